from __future__ import annotations

import random

import pytest
from gatelet.agent.scoring.routing import (
    SESSION_HEADER,
    Route,
    Target,
    choose,
    copies,
    make_route,
    place,
    position,
)
from hypothesis import given
from hypothesis import strategies as st


def route(*percents: int) -> Route[str]:
    others = [Target(f"i{n}", str(n), percent) for n, percent in enumerate(percents, 1)]
    return make_route("digits", Target("i0", "0", 0), others)


@st.composite
def shares(draw: st.DrawFn) -> list[int]:
    left = 100
    percents = []
    for _ in range(draw(st.integers(0, 4))):
        percents.append(draw(st.integers(0, left)))
        left -= percents[-1]
    return percents


@given(shares())
def test_every_target_gets_exactly_its_percentage(percents: list[int]) -> None:
    made = route(*percents)
    draws = [n / 100 + 0.005 for n in range(100)]
    answers = [choose(made, "", draw) for draw in draws]
    expected = [100 - sum(percents), *percents]
    assert [answers.count(target) for target in made.targets] == expected
    assert [target.percent for target in made.targets] == expected


@given(shares(), st.floats(0, 1, exclude_max=True))
def test_a_named_version_answers_whatever_its_share(percents: list[int], draw: float) -> None:
    made = route(*percents)
    for target in made.targets:
        assert choose(made, target.version, draw) == target
    assert choose(made, "other", draw) is None


@pytest.mark.parametrize(
    ("draw", "instance"), [(0.0, "i1"), (0.0999, "i1"), (0.1, "i0"), (0.9999, "i0")]
)
def test_the_bounds_are_half_open(draw: float, instance: str) -> None:
    chosen = choose(route(10), "", draw)
    assert chosen is not None
    assert chosen.instance == instance


def test_a_target_with_no_share_gets_nothing() -> None:
    assert choose(route(0), "", 0.0) == route(0).default


def test_more_than_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="claim 101 percent"):
        route(60, 41)


def by_lot() -> float:
    raise AssertionError("a session must not be drawn for")


@given(st.text(min_size=1), st.text())
def test_a_session_stands_where_it_always_stands(session: str, endpoint: str) -> None:
    at = position(session, endpoint)
    assert 0.0 <= at < 1.0
    assert position(session, endpoint) == at


def test_the_hash_is_the_same_on_every_device() -> None:
    # Devices of a fleet must agree on who sees the new version, also after an update.
    places = [round(position(name, "digits"), 6) for name in ("alice", "bob")]
    assert places == [0.258686, 0.283315]


@given(st.integers(0, 100), st.integers(0, 100), st.text(min_size=1))
def test_raising_a_share_takes_nobody_off_it(one: int, other: int, session: str) -> None:
    low, high = sorted((one, other))
    headers = {SESSION_HEADER: session}
    before, after = route(low), route(high)
    if choose(before, "", place(before, headers, by_lot)) is before.targets[1]:
        assert choose(after, "", place(after, headers, by_lot)) is after.targets[1]


def test_sessions_are_spread_by_percentage_and_another_header_can_be_named() -> None:
    made = make_route("e", Target("i0", "0", 0), [Target("i1", "1", 25)], "X-User")
    assert made.sticky == "x-user"
    chosen = [
        choose(made, "", place(made, {"x-user": f"u{n}", SESSION_HEADER: "same"}, by_lot))
        for n in range(4000)
    ]
    # Binomial, six standard deviations: 164.
    assert abs(chosen.count(made.targets[1]) - 1000) < 164


def test_without_a_session_a_seeded_generator_draws() -> None:
    made = route(10, 30)
    seeded = random.Random(7)
    places = [place(made, {}, seeded.random) for _ in range(10_000)]
    again = random.Random(7)
    assert places == [again.random() for _ in range(10_000)]
    counts = [[choose(made, "", at) for at in places].count(target) for target in made.targets]
    for count, percent in zip(counts, (60, 10, 30), strict=True):
        p = percent / 100
        assert abs(count - 10_000 * p) < 6 * (10_000 * p * (1 - p)) ** 0.5


def test_one_target_needs_no_draw() -> None:
    assert place(route(), {}, by_lot) == 0.0


def test_a_named_deployment_answers_whatever_its_share() -> None:
    blue, green = Target("b@1", "1", 0, "blue"), Target("g@1", "2", 0, "green")
    made = make_route("e", blue, [green])
    assert choose(made, "", 0.0, "green") == green
    assert choose(made, "2", 0.0, "green") == green
    assert choose(made, "1", 0.0, "green") is None
    assert choose(made, "", 0.0, "red") is None


def test_mirrors_get_their_percentage_of_copies_but_not_of_their_own_answers() -> None:
    mirror = Target("m", "2", 0, "m", mirror=20)
    made = make_route("e", Target("i", "1", 0), [mirror])
    seeded = random.Random(3)
    got = [copies(made, made.default, seeded.random) for _ in range(10_000)]
    assert abs(got.count((mirror,)) - 2000) < 6 * 40
    assert copies(made, mirror, lambda: 0.0) == ()
    assert copies(route(50), route(50).default, lambda: 0.0) == ()
    # It takes no share of the answers.
    assert all(choose(made, "", n / 100) == made.default for n in range(100))


def test_the_default_cannot_be_a_mirror() -> None:
    with pytest.raises(ValueError, match="cannot mirror"):
        make_route("e", Target("i", "1", 0, mirror=5))
