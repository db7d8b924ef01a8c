"""Which points a profile measures, and how one becomes a row of its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .load import Timing
from .report import Phase, Point


@dataclass(frozen=True, slots=True)
class Setting:
    """One point to measure; see `report.Point`."""

    phase: Phase
    backend: str
    threads: int
    batch: int
    concurrency: int
    together: bool = False


class Subject(Protocol):
    """What is profiled."""

    @property
    def backends(self) -> tuple[str, ...]: ...

    @property
    def thread_counts(self) -> dict[str, tuple[int, ...]]:
        """By backend: those that can be tried; (0,) where they are not ours to choose."""

    @property
    def batched(self) -> bool:
        """Whether requests may have several items."""

    @property
    def chooses_batching(self) -> bool:
        """Whether requests can be run both singly and together."""

    def measure(self, setting: Setting, seconds: float) -> Timing: ...


def batch_settings(subject: Subject, sizes: Sequence[int]) -> list[Setting]:
    """Requests of every size, one at a time, with every number of threads."""
    return [
        Setting("batch", backend, threads, size, 1)
        for backend in subject.backends
        for threads in subject.thread_counts[backend]
        for size in (sizes if subject.batched else [1])
    ]


def concurrency_settings(
    subject: Subject, threads: dict[str, int], callers: Sequence[int]
) -> list[Setting]:
    """Requests of one item from more and more callers, run singly and, where possible, together."""
    ways = (False, True) if subject.chooses_batching and subject.batched else (False,)
    return [
        Setting("concurrency", backend, threads[backend], 1, count, together)
        for backend in subject.backends
        for together in ways
        for count in callers
    ]


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4 ... and `most` itself."""
    sizes = [1]
    while sizes[-1] * 2 <= most:
        sizes.append(sizes[-1] * 2)
    return sizes if sizes[-1] == most else [*sizes, most]


def point(setting: Setting, timing: Timing) -> Point:
    count = len(timing.times)
    rate = count / timing.seconds if timing.seconds else 0.0
    cpu = timing.cpu
    return Point(
        phase=setting.phase,
        backend=setting.backend,
        threads=setting.threads,
        batch=setting.batch,
        concurrency=setting.concurrency,
        together=setting.together,
        seconds=round(timing.seconds, 3),
        requests=count,
        requests_per_second=rate,
        items_per_second=rate * setting.batch,
        mean_ms=1000 * sum(timing.times) / count if count else 0.0,
        p50_ms=1000 * timing.percentile(50),
        p90_ms=1000 * timing.percentile(90),
        p99_ms=1000 * timing.percentile(99),
        cpu_ms=None if cpu is None or not count else 1000 * cpu / count,
        cores=None if cpu is None or not timing.seconds else cpu / timing.seconds,
        errors=timing.errors,
        error=timing.error,
    )
