"""Automatic rollout of a new version: a state machine over what old and new version answered.

A canary gets its endpoint's requests in steps. A step ends well when it lasted long enough, the
canary answered enough requests in it, and it neither failed more often nor took longer than the
version beside it by more than the rules allow. One that does worse gets no requests any more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import msgspec


class CanaryRules(msgspec.Struct, frozen=True):
    """`steps`: rising percentages. `max_error_delta`: by how much its rate of failed requests
    (0 to 1) may exceed the other's; `max_latency_ratio`: its mean time per answer against the
    other's; `min_requests`: answered in a step before it is judged."""

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
    """What one instance answered since it was loaded; `success_ns` of all successes together."""

    successes: int = 0
    failures: int = 0
    success_ns: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            self.successes - other.successes,
            self.failures - other.failures,
            self.success_ns - other.success_ns,
        )

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.successes + other.successes,
            self.failures + other.failures,
            self.success_ns + other.success_ns,
        )

    @property
    def requests(self) -> int:
        return self.successes + self.failures

    @property
    def error_rate(self) -> float:
        return self.failures / self.requests if self.requests else 0.0

    @property
    def mean_ns(self) -> float:
        return self.success_ns / self.successes if self.successes else 0.0


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
    first one; `reason`: why it was rolled back."""

    step: int = 0
    phase: CanaryPhase = CanaryPhase.RUNNING
    reason: str = ""
    start: Sample | None = None


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
    reason = _worse(rules, new, old)
    if reason:
        return Canary(canary.step, CanaryPhase.ROLLED_BACK, reason)
    if sample.now - start.now < rules.step_seconds:
        return canary
    if canary.step + 1 >= len(rules.steps):
        return Canary(canary.step, CanaryPhase.PROMOTED)
    return Canary(canary.step + 1)


def _worse(rules: CanaryRules, new: Counts, old: Counts) -> str:
    """Why the canary's answers are not good enough; "" when they are.

    Beside 100 percent there is nobody to compare with: then its failures are held against none,
    and its time against nothing.
    """
    if new.error_rate > old.error_rate + rules.max_error_delta:
        return (
            f"{new.failures} of {new.requests} requests failed ({new.error_rate:.1%}), beside it "
            f"{old.error_rate:.1%}; allowed are {rules.max_error_delta:.1%} more"
        )
    if new.successes and old.successes and new.mean_ns > old.mean_ns * rules.max_latency_ratio:
        return (
            f"an answer took {new.mean_ns / 1e6:.3g} ms on average, beside it "
            f"{old.mean_ns / 1e6:.3g} ms; allowed are {rules.max_latency_ratio:g} times as much"
        )
    return ""


def _went_back(start: Sample, sample: Sample) -> bool:
    """Whether an instance was loaded anew in between: its counts began again."""
    return (
        sample.canary.requests < start.canary.requests
        or sample.stable.requests < start.stable.requests
    )


def inherited(before: Canary | None) -> Canary:
    """Where an unchanged canary module of a new deployment goes on: a promoted one stays, a running
    one keeps its step; one that was rolled back is given another chance."""
    if before is None or before.phase is CanaryPhase.ROLLED_BACK:
        return Canary()
    return replace(before, start=None)
