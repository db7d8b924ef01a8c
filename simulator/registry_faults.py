"""What a simulated registry can be made to do wrong."""

from __future__ import annotations

MOST_FAILURES = 100_000


class RegistryFaults:
    """Everything that goes wrong now; `Registry` has the methods that set it."""

    def __init__(self) -> None:
        self.corrupted: set[str] = set()
        self.truncated: dict[str, int] = {}
        self.drop_after: int | None = None
        self._failures: list[int] = []

    def truncate(self, digest: str, at: int) -> None:
        if at < 0:
            raise ValueError(f"a blob cannot be cut at {at}")
        self.truncated[digest] = at

    def fail_next(self, count: int, status: int) -> None:
        if not 0 <= count <= MOST_FAILURES:
            raise ValueError(f"count is from 0 to {MOST_FAILURES}, not {count}")
        if not 400 <= status <= 599:
            raise ValueError(f"status is from 400 to 599, not {status}")
        self._failures += [status] * count

    def failure(self) -> int | None:
        """The status that the next request fails with."""
        return self._failures.pop(0) if self._failures else None

    def heal(self, digest: str | None) -> None:
        if digest is not None:
            self.corrupted.discard(digest)
            self.truncated.pop(digest, None)
            return
        self.corrupted.clear()
        self.truncated.clear()
        self.drop_after = None
        self._failures.clear()
