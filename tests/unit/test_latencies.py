"""Whether some answers took longer than others: laws of the comparison, and of what is counted."""

from __future__ import annotations

import random

from gatelet.agent.latencies import Latencies, bucket, latencies, middle, slower
from hypothesis import example, given
from hypothesis import strategies as st

CERTAINTY = 3.5
times = st.lists(st.integers(0, 10**13), max_size=60).map(latencies)
many = st.lists(st.integers(1, 2000), min_size=1, max_size=12).flatmap(
    lambda found: st.tuples(
        st.just(found), st.lists(st.integers(1, 200), min_size=len(found), max_size=len(found))
    )
)
"""Times in units that a test chooses, and how often each."""


def made(pairs: tuple[list[int], list[int]], unit: int = 1000) -> Latencies:
    found: dict[int, int] = {}
    for time, number in zip(*pairs, strict=True):
        at = bucket(time * unit)
        found[at] = found.get(at, 0) + number
    return Latencies(tuple(sorted(found.items())))


@given(st.integers(0, 2**41))
def test_a_bucket_stands_for_its_times(ns: int) -> None:
    assert abs(middle(bucket(ns)) - ns) <= ns / 63
    assert bucket(ns) <= bucket(ns + 1) <= bucket(ns) + 1


def test_no_time_is_too_long_or_too_short() -> None:
    assert bucket(-5) == 0
    assert bucket(10**30) == bucket(10**20) == bucket(2**60)


@given(times, times)
def test_what_came_since(one: Latencies, other: Latencies) -> None:
    assert (one + other) - other == one
    assert one + other == other + one
    assert (one + other).count == one.count + other.count
    assert one - one == Latencies()
    # Whatever is given.
    assert all(number > 0 for _, number in (one - other).buckets)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=60), st.floats(0, 1))
def test_quantiles_are_those_of_the_times(found: list[int], share: float) -> None:
    counted = latencies(found)
    at = counted.quantile(share)
    within = sum(middle(bucket(ns)) <= at for ns in found)
    assert within >= share * len(found)
    assert counted.above(at) == len(found) - within
    assert counted.quantile(1.0) >= at


@given(many, st.floats(1, 3))
def test_nothing_is_slower_than_itself(pairs: tuple[list[int], list[int]], ratio: float) -> None:
    assert slower(made(pairs), made(pairs), ratio, CERTAINTY) is None


@given(many, many, st.floats(1, 3), st.integers(1, 4), st.integers(1, 20))
def test_few_answers_decide_nothing(
    pairs: tuple[list[int], list[int]],
    others: tuple[list[int], list[int]],
    ratio: float,
    few: int,
    score: int,
) -> None:
    assert slower(latencies([10**12] * few), made(others), ratio, CERTAINTY) is None
    assert slower(made(pairs), latencies([1] * score), ratio, CERTAINTY) is None
    assert slower(made(pairs), Latencies(), ratio, CERTAINTY) is None
    assert slower(Latencies(), made(others), ratio, CERTAINTY) is None


@given(many, many, st.floats(1, 3))
@example(([3], [60]), ([1], [60]), 2.985)
def test_the_unit_of_time_does_not_matter(
    pairs: tuple[list[int], list[int]], others: tuple[list[int], list[int]], ratio: float
) -> None:
    # Octaves are cut alike.
    one = slower(made(pairs, 1024), made(others, 1024), ratio, CERTAINTY)
    two = slower(made(pairs, 2**20), made(others, 2**20), ratio, CERTAINTY)
    assert (one is None) == (two is None)


@given(many, many, st.floats(1, 3), st.integers(0, 11), st.integers(1, 2000))
def test_who_gets_faster_is_not_held_to_be_slower(
    pairs: tuple[list[int], list[int]],
    others: tuple[list[int], list[int]],
    ratio: float,
    which: int,
    less: int,
) -> None:
    found = slower(made(pairs), made(others), ratio, CERTAINTY)
    faster = list(pairs[0])
    faster[which % len(faster)] = max(1, faster[which % len(faster)] - less)
    better = slower(made((faster, pairs[1])), made(others), ratio, CERTAINTY)
    longer = slower(made(pairs), made(others), ratio * 1.5, CERTAINTY)
    if found is None:
        assert better is None
        assert longer is None


@given(many, st.floats(1, 3))
def test_who_takes_much_longer_is_found_out(
    pairs: tuple[list[int], list[int]], ratio: float
) -> None:
    # Forty answers, all of them beyond whatever the others took.
    late = latencies([2000 * 1000 * 4 * 40] * 40)
    old = made((pairs[0], [number * 40 for number in pairs[1]]))
    assert slower(late, old, ratio, CERTAINTY) is not None


def test_a_late_tail_is_found_out_though_the_median_is_the_same() -> None:
    old = latencies([1_000_000] * 2000)
    new = latencies([1_000_000] * 900 + [10_000_000] * 100)
    found = slower(new, old, 1.5, CERTAINTY)
    assert found is not None
    assert (found.share, round(found.ns / 1e6), round(found.other_ns / 1e6)) == (0.95, 10, 1)
    # Five of a hundred may be late by chance.
    assert slower(latencies([1_000_000] * 94 + [10_000_000] * 6), old, 1.5, CERTAINTY) is None


def test_equals_are_not_told_apart() -> None:
    """Heavy tails, as of a busy device: 1,000 comparisons of samples of one distribution."""
    chance = random.Random(7)

    def sample(count: int) -> Latencies:
        return latencies([int(1e5 * chance.paretovariate(1.1)) for _ in range(count)])

    for _ in range(1000):
        new, old = sample(chance.choice((50, 200))), sample(chance.choice((60, 400)))
        assert slower(new, old, 1.0, CERTAINTY) is None
