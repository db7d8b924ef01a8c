"""Which waiting requests run together, and when: pure functions in virtual time.

A request that finds the model idle runs at once; while the model runs, others gather and go
together into its next run. A delay above 0 lets those that gathered wait for more company, never
longer than their deadlines allow.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, Protocol, TypeVar

import msgspec

FIRST_PRIORITY = 1
DEFAULT_PRIORITY = 5
LAST_PRIORITY = 10


class Overflow(Enum):
    """Who is turned away when the queue is full."""

    REJECT = "reject"
    SHED_OLDEST = "shed-oldest"


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """How one model runs its requests. Times in seconds.

    `max_batch`: items of one run; 1 runs requests singly. `max_delay`: how long a request may wait
    for company. `preferred`: sizes to aim at. `max_queue`: requests that may wait. `slots`: runs at
    the same time. `priority`: of requests that name none.
    """

    max_batch: int = 1
    max_delay: float = 0.0
    preferred: tuple[int, ...] = ()
    max_queue: int = 256
    overflow: Overflow = Overflow.REJECT
    slots: int = 1
    priority: int = DEFAULT_PRIORITY


class Queued(Protocol):
    """A request in the queue, as `Waiting` has it."""

    @property
    def number(self) -> int: ...
    @property
    def items(self) -> int: ...
    @property
    def arrived(self) -> float: ...
    @property
    def alike(self) -> Hashable: ...
    @property
    def deadline(self) -> float | None: ...
    @property
    def priority(self) -> int: ...
    @property
    def urgent(self) -> bool: ...


Q = TypeVar("Q", bound=Queued)


class Waiting(msgspec.Struct, frozen=True, gc=False):
    """A request in the queue.

    `number`: its arrival, counted up. `items`: its size along the batch axis. `alike`: only
    requests of equal `alike` can be stacked. `urgent`: it found the model idle, so nothing is
    gained by a delay. `priority`: lower runs first.
    """

    number: int
    items: int
    arrived: float
    alike: Hashable = None
    deadline: float | None = None
    priority: int = DEFAULT_PRIORITY
    urgent: bool = False

    @property
    def order(self) -> tuple[int, int]:
        return self.priority, self.number


class Decision(msgspec.Struct, Generic[Q], frozen=True):
    """`expired`: answer DEADLINE_EXCEEDED without running. `batch`: run now, together and in this
    order. With neither, look again at `again_at`, or when a request arrives (None)."""

    expired: tuple[Q, ...] = ()
    batch: tuple[Q, ...] = ()
    again_at: float | None = None


class Admission(msgspec.Struct, Generic[Q], frozen=True):
    """Whether the newcomer may wait, and who makes room for it."""

    admitted: bool
    shed: Q | None = None


def normalised_priority(priority: int, default: int = DEFAULT_PRIORITY) -> int:
    """0, which clients send for "none", is the default; what is beyond the last is the last."""
    return min(priority, LAST_PRIORITY) if priority >= FIRST_PRIORITY else default


def admit(queue: Sequence[Q], newcomer: Q, config: BatchConfig) -> Admission[Q]:
    """Whether `newcomer` may join `queue`.

    Shedding turns away the oldest of the last priority, unless the newcomer itself comes after it.
    """
    if len(queue) < config.max_queue:
        return Admission(True)
    if config.overflow is Overflow.REJECT or not queue:
        return Admission(False)
    last = max(waiting.priority for waiting in queue)
    if newcomer.priority > last:
        return Admission(False)
    oldest = min((w for w in queue if w.priority == last), key=lambda w: w.number)
    return Admission(True, oldest)


def decide(
    queue: Sequence[Q], now: float, config: BatchConfig, run_seconds: float = 0.0
) -> Decision[Q]:
    """What a free slot does with `queue`, which is sorted by `Waiting.order`.

    `run_seconds`: what a run takes, kept free before the earliest deadline.
    """
    expired = tuple(w for w in queue if w.deadline is not None and w.deadline <= now)
    alive = [w for w in queue if w not in expired] if expired else queue
    if not alive:
        return Decision(expired)
    gathered = _gather(alive, config.max_batch)
    if config.max_delay > 0 and config.max_batch > 1:
        ready_at = _ready_at(gathered, config, run_seconds)
        if now < ready_at and not _is_full(gathered, alive, config):
            earliest = min((w.deadline for w in alive if w.deadline is not None), default=ready_at)
            return Decision(expired, (), min(ready_at, earliest))
    return Decision(expired, tuple(_preferred(gathered, config)))


def _gather(alive: Sequence[Q], max_batch: int) -> list[Q]:
    """The first in line and, in order, who fits with it; one that does not fit ends the batch, so
    that nobody is overtaken by a smaller request."""
    first = alive[0]
    alike, items = first.alike, first.items
    batch = [first]
    for waiting in alive[1:]:
        if items >= max_batch:
            break
        if waiting.alike != alike:
            continue
        items += waiting.items
        if items > max_batch:
            break
        batch.append(waiting)
    return batch


def _ready_at(gathered: Sequence[Queued], config: BatchConfig, run_seconds: float) -> float:
    if any(waiting.urgent for waiting in gathered):
        return float("-inf")
    latest = min(waiting.arrived for waiting in gathered) + config.max_delay
    for waiting in gathered:
        if waiting.deadline is not None:
            latest = min(latest, waiting.deadline - run_seconds)
    return latest


def _is_full(gathered: Sequence[Queued], alive: Sequence[Queued], config: BatchConfig) -> bool:
    items = sum(waiting.items for waiting in gathered)
    if items >= config.max_batch or items in config.preferred:
        return True
    # Somebody like them is left behind: there is no room for it however long they wait.
    alike = sum(waiting.alike == gathered[0].alike for waiting in alive)
    return alike > len(gathered)


def _preferred(gathered: list[Q], config: BatchConfig) -> list[Q]:
    """Cut down to the largest preferred size that the order allows, else everybody."""
    if not config.preferred:
        return gathered
    items = 0
    best = len(gathered)
    for count, waiting in enumerate(gathered, 1):
        items += waiting.items
        if items in config.preferred:
            best = count
    return gathered[:best]
