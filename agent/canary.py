"""Automatic rollout of a new version: a state machine over what old and new version answered.

A canary gets its endpoint's requests in steps. A step ends well when it lasted long enough, the
canary answered enough requests in it, and it neither failed more often nor took longer than the
version beside it by more than the rules allow and chance explains. One that does worse gets no
requests any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from math import sqrt

import msgspec

from .latencies import Latencies, slower

# Standard deviations: few failures or late answers among few requests are no verdict, and a canary
# is looked at often.
_CERTAIN = 3.5


class CanaryRules(msgspec.Struct, frozen=True):
    """`steps`: rising percentages. `max_error_delta`: by how much its rate of failed requests
    (0 to 1) may exceed the other's, beyond what chance explains; `max_latency_ratio`: its times
    of an answer against the other's; `min_requests`: answered in a step before it is judged."""

    steps: tuple[int, ...]
    step_seconds: float = 60.0
    max_error_delta: float = 0.01
    max_latency_ratio: float = 1.5
    min_requests: int = 50


class CanaryPhase(str, Enum):
    RUNNING = "running"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled-back"


@dataclass(frozen=True, slots=True)
class Counts:
    """What one instance answered since it was loaded; `times` are those of its successes, as far as
    they were kept."""

    successes: int = 0
    failures: int = 0
    times: Latencies = field(default_factory=Latencies)

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            self.successes - other.successes,
            self.failures - other.failures,
            self.times - other.times,
        )

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.successes + other.successes,
            self.failures + other.failures,
            self.times + other.times,
        )

    @property
    def requests(self) -> int:
        return self.successes + self.failures

    @property
    def error_rate(self) -> float:
        return self.failures / self.requests if self.requests else 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at both sides. `boot_id`: of the process that counts; `now`: monotonic seconds."""

    boot_id: str
    now: float
    canary: Counts
    stable: Counts


@dataclass(frozen=True, slots=True)
class Canary:
    """How far it is. `start`: the sample that the present step is measured from, None before the
    first one; `beside`: what the other version answered in the step before, to compare with where
    it gets no requests any more; `reason`: why it was rolled back."""

    step: int = 0
    phase: CanaryPhase = CanaryPhase.RUNNING
    reason: str = ""
    start: Sample | None = None
    beside: Counts = Counts()


def percent(rules: CanaryRules, canary: Canary) -> int:
    """Its share of the endpoint's requests."""
    if canary.phase is CanaryPhase.ROLLED_BACK:
        return 0
    if canary.phase is CanaryPhase.PROMOTED:
        return rules.steps[-1]
    return rules.steps[min(canary.step, len(rules.steps) - 1)]


def advance(rules: CanaryRules, canary: Canary, sample: Sample) -> Canary:
    """The next state. Only a sample that was taken while the present share is routed may be given.

    A restart of the counting process begins the step's measurement anew.
    """
    if canary.phase is not CanaryPhase.RUNNING:
        return canary
    start = canary.start
    if start is None or start.boot_id != sample.boot_id or _went_back(start, sample):
        return replace(canary, start=sample)
    new, old = sample.canary - start.canary, sample.stable - start.stable
    if new.requests < rules.min_requests:
        return canary
    enough = old.requests >= rules.min_requests
    reason = _worse(rules, new, old if enough else canary.beside)
    if reason:
        return Canary(canary.step, CanaryPhase.ROLLED_BACK, reason)
    if sample.now - start.now < rules.step_seconds:
        return canary
    if canary.step + 1 >= len(rules.steps):
        return Canary(canary.step, CanaryPhase.PROMOTED)
    return Canary(canary.step + 1, beside=old if enough else canary.beside)


def _worse(rules: CanaryRules, new: Counts, old: Counts) -> str:
    """Why the canary's answers are not good enough; "" when they are."""
    allowed = old.error_rate + rules.max_error_delta + _CERTAIN * _deviation(new, old)
    if new.error_rate > allowed:
        return (
            f"{new.failures} of {new.requests} requests failed ({new.error_rate:.1%}), beside it "
            f"{old.error_rate:.1%}; allowed are {allowed:.1%}"
        )
    late = slower(new.times, old.times, rules.max_latency_ratio, _CERTAIN)
    if late is not None:
        return (
            f"{late.share:.0%} of the answers took up to {late.ns / 1e6:.3g} ms, beside it "
            f"{late.other_ns / 1e6:.3g} ms; allowed are {rules.max_latency_ratio:g} times as much"
        )
    return ""


def _deviation(new: Counts, old: Counts) -> float:
    """By how much two rates of failure differ by chance: one standard deviation."""
    if not new.requests or not old.requests:
        return 0.0
    rate = (new.failures + old.failures) / (new.requests + old.requests)
    return sqrt(rate * (1 - rate) * (1 / new.requests + 1 / old.requests))


def _went_back(start: Sample, sample: Sample) -> bool:
    """Whether an instance was loaded anew in between: its counts began again."""
    return any(
        now.successes < then.successes
        or now.failures < then.failures
        or now.times.count < then.times.count
        for now, then in ((sample.canary, start.canary), (sample.stable, start.stable))
    )


def inherited(before: Canary | None) -> Canary:
    """Where an unchanged canary module of a new deployment goes on: a promoted one stays, a running
    one keeps its step; one that was rolled back is given another chance."""
    if before is None or before.phase is CanaryPhase.ROLLED_BACK:
        return Canary()
    return replace(before, start=None)
