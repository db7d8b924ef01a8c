"""Who may publish and subscribe to what."""

from __future__ import annotations

import pytest
from gatelet.simulator.mqtt.access import AccessList, Grant, common_name, covers, identify
from gatelet.simulator.mqtt.handler import Refused
from gatelet.simulator.mqtt.packets import Connect
from gatelet.simulator.mqtt.topics import filter_problem, matches
from hypothesis import given
from hypothesis import strategies as st

levels = st.sampled_from(["a", "b", "+", "#", "", "$s"])
filters = (
    st.lists(levels, min_size=1, max_size=4)
    .map("/".join)
    .filter(lambda text: filter_problem(text) is None)
)
topics = (
    st.lists(st.sampled_from(["a", "b", "", "$s", "c"]), min_size=1, max_size=4)
    .map("/".join)
    .filter(bool)
)


@given(filters, filters, topics)
def test_a_wider_filter_matches_whatever_the_narrower_does(wide, narrow, topic) -> None:
    if covers(wide, narrow) and matches(narrow, topic):
        assert matches(wide, topic)


@given(filters, topics)
def test_for_topics_covering_is_matching(wide, topic) -> None:
    assert covers(wide, topic) == matches(wide, topic)


@pytest.mark.parametrize(
    ("wide", "narrow", "expected"),
    [
        ("a/#", "a/#", True),
        ("a/#", "a", True),
        ("a/#", "a/+/c", True),
        ("a/+", "a/#", False),
        ("a/+", "a/+", True),
        ("a/b", "a/+", False),
        ("#", "#", True),
        ("#", "$SYS/#", False),
        ("+/#", "#", False),
    ],
)
def test_covering(wide: str, narrow: str, expected: bool) -> None:
    assert covers(wide, narrow) is expected


def test_devices_have_their_own_topics() -> None:
    access = AccessList(
        [
            Grant("gatelet/v1/%u/#"),
            Grant("clients/%c", subscribe=False),
            Grant("news/+", publish=False),
            Grant("#", user="operator"),
        ]
    )
    assert access.may_publish("edge-1", "c", "gatelet/v1/edge-1/reported")
    assert access.may_subscribe("edge-1", "c", "gatelet/v1/edge-1/cmd/#")
    assert access.may_subscribe("edge-1", "c", "$share/g/gatelet/v1/edge-1/cmd/#")
    assert not access.may_publish("edge-1", "c", "gatelet/v1/edge-2/reported")
    assert not access.may_subscribe("edge-1", "c", "gatelet/v1/+/cmd/#")
    assert not access.may_subscribe("edge-1", "c", "#")
    assert access.may_publish("edge-1", "c", "clients/c")
    assert not access.may_subscribe("edge-1", "c", "clients/c")
    assert access.may_subscribe("edge-1", "c", "news/today")
    assert not access.may_publish("edge-1", "c", "news/today")
    assert access.may_subscribe("operator", "c", "#")
    assert not access.may_subscribe("operator", "c", "$SYS/#")


@pytest.mark.parametrize("name", ["+", "#", "a/b", "", None, "%u", "x+"])
def test_names_that_would_widen_a_grant_get_nothing(name: str | None) -> None:
    access = AccessList([Grant("d/%u/#")])
    assert not access.may_subscribe(name, "c", f"d/{name}/x")
    assert not access.may_publish(name, "c", "d/a/b")
    assert not AccessList([Grant("d/%c")]).may_subscribe("u", name or "", "d/+")


def test_what_is_remembered_is_of_one_user_client_and_topic() -> None:
    access = AccessList([Grant("d/%u/%c"), Grant("#", user="operator")])
    for _ in range(2):
        assert access.may_publish("u", "c", "d/u/c")
        assert not access.may_publish("v", "c", "d/u/c")
        assert not access.may_publish(None, "c", "d/u/c")
        assert not access.may_publish("u", "d", "d/u/c")
        assert not access.may_publish("u", "c", "d/u/d")
        assert access.may_publish("operator", "c", "d/u/d")
        assert access.may_publish("operator", "c", "x" * 60_000)
    for number in range(10_000):
        access.may_publish("u", "c", f"{number}")
    assert access._known.cache_info().currsize <= 4096


def test_a_grant_needs_a_valid_filter() -> None:
    with pytest.raises(ValueError, match="stands alone"):
        Grant("a#")


def test_identities() -> None:
    certificate = {"subject": ((("organizationName", "x"),), (("commonName", "edge-1"),))}
    assert common_name(certificate) == "edge-1"
    connect = Connect("c", username="other", password=b"p")
    assert identify({}, certificate, connect) == "edge-1"
    assert isinstance(identify(None, {"subject": ()}, connect), Refused)
    assert identify(None, None, connect) is None
    assert identify({"other": "p"}, None, connect) == "other"
    assert isinstance(identify({"other": "q"}, None, connect), Refused)
