"""Which models stay in memory: a pure choice by last use, and the accounting around it.

A model that is deployed but was pushed out is loaded again by the first request for it, which waits
for that no longer than its deadline.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...accelerators.backend import (
    Backend,
    LoadOptions,
    Remarked,
    Session,
    Variant,
    WithOptionalInputs,
)
from ...accelerators.errors import BackendUnavailable, DeadlineExceeded, LoadError
from ...accelerators.tensors import Array, TensorSpec
from .instances import Instance

log = logging.getLogger(__name__)

# What onnxruntime needs besides the weights, before it was measured.
_OVERHEAD_BYTES = 1024 * 1024
# More than this many times its file is somebody else's growth.
_MOST_OF_FILE = 16
# For a request without a deadline of its own.
_WAIT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in memory. `used`: monotonic, when it last answered; `busy`: it is answering now."""

    key: int
    bytes: int
    used: float
    busy: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """`evict`: who leaves, the one longest unused first. `fits` False: even then there is not
    enough, for now (somebody is busy) or at all."""

    fits: bool
    evict: tuple[int, ...] = ()


def make_room(residents: Sequence[Resident], needed: int, budget: int) -> Room:
    """Who makes room for `needed` more bytes, within `budget` bytes in all.

    A model larger than the whole budget still runs when it is alone.
    """
    total = sum(one.bytes for one in residents) + needed
    leaving: list[int] = []
    for one in sorted(residents, key=lambda one: (one.used, one.key)):
        if total <= budget:
            break
        if not one.busy:
            leaving.append(one.key)
            total -= one.bytes
    alone = len(leaving) == len(residents)
    return Room(total <= budget or alone, tuple(leaving))


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Of one model. `bytes` while it is in memory; `loads` without the first one."""

    resident: bool
    bytes: int
    loads: int
    evictions: int


class Evictable(Protocol):
    """What the accounting moves in and out."""

    size: int
    used: float
    busy: int

    @property
    def resident(self) -> bool: ...

    def admit(self, session: Session) -> None: ...

    def evict(self) -> Session | None:
        """Its session, which is the caller's to close, as it is no longer in memory."""


class Residency:
    """The memory budget of all models of one process. Thread-safe."""

    def __init__(
        self,
        budget_bytes: int,
        *,
        now: Callable[[], float] = time.monotonic,
        measure: Callable[[], int] | None = None,
    ) -> None:
        """`measure`: the process's resident memory in bytes."""
        self.budget = budget_bytes
        self.now = now
        self._measure = measure or resident_bytes
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._members: list[Evictable] = []
        self._loading = False

    def load(
        self, member: Evictable, open_: Callable[[], Session], deadline: float | None
    ) -> Session:
        """Open a model and admit it as soon as there is room for it; one at a time.

        Raises DeadlineExceeded, BackendUnavailable when there is no room in time, and what `open_`
        raises.
        """
        with self._lock:
            evicted = self._wait_for_room(member, deadline)
            self._loading = True
        try:
            # Without the lock: those that stay go on answering.
            _close(evicted)
            before = self._measure()
            session = open_()
            grown = self._measure() - before
        except BaseException:
            # Others wait for this load to end, however it does. It is raised again.
            with self._lock:
                self._loading = False
                self._freed.notify_all()
            raise
        with self._lock:
            self._loading = False
            self._freed.notify_all()
            # The file's size is the least it takes; what was freed in between hides the rest.
            member.size = max(member.size, min(grown, _MOST_OF_FILE * member.size))
            member.used = self.now()
            member.admit(session)
            if member not in self._members:
                self._members.append(member)
        return session

    def _wait_for_room(self, member: Evictable, deadline: float | None) -> list[Session]:
        """The sessions that have to be closed first."""
        limit = self.now() + _WAIT_SECONDS
        until = limit if deadline is None else min(deadline, limit)
        while True:
            if not self._loading:
                others = [one for one in self._members if one is not member and one.resident]
                residents = [
                    Resident(number, one.size, one.used, one.busy > 0)
                    for number, one in enumerate(others)
                ]
                room = make_room(residents, member.size, self.budget)
                if room.fits:
                    evicted = [others[number].evict() for number in room.evict]
                    return [session for session in evicted if session is not None]
            left = until - self.now()
            if left <= 0:
                if deadline is not None and self.now() >= deadline:
                    raise DeadlineExceeded("the deadline passed while waiting for memory")
                raise BackendUnavailable(
                    f"no memory for this model within {_WAIT_SECONDS:g} s: the others that share "
                    f"the budget of {self.budget >> 20} MiB are all busy"
                )
            self._freed.wait(left)

    def begin(self, member: Evictable) -> bool:
        """Keep `member` in memory until `end`; False when it is not there."""
        with self._lock:
            if not member.resident:
                return False
            member.busy += 1
            member.used = self.now()
            return True

    def end(self, member: Evictable) -> None:
        with self._lock:
            member.busy -= 1
            member.used = self.now()
            self._freed.notify_all()

    def evict(self, member: Evictable) -> bool:
        """Take `member` out of memory now; False while it is busy."""
        with self._lock:
            if member.busy:
                return False
            session = member.evict()
            self._freed.notify_all()
        if session is not None:
            _close([session])
        return True

    def forget(self, member: Evictable) -> None:
        with self._lock:
            self._members = [one for one in self._members if one is not member]
            self._freed.notify_all()

    @property
    def used(self) -> int:
        """Bytes of the models in memory."""
        with self._lock:
            return sum(one.size for one in self._members if one.resident)


class BudgetedBackend:
    """A backend whose sessions share a memory budget."""

    def __init__(self, backend: Backend, residency: Residency) -> None:
        self._backend = backend
        self._residency = residency
        self.name = backend.name
        self.note = backend.note if isinstance(backend, Remarked) else ""

    def accepts(self, variant: Variant) -> str | None:
        return self._backend.accepts(variant)

    def load(self, directory: Path, variant: Variant, options: LoadOptions) -> BudgetedSession:
        """Raises what the backend raises, and BackendUnavailable while there is no room."""

        def open_() -> Session:
            return self._backend.load(directory, variant, options)

        size = file_bytes(directory / variant.path) + _OVERHEAD_BYTES
        return BudgetedSession(self._residency, open_, size)


class BudgetedSession:
    """A session that may be out of memory between requests; its signature stays."""

    may_wait = True

    def __init__(self, residency: Residency, open_: Callable[[], Session], size: int) -> None:
        self.size = size
        self.used = residency.now()
        self.busy = 0
        self._residency = residency
        self._open = open_
        self._closed = False
        self._loads = 0
        self._evictions = 0
        self._loading = threading.Lock()
        self._session: Session | None = None
        session = residency.load(self, open_, None)
        self.backend = session.backend
        self.inputs: tuple[TensorSpec, ...] = session.inputs
        self.outputs: tuple[TensorSpec, ...] = session.outputs
        own = session.optional_inputs if isinstance(session, WithOptionalInputs) else ()
        self.optional_inputs: tuple[TensorSpec, ...] = own

    @property
    def resident(self) -> bool:
        return self._session is not None

    @property
    def healthy(self) -> bool:
        """Whether it can answer, be it after it was loaded again."""
        session = self._session
        return not self._closed and (session is None or session.healthy)

    def memory(self) -> MemoryReport:
        return MemoryReport(
            self.resident, self.size if self.resident else 0, self._loads, self._evictions
        )

    def admit(self, session: Session) -> None:
        self._session = session

    def evict(self) -> Session | None:
        """Called by the residency, which holds its lock."""
        session, self._session = self._session, None
        if session is not None:
            self._evictions += 1
            log.info("a model of %d MiB leaves memory", self.size >> 20)
        return session

    def warm(self, deadline: float | None) -> None:
        """Be in memory. Raises as `run`."""
        with self._in_memory(deadline):
            pass

    def cool(self) -> bool:
        """Leave memory until the next request; False while one is being answered."""
        return self._residency.evict(self)

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> dict[str, Array]:
        """As `Session.run`; the time to load the model again counts against `deadline`."""
        with self._in_memory(deadline) as session:
            return session.run(inputs, outputs, deadline)

    @contextmanager
    def _in_memory(self, deadline: float | None) -> Iterator[Session]:
        while not self._residency.begin(self):
            if deadline is not None and self._residency.now() >= deadline:
                raise DeadlineExceeded("the deadline passed before the model was in memory")
            self._load(deadline)
        try:
            session = self._session
            if session is None:
                raise BackendUnavailable("the model was closed")
            yield session
        finally:
            self._residency.end(self)

    def _load(self, deadline: float | None) -> None:
        now = self._residency.now()
        wait = _WAIT_SECONDS if deadline is None else max(0.0, deadline - now)
        if not self._loading.acquire(timeout=min(wait, _WAIT_SECONDS)):
            raise DeadlineExceeded("the deadline passed while the model was being loaded")
        try:
            if self._closed:
                raise BackendUnavailable("the model was closed")
            if self._session is not None:
                return
            try:
                self._residency.load(self, self._open, deadline)
            except LoadError as error:
                raise BackendUnavailable(f"it cannot be loaded again: {error}") from error
            self._loads += 1
            self._keep_unless_closed()
        finally:
            self._loading.release()

    def _keep_unless_closed(self) -> None:
        """Raises BackendUnavailable when it was closed while it was loaded: nobody else would give
        back what was loaded."""
        if self._closed:
            self.close()
            raise BackendUnavailable("the model was closed")

    def close(self) -> None:
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            session.close()
        self._residency.forget(self)


def memory_of(instance: Instance) -> MemoryReport | None:
    """Of all backends of an instance together; None where no budget limits them."""
    sessions = [member.session for member in instance.members]
    reports = [one.memory() for one in sessions if isinstance(one, BudgetedSession)]
    if not reports:
        return None
    return MemoryReport(
        resident=all(report.resident for report in reports),
        bytes=sum(report.bytes for report in reports),
        loads=sum(report.loads for report in reports),
        evictions=sum(report.evictions for report in reports),
    )


def _close(sessions: Sequence[Session]) -> None:
    """Close them, and return their memory to the system, which glibc would keep for later."""
    if not sessions:
        return
    for session in sessions:
        session.close()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def file_bytes(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    try:
        return path.stat().st_size
    except OSError:
        return 0


def resident_bytes() -> int:
    """This process's resident memory (proc(5), statm: pages)."""
    import resource

    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * resource.getpagesize()
