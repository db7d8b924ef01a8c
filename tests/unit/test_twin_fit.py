"""The check before sending agrees with the hub that it speaks for."""

from __future__ import annotations

import json
from typing import Any

from gatelet.agent.twin_fit import section_bytes, section_misfits, twin_misfits
from gatelet.simulator.iothub.errors import HubError
from gatelet.simulator.iothub.twins import Twin, section_size
from hypothesis import example, given
from hypothesis import strategies as st

keys = st.sampled_from(["a", "b.c", "$d", "e f", "", "é", "k" * 1024, "k" * 1025, "\x85", "n"])
values = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, 2**52, -(2**52), 2**52 - 1, 1.5, "x", "é" * 2048, "é" * 2049]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@given(st.dictionaries(keys, values, max_size=6))
@example({"a": ["x" * 4096] * 8})
@example({"a": ["x" * 4096] * 7 + ["x" * 4095]})
@example({f"a{n}": None for n in range(10_000)})
@example(nested(10))
@example(nested(11))
@example({"$version": 3, "$metadata": {"$lastUpdated": "x"}, "a": 1})
def test_it_finds_something_exactly_when_the_hub_refuses(section: dict[str, Any]) -> None:
    assert section_bytes(section) == section_size(section)
    try:
        Twin().updated({"properties": {"desired": section}}, "", whole=True)
    except HubError:
        assert section_misfits(section, "$edgeAgent")
    else:
        assert section_misfits(section, "$edgeAgent") == []


def manifest(**settings: Any) -> bytes:
    desired = {"modules": {"m": {"settings": {"image": "m:1", **settings}}}}
    content = {"$edgeAgent": {"properties.desired": desired}, "m": {"properties.desired": {"x": 1}}}
    return json.dumps({"modulesContent": content}).encode()


def said(body: bytes) -> list[str]:
    return [str(misfit) for misfit in twin_misfits(body)]


def test_it_names_the_place_the_size_and_the_way_out() -> None:
    assert said(manifest(createOptions="{}")) == []
    chunks = {f"createOptions{n:02}" if n else "createOptions": "x" * 512 for n in range(70)}
    (found,) = said(manifest(**chunks))
    assert found.startswith("$edgeAgent: 36,912 bytes; a twin holds 32,768.")
    assert "manifest sign --url" in found
    (found,) = said(manifest(createOptions="x" * 513))
    assert found.startswith("$edgeAgent.modules.m.settings.createOptions: 513 characters")
    (found,) = said(manifest(createOptions={"a": 1}))
    assert found.endswith("edgeAgent takes the text of a JSON object only")
    (found,) = said(manifest(createOptions="x" * 5000))
    assert "a text of 5,000 bytes; a twin takes 4,096" in found


def test_layers_are_measured_merged() -> None:
    part = {"modulesContent": {"$edgeAgent": {"properties.desired.modules.n": ["x" * 4000] * 7}}}
    base = {"modulesContent": {"$edgeAgent": {"properties.desired": {"modules": {}}}}}
    layers = {"b": {"priority": 1, **base}, "l": {"priority": 2, **part}}
    assert said(json.dumps({"layers": layers}).encode()) == []
    part["modulesContent"]["$edgeAgent"]["properties.desired.modules.o"] = ["x" * 4000] * 7
    (found,) = said(json.dumps({"layers": layers}).encode())
    assert "56,0" in found
