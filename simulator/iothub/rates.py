"""How much a hub does per second before it answers 429."""

from __future__ import annotations

from dataclasses import dataclass

from ...agent.clock import Clock
from .errors import HubError


@dataclass(frozen=True, slots=True)
class RateLimits:
    """Operations per second of the whole hub; None is no limit. The defaults are one S1 unit's."""

    twin_reads: float | None = 100.0
    twin_updates: float | None = 50.0


class Throttle:
    """Token buckets that hold one second's worth. `limits` may be replaced at any time."""

    def __init__(self, limits: RateLimits, clock: Clock) -> None:
        self.limits = limits
        self._clock = clock
        self._levels: dict[str, tuple[float, float]] = {}

    def check(self, name: str) -> None:
        """Counts an operation (a field of the limits). Raises HubError 429."""
        rate: float | None = getattr(self.limits, name)
        if rate is None:
            return
        now = self._clock.monotonic()
        level, then = self._levels.get(name, (rate, now))
        level = min(rate, level + (now - then) * rate)
        if level < 1:
            self._levels[name] = level, now
            what = name.replace("_", " ")
            raise throttled(f"more than {rate:g} {what} per second in this hub: slow down")
        self._levels[name] = level - 1, now


def throttled(message: str) -> HubError:
    return HubError(429, "ThrottlingException", message)
