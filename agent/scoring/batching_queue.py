"""The requests of one model that wait for their turn, in order. Not thread-safe."""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Sequence

from .batching import BatchConfig, admit, normalised_priority
from .batching_job import Job


class QueueFull(Exception):
    """There is no room for the newcomer."""


class Queue:
    """`waiting` is sorted by `Waiting.order`, as `batching.decide` wants it."""

    __slots__ = ("_arrivals", "waiting")

    def __init__(self) -> None:
        self.waiting: list[Job] = []
        self._arrivals = 0

    def put(
        self, job: Job, alike: Hashable, priority: int, config: BatchConfig, *, urgent: bool
    ) -> Job | None:
        """Who is turned away to make room for `job`. Raises QueueFull."""
        queue = self.waiting
        job.number = self._arrivals = self._arrivals + 1
        job.alike = alike
        job.urgent = urgent
        job.priority = normalised_priority(priority, config.priority)
        shed = None
        if len(queue) >= config.max_queue:
            admission = admit(queue, job, config)
            if not admission.admitted:
                raise QueueFull
            shed = admission.shed
            if shed is not None:
                self.withdraw(shed)
        job.queued = True
        if not queue or queue[-1].priority <= job.priority:
            queue.append(job)
        else:
            insort(queue, job, key=_order)
        return shed

    def take(self, chosen: Sequence[Job]) -> Sequence[Job]:
        """Those leave the queue."""
        if not chosen:
            return ()
        for job in chosen:
            job.queued = False
        if len(chosen) == len(self.waiting):
            self.waiting = []
        else:
            self.waiting = [job for job in self.waiting if job.queued]
        return chosen

    def withdraw(self, job: Job) -> bool:
        """Whether it was still waiting."""
        if not job.queued:
            return False
        job.queued = False
        self.waiting.remove(job)
        return True

    def clear(self) -> Sequence[Job]:
        return self.take(tuple(self.waiting))


def _order(job: Job) -> tuple[int, int]:
    return job.priority, job.number
