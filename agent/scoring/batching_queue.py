"""The requests of one model that wait for their turn, in order. Not thread-safe."""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Sequence

from .batching import BatchConfig, Waiting, admit, normalised_priority
from .batching_job import Job


class QueueFull(Exception):
    """There is no room for the newcomer."""


class Queue:
    """`waiting` is sorted by `Waiting.order`, as `batching.decide` wants it."""

    __slots__ = ("_arrivals", "_jobs", "waiting")

    def __init__(self) -> None:
        self.waiting: list[Waiting] = []
        self._jobs: dict[int, Job] = {}
        self._arrivals = 0

    def put(
        self, job: Job, alike: Hashable, priority: int, config: BatchConfig, *, urgent: bool
    ) -> Job | None:
        """Who is turned away to make room for `job`. Raises QueueFull."""
        queue = self.waiting
        number = self._arrivals = self._arrivals + 1
        rank = normalised_priority(priority, config.priority)
        waiting = Waiting(number, job.items, job.arrived, alike, job.deadline, rank, urgent)
        shed = None
        if len(queue) >= config.max_queue:
            admission = admit(queue, waiting, config)
            if not admission.admitted:
                raise QueueFull
            if admission.shed is not None:
                queue.remove(admission.shed)
                shed = self._jobs.pop(admission.shed.number)
        job.waiting = waiting
        self._jobs[number] = job
        if not queue or queue[-1].priority <= rank:
            queue.append(waiting)
        else:
            insort(queue, waiting, key=_order)
        return shed

    def take(self, chosen: Sequence[Waiting]) -> tuple[Job, ...]:
        """Those leave the queue."""
        if not chosen:
            return ()
        jobs = self._jobs
        if len(chosen) == len(self.waiting):
            self.waiting = []
        else:
            numbers = {waiting.number for waiting in chosen}
            self.waiting = [one for one in self.waiting if one.number not in numbers]
        return tuple([jobs.pop(waiting.number) for waiting in chosen])

    def withdraw(self, job: Job) -> bool:
        """Whether it was still waiting."""
        waiting = job.waiting
        if waiting is None or self._jobs.pop(waiting.number, None) is None:
            return False
        self.waiting.remove(waiting)
        return True

    def clear(self) -> tuple[Job, ...]:
        return self.take(tuple(self.waiting))


def _order(waiting: Waiting) -> tuple[int, int]:
    return waiting.order
