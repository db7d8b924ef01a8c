from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from gatelet.agent.twin.merge_patch import apply_patch, make_patch, same, without_nulls
from hypothesis import given
from hypothesis import strategies as st

scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a", "b"])
keys = st.sampled_from(["a", "b", "c", "$x"])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
)
documents = st.dictionaries(keys, values, max_size=4)


# The object cases of RFC 7386, appendix A.
@pytest.mark.parametrize(
    ("document", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_rfc_examples(
    document: dict[str, Any], patch: dict[str, Any], result: dict[str, Any]
) -> None:
    assert apply_patch(document, patch) == result


def test_true_and_one_differ() -> None:
    assert make_patch({"a": 1, "b": [True]}, {"a": True, "b": [1]}) == {"a": True, "b": [1]}


@given(documents, documents)
def test_a_patch_leads_from_old_to_new(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert same(apply_patch(old, make_patch(old, new)), without_nulls(new))


@given(documents)
def test_no_change_is_an_empty_patch(document: dict[str, Any]) -> None:
    clean = without_nulls(document)
    assert make_patch(clean, clean) == {}


@given(documents, documents)
def test_applying_twice_is_applying_once(document: dict[str, Any], patch: dict[str, Any]) -> None:
    once = apply_patch(document, patch)
    assert same(apply_patch(once, patch), once)


@given(documents, documents)
def test_arguments_stay_and_nothing_is_shared(old: dict[str, Any], new: dict[str, Any]) -> None:
    before = copy.deepcopy((old, new))
    for result in (apply_patch(old, new), make_patch(old, new)):
        _scribble(result)
    assert json.dumps((old, new)) == json.dumps(before)


def _scribble(value: Any) -> None:
    if isinstance(value, dict):
        for item in value.values():
            _scribble(item)
        value["scribbled"] = 1
    elif isinstance(value, list):
        for item in value:
            _scribble(item)
        value.append("scribbled")
