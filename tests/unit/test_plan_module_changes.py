"""What a change of each field of a module makes the planner do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from gatelet.agent.config import AgentConfig, DeviceConfig
from gatelet.agent.container_modules import DeviceContainers
from gatelet.agent.deployments import inherited_pins, wanted_modules
from gatelet.agent.manifest import Manifest
from gatelet.agent.module_spec import ModuleSpec
from gatelet.agent.plan import Observed, plan
from gatelet.agent.runtime.container import ContainerView
from gatelet.agent.store import Pin

from .plan_rows import NOW, digest, short

SPEC = ModuleSpec(
    "web",
    "r.io/web:1",
    env=(("A", "1"),),
    create_options='{"HostConfig":{"Memory":1048576}}',
    startup_order=5,
    restart_policy="always",
    version="1",
)
CHANGES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("nothing", {}, []),
    ("image", {"image": "r.io/web:2"}, ["resolve web"]),
    ("env", {"env": (("A", "2"),)}, ["resolve web"]),
    ("create_options", {"create_options": "{}"}, ["resolve web"]),
    ("status", {"status": "stopped"}, ["stop web"]),
    ("restart_policy", {"restart_policy": "never"}, []),
    ("startup_order", {"startup_order": 0}, []),
    ("image_pull_policy", {"image_pull_policy": "never"}, ["resolve web"]),
    ("version", {"version": "2"}, ["resolve web"]),
    ("name", {"name": "other"}, ["resolve other"]),
]
AFTER_RESOLVING = {
    "image": ["stop web"],
    "env": ["stop web"],
    "create_options": ["stop web"],
    "image_pull_policy": [],
    "version": [],
}


@pytest.mark.parametrize(
    ("changed", "changes", "steps"), CHANGES, ids=lambda value: str(value)[:20]
)
def test_what_a_change_of_each_field_leads_to(
    changed: str, changes: dict[str, Any], steps: list[str]
) -> None:
    """An unchanged image name is resolved again where edgeAgent would pull again; a container is
    made anew only when it would be another one."""
    maker = DeviceContainers(AgentConfig(device=DeviceConfig(id="d", run_dir=Path("/run/g"))))
    before = Manifest("1.1", modules=(SPEC,))
    after = Manifest("1.1", modules=(msgspec.structs.replace(SPEC, **changes),))
    pin = Pin(digest("web1"), "container")
    old = wanted_modules(1, before, {"web": pin}, maker)
    made = old.modules[0].container
    assert made is not None
    view = ContainerView("web", "web", "id", made.fingerprint(), pin.digest, "running")
    new_digest = digest("web2") if changed == "image" else pin.digest
    observed = Observed(
        frozenset(),
        True,
        {},
        (),
        "up",
        "",
        {"web": view},
        frozenset({pin.digest, new_digest}),
    )
    pins = inherited_pins(after, before, {"web": pin})
    wanted = wanted_modules(2, after, pins, maker)
    found = plan(wanted, old, observed, {}, NOW)
    assert [short(step) for step in found.steps] == steps
    if changed in AFTER_RESOLVING:
        wanted = wanted_modules(2, after, {"web": Pin(new_digest, "container")}, maker)
        found = plan(wanted, old, observed, {}, NOW)
        assert [short(step) for step in found.steps] == AFTER_RESOLVING[changed]


def test_every_field_of_a_module_is_in_the_table() -> None:
    fields = {item.name for item in msgspec.structs.fields(ModuleSpec)} - {"type"}
    assert fields <= {name for name, _, _ in CHANGES}
