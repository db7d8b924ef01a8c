"""Whether a container still is what it was created as.

The engine fills in defaults and merges settings of the image, so a plain comparison would find
changes where there are none, and the container would be made anew for ever. Where the engine can
have had a reason of its own for a value, the value counts as unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .create_schema import HOST_CONFIG
from .policy import capability

_RESOURCES = frozenset(
    {
        "BlkioWeight",
        "CpuPeriod",
        "CpuQuota",
        "CpuRealtimePeriod",
        "CpuRealtimeRuntime",
        "CpuShares",
        "CpusetCpus",
        "CpusetMems",
        "KernelMemory",
        "KernelMemoryTCP",
        "Memory",
        "MemoryReservation",
        "NanoCpus",
        "PidsLimit",
    }
)
"""An engine whose kernel lacks the control group drops these with a warning."""

_ANY_WHEN_SILENT: Mapping[str, tuple[Any, ...]] = {
    "NetworkMode": ("default", "bridge", "none"),
    "IpcMode": ("private", "shareable"),
    "CgroupnsMode": ("host", "private"),
    "ShmSize": (64 << 20,),
    "Runtime": ("runc", "crun", "runsc", "nvidia", "io.containerd.runc.v2"),
    "Isolation": ("default",),
}
"""What the engine puts in by its own settings."""

_NOT_COMPARED = frozenset(
    {
        "ConsoleSize",
        "MaskedPaths",
        "ReadonlyPaths",
        "MemorySwap",
        "MemorySwappiness",
        "OomKillDisable",
        "Ulimits",
        "LogConfig",
        "StorageOpt",
        "RestartPolicy",
    }
)
"""These have rules of their own, or none that holds for all engines."""

_UNORDERED = frozenset(
    {"Binds", "SecurityOpt", "GroupAdd", "ExtraHosts", "VolumesFrom", "DeviceCgroupRules"}
)
_FROM_IMAGE = ("Entrypoint", "Cmd", "User", "WorkingDir")


def drift(
    name: str,
    image_id: str,
    body: Mapping[str, Any],
    inspect: Mapping[str, Any],
    image_config: Mapping[str, Any] | None,
) -> tuple[str, ...]:
    """The settings of a container that differ from how it was created: paths such as
    `HostConfig.Memory`, `Env.MODE`, `Name`, `Image`, `Networks`, in order.

    `name`, `image_id` and `body` are those of creation, `inspect` is what the engine says now, and
    `image_config` the `Config` of its image (None when the image is gone: what it would have added
    is then not judged).
    """
    found: list[str] = []
    if inspect["Name"].lstrip("/") != name:
        found.append("Name")
    if image_id and inspect["Image"] != image_id:
        found.append("Image")
    found += _process(body, inspect["Config"], image_config)
    found += _host(body.get("HostConfig") or {}, inspect["HostConfig"])
    if _networks(body) is not None:
        now = frozenset((inspect.get("NetworkSettings") or {}).get("Networks") or {})
        if now != _networks(body):
            found.append("Networks")
    return tuple(found)


def _process(
    body: Mapping[str, Any], now: Mapping[str, Any], image: Mapping[str, Any] | None
) -> list[str]:
    found = []
    for key in ("Hostname", "Domainname", "StopSignal", "StopTimeout", "Tty", "OpenStdin"):
        if body.get(key) and body[key] != now.get(key):
            found.append(key)
    for key in _FROM_IMAGE:
        if body.get(key):
            expected = body[key]
        elif image is None or (key == "Cmd" and body.get("Entrypoint")):
            # An entry point of its own takes the image's arguments away, on most engines.
            continue
        else:
            expected = image.get(key)
        if (expected or None) != (now.get(key) or None):
            found.append(key)
    for key in ("ExposedPorts", "Volumes"):
        if not set(body.get(key) or {}) <= set(now.get(key) or {}):
            found.append(key)
    found += [
        f"Labels.{label}"
        for label, value in (body.get("Labels") or {}).items()
        if (now.get("Labels") or {}).get(label) != value
    ]
    check, checked = body.get("Healthcheck") or {}, now.get("Healthcheck") or {}
    # What is not given comes from the image, field by field.
    if any(value and checked.get(key) != value for key, value in check.items()):
        found.append("Healthcheck")
    return found + _environment(body.get("Env") or [], now.get("Env") or [], image)


def _environment(
    given: Sequence[str], now: Sequence[str], image: Mapping[str, Any] | None
) -> list[str]:
    expected = {} if image is None else _variables(image.get("Env") or [])
    for entry in given:
        name, equals, value = entry.partition("=")
        if equals:
            expected[name] = value
        else:
            expected.pop(name, None)
    actual = _variables(now)
    changed = {name for name, value in expected.items() if actual.get(name) != value}
    if image is not None:
        # The engine adds a PATH where there is none.
        changed |= actual.keys() - expected.keys() - {"PATH"}
    return [f"Env.{name}" for name in sorted(changed)]


def _variables(entries: Sequence[str]) -> dict[str, str]:
    return {name: value for name, _, value in (entry.partition("=") for entry in entries)}


def _host(given: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for key in HOST_CONFIG:
        if key in _NOT_COMPARED:
            continue
        expected, actual = _plain(key, given.get(key)), _plain(key, now.get(key))
        if expected == actual:
            continue
        if expected is None and actual in _ANY_WHEN_SILENT.get(key, ()):
            continue
        if actual is None and key in _RESOURCES:
            continue
        found.append(f"HostConfig.{key}")
    if _swap_changed(given, now):
        found.append("HostConfig.MemorySwap")
    if (now.get("RestartPolicy") or {}).get("Name") not in ("", "no", None):
        found.append("HostConfig.RestartPolicy")
    for key in ("LogConfig", "StorageOpt"):
        if not _contains(now.get(key) or {}, given.get(key) or {}):
            found.append(f"HostConfig.{key}")
    limits = now.get("Ulimits") or []
    if any(limit not in limits for limit in given.get("Ulimits") or []):
        found.append("HostConfig.Ulimits")
    return found


def _swap_changed(given: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    memory, swap = given.get("Memory") or 0, given.get("MemorySwap") or 0
    actual = now.get("MemorySwap") or 0
    # Without swap accounting it is -1 or 0; where only Memory is given, twice that.
    return actual not in (swap, 0, -1, *(() if swap else (2 * memory,)))


def _contains(whole: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """Whether `whole` has all that `part` gives; the engine adds its own defaults."""
    for key, value in part.items():
        other = whole.get(key)
        if isinstance(value, Mapping):
            if not _contains(other if isinstance(other, Mapping) else {}, value):
                return False
        elif value and other != value:
            return False
    return True


def _plain(key: str, value: Any) -> Any:
    """`value` in the form that equal settings share; None for everything that means "not set"."""
    if key in ("CapAdd", "CapDrop"):
        return sorted(capability(name) for name in value or ()) or None
    if key == "PidsLimit" and value == -1:
        return "unlimited"
    if key == "Devices":
        value = [
            {
                **device,
                "PathInContainer": device.get("PathInContainer") or device.get("PathOnHost"),
                "CgroupPermissions": device.get("CgroupPermissions") or "rwm",
            }
            for device in value or ()
        ]
    if key in _UNORDERED and value:
        return sorted(value)
    return _pruned(value)


def _pruned(value: Any) -> Any:
    """Without empty parts."""
    if isinstance(value, Mapping):
        kept = {key: part for key, item in value.items() if (part := _pruned(item)) is not None}
        return kept or None
    if isinstance(value, (list, tuple)):
        return [_pruned(item) for item in value] or None
    return value or None


def _networks(body: Mapping[str, Any]) -> frozenset[str] | None:
    """The networks a container shall be in; None where the engine decides."""
    named = frozenset((body.get("NetworkingConfig") or {}).get("EndpointsConfig") or {})
    mode = (body.get("HostConfig") or {}).get("NetworkMode") or ""
    if mode in ("", "default"):
        return named or None
    if mode.startswith("container:"):
        return None
    return named | {mode}
