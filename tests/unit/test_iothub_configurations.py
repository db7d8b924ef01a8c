"""What automatic deployments give a device: laws over any set of them, and their state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gatelet.agent.clock import SystemClock
from gatelet.simulator.iothub.configurations import APPLIED, Configuration, plan
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.hub import Hub
from gatelet.simulator.iothub.state import HubState, load, save
from hypothesis import given
from hypothesis import strategies as st

AGENT = ClientId("d", "$edgeAgent")
TWIN = {"deviceId": "d", "tags": {"a": 1}, "capabilities": {"iotEdge": True}}
NAMES = ("m0", "m1", "m2")


def configuration(order: int, base: bool, priority: int, modules: list[str]) -> Configuration:
    images = {name: {"image": f"{name}:{order}"} for name in modules}
    if base:
        agent: dict[str, Any] = {"properties.desired": {"modules": images}}
    else:
        agent = {f"properties.desired.modules.{name}": one for name, one in images.items()}
    content = {"modulesContent": {"$edgeAgent": agent}}
    return Configuration(f"c{order}", content, "tags.a = 1", priority, order=order)


configurations = st.lists(
    st.tuples(st.booleans(), st.integers(0, 4), st.lists(st.sampled_from(NAMES), unique=True)),
    max_size=6,
).map(lambda items: [configuration(order, *item) for order, item in enumerate(items)])


@given(configurations, st.randoms())
def test_the_highest_that_names_a_module_decides_it(many: list[Configuration], random: Any) -> None:
    shuffled = random.sample(many, len(many))
    found = plan("d", TWIN, shuffled)
    rank = {one.id: (one.priority, one.order) for one in many}
    bases = [c for c in many if "properties.desired" in c.content["modulesContent"]["$edgeAgent"]]
    if not bases:
        assert found.modules is None
        assert APPLIED not in found.status.get(AGENT, {}).values()
        return
    base = max(bases, key=lambda one: rank[one.id])
    layers = [one for one in many if one not in bases and one.priority > base.priority]
    applied = {base.id, *(one.id for one in layers)}
    assert {id for id, state in found.status[AGENT].items() if state == APPLIED} == applied
    assert set(found.status[AGENT]) == {one.id for one in many}
    wanted = {}
    for one in sorted((base, *layers), key=lambda one: rank[one.id]):
        agent = one.content["modulesContent"]["$edgeAgent"]
        wanted.update(agent.get("properties.desired", {}).get("modules", {}))
        prefix = "properties.desired.modules."
        wanted.update({k[len(prefix) :]: v for k, v in agent.items() if k.startswith(prefix)})
    assert found.modules is not None
    assert found.modules["$edgeAgent"].get("modules", {}) == wanted


@given(configurations)
def test_who_is_not_targeted_gets_nothing(many: list[Configuration]) -> None:
    for other in ({**TWIN, "tags": {}}, {**TWIN, "capabilities": {"iotEdge": False}}):
        found = plan("d", other, many)
        assert (found.modules, dict(found.status), dict(found.device)) == (None, {}, {})


def test_deployments_outlive_the_hub(tmp_path: Path) -> None:
    state = HubState()
    hub = Hub("h", state, SystemClock())
    hub.put_identity(ClientId("d"), {"capabilities": {"iotEdge": True}})
    agent = {"properties.desired": {"modules": {"m": {"image": "m:1"}}}}
    content = {"modulesContent": {"$edgeAgent": agent, "m": {"properties.desired": {"x": 1}}}}
    hub.rollout.put("one", {"content": content, "targetCondition": "*", "priority": 3}, None)
    save(tmp_path / "hub.json", state)
    again = Hub("h", load(tmp_path / "hub.json"), SystemClock())
    shown = [json.dumps(one.rollout.view(one.rollout.get("one"))) for one in (hub, again)]
    assert shown[0] == shown[1]
    assert again.twin_view(AGENT)["configurations"] == {"one": {"status": "Applied"}}
    version = again.twin(AGENT).desired.version
    again.rollout.evaluate_all()
    assert again.twin(AGENT).desired.version == version, "the same again changes nothing"
    again.rollout.delete("one", None)
    again.delete_identity(ClientId("d"))
    state = again.state
    assert [state.assignments, state.deployed, state.configurations] == [{}, {}, {}]
