"""Layers merged on the device: the hub's own merge for the same inputs, in any order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gatelet.agent.cli.command import CommandError
from gatelet.agent.cli.documents import document as document_of
from gatelet.agent.document import Node
from gatelet.agent.layers import layered_document, merge_layers
from gatelet.agent.manifest import ManifestError, parse_manifest
from gatelet.simulator.iothub.configurations import Configuration, plan
from hypothesis import given
from hypothesis import strategies as st

TWIN = {"deviceId": "d", "tags": {}, "capabilities": {"iotEdge": True}}
AGENT = {"type": "docker", "settings": {"image": "agent:1"}}


def base(**modules: str) -> dict[str, Any]:
    return {
        "schemaVersion": "1.1",
        "runtime": {"type": "docker", "settings": {}},
        "systemModules": {"edgeAgent": AGENT},
        "modules": {name: module(image) for name, image in modules.items()},
    }


def module(image: str) -> dict[str, Any]:
    return {"type": "docker", "status": "running", "settings": {"image": image}}


def layer(priority: int, agent: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {"priority": priority, "content": {"modulesContent": {"$edgeAgent": agent, **sections}}}


PATHS = ("modules", "modules.m0", "modules.m1", "modules.m0.env", "modules.m0.settings.image", "x")
values = st.recursive(
    st.none() | st.integers(0, 3) | st.sampled_from(["a", "b"]),
    lambda inner: st.dictionaries(st.sampled_from(["m0", "m1", "env", "settings"]), inner),
    max_leaves=4,
)
objects = st.dictionaries(st.sampled_from(["modules", "x"]), values)
sections = st.dictionaries(
    st.sampled_from(PATHS).map(lambda path: f"properties.desired.{path}"), values, max_size=4
)
agents = st.builds(
    lambda whole, parts: parts if whole is None else {"properties.desired": whole, **parts},
    st.none() | objects,
    sections,
)
contents = st.builds(
    lambda agent, hub: {"modulesContent": {"$edgeAgent": agent, "$edgeHub": hub}}, agents, agents
)
many_layers = st.lists(st.tuples(st.integers(0, 3), contents), min_size=1, max_size=6)


def document(layers: list[tuple[int, Any]]) -> dict[str, Any]:
    """The list's order is the order of creation."""
    return {
        f"layer{7 * n % 10}": {
            "priority": priority,
            "content": content,
            "createdTimeUtc": f"2026-03-01T10:00:{n:02}Z",
        }
        for n, (priority, content) in enumerate(layers)
    }


@given(many_layers, st.randoms())
def test_it_is_the_merge_of_the_hub_in_any_order(layers: list[Any], random: Any) -> None:
    configurations = [
        Configuration(f"c{n}", content, "*", priority, order=n)
        for n, (priority, content) in enumerate(layers)
    ]
    hub = plan("d", TWIN, configurations).modules
    entries = list(document(layers).items())
    random.shuffle(entries)
    shuffled = Node({"layers": dict(entries)})
    if hub is None:
        with pytest.raises(ManifestError, match="none of the layers is a base"):
            merge_layers(shuffled)
        return
    before = json.dumps(shuffled.value)
    merged = merge_layers(shuffled)
    assert merged.sections == hub
    assert json.dumps(shuffled.value) == before


def test_a_layer_adds_replaces_and_removes_modules_and_routes() -> None:
    hub = {"schemaVersion": "1.2", "routes": {"a": "FROM /* INTO $upstream"}}
    layers = {
        "site": layer(
            20,
            {
                "properties.desired.modules.two": module("two:9"),
                "properties.desired.modules.one": None,
                "properties.desired.runtime.settings.loggingOptions": "x",
            },
            **{"$edgeHub": {"properties.desired.routes.b": "FROM /messages/* INTO $upstream"}},
        ),
        "base": layer(
            5,
            {"properties.desired": base(one="one:1")},
            **{"$edgeHub": {"properties.desired": hub}},
        ),
        "late": layer(5, {"properties.desired.modules.never": module("n:1")}),
    }
    manifest = parse_manifest(json.dumps({"layers": layers}).encode())
    assert [(m.name, m.image) for m in manifest.modules] == [("two", "two:9")]
    assert manifest.runtime.logging_options == "x"
    assert manifest.edge_hub is not None
    assert [route.name for route in manifest.edge_hub.routes] == ["a", "b"]
    assert manifest.ignored == (("layers.late", "not above the base layers.base: not applied"),)


def test_an_export_of_the_hub_is_taken_as_it_is() -> None:
    exported = {
        "id": "base",
        "schemaVersion": "1.0",
        "labels": {"a": "b"},
        "content": {
            "modulesContent": {"$edgeAgent": {"properties.desired": base(one="one:1")}},
            "deviceContent": None,
        },
        "targetCondition": "tags.site = 'x'",
        "createdTimeUtc": "2026-03-01T10:00:00.1234567Z",
        "lastUpdatedTimeUtc": "2026-03-01T10:00:00Z",
        "priority": 10,
        "systemMetrics": {},
        "metrics": {},
        "etag": "x",
    }
    manifest = parse_manifest(json.dumps({"layers": {"base": exported}}).encode())
    assert [m.name for m in manifest.modules] == ["one"]
    assert [path for path, _ in manifest.ignored] == ["layers.base.targetCondition"]


def test_files_become_one_document_and_the_later_of_equals_wins() -> None:
    def parts(image: str) -> bytes:
        agent = {"properties.desired.modules.two": module(image)}
        return json.dumps({"modulesContent": {"$edgeAgent": agent}}).encode()

    body = layered_document(
        json.dumps(base(one="one:1")).encode(),
        [(10, "z", parts("two:1")), (10, "a", parts("two:2")), (9, "b", parts("two:3"))],
    )
    assert [m.image for m in parse_manifest(body).modules] == ["one:1", "two:2"]


@pytest.mark.parametrize(
    ("layers", "code", "said"),
    [
        ({}, 417, "layers: there is no layer"),
        ([], 400, "layers: expected an object"),
        ({"a": {"content": {}}}, 400, "layers.a.priority: missing"),
        ({"a": {"priority": -1, "modulesContent": {}}}, 400, "layers.a.priority: expected"),
        ({"a": {"priority": 1}}, 400, "layers.a: no modulesContent"),
        ({"a": {"priority": 1, "moduls": {}}}, 400, "layers.a.moduls: unknown key"),
        ({"a": layer(1, {"properties": {}})}, 400, "expected properties.desired or"),
        ({"a": layer(1, {"properties.desired": 3})}, 400, "expected an object, found 3"),
        ({"a": layer(1, {"properties.desired.modules.m": {}})}, 400, "none of the layers"),
        ({"a": layer(1, {"properties.desired" + ".a" * 11: {}})}, 400, "more than 10 levels"),
        ({"a": {**layer(1, {}), "createdTimeUtc": "yesterday"}}, 400, "expected a time in UTC"),
        ({f"l{n}": layer(1, {}) for n in range(101)}, 400, "101 layers; at most 100"),
        ({"a": layer(1, {"properties.desired": {}})}, 417, "is empty"),
    ],
)
def test_what_is_refused(layers: Any, code: int, said: str) -> None:
    with pytest.raises(ManifestError) as refused:
        parse_manifest(json.dumps({"layers": layers}).encode())
    assert refused.value.code == code
    assert said in str(refused.value)


def test_a_layer_alone_says_what_it_needs() -> None:
    agent = {"properties.desired.modules.m": module("m:1")}
    with pytest.raises(ManifestError, match="a layered deployment needs a base"):
        parse_manifest(json.dumps({"modulesContent": {"$edgeAgent": agent}}).encode())


def test_the_command_reads_layers_and_says_what_a_hub_would_not_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    below, above = tmp_path / "base.json", tmp_path / "site.json"
    below.write_text(json.dumps(base(one="one:1")))
    long = {**module("two:1"), "env": {f"k{n}": {"value": "x" * 5000} for n in range(9)}}
    agent = {"properties.desired.modules.two": long}
    above.write_text(json.dumps({"modulesContent": {"$edgeAgent": agent}}))
    body = document_of(str(below), [f"10:{above}"])
    assert [m.name for m in parse_manifest(body).modules] == ["one", "two"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 9
    assert said[0].startswith("gatelet: IoT Hub would not take this: $edgeAgent: 45,")
    assert said[-1] == "gatelet: ... and 2 more"
    for option in (str(above), f"0:{above}", f"ten:{above}", f":{above}"):
        with pytest.raises(CommandError, match="expected PRIORITY:FILE"):
            document_of(str(below), [option])
    above.write_text("{")
    with pytest.raises(CommandError, match="site: not valid JSON"):
        document_of(str(below), [f"10:{above}"])
