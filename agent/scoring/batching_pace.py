"""How long a model's runs take, as far as is known."""

from __future__ import annotations

# Of the newest run in the running average.
_WEIGHT = 0.2
_FORGETTING = 1.05


class Pace:
    """Seconds of a run; 0 before the first one. `fastest` is without what other processes took of
    the time."""

    __slots__ = ("fastest", "mean")

    def __init__(self) -> None:
        self.mean = 0.0
        self.fastest = 0.0

    def ran(self, seconds: float) -> None:
        self.mean += _WEIGHT * (seconds - self.mean)
        # Forgets slowly, for models that turn slower.
        fastest = self.fastest * _FORGETTING
        self.fastest = min(seconds, fastest) if fastest else seconds
