from __future__ import annotations

import pytest
from gatelet.agent.scoring.routing import Route, Target, choose, make_route
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
