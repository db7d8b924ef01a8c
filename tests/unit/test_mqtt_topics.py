"""Topic matching, and the subscription tree as a faster way to the same answer."""

from __future__ import annotations

import pytest
from gatelet.simulator.mqtt.packets import Subscription
from gatelet.simulator.mqtt.session import Session
from gatelet.simulator.mqtt.subscriptions import Entry, Match, SubscriptionTree
from gatelet.simulator.mqtt.topics import filter_problem, matches, split_shared, topic_problem
from hypothesis import given
from hypothesis import strategies as st

level = st.sampled_from(["", "a", "b", "$sys"])
topics = st.lists(level, min_size=1, max_size=4).map("/".join).filter(bool)
filters = st.builds(
    lambda levels, tail: "/".join([*levels, *tail]),
    st.lists(st.sampled_from(["", "a", "b", "$sys", "+"]), max_size=3),
    st.sampled_from([["#"], ["a"], ["+"]]),
)


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("sport/tennis/player1/#", "sport/tennis/player1", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
        ("sport/#", "sport", True),
        ("#", "a/b", True),
        ("sport/tennis/+", "sport/tennis/player1/ranking", False),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+/+", "/finance", True),
        ("/+", "/finance", True),
        ("+", "/finance", False),
        ("#", "$SYS/a", False),
        ("+/monitor/Clients", "$SYS/monitor/Clients", False),
        ("$SYS/#", "$SYS/a", True),
        ("$SYS/monitor/+", "$SYS/monitor/Clients", True),
        ("A", "a", False),
    ],
)
def test_examples_of_the_specification(topic_filter: str, topic: str, expected: bool) -> None:
    """Sections 4.7.1.2, 4.7.1.3 and 4.7.2."""
    assert matches(topic_filter, topic) is expected


@pytest.mark.parametrize(
    "topic_filter",
    ["", "a#", "#/a", "a/#/b", "a+", "+a/b", "$share/", "$share/g", "$share/g/", "$share//a",
     "$share/+/a", "$share/g/a#", "a\0", "x" * 65_536, "\ud800"],
)  # fmt: skip
def test_invalid_filters(topic_filter: str) -> None:
    assert filter_problem(topic_filter)


@pytest.mark.parametrize("topic", ["", "a/+", "#", "a\0", "x" * 65_536])
def test_invalid_topics(topic: str) -> None:
    assert topic_problem(topic)


def test_shared_filters_are_split() -> None:
    assert split_shared("$share/g/a/+/#") == ("g", "a/+/#")
    assert split_shared("$sharex/g/a") == ("", "$sharex/g/a")


@given(st.lists(st.tuples(st.sampled_from("xyz"), filters), max_size=8), topics)
def test_tree_finds_what_matching_each_filter_finds(subscribed, topic) -> None:
    tree = SubscriptionTree()
    sessions = {client_id: Session(client_id) for client_id in "xyz"}
    for client_id, topic_filter in subscribed:
        tree.add(Entry(sessions[client_id], Subscription(topic_filter)))
    expected = {(c, f) for c, f in subscribed if matches(f, topic)}
    found = [(e.session.client_id, e.subscription.topic_filter) for e in tree.match(topic).entries]
    assert sorted(found) == sorted(expected)
    for client_id, topic_filter in set(subscribed):
        assert tree.remove(client_id, topic_filter)
        assert not tree.remove(client_id, topic_filter)
    assert tree.match(topic) == Match((), (), (), False)
    assert tree._root.is_empty


def test_shared_members_are_grouped() -> None:
    tree = SubscriptionTree()
    one, two = Session("one"), Session("two")
    assert tree.add(Entry(one, Subscription("$share/g/a/#")))
    assert tree.add(Entry(two, Subscription("$share/g/a/#")))
    assert not tree.add(Entry(two, Subscription("$share/g/a/#", 1)))
    found = tree.match("a/b")
    assert found.entries == ()
    assert [sorted(members) for members in found.groups] == [["one", "two"]]
