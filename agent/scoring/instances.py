"""A loaded model: its sessions in order of preference, and who is using them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from ...accelerators.backend import Session, Waiting
from ...accelerators.errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    InvalidTensor,
)
from ...accelerators.tensors import Array, TensorSpec
from . import breaker as circuit
from .batching import BatchConfig
from .batching_choice import has_batch_axis
from .batching_runner import BatchRunner
from .errors import Code, ScoringError
from .statistics import MirrorStatistics, Statistics

# Longer runs would keep an event loop from its other clients.
_SHORT_SECONDS = 0.0005


class State(Enum):
    LOADED = "loaded"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class BackendReport:
    """What one backend of an instance did. `fallbacks`: requests it passed on to the next."""

    name: str
    healthy: bool
    detail: str
    requests: int
    failures: int
    fallbacks: int
    breaker_open: bool = False


class Member:
    """One session of an instance, with its breaker and counts.

    `proven`: whether its answers may be given out, because it passed the probe. `prompt`: whether
    it computes at once, and never hangs.
    """

    def __init__(
        self, session: Session, variant: str, now: Callable[[], float], *, proven: bool = True
    ) -> None:
        self.session = session
        self.variant = variant
        self.name = session.backend
        own = self.name in ("cpu", "numpy")
        self.prompt = own and not (isinstance(session, Waiting) and session.may_wait)
        self.proven = proven
        self._now = now
        self._lock = threading.Lock()
        self._breaker = circuit.CLOSED
        self._detail = ""
        self._requests = 0
        self._failures = 0
        self._fallbacks = 0
        self._took = 0.0

    @property
    def usable(self) -> bool:
        """Whether it is there and may answer, on probation or not."""
        return self.proven and self.session.healthy

    def allowed(self) -> bool:
        """Whether to ask it now; a trial after a pause is granted to one caller only."""
        if not self.usable:
            return False
        if self._breaker is circuit.CLOSED:
            return True
        with self._lock:
            now = self._now()
            if not circuit.allows(self._breaker, now):
                return False
            self._breaker = circuit.after_trial_begins(self._breaker, now)
            return True

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        deadline: float | None,
        requests: int = 1,
    ) -> dict[str, Array]:
        """As `Session.run`, for `requests` requests at once; counts, and keeps the breaker."""
        started = self._now()
        try:
            results = self.session.run(inputs, outputs, deadline)
        except BackendError as error:
            with self._lock:
                self._requests += requests
                if not isinstance(error, InvalidTensor):
                    self._failures += requests
                    self._detail = str(error)
                if isinstance(error, BackendUnavailable):
                    self._breaker = circuit.after_failure(self._breaker, self._now())
                elif not isinstance(error, DeadlineExceeded):
                    # It answered, if only with an error: the backend itself is there.
                    self._breaker = circuit.CLOSED
            raise
        with self._lock:
            self._requests += requests
            took = self._now() - started
            # Up at once, down by half: a long one may come again.
            self._took = max(took, (self._took + took) / 2)
            if self._breaker is not circuit.CLOSED:
                self._breaker = circuit.CLOSED
                self._detail = ""
        return results

    def needs(self, left: float) -> float:
        """Seconds to keep for it of those that are `left` until a deadline.

        A quarter of them, and half where its runs took that long lately.
        """
        return min(left / 2, max(left / 4, 2 * self._took))

    def overdue(self) -> None:
        """It did not answer in the time it could be given: others come first for a while."""
        with self._lock:
            self._breaker = circuit.after_overdue(self._breaker, self._now())

    def passed_on(self, requests: int = 1) -> None:
        with self._lock:
            self._fallbacks += requests

    def report(self) -> BackendReport:
        with self._lock:
            detail = self._detail
            if not self.session.healthy:
                detail = detail or "the backend is away"
            elif not self.proven:
                detail = "not probed yet"
            return BackendReport(
                self.name,
                self.usable and circuit.allows(self._breaker, self._now()),
                detail,
                self._requests,
                self._failures,
                self._fallbacks,
                not circuit.allows(self._breaker, self._now()),
            )


class Instance:
    """One version of a model, opened on one or more backends. Thread-safe.

    `run`, `submit` and `withdraw` are `BatchRunner.call`, `.submit` and `.withdraw`.

    `inputs` and `outputs` are model.json's. `timeout` bounds a request that brings no earlier
    deadline, in seconds (None: unbounded).
    """

    def __init__(
        self,
        name: str,
        model: str,
        version: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        members: Sequence[Member],
        *,
        platform: str = "",
        timeout: float | None = None,
        batching: BatchConfig | None = None,
        optional: frozenset[str] = frozenset(),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`batching` None: requests run singly, one per core. `optional`: inputs that a request
        may leave out."""
        self.name = name
        self.model = model
        self.version = version
        self.inputs = inputs
        self.outputs = outputs
        self.output_datatypes = {spec.name: spec.datatype for spec in outputs}
        self.platform = platform
        self.timeout = timeout
        self.state = State.LOADED
        self.error = ""
        self.optional = optional
        # What clients must show to be answered: none, key or token.
        self.auth = "none"
        # Common names of the certificates that may be shown; none: any, or no certificate.
        self.clients: frozenset[str] = frozenset()
        self.statistics = Statistics()
        self.mirrored = MirrorStatistics()
        self._members = tuple(members)
        self._now = now
        specs = (*inputs, *outputs)
        self._runner = BatchRunner(
            f"model {model!r} version {version}",
            self._answer,
            batching or BatchConfig(slots=os.cpu_count() or 1),
            self.statistics,
            batched=has_batch_axis(inputs, outputs),
            free_sizes=bool(optional) or any(-1 in spec.shape[1:] for spec in specs),
            now=now,
        )
        # On the first backend that can answer, perhaps together with other requests: every request
        # comes through here, so there is no call in between.
        self.run = self._runner.call
        self.submit = self._runner.submit
        self.withdraw = self._runner.withdraw
        # Taken directly where nobody waits: a Condition's own `with` costs more.
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._in_flight = 0
        self._closing = False

    @property
    def members(self) -> tuple[Member, ...]:
        return self._members

    def add(self, member: Member, at: int) -> None:
        """Take in a backend that could not be opened before, at its place in the preference."""
        with self._idle:
            if not self._closing:
                members = list(self._members)
                members.insert(at, member)
                self._members = tuple(members)
                return
        member.session.close()

    def remove(self, member: Member) -> None:
        """Ask this backend no more, and close it."""
        with self._idle:
            self._members = tuple(one for one in self._members if one is not member)
        member.session.close()

    @property
    def batching(self) -> BatchConfig:
        return self._runner.config

    @batching.setter
    def batching(self, config: BatchConfig) -> None:
        self._runner.config = config

    @property
    def pending(self) -> int:
        """Requests that wait for their turn."""
        return self._runner.pending

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def healthy(self) -> bool:
        """Whether a request may find a backend now."""
        return any(member.usable for member in self._members)

    def begin(self) -> bool:
        """Claim the instance for one request; False when it is being closed. Ends with `end`."""
        with self._lock:
            if self._closing:
                return False
            self._in_flight += 1
            return True

    def end(self) -> None:
        with self._lock:
            self._in_flight -= 1
            if self._in_flight == 0 and self._closing:
                self._idle.notify_all()

    def serve_here(self) -> None:
        """Run what waits, on this thread if that is short and computed at once."""
        self._runner.serve_here(self._longest_here())

    def serve_stacked(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], requests: int
    ) -> dict[str, Array] | None:
        """As `BatchRunner.serve_stacked`, on this thread under the same condition."""
        return self._runner.serve_stacked(inputs, outputs, requests, self._longest_here())

    def may_stack(self, requests: int, items: int) -> bool:
        """Whether stacking them is likely to be worth it."""
        longest = self._longest_here()
        return self.timeout is None and self._runner.may_stack(requests, items, longest)

    def _longest_here(self) -> float:
        return _SHORT_SECONDS if self._members and self._members[0].prompt else 0.0

    def _answer(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        deadline: float | None,
        requests: int,
    ) -> dict[str, Array]:
        """On the first backend that can, passing the request on while time is left."""
        reasons: list[str] = []
        members = self._members
        skipped: list[Member] = []
        for at, member in enumerate(members):
            if member.allowed():
                until = deadline
                if deadline is not None and member is not members[-1] and not member.prompt:
                    until = self._until(members[at + 1 :], deadline)
                answer = self._attempt(member, inputs, outputs, deadline, requests, reasons, until)
                if answer is not None:
                    return answer
            else:
                skipped.append(member)
            if member is not members[-1]:
                member.passed_on(requests)
        # Nobody else could: one that is on probation is better than no answer.
        for member in skipped:
            if member.usable:
                answer = self._attempt(
                    member, inputs, outputs, deadline, requests, reasons, deadline
                )
                if answer is not None:
                    return answer
            else:
                reasons.append(f"{member.name}: away")
        raise ScoringError(
            Code.UNAVAILABLE,
            f"model {self.model!r} version {self.version}: no backend can answer now "
            f"({'; '.join(reasons)}); try again",
        )

    def _until(self, others: Sequence[Member], deadline: float) -> float:
        """How long one may take that can hang, when one of the `others` never does."""
        rescue = next((member for member in others if member.prompt and member.usable), None)
        left = deadline - self._now()
        return deadline if rescue is None or left <= 0 else deadline - rescue.needs(left)

    def _attempt(
        self,
        member: Member,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        deadline: float | None,
        requests: int,
        reasons: list[str],
        until: float | None,
    ) -> dict[str, Array] | None:
        if deadline is not None and self._now() >= deadline:
            raise self._too_late(reasons)
        try:
            return member.run(inputs, outputs, until, requests)
        except BackendUnavailable as error:
            reasons.append(f"{member.name}: {error}")
            return None
        except DeadlineExceeded as error:
            reasons.append(f"{member.name}: {error}")
            if until != deadline:
                member.overdue()
                return None
            raise self._too_late(reasons) from error
        except InvalidTensor as error:
            raise ScoringError(
                Code.INVALID_ARGUMENT, f"model {self.model!r} refuses the request: {error}"
            ) from error
        except BackendError as error:
            raise ScoringError(
                Code.INTERNAL,
                f"model {self.model!r} version {self.version} failed on this request "
                f"({member.name}): {error}",
            ) from error

    def _too_late(self, reasons: Sequence[str]) -> ScoringError:
        tried = f" ({'; '.join(reasons)})" if reasons else " before the model was run"
        return ScoringError(
            Code.DEADLINE_EXCEEDED,
            f"model {self.model!r} version {self.version}: the deadline passed{tried}; "
            "allow more time or send less at once",
        )

    def close(self, drain: float) -> bool:
        """Refuse new requests, wait up to `drain` seconds for running ones, close the sessions.

        Whether all running requests ended in time. Idempotent.
        """
        with self._idle:
            self._closing = True
            drained = self._idle.wait_for(lambda: self._in_flight == 0, timeout=drain)
        self._runner.close()
        for member in self._members:
            with suppress(BackendError):
                member.session.close()
        return drained
