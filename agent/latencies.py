"""How long answers took, as counts over buckets of time, and whether some took longer than others.

A bucket is a thirty-second of an octave of nanoseconds: its middle is within 1.6 % of every time in
it. Counts can be taken away from each other, so what happened between two looks is known, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt

_BITS = 5
_STEPS = 1 << _BITS
_LAST = (36 << _BITS) + 2 * _STEPS - 1
"""From 72 minutes on."""

QUANTILES = (0.5, 0.95)
"""The ordinary answer, and the late one that users complain about."""


def bucket(ns: int) -> int:
    """The bucket of a time; rises with it."""
    shift = ns.bit_length() - _BITS - 1
    if shift <= 0:
        return max(ns, 0)
    return min((shift << _BITS) + (ns >> shift), _LAST)


def middle(number: int) -> float:
    """The time in nanoseconds that stands for a bucket."""
    if number < 2 * _STEPS:
        return float(number)
    # So that octaves are cut alike: twice the time has exactly twice the middle.
    return ((number & (_STEPS - 1)) + _STEPS + 0.5) * (1 << ((number >> _BITS) - 1))


@dataclass(frozen=True, slots=True)
class Latencies:
    """(bucket, how many) in rising order, without empty buckets."""

    buckets: tuple[tuple[int, int], ...] = ()

    @property
    def count(self) -> int:
        return sum(number for _, number in self.buckets)

    def __add__(self, other: Latencies) -> Latencies:
        return _merged(self, other, 1)

    def __sub__(self, other: Latencies) -> Latencies:
        """What came since `other`; never below nothing, whatever is given."""
        return _merged(self, other, -1)

    def quantile(self, share: float) -> float:
        """The least time in nanoseconds within which `share` of the answers came; 0 of none."""
        wanted, seen = share * self.count, 0
        for number, many in self.buckets:
            seen += many
            if seen >= wanted:
                return middle(number)
        return middle(self.buckets[-1][0]) if self.buckets else 0.0

    def above(self, ns: float) -> int:
        """How many took longer."""
        return sum(many for number, many in self.buckets if middle(number) > ns)


def latencies(times: Iterable[int]) -> Latencies:
    """Of times in nanoseconds."""
    found: dict[int, int] = {}
    for ns in times:
        number = bucket(ns)
        found[number] = found.get(number, 0) + 1
    return Latencies(tuple(sorted(found.items())))


@dataclass(frozen=True, slots=True)
class Slower:
    """At `share` of the answers, one side needs `ns`, the other `other_ns`."""

    share: float
    ns: float
    other_ns: float


def slower(new: Latencies, old: Latencies, ratio: float, certainty: float) -> Slower | None:
    """Where `new` certainly takes more than `ratio` times as long as `old`; None where it may not.

    At the median and at the 95th percentile: `old`'s is taken as late as chance may have made it
    look early, and more of `new` must lie beyond `ratio` times that than chance puts there. No
    shape of either is assumed, single late answers decide nothing, and neither do too few.
    """
    for share in QUANTILES:
        within = share * old.count + _chance(share, old.count, certainty)
        if within >= old.count:
            # No answer of the old ones is late enough to be sure.
            continue
        beyond = new.above(old.quantile(within / old.count) * ratio)
        if beyond > (1 - share) * new.count + _chance(share, new.count, certainty):
            return Slower(share, new.quantile(share), old.quantile(share))
    return None


def _chance(share: float, count: int, certainty: float) -> float:
    """By how many of `count` answers a share of them may be off, with the probability of
    `certainty` standard deviations at most (Bernstein's inequality, which holds for any number)."""
    rarity = certainty**2 / 2
    return rarity / 3 + sqrt(rarity**2 / 9 + 2 * rarity * count * share * (1 - share))


def _merged(one: Latencies, other: Latencies, sign: int) -> Latencies:
    found = dict(one.buckets)
    for number, many in other.buckets:
        found[number] = found.get(number, 0) + sign * many
    return Latencies(tuple(sorted((number, many) for number, many in found.items() if many > 0)))
