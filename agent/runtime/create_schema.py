"""The Docker create body, API 1.41: which settings there are, and of what type.

Source: Docker Engine API v1.41, `POST /containers/create`. Go reads keys without regard to case, so
do we; what is passed on has the canonical keys only, and so nothing that was not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..document import shown

Problems = list[str]
Shape = Callable[[str, Any, Problems], Any]

BAD = object()
"""What a shape gives for a value it refused."""

_INT64 = 2**63


def _wrong(path: str, value: Any, expected: str, problems: Problems) -> Any:
    problems.append(f"{path}: expected {expected}, found {shown(value)}")
    return BAD


def text(path: str, value: Any, problems: Problems) -> Any:
    if isinstance(value, str) and "\0" not in value:
        return value
    return _wrong(path, value, "text", problems)


def flag(path: str, value: Any, problems: Problems) -> Any:
    return value if isinstance(value, bool) else _wrong(path, value, "true or false", problems)


def integer(path: str, value: Any, problems: Problems) -> Any:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and -_INT64 <= value < _INT64:
        return value
    return _wrong(path, value, "a whole number", problems)


def nothing(path: str, value: Any, problems: Problems) -> Any:
    return {} if value in (None, {}) else _wrong(path, value, "{}", problems)


def items(shape: Shape) -> Shape:
    def check(path: str, value: Any, problems: Problems) -> Any:
        if not isinstance(value, list):
            return _wrong(path, value, "a list", problems)
        found = [shape(f"{path}[{number}]", item, problems) for number, item in enumerate(value)]
        return BAD if BAD in found else found

    return check


def words(path: str, value: Any, problems: Problems) -> Any:
    """A list of texts; one text means a list of one."""
    return texts(path, [value] if isinstance(value, str) else value, problems)


def members(shape: Shape) -> Shape:
    """An object with any keys."""

    def check(path: str, value: Any, problems: Problems) -> Any:
        if not isinstance(value, dict):
            return _wrong(path, value, "an object", problems)
        found = {key: shape(f"{path}.{key}", item, problems) for key, item in value.items()}
        return BAD if any(item is BAD for item in found.values()) else found

    return check


def fields(shapes: Mapping[str, Shape]) -> Shape:
    """An object with these keys; null means not given."""
    canonical = {name.lower(): name for name in shapes}

    def check(path: str, value: Any, problems: Problems) -> Any:
        if not isinstance(value, dict):
            return _wrong(path, value, "an object", problems)
        found: dict[str, Any] = {}
        for key, item in value.items():
            where = f"{path}.{key}" if path else key
            name = canonical.get(key.lower())
            if name is None:
                problems.append(f"{where}: not a setting of Docker's API 1.41; remove it")
            elif name in found:
                problems.append(f"{where}: given twice, in another spelling; keep one {name}")
            elif item is not None:
                checked = shapes[name](f"{path}.{name}" if path else name, item, problems)
                if checked is not BAD:
                    found[name] = checked
        return found

    return check


def optional(shape: Shape, empty: Any) -> Shape:
    """`shape`, or null for an empty one."""

    def check(path: str, value: Any, problems: Problems) -> Any:
        return shape(path, empty if value is None else value, problems)

    return check


texts = items(text)
labels = members(text)
names = members(nothing)

HEALTHCHECK: Shape = fields(
    {
        "Test": words,
        "Interval": integer,
        "Timeout": integer,
        "Retries": integer,
        "StartPeriod": integer,
    }
)

ENDPOINT: Shape = optional(
    fields(
        {
            "IPAMConfig": fields({"IPv4Address": text, "IPv6Address": text, "LinkLocalIPs": texts}),
            "Links": texts,
            "Aliases": texts,
            "NetworkID": text,
            "MacAddress": text,
            "DriverOpts": labels,
        }
    ),
    {},
)

MOUNT: Shape = fields(
    {
        "Type": text,
        "Source": text,
        "Target": text,
        "ReadOnly": flag,
        "Consistency": text,
        "BindOptions": fields({"Propagation": text, "NonRecursive": flag}),
        "VolumeOptions": fields(
            {
                "NoCopy": flag,
                "Labels": labels,
                "DriverConfig": fields({"Name": text, "Options": labels}),
            }
        ),
        "TmpfsOptions": fields({"SizeBytes": integer, "Mode": integer}),
    }
)

_RATE: Shape = items(fields({"Path": text, "Rate": integer}))

HOST_CONFIG: Mapping[str, Shape] = {
    # Resources
    "CpuShares": integer,
    "Memory": integer,
    "CgroupParent": text,
    "BlkioWeight": integer,
    "BlkioWeightDevice": items(fields({"Path": text, "Weight": integer})),
    "BlkioDeviceReadBps": _RATE,
    "BlkioDeviceWriteBps": _RATE,
    "BlkioDeviceReadIOps": _RATE,
    "BlkioDeviceWriteIOps": _RATE,
    "CpuPeriod": integer,
    "CpuQuota": integer,
    "CpuRealtimePeriod": integer,
    "CpuRealtimeRuntime": integer,
    "CpusetCpus": text,
    "CpusetMems": text,
    "Devices": items(
        fields({"PathOnHost": text, "PathInContainer": text, "CgroupPermissions": text})
    ),
    "DeviceCgroupRules": texts,
    "DeviceRequests": items(
        fields(
            {
                "Driver": text,
                "Count": integer,
                "DeviceIDs": texts,
                "Capabilities": items(texts),
                "Options": labels,
            }
        )
    ),
    "KernelMemory": integer,
    "KernelMemoryTCP": integer,
    "MemoryReservation": integer,
    "MemorySwap": integer,
    "MemorySwappiness": integer,
    "NanoCpus": integer,
    "OomKillDisable": flag,
    "Init": flag,
    "PidsLimit": integer,
    "Ulimits": items(fields({"Name": text, "Soft": integer, "Hard": integer})),
    # Windows
    "CpuCount": integer,
    "CpuPercent": integer,
    "IOMaximumIOps": integer,
    "IOMaximumBandwidth": integer,
    "Isolation": text,
    # The host
    "Binds": texts,
    "ContainerIDFile": text,
    "LogConfig": fields({"Type": text, "Config": labels}),
    "NetworkMode": text,
    "PortBindings": members(optional(items(fields({"HostIp": text, "HostPort": text})), [])),
    "RestartPolicy": fields({"Name": text, "MaximumRetryCount": integer}),
    "AutoRemove": flag,
    "VolumeDriver": text,
    "VolumesFrom": texts,
    "Mounts": items(MOUNT),
    "ConsoleSize": items(integer),
    "CapAdd": words,
    "CapDrop": words,
    "CgroupnsMode": text,
    "Dns": texts,
    "DnsOptions": texts,
    "DnsSearch": texts,
    "ExtraHosts": texts,
    "GroupAdd": texts,
    "IpcMode": text,
    "Cgroup": text,
    "Links": texts,
    "OomScoreAdj": integer,
    "PidMode": text,
    "Privileged": flag,
    "PublishAllPorts": flag,
    "ReadonlyRootfs": flag,
    "SecurityOpt": texts,
    "StorageOpt": labels,
    "Tmpfs": labels,
    "UTSMode": text,
    "UsernsMode": text,
    "ShmSize": integer,
    "Sysctls": labels,
    "Runtime": text,
    "MaskedPaths": texts,
    "ReadonlyPaths": texts,
}

CREATE_BODY: Shape = fields(
    {
        "Hostname": text,
        "Domainname": text,
        "User": text,
        "AttachStdin": flag,
        "AttachStdout": flag,
        "AttachStderr": flag,
        "ExposedPorts": names,
        "Tty": flag,
        "OpenStdin": flag,
        "StdinOnce": flag,
        "Env": texts,
        "Cmd": words,
        "Healthcheck": HEALTHCHECK,
        "ArgsEscaped": flag,
        "Image": text,
        "Volumes": names,
        "WorkingDir": text,
        "Entrypoint": words,
        "NetworkDisabled": flag,
        "MacAddress": text,
        "OnBuild": texts,
        "Labels": labels,
        "StopSignal": text,
        "StopTimeout": integer,
        "Shell": texts,
        "HostConfig": fields(HOST_CONFIG),
        "NetworkingConfig": fields({"EndpointsConfig": members(ENDPOINT)}),
        # Not of Docker's body: edgeAgent's templates carry it, and it is the module's name anyway.
        "name": text,
    }
)
