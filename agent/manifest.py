"""The IoT Edge deployment manifest: from bytes of unknown origin to a frozen `Manifest`."""

from __future__ import annotations

import re
from typing import cast

import msgspec

from .create_options import read_create_options
from .document import (
    EMPTY,
    UNKNOWN_SCHEMA,
    ManifestError,
    Node,
    decoded,
    joined,
    parse_json,
    shown,
    without_nulls,
)
from .edge_hub import EdgeHub, parse_edge_hub
from .layers import LAYERS, check_parts, laid_over, merge_layers
from .module_env import module_update_mode, probation_seconds
from .module_spec import (
    MAX_STARTUP_ORDER,
    DesiredRunState,
    ImagePullPolicy,
    ModuleSpec,
    RegistryCredential,
    RestartPolicy,
    Runtime,
    fingerprint,
)
from .scoring_env import check_endpoints

__all__ = [
    "Manifest",
    "ManifestError",
    "ModuleSpec",
    "RegistryCredential",
    "Runtime",
    "fingerprint",
    "parse_manifest",
]

MAX_MODULE_NAME = 128
"""IoT Hub's limit for a module id."""

# What registries and engines take: [host[:port]/]path[:tag][@digest].
_IMAGE = re.compile(
    r"(?:(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?/)?"
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
    r"(?P<tag>:\w[\w.-]{0,127})?"
    r"(?P<digest>@sha256:[0-9a-f]{64})?",
    re.ASCII,
)
_MAX_IMAGE = 512
_MODULE_NAME = re.compile(r"[a-zA-Z0-9_-]+", re.ASCII)
# A name must also be a legal twin key, since it is reported back.
_ENV_NAME = re.compile(r"[^+#$\s.=\x00-\x1f\x7f-\x9f]{1,512}")
_SCHEMA = re.compile(r"1\.[01](\.[0-9]{1,9}){0,2}", re.ASCII)
_DESIRED = "properties.desired"
_OUTER_KEYS = ("content", "modulesContent", "moduleContent", "deployment")

_STATUSES = ("running", "stopped")
_RESTART_POLICIES = ("never", "on-failure", "on-unhealthy", "always")
_PULL_POLICIES = ("on-create", "never")


class Manifest(msgspec.Struct, frozen=True):
    """A whole deployment. `modules` is sorted by startup order, then name.

    `system_modules` holds edgeAgent and, when given, edgeHub. `registry_credentials` keep the
    order of the document, because the first match wins. `edge_hub` is None when the document has
    no `$edgeHub` section; `module_twins` names the modules it brings desired properties for.
    `ignored` are parts without effect here: (path, reason).
    """

    schema_version: str
    runtime: Runtime = Runtime()
    system_modules: tuple[ModuleSpec, ...] = ()
    modules: tuple[ModuleSpec, ...] = ()
    registry_credentials: tuple[RegistryCredential, ...] = ()
    edge_hub: EdgeHub | None = None
    module_twins: tuple[str, ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()


def parse_manifest(body: bytes) -> Manifest:
    """Read a deployment manifest (IoT Edge schema 1.0 or 1.1) as JSON.

    Accepted are a whole manifest (`modulesContent`, legacy `moduleContent`), the same inside
    `content` as configurations have it, `layers` of these to be merged (see layers.py), the desired
    properties of `$edgeAgent` alone (`$version` and `$metadata` ignored), and any of these under a
    device twin's `deployment`. Null members count as absent, as in a twin. Other keys than the
    schema's are refused: edgeAgent would ignore them, and with them a misspelt option.

    Raises ManifestError: 417 for an empty document, 412 for another schema version, 400 for
    anything else that is wrong.
    """
    ignored: list[tuple[str, str]] = []
    desired, outer = _unwrap(Node(parse_json(decoded(body), "")), ignored)
    desired = Node(without_nulls(desired.value), desired.path)
    if not [key for key in desired.members() if not key.startswith("$")]:
        raise desired.fail(
            "the configuration of the edge agent is empty; set a deployment manifest", EMPTY
        )
    inner = Node(desired.value)
    if "manifest" in inner.members() and "schemaVersion" not in inner.members():
        raise inner.members()["manifest"].fail(
            "a manifest by reference leads to a whole manifest, not to another reference"
        )
    schema_version = _schema_version(inner)
    fields = inner.fields(
        ("schemaVersion", "runtime", "systemModules", "modules"),
        extra=r"\$(version|metadata)|signed",
    )
    runtime, credentials = _runtime(fields["runtime"])
    system_modules = _system_modules(fields["systemModules"])
    modules = sorted(
        (_module(name, node) for name, node in fields["modules"].members().items()),
        key=lambda spec: (spec.startup_order, spec.name),
    )
    check_endpoints(modules)
    for spec in modules:
        probation_seconds(spec)
    edge_hub, module_twins = _other_sections(outer)
    module_update_mode(system_modules)
    return Manifest(
        schema_version=schema_version,
        runtime=runtime,
        system_modules=system_modules,
        modules=tuple(modules),
        registry_credentials=credentials,
        edge_hub=edge_hub,
        module_twins=module_twins,
        ignored=tuple(ignored),
    )


def _unwrap(node: Node, ignored: list[tuple[str, str]]) -> tuple[Node, Node | None]:
    """The desired properties of `$edgeAgent`, and the `modulesContent` they came in (if any)."""
    while True:
        members = node.members()
        if LAYERS in members and "systemModules" not in members:
            merged = merge_layers(node)
            ignored += merged.ignored
            whole = {name: {_DESIRED: part} for name, part in merged.sections.items()}
            node = Node({"modulesContent": whole})
            continue
        key = next((name for name in _OUTER_KEYS if name in members), None)
        if key is None or "systemModules" in members:
            return node, None
        node = members[key]
        if key in ("modulesContent", "moduleContent"):
            sections = node.members()
            if not sections:
                raise node.fail("the deployment is empty; set a deployment manifest", EMPTY)
            if "$edgeAgent" not in sections:
                raise Node(None, f"{node.path}.$edgeAgent").fail(
                    "missing; a deployment manifest needs the properties.desired of $edgeAgent"
                )
            return _desired(sections["$edgeAgent"]), node


def _desired(section: Node) -> Node:
    members = section.members()
    layered = [key for key in members if key.startswith(f"{_DESIRED}.")]
    if layered and _DESIRED not in members:
        raise members[layered[0]].fail(
            "a layered deployment needs a base: apply it with --layer, or send it with its base "
            "under 'layers'"
        )
    if layered:
        check_parts(members)
        return Node(laid_over({}, members), joined(section.path, _DESIRED))
    return section.fields((_DESIRED,))[_DESIRED]


def _other_sections(outer: Node | None) -> tuple[EdgeHub | None, tuple[str, ...]]:
    if outer is None:
        return None, ()
    sections = outer.members()
    sections.pop("$edgeAgent")
    hub_section = sections.pop("$edgeHub", None)
    hub = None
    if hub_section is not None and hub_section.value is not None:
        desired = _desired(hub_section)
        hub = parse_edge_hub(Node(without_nulls(desired.value), "$edgeHub"))
    for name, section in sections.items():
        _check_name(name, section)
        section.members()
    return hub, tuple(sorted(sections))


def _schema_version(desired: Node) -> str:
    # Before anything else: another schema may look different everywhere.
    node = desired.members().get("schemaVersion")
    if node is None:
        known = ", ".join(shown(key) for key in sorted(desired.members())[:5])
        raise Node(None, "schemaVersion").fail(
            f"missing; expected a deployment manifest or the properties.desired of $edgeAgent, "
            f"found an object with {known}"
        )
    version = node.word()
    if not _SCHEMA.fullmatch(version):
        raise node.fail(
            f"schema version {shown(version)} is not supported; expected 1.0 or 1.1",
            UNKNOWN_SCHEMA,
        )
    return version


def _runtime(node: Node) -> tuple[Runtime, tuple[RegistryCredential, ...]]:
    fields = node.fields(("type", "settings"))
    settings = fields["settings"].fields(
        (), ("minDockerVersion", "loggingOptions", "registryCredentials")
    )
    runtime = Runtime(
        type=fields["type"].choice(("docker",)),
        min_docker_version=_text(settings.get("minDockerVersion")),
        logging_options=_text(settings.get("loggingOptions")),
    )
    entries = settings.get("registryCredentials")
    credentials = {} if entries is None else entries.members()
    return runtime, tuple(_credential(name, entry) for name, entry in credentials.items())


def _credential(name: str, node: Node) -> RegistryCredential:
    fields = node.fields(("username", "password", "address"))
    address = fields["address"].word()
    if re.search(r"\s", address):
        raise fields["address"].expected("a registry host without blanks, such as example.com:5000")
    password = Node(fields["password"].value, fields["password"].path, secret=True)
    return RegistryCredential(name, address, fields["username"].text(), password.text())


def _system_modules(node: Node) -> tuple[ModuleSpec, ...]:
    fields = node.fields(("edgeAgent",), ("edgeHub",))
    # edgeAgent itself is always running, always restarted and first; files that say so, or say
    # otherwise, were always accepted without effect.
    fixed = ("version", "status", "restartPolicy", "startupOrder")
    agent = fields["edgeAgent"].fields(("type", "settings"), ("env", "imagePullPolicy", *fixed))
    specs = [
        ModuleSpec(
            name="edgeAgent",
            status="running",
            restart_policy="always",
            startup_order=0,
            type=agent["type"].choice(("docker",)),
            image_pull_policy=_pull_policy(agent.get("imagePullPolicy")),
            env=_env(agent.get("env")),
            image=_image(agent["settings"]),
            create_options=read_create_options(agent["settings"]),
        )
    ]
    if "edgeHub" in fields:
        specs.append(_spec("edgeHub", fields["edgeHub"]))
    return tuple(specs)


def _check_name(name: str, node: Node) -> None:
    if len(name) > MAX_MODULE_NAME or not _MODULE_NAME.fullmatch(name):
        raise node.fail(
            f"a module name has letters, digits, '_' and '-' only, at most {MAX_MODULE_NAME}; "
            f"found {shown(name)}"
        )


def _module(name: str, node: Node) -> ModuleSpec:
    _check_name(name, node)
    if name in ("edgeAgent", "edgeHub"):
        raise node.fail("this name belongs to a system module; choose another one")
    return _spec(name, node)


def _spec(name: str, node: Node) -> ModuleSpec:
    fields = node.fields(
        ("type", "status", "settings"),
        ("version", "restartPolicy", "imagePullPolicy", "startupOrder", "env"),
    )
    policy = fields.get("restartPolicy")
    order = fields.get("startupOrder")
    return ModuleSpec(
        name=name,
        image=_image(fields["settings"]),
        status=cast(DesiredRunState, fields["status"].choice(_STATUSES)),
        restart_policy=(
            "on-unhealthy"
            if policy is None
            else cast(RestartPolicy, policy.choice(_RESTART_POLICIES))
        ),
        image_pull_policy=_pull_policy(fields.get("imagePullPolicy")),
        startup_order=(MAX_STARTUP_ORDER if order is None else order.integer(0, MAX_STARTUP_ORDER)),
        version=_text(fields.get("version")),
        type=fields["type"].choice(("docker",)),
        env=_env(fields.get("env")),
        create_options=read_create_options(fields["settings"]),
    )


def _pull_policy(node: Node | None) -> ImagePullPolicy:
    return "on-create" if node is None else cast(ImagePullPolicy, node.choice(_PULL_POLICIES))


def _text(node: Node | None) -> str:
    return "" if node is None else node.text()


def _image(settings: Node) -> str:
    node = settings.fields(("image",), extra=r"createOptions[0-9]*")["image"]
    image = node.word().strip()
    if "$" in image:
        raise node.fail(
            f"{shown(image)} holds a template variable; generate the deployment manifest from "
            "the template first"
        )
    match = _IMAGE.fullmatch(image) if len(image) <= _MAX_IMAGE else None
    if match is None:
        raise node.fail(
            f"expected an image name such as host:5000/path/name:tag, found {shown(image)}"
        )
    return image if match["tag"] or match["digest"] else f"{image}:latest"


def _env(node: Node | None) -> tuple[tuple[str, str], ...]:
    if node is None:
        return ()
    variables = []
    for name, entry in node.members().items():
        if not _ENV_NAME.fullmatch(name):
            raise entry.fail(
                "the name of a variable has no '+', '#', '$', '.', '=' and no blank in it; "
                f"found {shown(name)}"
            )
        variables.append((name, _env_value(entry.fields(("value",))["value"])))
    return tuple(sorted(variables))


def _env_value(node: Node) -> str:
    """Numbers and booleans become the text that stands for them in JSON, as in edgeAgent."""
    value = node.value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if not isinstance(value, str):
        raise node.expected("a string, a number or a boolean")
    return node.text()
