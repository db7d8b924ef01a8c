from __future__ import annotations

import json
from typing import Any

import pytest
from gatelet.agent.identity.sources import KeyText, Registered
from gatelet.agent.twin.document import DesiredDocument, deployment_body, deployment_property
from gatelet.agent.twin.iothub_client import IotHubSettings, describe
from gatelet.agent.twin.merge_patch import apply_patch, without_nulls
from gatelet.simulator.iothub.twins import Section
from hypothesis import given
from hypothesis import strategies as st

keys = st.sampled_from(["a", "b", "c"])
scalars = st.none() | st.booleans() | st.integers(-3, 3)
values = st.recursive(scalars, lambda inner: st.dictionaries(keys, inner, max_size=3))
patches = st.lists(st.dictionaries(keys, values, max_size=3), min_size=1, max_size=6)


def test_nothing_is_known_before_the_first_full_document() -> None:
    assert DesiredDocument().stale
    early = DesiredDocument().with_patch({"a": 1, "$version": 5})
    assert early.stale
    assert early.with_full({"a": 0, "$version": 4}).stale
    assert not early.with_full({"a": 1, "$version": 5}).stale


def test_old_patches_are_dropped_and_gaps_are_noticed() -> None:
    document = DesiredDocument().with_full({"a": 1, "$version": 3, "$metadata": {}})
    assert document.properties == {"a": 1}
    assert document.with_patch({"a": 9, "$version": 3}) is document
    assert document.with_patch({"a": 9, "$version": 2}) is document
    next_one = document.with_patch({"a": None, "b": 2, "$version": 4})
    assert (next_one.properties, next_one.version, next_one.stale) == ({"b": 2}, 4, False)
    gap = document.with_patch({"b": 2, "$version": 5})
    assert (gap.properties, gap.stale) == ({"a": 1}, True)
    assert not gap.with_full({"b": 2, "$version": 5}).stale


def test_a_read_that_was_overtaken_by_a_patch_takes_nothing_back() -> None:
    document = DesiredDocument().with_full({"a": 1, "$version": 1})
    document = document.with_patch({"a": 2, "$version": 2})
    assert document.with_full({"a": 1, "$version": 1}).properties == {"a": 2}


def test_a_patch_without_version_leads_to_a_read() -> None:
    document = DesiredDocument().with_full({"a": 1, "$version": 7}).with_patch({"a": 2})
    assert document.stale
    assert not document.with_full({"a": 1, "$version": 7}).stale


@given(patches, st.data())
def test_any_delivery_ends_at_the_hubs_state(all_patches: list[Any], data: st.DataObject) -> None:
    """Lost, repeated and reordered patches: equal to the hub's section, or known to be stale."""
    section = Section()
    messages = []
    for patch in all_patches:
        section = section.patched(patch, "now", "desired")
        messages.append({**patch, "$version": section.version})
    indices = st.lists(st.integers(0, len(messages) - 1), max_size=12)
    document = DesiredDocument().with_full({"$version": 1})
    heard = 1
    for index in data.draw(indices):
        document = document.with_patch(messages[index])
        heard = max(heard, messages[index]["$version"])
    if not document.stale:
        assert document.version == heard
        assert document.properties == state_at(all_patches, heard)
    final = document.with_full(section.with_version(metadata=True))
    assert not final.stale
    assert final.properties == section.value


def state_at(all_patches: list[dict[str, Any]], version: int) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for patch in all_patches[: version - 1]:
        state = apply_patch(state, patch)
    return without_nulls(state)


def test_where_the_deployment_is() -> None:
    assert deployment_body({}, module=True) is None
    assert deployment_body({"other": 1}, module=False) is None
    assert deployment_body({"modules": {"ü": 1}}, module=True) == '{"modules":{"ü":1}}'.encode()
    assert deployment_body({"deployment": {"a": 1}, "x": 2}, module=False) == b'{"a":1}'
    assert deployment_body({"deployment": ' {"a": 1}'}, module=False) == b' {"a": 1}'
    assert deployment_body({"deployment": ['{"a":', "1}"]}, module=False) == b'{"a":1}'
    assert deployment_body({"deployment": [1]}, module=False) == b"[1]"


def test_a_manifest_as_text_passes_the_hubs_rules() -> None:
    manifest = {
        "modulesContent": {
            "$edgeAgent": {
                "properties.desired": {"modules": {f"m{i}": "ü" * 90 for i in range(40)}}
            }
        }
    }
    value = deployment_property(manifest)
    assert len(value) > 1
    stored = Section().patched({"deployment": value}, "now", "properties.desired")
    body = deployment_body(stored.value, module=False)
    assert body is not None
    assert json.loads(body) == manifest


def test_settings() -> None:
    text = "HostName=h;DeviceId=d;ModuleId=$edgeAgent;SharedAccessKey=c2VjcmV0==\n"
    settings = IotHubSettings(text, proxy="127.0.0.1:8080")
    assert settings.identity == Registered("h", "d", KeyText("c2VjcmV0=="), "$edgeAgent")
    assert "c2VjcmV0" not in repr(settings.identity)
    assert "c2VjcmV0" not in repr(settings)
    with pytest.raises(ValueError, match="lacks DeviceId"):
        IotHubSettings("HostName=h;SharedAccessKey=c2VjcmV0")
    with pytest.raises(ValueError, match="not host:port"):
        IotHubSettings(text, proxy="nowhere")


def test_errors_tell_their_causes() -> None:
    error = ValueError("Could not connect")
    error.__cause__ = ConnectionRefusedError(111, "Connection refused")
    assert describe(error) == "Could not connect: [Errno 111] Connection refused"
