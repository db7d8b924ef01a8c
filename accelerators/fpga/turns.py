"""Turns at the fabric between threads, by the rules of `schedule`."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import BackendUnavailable, DeadlineExceeded
from . import schedule
from .schedule import Fabric, Grant, Overlay, Policy, Prefetch, Waiting

QUEUE_LIMIT = 64


@dataclass(eq=False, slots=True)
class _Place:
    """Somebody in line; `woken` is set when it is their turn, or never will be."""

    woken: threading.Event = field(default_factory=threading.Event)
    error: BackendUnavailable | DeadlineExceeded | None = None


@dataclass(frozen=True, slots=True)
class TurnCounters:
    """`swaps_avoided`: turns for the loaded overlay ahead of an older request of another one.

    `refused` requests went to the CPU, because configuring takes longer than they had time. `busy`
    is how many seconds somebody had the fabric, whatever for.
    """

    swaps: int = 0
    swaps_avoided: int = 0
    refused: int = 0
    prefetches: int = 0
    expired: int = 0
    waiting: int = 0
    busy: float = 0.0


class Turns:
    """One at a time has the fabric. `prefetch` configures an overlay, with the turn held."""

    def __init__(
        self,
        prefetch: Callable[[Overlay], None],
        policy: Policy | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prefetch = prefetch
        self._policy = policy or Policy()
        self._monotonic = monotonic
        self._guard = threading.Lock()
        self._bell = threading.Condition(self._guard)
        self._fabric = Fabric()
        self._places: dict[int, _Place] = {}
        self._busy_since: float | None = None
        self._next_ticket = 0
        self._until = self._alarm = math.inf
        self._idle_since: float | None = None
        self._busy = 0.0
        self._swaps = self._avoided = self._refused = self._prefetches = self._expired = 0
        self._fetching: Overlay | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Keep the time of decisions, and configure what is wished for, in the background."""
        self._thread = threading.Thread(target=self._fetch, name="fabric-turns", daemon=True)
        self._thread.start()

    def close(self, seconds: float = 5.0) -> bool:
        """Refuse all to come; whether whoever has the fabric gave it back in time."""
        with self._guard:
            self._closed = True
            for ticket in list(self._places):
                self._end(ticket, BackendUnavailable("the fabric process is ending"))
            self._bell.notify_all()
            free = self._bell.wait_for(lambda: self._busy_since is None, seconds)
        if self._thread is not None:
            self._thread.join(seconds)
        return free

    @property
    def busy_since(self) -> float | None:
        """When the turn in progress began."""
        return self._busy_since

    @property
    def counters(self) -> TurnCounters:
        with self._guard:
            return TurnCounters(
                self._swaps, self._avoided, self._refused, self._prefetches,
                self._expired, len(self._places), self._busy,
            )  # fmt: skip

    def enter(self, overlay: Overlay | None, deadline: float) -> bool:
        """Wait for the fabric; whether `overlay` has to be configured. `leave` must follow.

        Raises DeadlineExceeded, and BackendUnavailable when the deadline cannot be met or too
        many wait.
        """
        with self._guard:
            now = self._monotonic()
            fabric = self._fabric
            if (
                self._busy_since is None
                and overlay == fabric.loaded
                and not (fabric.waiting or fabric.demands or self._closed)
                and now < deadline
            ):
                self._busy_since = now
                return False
            if self._closed:
                raise BackendUnavailable("the fabric process is ending")
            if len(self._places) >= QUEUE_LIMIT:
                raise BackendUnavailable(f"{QUEUE_LIMIT} requests wait for the fabric already")
            if self._idle_since is not None:
                fabric = schedule.worked(fabric, fabric.loaded, self._idle_since)
                self._idle_since = None
            self._next_ticket += 1
            ticket, place = self._next_ticket, _Place()
            self._places[ticket] = place
            self._fabric = schedule.arrived(fabric, Waiting(ticket, overlay, now, deadline))
            self._advance(now)
            pause = min(deadline, self._until) - now
        while not place.woken.wait(min(max(0.0, pause), threading.TIMEOUT_MAX)):
            with self._guard:
                now = self._monotonic()
                self._advance(now)
                pause = min(deadline, self._until) - now
        if place.error is not None:
            raise place.error
        with self._guard:
            return overlay is not None and overlay != self._fabric.loaded

    def leave(self, loaded: Overlay | None) -> None:
        """Give the fabric back, with `loaded` in it."""
        with self._guard:
            now = self._monotonic()
            if self._busy_since is not None:
                self._busy += now - self._busy_since
            fabric = self._fabric
            if loaded == fabric.loaded and not (fabric.waiting or fabric.demands or self._closed):
                # Most turns: nothing to decide, so nothing is computed.
                self._busy_since, self._idle_since = None, now
                return
            if loaded is not None and loaded != fabric.loaded:
                self._swaps += 1
            self._fabric = schedule.worked(self._fabric, loaded, now)
            self._busy_since = None
            self._advance(now)
            if self._closed:
                self._bell.notify_all()

    def described(self, overlay: Overlay, static: object) -> None:
        """Note of which design the overlay is a part; None: of none."""
        with self._guard:
            self._fabric = schedule.described(self._fabric, overlay, static)

    def configured(self, overlay: Overlay, seconds: float, *, partial: bool = False) -> None:
        """Note how long configuring took, by whoever has the fabric."""
        with self._guard:
            self._fabric = schedule.configured(self._fabric, overlay, seconds, partial=partial)

    def forget(self, overlay: Overlay) -> None:
        """Nobody has this overlay loaded any more."""
        with self._guard:
            self._fabric = schedule.forgotten(self._fabric, overlay)

    # With the guard held.

    def _advance(self, now: float) -> None:
        for request in schedule.hopeless(self._fabric, self._policy, now):
            if now >= request.deadline or request.overlay is None:
                self._expired += 1
                error: BackendUnavailable | DeadlineExceeded = DeadlineExceeded(
                    "the deadline passed while the request was queued"
                )
            else:
                self._refused += 1
                error = BackendUnavailable(
                    "another overlay has the fabric, and configuring takes longer than the deadline"
                )
                self._fabric = schedule.refused(self._fabric, self._policy, request.overlay, now)
            self._end(request.ticket, error)
        self._fabric = schedule.current(self._fabric, self._policy, now)
        self._until = schedule.next_loss(self._fabric)
        if self._closed:
            return
        if self._busy_since is None:
            self._give(now)
        if self._until < self._alarm:
            self._bell.notify_all()

    def _give(self, now: float) -> None:
        decision = schedule.decide(self._fabric, self._policy, now)
        if isinstance(decision, Grant):
            self._busy_since = now
            # In order of arrival; work on the fabric as such jumps the line and swaps nothing.
            first = self._fabric.waiting[0]
            if first.ticket != decision.ticket and first.overlay != self._fabric.loaded:
                granted = next(w for w in self._fabric.waiting if w.ticket == decision.ticket)
                self._avoided += granted.overlay == self._fabric.loaded
            self._end(decision.ticket, None)
        elif isinstance(decision, Prefetch):
            self._busy_since = now
            self._fetching = decision.overlay
            self._fabric = schedule.answered(self._fabric, decision.overlay)
            self._bell.notify_all()
        else:
            self._until = min(self._until, decision.until)

    def _end(self, ticket: int, error: BackendUnavailable | DeadlineExceeded | None) -> None:
        self._fabric = schedule.without(self._fabric, (ticket,))
        place = self._places.pop(ticket)
        place.error = error
        place.woken.set()

    # The thread that keeps the time, and configures what is wished for.

    def _fetch(self) -> None:
        while True:
            with self._guard:
                while self._fetching is None and not self._closed:
                    now = self._monotonic()
                    if now >= self._until:
                        self._advance(now)
                        continue
                    self._alarm = self._until
                    self._bell.wait(min(self._until - now, threading.TIMEOUT_MAX))
                    # Nobody needs to ring while this thread is up.
                    self._alarm = -math.inf
                overlay, self._fetching = self._fetching, None
                if overlay is None:
                    return
                self._prefetches += 1
            self._prefetch(overlay)
