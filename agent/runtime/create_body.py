"""createOptions, env and the device's policy become the container that a module shall have."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ..document import UNPARSABLE, ManifestError
from ..module_spec import ModuleSpec
from .container import (
    DEVICE_LABEL,
    DIGEST_LABEL,
    MODULE_LABEL,
    SCORING_LABEL,
    ContainerSpec,
    canonical_body,
)
from .create_rules import Rules
from .create_schema import BAD, CREATE_BODY, Problems, fields, labels, text
from .policy import DockerPolicy
from .scoring_module import (
    MOUNT,
    SOCKET_LIMIT,
    SOCKET_NAME,
    SOCKET_VARIABLE,
    is_scoring,
    module_folder,
    scoring_socket,
)

DEFAULT_LOG_CONFIG: Mapping[str, Any] = {
    "Type": "json-file",
    "Config": {"max-size": "10m", "max-file": "3"},
}

_SHOWN_PROBLEMS = 8
_ENV_NAME = re.compile(r"[^=\0]+\Z")
_CONTAINER_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+\Z", re.ASCII)
_LOGGING_OPTIONS = fields({"Type": text, "Config": labels})
_RUN_DIR = PurePosixPath("/run/gatelet")
_NO_RESTART = {"Name": "no", "MaximumRetryCount": 0}


@dataclass(frozen=True, slots=True)
class CreateFacts:
    """What of the device goes into a container.

    `digest`: the image's, as pinned. `image_labels`: those of the image. `protected`: host paths
    that give away the device (`policy.protected_paths`). `logging_options`: the manifest's
    `runtime.settings.loggingOptions`. `network`: the one to join where createOptions name none, ""
    for the engine's default. `hub_host`, `hub_device`, `gateway_host`: as the module should know
    them, or "".
    """

    digest: str = ""
    run_dir: PurePosixPath = _RUN_DIR
    image_labels: Mapping[str, str] = field(default_factory=dict)
    protected: tuple[str, ...] = ()
    logging_options: str = ""
    network: str = ""
    hub_host: str = ""
    hub_device: str = ""
    gateway_host: str = ""


def container_name(module: str) -> str:
    """The module's name where Docker takes it as a container's, as with edgeAgent."""
    return module if _CONTAINER_NAME.match(module) else f"gatelet.{module}"


def ignored_options(spec: ModuleSpec) -> tuple[str, ...]:
    """Paths in createOptions that gatelet decides itself, to be named in the report."""
    options = {key.lower(): value for key, value in json.loads(spec.create_options).items()}
    host = options.get("hostconfig")
    found = [name for name in ("Image", "name") if options.get(name.lower())]
    if isinstance(host, dict) and any(
        key.lower() == "restartpolicy" and value for key, value in host.items()
    ):
        found.append("HostConfig.RestartPolicy")
    return tuple(found)


def create_body(
    spec: ModuleSpec, device_id: str, policy: DockerPolicy, facts: CreateFacts
) -> ContainerSpec:
    """The container of `spec` on this device.

    Raises ManifestError 400 under `modules.<m>.settings.createOptions` that names every setting
    which is unknown, of a wrong type or not permitted by `policy`.
    """
    problems: Problems = []
    options = CREATE_BODY("", json.loads(spec.create_options), problems)
    body: dict[str, Any] = {} if options is BAD else options
    body.pop("name", None)
    scoring = is_scoring({**facts.image_labels, **body.get("Labels", {})})
    Rules(policy, facts.protected, MOUNT if scoring else "", problems).check(body)

    body["Image"] = spec.image
    body["Env"] = _environment(spec, device_id, facts, body.get("Env", []), scoring, problems)
    host: dict[str, Any] = body.setdefault("HostConfig", {})
    host["RestartPolicy"] = _NO_RESTART
    if "Devices" in host:
        host["Devices"] = [_whole_device(device) for device in host["Devices"]]
    host["LogConfig"] = host.get("LogConfig") or _log_config(policy, facts, problems)
    security = host.get("SecurityOpt", [])
    if not host.get("Privileged") and not any(
        option.startswith("no-new-privileges") for option in security
    ):
        host["SecurityOpt"] = [*security, "no-new-privileges:true"]
    if scoring:
        _share_folder(host, facts.run_dir, spec.name, problems)
    if facts.network:
        _join(body, facts.network, spec.name)
    if problems:
        raise _refused(spec.name, problems)
    name = container_name(spec.name)
    if scoring:
        # The image may have said so; the container alone shall tell.
        body["Labels"] = {
            SCORING_LABEL: facts.image_labels.get(SCORING_LABEL, ""),
            **body.get("Labels", {}),
        }
    body["Labels"] = {
        **body.get("Labels", {}),
        MODULE_LABEL: spec.name,
        DEVICE_LABEL: device_id,
        DIGEST_LABEL: facts.digest,
    }
    return ContainerSpec(spec.name, name, spec.image, facts.digest, canonical_body(body))


def _whole_device(device: Mapping[str, str]) -> Mapping[str, str]:
    """With what Docker's own command line fills in: the engine does not."""
    path = device.get("PathOnHost", "")
    return {
        "PathOnHost": path,
        "PathInContainer": device.get("PathInContainer") or path,
        "CgroupPermissions": device.get("CgroupPermissions") or "rwm",
    }


def _refused(module: str, problems: Problems) -> ManifestError:
    shown = problems[:_SHOWN_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return ManifestError(UNPARSABLE, f"modules.{module}.settings.createOptions", "; ".join(shown))


def _environment(
    spec: ModuleSpec,
    device_id: str,
    facts: CreateFacts,
    given: list[str],
    scoring: bool,
    problems: Problems,
) -> list[str]:
    """createOptions first, the manifest over it, what the device says over both."""
    found: dict[str, str | None] = {}
    for number, entry in enumerate(given):
        name, equals, value = entry.partition("=")
        if not _ENV_NAME.match(name):
            problems.append(f"Env[{number}]: expected NAME=VALUE")
        # Without a value it takes the variable away from the image's.
        found[name] = value if equals else None
    for name, value in spec.env:
        if not _ENV_NAME.match(name) or "\0" in value:
            problems.append(f"env.{name}: a name without '=' and a value without NUL is needed")
        found[name] = value
    found["IOTEDGE_DEVICEID"] = facts.hub_device or device_id
    found["IOTEDGE_MODULEID"] = spec.name
    if facts.hub_host:
        found["IOTEDGE_IOTHUBHOSTNAME"] = facts.hub_host
    if facts.gateway_host:
        found["IOTEDGE_GATEWAYHOSTNAME"] = facts.gateway_host
    if scoring:
        found[SOCKET_VARIABLE] = f"{MOUNT}/{SOCKET_NAME}"
    return [name if value is None else f"{name}={value}" for name, value in sorted(found.items())]


def _log_config(policy: DockerPolicy, facts: CreateFacts, problems: Problems) -> Mapping[str, Any]:
    given = facts.logging_options.strip()
    if not given:
        return DEFAULT_LOG_CONFIG
    path = "runtime.settings.loggingOptions"
    try:
        value = json.loads(given)
    except (ValueError, RecursionError):
        value = None
    found: list[str] = []
    config = _LOGGING_OPTIONS("", value, found)
    if found or config is BAD or not config.get("Type"):
        problems.append(f'{path}: expected {{"type": DRIVER, "config": {{OPTION: TEXT}}}} as text')
        return DEFAULT_LOG_CONFIG
    rules = Rules(policy, (), "", found)
    rules.check({"HostConfig": {"LogConfig": config}})
    problems.extend(f"{path}: {reason}" for reason in found)
    return dict(config)


def _share_folder(
    host: dict[str, Any], run_dir: PurePosixPath, module: str, problems: Problems
) -> None:
    socket = scoring_socket(run_dir, module)
    if len(str(socket).encode()) > SOCKET_LIMIT:
        problems.append(
            f"Labels: the scoring socket {socket} has more than {SOCKET_LIMIT} bytes; "
            "choose a shorter device.run-dir or module name"
        )
    mount = {"Type": "bind", "Source": str(module_folder(run_dir, module)), "Target": MOUNT}
    host["Mounts"] = [*host.get("Mounts", []), mount]


def _join(body: dict[str, Any], network: str, module: str) -> None:
    """Modules reach each other by name, as on IoT Edge's network."""
    host = body["HostConfig"]
    endpoints = body.get("NetworkingConfig", {}).get("EndpointsConfig", {})
    if endpoints or host.get("NetworkMode", "") not in ("", network):
        return
    host["NetworkMode"] = network
    body["NetworkingConfig"] = {"EndpointsConfig": {network: {"Aliases": [module]}}}
