"""A request under way, what runs it, and where its caller finds the answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol

from ...accelerators.tensors import Array
from .errors import Code, ScoringError

log = logging.getLogger(__name__)

Results = dict[str, Array]
Done = Callable[[Results | ScoringError], None]


class Execute(Protocol):
    """Runs the model; `requests`: how many it answers with that. Raises ScoringError."""

    def __call__(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        deadline: float | None,
        requests: int,
    ) -> Results: ...


class Job:
    """A request under way, until `finish` hands its results or its error to whoever waits.

    `arrived`: of the runner's clock. `counted`: the runner tells the statistics when it succeeds.
    The queue has it as `batching.Waiting` and sets what is its own to know; `queued` while it does.
    """

    __slots__ = (
        "_done",
        "alike",
        "arrived",
        "counted",
        "deadline",
        "inputs",
        "items",
        "number",
        "outputs",
        "priority",
        "queued",
        "started",
        "urgent",
    )
    alike: Hashable
    number: int
    priority: int
    urgent: bool

    def __init__(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        deadline: float | None,
        items: int,
        arrived: float,
        done: Done,
        *,
        counted: bool = False,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.deadline = deadline
        self.items = items
        self.arrived = arrived
        self.counted = counted
        self.started = 0.0
        self.queued = False
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


def too_late(name: str, *, waited: bool) -> ScoringError:
    when = "before the model was run" if waited else "while the model was running"
    return ScoringError(
        Code.DEADLINE_EXCEEDED,
        f"{name}: the deadline passed {when}; allow more time or send less at once",
    )
