"""How long a model's runs take, as far as is known."""

from __future__ import annotations

# Of the newest run in the running average.
_WEIGHT = 0.2
_FORGETTING = 1.05
_SIZES = 24


class Pace:
    """Seconds of a run; `mean` is 0 before the first one."""

    __slots__ = ("_fastest", "mean")

    def __init__(self) -> None:
        self.mean = 0.0
        # By size, doubled from one to the next; without what other processes took of the time.
        self._fastest = [0.0] * _SIZES

    def ran(self, seconds: float, items: int = 1) -> None:
        self.mean += _WEIGHT * (seconds - self.mean)
        size = min(items.bit_length(), _SIZES - 1)
        # Forgets slowly, for models that turn slower.
        fastest = self._fastest[size] * _FORGETTING
        self._fastest[size] = min(seconds, fastest) if fastest else seconds

    def expected(self, items: int) -> float:
        """Of a run with so many items, if others do not disturb it: at most in proportion to a
        smaller one. 0 where nothing is known."""
        size = min(items.bit_length(), _SIZES - 1)
        known = self._fastest[size]
        smaller = size
        while not known and smaller:
            smaller -= 1
            known = self._fastest[smaller] * float(2 ** (size - smaller))
        return known
