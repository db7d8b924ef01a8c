"""What of a create body reaches out of its container, and whether the device's policy permits it.

A setting without a rule here stays inside the container, or only takes something from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .container import DEVICE_LABEL, DIGEST_LABEL, MODULE_LABEL, SPEC_LABEL
from .create_schema import Problems
from .policy import (
    DockerPolicy,
    capability,
    clean_path,
    device_refusal,
    mount_refusal,
)

CREATED_LABEL = "io.gatelet.created"
"""What `drift` compares with: name, image and body at creation, as JSON."""

_OWN_LABELS = (MODULE_LABEL, DEVICE_LABEL, DIGEST_LABEL, SPEC_LABEL, CREATED_LABEL)
_VOLUME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+\Z")
_NETWORK = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*\Z")
_LOG_DRIVERS = ("", "json-file", "local", "journald", "none")
_BIND_MODES = ("ro", "rw", "z", "Z", "nocopy", "consistent", "cached", "delegated")
_PROPAGATIONS = ("", "private", "rprivate", "slave", "rslave")
_BIND_OPTIONS = frozenset((*_BIND_MODES, *_PROPAGATIONS))
_NO_NEW_PRIVILEGES = (
    "no-new-privileges",
    "no-new-privileges:true",
    "no-new-privileges=true",
)

Rule = Callable[["Rules", str, Any], None]


class Rules:
    """Collects what is refused, as `PATH: why; what to do` in `problems`."""

    def __init__(
        self, policy: DockerPolicy, protected: Iterable[str], reserved: str, problems: Problems
    ) -> None:
        self.policy = policy
        self.protected = tuple(protected)
        self.reserved = reserved
        self.problems = problems

    def check(self, body: Mapping[str, Any]) -> None:
        """`body` as `create_schema.CREATE_BODY` gives it."""
        for key in body.get("Labels", {}):
            if key in _OWN_LABELS:
                self.refuse(f"Labels.{key}", "is set by gatelet; remove it")
        for target in body.get("Volumes", {}):
            self.target("Volumes", target)
        endpoints = body.get("NetworkingConfig", {}).get("EndpointsConfig", {})
        for name, endpoint in endpoints.items():
            path = f"NetworkingConfig.EndpointsConfig.{name}"
            _network(self, path, name)
            if endpoint.get("Links"):
                self.privileged(f"{path}.Links", "shares another container's environment")
        host = body.get("HostConfig", {})
        for key, value in host.items():
            rule = _HOST_RULES.get(key)
            # Docker reads empty values as not given; what empties loosen is in the rule.
            if rule is not None and (value or key in _ALSO_EMPTY):
                rule(self, f"HostConfig.{key}", value)

    def refuse(self, path: str, reason: str) -> None:
        self.problems.append(f"{path}: {reason}")

    def privileged(self, path: str, what: str) -> None:
        if not self.policy.allow_privileged:
            self.refuse(path, f"{what}; [docker.policy] allow-privileged = true permits it")

    def permit(self, allowed: bool, path: str, what: str, key: str) -> None:
        if not (allowed or self.policy.allow_privileged):
            self.refuse(path, f"{what}; [docker.policy] {key} = true permits it")

    def listed(self, listed: Iterable[str], path: str, value: str, key: str) -> None:
        if value not in listed and not self.policy.allow_privileged:
            self.refuse(
                path,
                f"{value} is not allowed by [docker.policy] {key}; "
                f'add "{value}" there to permit it',
            )

    def mount(self, path: str, source: str, read_only: bool) -> None:
        reason = mount_refusal(self.policy, source, read_only, self.protected)
        if reason is not None:
            self.refuse(path, reason)

    def target(self, path: str, target: str) -> None:
        """A place inside the container."""
        clean = clean_path(target)
        if clean is None or clean == "/":
            self.refuse(path, f"{target} is no place in the container; give an absolute path")
        elif self.reserved and (clean == self.reserved or clean.startswith(f"{self.reserved}/")):
            self.refuse(path, f"{target} is where gatelet mounts the scoring socket")


def _bind(rules: Rules, path: str, bind: str) -> None:
    source, _, rest = bind.partition(":")
    target, _, options = rest.partition(":")
    if not target:
        rules.refuse(path, f"{bind} is not SOURCE:TARGET[:OPTIONS]")
        return
    chosen = options.split(",") if options else []
    for option in chosen:
        if option not in _BIND_OPTIONS:
            rules.privileged(path, f"option {option!r} is not allowed")
    rules.target(path, target)
    if source.startswith("/"):
        rules.mount(path, source, "ro" in chosen)
    elif not _VOLUME.match(source):
        rules.refuse(path, f"{source!r} is neither an absolute path nor the name of a volume")


def _binds(rules: Rules, path: str, binds: list[str]) -> None:
    for number, bind in enumerate(binds):
        _bind(rules, f"{path}[{number}]", bind)


def _mounts(rules: Rules, path: str, mounts: list[Mapping[str, Any]]) -> None:
    for number, mount in enumerate(mounts):
        where = f"{path}[{number}]"
        kind, source = mount.get("Type", ""), mount.get("Source", "")
        rules.target(where, mount.get("Target", ""))
        if kind == "bind":
            rules.mount(where, source, mount.get("ReadOnly", False))
            propagation = mount.get("BindOptions", {}).get("Propagation", "")
            if propagation not in _PROPAGATIONS:
                rules.privileged(
                    f"{where}.BindOptions.Propagation", f"{propagation} is not allowed"
                )
        elif kind == "volume":
            if source and not _VOLUME.match(source):
                rules.refuse(where, f"{source!r} is not the name of a volume")
            driver = mount.get("VolumeOptions", {}).get("DriverConfig", {})
            if driver.get("Options") or driver.get("Name", "") not in ("", "local"):
                rules.privileged(
                    f"{where}.VolumeOptions.DriverConfig",
                    "options of a volume driver can mount any path of the host",
                )
        elif kind != "tmpfs":
            rules.refuse(f"{where}.Type", f"{kind!r} is not bind, volume or tmpfs")


def _devices(rules: Rules, path: str, devices: list[Mapping[str, str]]) -> None:
    for number, device in enumerate(devices):
        permissions = device.get("CgroupPermissions") or "rwm"
        reason = device_refusal(rules.policy, device.get("PathOnHost", ""), permissions)
        if reason is not None:
            rules.refuse(f"{path}[{number}]", reason)


def _capabilities(rules: Rules, path: str, names: list[str]) -> None:
    allowed = {capability(name) for name in rules.policy.capabilities}
    for number, name in enumerate(names):
        rules.listed(allowed, f"{path}[{number}]", capability(name), "capabilities")


def _security(rules: Rules, path: str, options: list[str]) -> None:
    for number, option in enumerate(options):
        if option not in _NO_NEW_PRIVILEGES:
            allowed = rules.policy.security_options
            rules.listed(allowed, f"{path}[{number}]", option[:200], "security-options")


def _network(rules: Rules, path: str, mode: str) -> None:
    if mode == "host" or mode.startswith("container:"):
        rules.permit(
            rules.policy.allow_host_network,
            path,
            f"network {mode} is not the module's own",
            "allow-host-network",
        )
    elif not _NETWORK.match(mode):
        rules.refuse(path, f"{mode!r} is not the name of a network")


def _pid(rules: Rules, path: str, mode: str) -> None:
    rules.permit(
        rules.policy.allow_host_pid, path, f"{mode} shows other processes", "allow-host-pid"
    )


def _ipc(rules: Rules, path: str, mode: str) -> None:
    if mode not in ("none", "private", "shareable"):
        rules.permit(
            rules.policy.allow_host_ipc,
            path,
            f"{mode} shares memory with other processes",
            "allow-host-ipc",
        )


def _log_config(rules: Rules, path: str, config: Mapping[str, Any]) -> None:
    kind = config.get("Type", "")
    if kind not in _LOG_DRIVERS:
        rules.listed(rules.policy.log_drivers, f"{path}.Type", kind, "log-drivers")


def _runtime(rules: Rules, path: str, name: str) -> None:
    if name != "runc":
        rules.listed(rules.policy.runtimes, path, name, "runtimes")


def _sysctls(rules: Rules, path: str, sysctls: Mapping[str, str]) -> None:
    for name in sysctls:
        rules.listed(rules.policy.sysctls, f"{path}.{name}", name, "sysctls")


def _device_requests(rules: Rules, path: str, _: Any) -> None:
    rules.permit(
        rules.policy.allow_device_requests,
        path,
        "asks for devices of the host",
        "allow-device-requests",
    )


def _tmpfs(rules: Rules, path: str, tmpfs: Mapping[str, str]) -> None:
    for target in tmpfs:
        rules.target(path, target)


def _needs_privilege(what: str) -> Rule:
    return lambda rules, path, value: rules.privileged(path, what)


def _never(what: str) -> Rule:
    return lambda rules, path, value: rules.refuse(path, what)


def _oom_score(rules: Rules, path: str, score: int) -> None:
    if score < 0:
        rules.privileged(path, "the agent goes before its modules")


def _isolation(rules: Rules, path: str, value: str) -> None:
    if value != "default":
        rules.refuse(path, f"{value} exists on Windows only; remove it")


def _cgroup_namespace(rules: Rules, path: str, value: str) -> None:
    if value != "private":
        rules.privileged(path, f"{value} shows the host's control groups")


def _volume_driver(rules: Rules, path: str, value: str) -> None:
    if value != "local":
        rules.privileged(path, f"volume driver {value} is not Docker's own")


_WINDOWS = _never("exists on Windows only; remove it")

_ALSO_EMPTY = frozenset({"MaskedPaths", "ReadonlyPaths"})

_HOST_RULES: Mapping[str, Rule] = {
    "AutoRemove": _never("gatelet removes containers itself; remove it"),
    "Binds": _binds,
    "CapAdd": _capabilities,
    "Cgroup": _needs_privilege("joins the control group of another container"),
    "CgroupParent": _needs_privilege("leaves the engine's control group"),
    "CgroupnsMode": _cgroup_namespace,
    "ContainerIDFile": _never("writes a file on the host; remove it"),
    "CpuCount": _WINDOWS,
    "CpuPercent": _WINDOWS,
    "DeviceCgroupRules": _needs_privilege("opens devices by number"),
    "DeviceRequests": _device_requests,
    "Devices": _devices,
    "IOMaximumBandwidth": _WINDOWS,
    "IOMaximumIOps": _WINDOWS,
    "IpcMode": _ipc,
    "Isolation": _isolation,
    "Links": _needs_privilege("shares another container's environment"),
    "LogConfig": _log_config,
    "MaskedPaths": _needs_privilege("uncovers parts of /proc and /sys"),
    "Mounts": _mounts,
    "NetworkMode": _network,
    "OomKillDisable": _needs_privilege("lets the module exhaust the device's memory"),
    "OomScoreAdj": _oom_score,
    "PidMode": _pid,
    "Privileged": _needs_privilege("a privileged container owns the device"),
    "ReadonlyPaths": _needs_privilege("makes parts of /proc and /sys writable"),
    "Runtime": _runtime,
    "SecurityOpt": _security,
    "Sysctls": _sysctls,
    "Tmpfs": _tmpfs,
    "UTSMode": _needs_privilege("shares the host's name"),
    "UsernsMode": _needs_privilege("gives up the user namespace"),
    "VolumeDriver": _volume_driver,
    "VolumesFrom": _needs_privilege("takes the mounts of another container"),
}
