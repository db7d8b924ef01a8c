"""Time as a seam: the only module that reads the clocks of the machine."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds since an arbitrary point; never goes back. For intervals and deadlines."""

    def now(self) -> datetime:
        """Wall-clock time with the UTC zone. For people and certificates, never for intervals."""


class SystemClock:
    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> datetime:
        return datetime.now(timezone.utc)
