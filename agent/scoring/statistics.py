"""What a loaded model did, counted the way Triton counts it.

Source: Triton's statistics extension (`ModelStatistics`) and its metrics `nv_inference_*`. Times
are nanoseconds. A request with a batch of 8 items counts one success and 8 inferences; an execution
is one run of the model, whatever it carried.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..clock import SystemClock
from ..latencies import Latencies, bucket
from .errors import Code

# Clients choose the sizes: beyond this many, executions are counted in the totals only.
_MOST_SIZES = 64
_OTHER_SIZES = -1


@dataclass(frozen=True, slots=True)
class Duration:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Executions that carried one and the same number of items."""

    size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment. `last_inference`: milliseconds since 1970, 0 for never. `pending`: requests that
    wait for their turn. `fail` has the failures of every code together, `failures` each."""

    success: Duration = Duration()
    fail: Duration = Duration()
    failures: Mapping[Code, int] = field(default_factory=dict)
    queue: Duration = Duration()
    compute_input: Duration = Duration()
    compute_infer: Duration = Duration()
    compute_output: Duration = Duration()
    inference_count: int = 0
    execution_count: int = 0
    last_inference: int = 0
    pending: int = 0
    batches: tuple[BatchStatistics, ...] = ()


class Statistics:
    """Counts of one instance. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clock = SystemClock()
        self._success = self._success_ns = 0
        self._fail_ns = 0
        self._failures: dict[Code, int] = {}
        self._queue_ns = 0
        self._inferences = 0
        self._last: float | None = None
        # How often answers took how long; kept where versions are compared.
        self._times: dict[int, int] | None = None
        # items -> executions, their requests, and ns of stacking, running and splitting.
        self._batches: dict[int, list[int]] = {}

    def succeeded(self, ns: int, queue_ns: int, items: int, requests: int = 1) -> None:
        """Requests were answered after `ns`, of which they waited `queue_ns`, all together."""
        with self._lock:
            self._success += requests
            self._success_ns += ns
            if self._times is not None:
                # Those that are answered together took about as long as each other.
                self._note_times(self._times, ns // requests, requests)
            self._queue_ns += queue_ns
            self._inferences += items
            self._last = self._clock.monotonic()

    def failed(self, code: Code, ns: int) -> None:
        with self._lock:
            self._failures[code] = self._failures.get(code, 0) + 1
            self._fail_ns += ns

    def executed(
        self, items: int, requests: int, input_ns: int, infer_ns: int, output_ns: int
    ) -> None:
        """The model ran once for `requests` requests with `items` items together."""
        with self._lock:
            self._executed(items, requests, input_ns, infer_ns, output_ns)

    def answered_alone(self, items: int, ns: int, infer_ns: int) -> None:
        """One request was run at once and alone: `succeeded` and `executed` in one."""
        with self._lock:
            self._success += 1
            self._success_ns += ns
            if self._times is not None:
                self._note_times(self._times, ns, 1)
            self._inferences += items
            self._last = self._clock.monotonic()
            self._executed(items, 1, 0, infer_ns, 0)

    def keep_times(self) -> None:
        """Count from now on how long answers take. Idempotent."""
        with self._lock:
            if self._times is None:
                self._times = {}

    def times(self) -> Latencies:
        """How long answers took since `keep_times`."""
        with self._lock:
            return Latencies(tuple(sorted((self._times or {}).items())))

    @staticmethod
    def _note_times(times: dict[int, int], ns: int, requests: int) -> None:
        number = bucket(ns)
        times[number] = times.get(number, 0) + requests

    def _executed(
        self, items: int, requests: int, input_ns: int, infer_ns: int, output_ns: int
    ) -> None:
        counts = self._batches.get(items)
        if counts is None:
            if len(self._batches) >= _MOST_SIZES:
                items = _OTHER_SIZES
            counts = self._batches.setdefault(items, [0, 0, 0, 0, 0])
        counts[0] += 1
        counts[1] += requests
        counts[2] += input_ns
        counts[3] += infer_ns
        counts[4] += output_ns

    def snapshot(self, pending: int = 0) -> Snapshot:
        with self._lock:
            failed = sum(self._failures.values())
            columns = zip(*self._batches.values(), strict=True)
            executions, requests, *spent = [sum(column) for column in columns] or [0] * 5
            return Snapshot(
                success=Duration(self._success, self._success_ns),
                fail=Duration(failed, self._fail_ns),
                failures=dict(self._failures),
                queue=Duration(self._success, self._queue_ns),
                compute_input=Duration(requests, spent[0]),
                compute_infer=Duration(requests, spent[1]),
                compute_output=Duration(requests, spent[2]),
                inference_count=self._inferences,
                execution_count=executions,
                last_inference=self._last_inference(),
                pending=pending,
                batches=tuple(
                    BatchStatistics(size, *(Duration(counts[0], ns) for ns in counts[2:]))
                    for size, counts in sorted(self._batches.items())
                    if size != _OTHER_SIZES
                ),
            )

    def _last_inference(self) -> int:
        if self._last is None:
            return 0
        ago = self._clock.monotonic() - self._last
        return int((self._clock.now().timestamp() - ago) * 1000)


@dataclass(frozen=True, slots=True)
class MirrorSnapshot:
    """What became of the copies an instance got. `largest`: difference between two answers."""

    compared: int = 0
    differing: int = 0
    failed: int = 0
    dropped: int = 0
    largest: float = 0.0


class MirrorStatistics:
    """Counts of the copies one instance got. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = MirrorSnapshot()

    def compared(self, largest: float, *, differs: bool) -> None:
        with self._lock:
            old = self._counts
            self._counts = replace(
                old,
                compared=old.compared + 1,
                differing=old.differing + differs,
                largest=max(old.largest, largest),
            )

    def failed(self) -> None:
        with self._lock:
            self._counts = replace(self._counts, failed=self._counts.failed + 1)

    def dropped(self) -> None:
        with self._lock:
            self._counts = replace(self._counts, dropped=self._counts.dropped + 1)

    def snapshot(self) -> MirrorSnapshot:
        return self._counts
