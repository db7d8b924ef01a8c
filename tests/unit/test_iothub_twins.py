from __future__ import annotations

import json
from typing import Any

import pytest
from gatelet.simulator.iothub.errors import HubError
from gatelet.simulator.iothub.twins import Section, Twin, section_size
from hypothesis import given
from hypothesis import strategies as st

NOW = "2026-01-02T03:04:05Z"
LATER = "2026-01-02T03:04:06Z"

names = st.sampled_from(["a", "b", "c", "é"])
scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=3)
)
objects = st.dictionaries(names, values, max_size=3)


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {"property": 1}
    for _ in range(levels):
        value = {"level": value}
    return value


def test_a_patch_counts_the_version_up_and_deletes_with_null() -> None:
    twin = Twin().updated({"properties": {"desired": {"a": 1, "b": {"c": 2}}}}, NOW)
    twin = twin.updated({"properties": {"desired": {"b": {"c": None, "d": 3}}}}, LATER)
    assert twin.desired.with_version(metadata=False) == {"a": 1, "b": {"d": 3}, "$version": 3}
    assert twin.desired.metadata == {
        "$lastUpdated": LATER,
        "a": {"$lastUpdated": NOW},
        "b": {"$lastUpdated": LATER, "d": {"$lastUpdated": LATER}},
    }


def test_tags_do_not_touch_the_desired_version() -> None:
    twin = Twin().updated({"tags": {"site": "a"}}, NOW)
    assert (twin.tags, twin.desired.version, twin.version) == ({"site": "a"}, 1, 2)


def test_put_replaces_and_a_read_twin_may_be_written_back() -> None:
    twin = Twin().updated({"tags": {"t": 1}, "properties": {"desired": {"a": 1}}}, NOW)
    read = twin.service_view({"deviceId": "d"})
    again = twin.updated(read, LATER, whole=True)
    assert (again.tags, again.desired.value) == ({"t": 1}, {"a": 1})
    assert again.updated({"properties": {"desired": {"b": 2}}}, NOW, whole=True).desired.value == {
        "b": 2
    }


@pytest.mark.parametrize("key", ["a.b", "$edgeAgent", "a b", "a\x01", "a\x85", "", "k" * 1025])
def test_keys_the_hub_refuses(key: str) -> None:
    with pytest.raises(HubError) as caught:
        Section().patched({"outer": {key: 1}}, NOW, "properties.desired")
    assert caught.value.status == 400
    assert "properties.desired.outer" in caught.value.message


def test_hub_names_are_reserved_only_at_the_top() -> None:
    section = Section().patched({"$version": 9, "$metadata": {}, "a": 1}, NOW, "desired")
    assert section.with_version(metadata=False) == {"a": 1, "$version": 2}
    with pytest.raises(HubError):
        Section().patched({"a": {"$version": 9}}, NOW, "desired")


def test_ten_levels_and_not_one_more() -> None:
    Section().patched(nested(10), NOW, "desired")
    with pytest.raises(HubError, match="10 levels"):
        Section().patched(nested(11), NOW, "desired")


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ({"a": "x" * 4096}, None),
        ({"a": "x" * 4097}, 400),
        ({"a": "é" * 2049}, 400),
        ({"a": 2**52}, 400),
        ({"a": 2**52 - 1}, None),
        ({"a": float("nan")}, 400),
        ({"a": "\ud800"}, 400),
        ({str(i): "x" * 4000 for i in range(8)}, None),
        ({str(i): "x" * 4000 for i in range(9)}, 413),
    ],
)
def test_sizes_and_values(value: dict[str, Any], status: int | None) -> None:
    if status is None:
        assert Section().patched(value, NOW, "desired").value == value
        return
    with pytest.raises(HubError) as caught:
        Section().patched(value, NOW, "desired")
    assert caught.value.status == status


def test_tags_are_smaller() -> None:
    with pytest.raises(HubError) as caught:
        Twin().updated({"tags": {str(i): "x" * 4000 for i in range(3)}}, NOW)
    assert caught.value.status == 413


def test_size_counts_what_the_documentation_says() -> None:
    assert section_size({"ab": "éx", "n": 5, "t": True, "z": None, "l": [1, "x"]}) == (
        2 + 3 + 1 + 8 + 1 + 4 + 1 + 0 + 1 + 8 + 1
    )


@pytest.mark.parametrize(
    "change", [{"tags": []}, {"properties": 1}, {"properties": {"desired": 1}}]
)
def test_wrong_shapes(change: dict[str, Any]) -> None:
    with pytest.raises(HubError) as caught:
        Twin().updated(change, NOW)
    assert caught.value.status == 400


def test_if_match() -> None:
    twin = Twin()
    for fine in (None, "*", f'"{twin.etag}"', f'W/"{twin.etag}"', f'"x", "{twin.etag}"'):
        twin.check_match(fine)
    with pytest.raises(HubError) as caught:
        twin.updated({"tags": {}}, NOW).check_match(f'"{twin.etag}"')
    assert caught.value.status == 412


@given(st.lists(objects, max_size=4))
def test_versions_count_and_metadata_mirrors_the_value(patches: list[dict[str, Any]]) -> None:
    twin = Twin()
    for patch in patches:
        twin = twin.reported_patched(patch, NOW)
    assert twin.reported.version == 1 + len(patches)
    _assert_mirrors(twin.reported.value, twin.reported.metadata)
    assert Twin.from_json(json.loads(json.dumps(twin.as_json()))) == twin


def _assert_mirrors(value: dict[str, Any], metadata: dict[str, Any]) -> None:
    assert {key for key in metadata if not key.startswith("$")} == set(value)
    for key, item in value.items():
        assert "$lastUpdated" in metadata[key]
        _assert_mirrors(item if isinstance(item, dict) else {}, metadata[key])
