"""A request under way, and where its caller finds the answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

from ...accelerators.tensors import Array
from .batching import Waiting
from .errors import ScoringError

log = logging.getLogger(__name__)

Results = dict[str, Array]
Done = Callable[[Results | ScoringError], None]


class Job:
    """A request under way, until `finish` hands its results or its error to whoever waits."""

    __slots__ = ("_done", "deadline", "inputs", "items", "outputs", "started", "waiting")

    def __init__(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        deadline: float | None,
        items: int,
        done: Done,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.deadline = deadline
        self.items = items
        self.started = 0.0
        self.waiting: Waiting | None = None
        self._done: Done | None = done

    def finish(self, value: Results | ScoringError) -> None:
        """The first value counts. Never raises: the others of a batch must get theirs."""
        done, self._done = self._done, None
        if done is None:
            return
        try:
            done(value)
        except Exception:
            # A receiver's defect is its own: the log has it whole, the batch goes on.
            log.exception("whoever waited for an answer could not take it")


class Answer:
    """Where a blocked caller finds its results."""

    __slots__ = ("lock", "value")

    def __init__(self) -> None:
        # A bare lock: an Event costs twice as much, and there is one per request.
        self.lock = threading.Lock()
        self.lock.acquire()
        self.value: Results | ScoringError | None = None

    def set(self, value: Results | ScoringError) -> None:
        self.value = value
        self.lock.release()


def union(jobs: Sequence[Job]) -> Sequence[str] | None:
    """The outputs that the jobs want together; None for all."""
    first = jobs[0].outputs
    if all(job.outputs == first for job in jobs):
        return first
    names: dict[str, None] = {}
    for job in jobs:
        if job.outputs is None:
            return None
        names.update(dict.fromkeys(job.outputs))
    return tuple(names)
