"""What a manifest asks for and this agent does not do, in one list: nothing is dropped silently.

What edgeAgent itself refuses (another `type` than docker, unknown keys) is refused with its path.
"""

from __future__ import annotations

from collections.abc import Iterator

from .document import joined
from .manifest import Manifest
from .message_routes import compile_routes
from .module_spec import ModuleSpec
from .runtime.create_body import ignored_options
from .scoring_env import scoring_options

MAX_REPORTED = 40
_READ_BY_AGENT = frozenset({"ModuleUpdateMode"})
"""Variables of edgeAgent that this agent follows."""
_DECIDED = {
    "Image": "without effect: settings.image names the image",
    "name": "without effect: the container has the name of its module",
    "HostConfig.RestartPolicy": "without effect: the module's restartPolicy counts",
}


def unsupported(manifest: Manifest, max_outbox_bytes: int | None = None) -> tuple[str, ...]:
    """Sentences "<JSON path>: <why>", in the order of the document's sections.

    `max_outbox_bytes` is the device's own limit of stored messages.
    """
    found = [*manifest.ignored]
    for spec in manifest.system_modules:
        found += _system_module(spec)
    for spec in manifest.modules:
        path = joined("modules", spec.name)
        options = scoring_options(spec)
        found += (
            (f"{path}.env.{name}", "not done by this version") for name in options.unsupported
        )
        found += (
            (f"{path}.settings.createOptions.{option}", _DECIDED[option])
            for option in ignored_options(spec)
        )
    hub = manifest.edge_hub
    if hub is not None:
        found += compile_routes(hub).unsupported
        if hub.mqtt_broker:
            found.append(("$edgeHub.mqttBroker", "this agent is no MQTT broker"))
        size = hub.max_size_bytes
        if size is not None and max_outbox_bytes is not None and size > max_outbox_bytes:
            path = "$edgeHub.storeAndForwardConfiguration.storeLimits.maxSizeBytes"
            found.append((path, f"the device keeps {max_outbox_bytes} bytes at most"))
    found += (
        (f"{module}.properties.desired", "module twins are IoT Hub's: set there, nowhere else")
        for module in manifest.module_twins
    )
    return tuple(f"{path}: {why}" for path, why in found)


def shortened(sentences: tuple[str, ...]) -> list[str]:
    """At most MAX_REPORTED of them, and how many more there are."""
    more = len(sentences) - MAX_REPORTED
    return [*sentences[:MAX_REPORTED], *([f"... and {more} more"] if more > 0 else [])]


def _system_module(spec: ModuleSpec) -> Iterator[tuple[str, str]]:
    path = joined("systemModules", spec.name)
    yield f"{path}.settings.image", f"not run: gatelet itself is the {spec.name} of this device"
    if spec.create_options != "{}":
        yield f"{path}.settings.createOptions", "there is no container for it"
    names = sorted(name for name, _ in spec.env if name not in _READ_BY_AGENT)
    if names:
        yield f"{path}.env", f"without effect: {', '.join(names)[:200]}"
