"""What this device permits containers beyond Docker's plain isolation: `[docker.policy]`."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

STOP_SECONDS = 10
"""Docker's own, where neither StopTimeout nor anybody else says more."""

_DEVICE_PERMISSIONS = re.compile(r"[rwm]{1,3}\Z")
_PLAIN_PATH = re.compile(r"/[^\x00-\x1f\x7f]*\Z")


class DockerPolicy(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"
):
    """An allow-list; empty permits nothing that reaches out of a container.

    `mounts` are host paths, each with everything below it, `:ro` for reading only. `devices` are
    host paths with optional permissions (`/dev/uio0:r`). `capabilities` are names with or without
    `CAP_` ("ALL" only permits "ALL"). `security-options`, `sysctls` (names), `runtimes` and
    `log-drivers` permit exactly what they list. `allow-privileged` permits everything.
    `max-stop-seconds` bounds what StopTimeout asks for.
    """

    allow_privileged: bool = False
    allow_host_network: bool = False
    allow_host_pid: bool = False
    allow_host_ipc: bool = False
    allow_device_requests: bool = False
    mounts: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    security_options: tuple[str, ...] = ()
    sysctls: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    log_drivers: tuple[str, ...] = ()
    max_stop_seconds: int = 300

    def __post_init__(self) -> None:
        if not 1 <= self.max_stop_seconds <= 86_400:
            raise ValueError(
                f"docker.policy.max-stop-seconds is {self.max_stop_seconds}; it must be from 1 to "
                "86400"
            )
        for entry in self.mounts:
            _, mode = _split(entry)
            _check_entry("mounts", entry, mode in ("", "ro", "rw"), "PATH or PATH:ro")
        for entry in self.devices:
            _, mode = _split(entry)
            good = not mode or _DEVICE_PERMISSIONS.match(mode) is not None
            _check_entry("devices", entry, good, "PATH or PATH:PERMISSIONS out of r, w and m")


def _check_entry(key: str, entry: str, mode_is_good: bool, form: str) -> None:
    path, _ = _split(entry)
    if not mode_is_good or clean_path(path) != path:
        raise ValueError(f"docker.policy.{key}: {entry!r} is not {form} with a plain absolute path")


def _split(entry: str) -> tuple[str, str]:
    path, _, mode = entry.partition(":")
    return path, mode


def clean_path(path: str) -> str | None:
    """`path` without doubled and trailing slashes; None unless it is absolute and free of `..`.

    `..` behind a symbolic link leads elsewhere than its text says, so no text rule can judge it.
    """
    if not _PLAIN_PATH.match(path):
        return None
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return None if ".." in parts else "/" + "/".join(parts)


def lies_in(path: str, folder: str) -> bool:
    """Whether clean `path` is `folder` or below it."""
    return path == folder or folder == "/" or path.startswith(f"{folder}/")


def capability(name: str) -> str:
    return name.upper().removeprefix("CAP_")


def mount_refusal(
    policy: DockerPolicy, source: str, read_only: bool, protected: Iterable[str]
) -> str | None:
    """Why a module may not mount host path `source`, None when it may.

    A `protected` path (the engine's socket, the agent's own folders: whoever has them has the
    device) is also refused through a folder around it, unless the policy names it itself.
    """
    path = clean_path(source)
    if path is None:
        return f"{source} is not a plain absolute path; write it without '..'"
    if policy.allow_privileged:
        return None
    wanted = f'add "{path}:ro"' if read_only else f'add "{path}"'
    entries = [_split(entry) for entry in policy.mounts]
    covering = [(allowed, mode) for allowed, mode in entries if lies_in(path, allowed)]
    if not covering:
        return f"{path} is not allowed by [docker.policy] mounts; {wanted} there to permit it"
    if not read_only and all(mode == "ro" for _, mode in covering):
        return (
            f"{path} is allowed for reading only by [docker.policy] mounts; "
            f"mount it read-only, or {wanted} there"
        )
    for secret in protected:
        if not (lies_in(secret, path) or lies_in(path, secret)):
            continue
        if not any(lies_in(allowed, secret) for allowed, _ in entries):
            return (
                f"{path} gives access to {secret}, which controls this device; "
                f'add "{secret}" to [docker.policy] mounts to permit it nevertheless'
            )
    return None


def device_refusal(policy: DockerPolicy, device: str, permissions: str) -> str | None:
    """Why a module may not use the host's `device` with `permissions` (of rwm)."""
    path = clean_path(device)
    if path is None:
        return f"{device} is not a plain absolute path; write it without '..'"
    if policy.allow_privileged:
        return None
    for entry in policy.devices:
        allowed, mode = _split(entry)
        if lies_in(path, allowed) and set(permissions) <= set(mode or "rwm"):
            return None
    return (
        f"{path} ({permissions}) is not allowed by [docker.policy] devices; "
        f'add "{path}:{permissions}" there to permit it'
    )


def stop_seconds(policy: DockerPolicy | None, asked: int | None) -> int:
    """How long a container may take to end after its StopSignal until it is killed.

    `asked` is its StopTimeout, None where it has none; Docker reads a negative one as "for ever",
    which here is the policy's limit, so that no update waits for ever.
    """
    limit = (policy or DockerPolicy()).max_stop_seconds
    if asked is None:
        asked = STOP_SECONDS
    return limit if asked < 0 else min(asked, limit)


def protected_paths(*paths: str) -> tuple[str, ...]:
    """`paths` in every spelling: /var/run is a link to /run on current systems."""
    spelled: dict[str, None] = {}
    for given in paths:
        path = clean_path(given)
        if path is None or path == "/":
            continue
        spelled[path] = None
        for one, other in (("/var/run", "/run"), ("/run", "/var/run")):
            if lies_in(path, one):
                spelled[other + path[len(one) :]] = None
    return tuple(spelled)
