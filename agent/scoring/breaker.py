"""When to stop asking a backend that fails: a circuit breaker as pure transitions."""

from __future__ import annotations

from dataclasses import dataclass, replace

FAILURES_TO_OPEN = 3
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0


@dataclass(frozen=True, slots=True)
class Breaker:
    """Closed while `open_until` is 0. Times are monotonic seconds.

    `FAILURES_TO_OPEN` failures in a row open it for `pause`; after that one request at a time is
    let through as a trial, and each failed trial doubles the pause.
    """

    failures: int = 0
    pause: float = FIRST_PAUSE
    open_until: float = 0.0


CLOSED = Breaker()


def allows(breaker: Breaker, now: float) -> bool:
    return now >= breaker.open_until


def after_trial_begins(breaker: Breaker, now: float) -> Breaker:
    """Keeps others out while one request finds out whether the backend is back."""
    if breaker.open_until == 0.0:
        return breaker
    return replace(breaker, open_until=now + breaker.pause)


def after_overdue(breaker: Breaker, now: float) -> Breaker:
    """Open at once: it let a request wait until another backend had to answer it."""
    return after_failure(replace(breaker, failures=FAILURES_TO_OPEN), now)


def after_failure(breaker: Breaker, now: float) -> Breaker:
    failures = breaker.failures + 1
    if failures < FAILURES_TO_OPEN:
        return replace(breaker, failures=failures)
    pause = breaker.pause if breaker.open_until == 0.0 else min(breaker.pause * 2, LONGEST_PAUSE)
    return Breaker(failures, pause, now + pause)
