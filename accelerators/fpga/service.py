"""What the fabric process does for its clients, in turns at the fabric.

What waits for its turn (see `schedule`) is answered by its deadline; what is being done ends by it,
or by the driver's own limit. How requests come in is `server`'s.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import BackendError, BackendUnavailable, InvalidTensor
from .board import Board
from .driver import FabricDriver
from .job import Job
from .package import Package
from .protocol import INFERRED, Inference, UnknownHandle, encode_message, error_header
from .schedule import Overlay, Policy
from .shared_memory import Segment, lay_out
from .turns import Turns

_LOG = logging.getLogger(__name__)

LOAD_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A package behind a handle, what stands for its overlay, and bytes per item of its tensors."""

    package: Package
    overlay: Overlay
    input_bytes: tuple[int, ...]
    output_bytes: tuple[int, ...]


@dataclass(eq=False, slots=True)
class Client:
    """One scoring process: its connections, and the packages it loaded, by handle.

    `unloads` changes whenever a handle goes.
    """

    connections: int = 0
    packages: dict[str, Loaded] = field(default_factory=dict)
    unloads: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """An inference that was found good, to be done as often as it is asked for."""

    overlay: Overlay
    loaded: Loaded
    job: Job


class FabricService:
    """Loads packages and computes with them, on a `driver` that has been opened. Thread-safe."""

    def __init__(
        self,
        driver: FabricDriver,
        board: Board | None,
        monotonic: Callable[[], float] = time.monotonic,
        policy: Policy | None = None,
    ) -> None:
        self._driver = driver
        self._board = board
        self._monotonic = monotonic
        self._started = monotonic()
        self._turns = Turns(self._prefetch, policy, monotonic)
        self._guard = threading.Lock()
        self._overlays: dict[tuple[object, ...], Loaded] = {}
        self._next_overlay = 0
        # Identities are large: what was in the fabric last is not looked up again.
        self._seen: tuple[Package | None, Overlay | None] = (None, None)
        self._clients: dict[str, Client] = {}
        self._requests = 0

    def start(self) -> None:
        """Keep the time of turns in the background."""
        self._turns.start()

    def close(self) -> None:
        """Serve nobody any more, and close the driver unless it does not return."""
        # Whoever has the fabric ends by itself; nobody gets it after us.
        if self._turns.close():
            self._driver.close()

    @property
    def busy_since(self) -> float | None:
        """When the turn in progress began."""
        return self._turns.busy_since

    def status(self) -> dict[str, Any]:
        """What `status` and `hello` answer: identity, counters, and what is loaded."""
        counters = asdict(self._driver.counters)
        turns = self._turns.counters
        readings = self._driver.readings()
        return {
            "board": self._board.name if self._board else None,
            "part": self._board.part if self._board else None,
            "loaded": self._driver.loaded,
            "reconfigurations": counters["reconfigurations"],
            "partialReconfigurations": counters["partial"],
            "transfers": counters["transfers"],
            "dmaErrors": counters["dma_errors"],
            "hangs": counters["hangs"],
            "replaced": counters["replaced"],
            "resets": counters["resets"],
            "trouble": self._driver.trouble,
            "busySeconds": round(turns.busy, 6),
            "configuringSeconds": counters["configuring"],
            "temperatures": readings.temperatures,
            "clocksMhz": readings.clocks,
            "manager": readings.manager,
            "requests": self._requests,
            "expired": turns.expired,
            "swaps": turns.swaps,
            "swapsAvoided": turns.swaps_avoided,
            "refused": turns.refused,
            "prefetches": turns.prefetches,
            "queued": turns.waiting,
            "uptimeSeconds": round(self._monotonic() - self._started, 3),
            "pid": os.getpid(),
        }

    # Who is served.

    def enter(self, client_id: str) -> Client:
        """One more connection of this client."""
        with self._guard:
            client = self._clients.setdefault(client_id, Client())
            client.connections += 1
            return client

    def leave(self, client_id: str, unload: bool = True) -> None:
        """One connection less; with the last one go the client's packages."""
        with self._guard:
            client = self._clients[client_id]
            client.connections -= 1
            if client.connections:
                return
            del self._clients[client_id]
        for handle in list(client.packages) if unload else ():
            with contextlib.suppress(BackendError):
                self.unload(client, handle)

    # What is loaded.

    def load(self, client: Client, package: Package) -> str:
        """Put the package into the fabric once; its handle. Raises BackendError."""
        # Unique beyond this process: a client may still unload what it had from the one before.
        handle = uuid.uuid4().hex
        with self._fabric(self._monotonic() + LOAD_SECONDS) as driver:
            # All in one turn: whoever unloads the same package has done so before, or sees ours.
            loaded = self._known(package)
            try:
                with self._timing(loaded.overlay):
                    driver.load(package)
                with self._guard:
                    client.packages[handle] = loaded
            finally:
                self._drop(loaded)
        return handle

    def unload(self, client: Client, handle: str) -> None:
        """Forget the handle, and with the last one of its package what is kept for that."""
        with self._guard:
            dropped = client.packages.pop(handle, None)
            client.unloads += 1
        if dropped is None or self._held(dropped):
            return
        with self._fabric(self._monotonic() + LOAD_SECONDS) as driver:
            if not self._held(dropped):
                driver.unload(dropped.package)
                self._drop(dropped)

    def _known(self, package: Package) -> Loaded:
        """What the package is called among turns: the same for packages with one identity."""
        with self._guard:
            known = self._overlays.get(package.identity)
            if known is None:
                self._next_overlay += 1
                known = Loaded(
                    package,
                    self._next_overlay,
                    tuple(port.wire.item_bytes for port in package.inputs),
                    tuple(port.wire.item_bytes for port in package.outputs),
                )
                self._overlays[package.identity] = known
                self._turns.described(known.overlay, package.static)
            return known

    def _drop(self, loaded: Loaded) -> None:
        """Forget the overlay, unless a client has it."""
        with self._guard:
            if self._held(loaded):
                return
            self._overlays.pop(loaded.package.identity, None)
        self._turns.forget(loaded.overlay)

    def _held(self, loaded: Loaded) -> bool:
        return any(
            other.package.identity == loaded.package.identity
            for holder in list(self._clients.values())
            for other in list(holder.packages.values())
        )

    # Computing.

    def work(self, client: Client, segment: Segment | None, request: Inference) -> Work:
        """What the request asks for, in memory that was found large enough.

        Raises UnknownHandle and InvalidTensor.
        """
        loaded = client.packages.get(request.handle.hex())
        if loaded is None:
            raise UnknownHandle("this package is not loaded here (any more)")
        package = loaded.package
        layout = lay_out(loaded.input_bytes, loaded.output_bytes, request.items)
        if (
            segment is None
            or layout is None
            or layout.nbytes != request.nbytes
            or layout.nbytes > segment.size
        ):
            raise InvalidTensor(
                f"{package.name}: {request.items} items in {request.nbytes} bytes of shared memory "
                "is not what the package takes"
            )
        items = [segment.view(place) for place in layout.inputs]
        results = [segment.view(place) for place in layout.outputs]
        return Work(loaded.overlay, loaded, Job(package, items, results))

    def infer(self, work: Work, deadline: float, reply: Callable[[bytes], object]) -> None:
        """Do the work when it is its turn, and `reply` as soon as the results are there.

        What the results need not wait for is done after that. `reply` may raise OSError.
        """
        self._requests += 1
        try:
            swap = self._turns.enter(work.overlay, deadline)
        except BackendError as error:
            reply(encode_message(error_header(error)))
            return
        well = False
        try:
            answer = INFERRED
            try:
                self._compute(work, deadline, swap)
            except BackendError as error:
                answer = encode_message(error_header(error))
            reply(answer)
            well = answer is INFERRED and self._driver.finish()
        finally:
            self._turns.leave(self._in_fabric())
        if not well:
            self._recover()

    def _compute(self, work: Work, deadline: float, swap: bool) -> None:
        try:
            if swap:
                self._configure(work.loaded)
            self._driver.run(work.job, deadline)
        except BackendError:
            raise
        except Exception as error:
            raise _unexpected(error) from error

    def _recover(self) -> None:
        try:
            with self._fabric() as driver:
                driver.recover()
        except BackendError as error:
            _LOG.warning("the fabric did not recover: %s", error)

    # The turn.

    @contextlib.contextmanager
    def _fabric(self, deadline: float = math.inf) -> Iterator[FabricDriver]:
        """The driver for work that is no inference, for as long as the block runs."""
        self._turns.enter(None, deadline)
        with self._holding():
            yield self._driver

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        """Gives the turn back in the end, whatever state the fabric is in then."""
        try:
            yield
        except BackendError:
            raise
        except Exception as error:
            raise _unexpected(error) from error
        finally:
            self._turns.leave(self._in_fabric())

    def _in_fabric(self) -> Overlay | None:
        package = self._driver.active
        if package is None:
            return None
        if package is not self._seen[0]:
            known = self._overlays.get(package.identity)
            self._seen = (package, known.overlay if known is not None else None)
        return self._seen[1]

    def _configure(self, loaded: Loaded) -> None:
        with self._timing(loaded.overlay):
            self._driver.configure(loaded.package)

    @contextlib.contextmanager
    def _timing(self, overlay: Overlay) -> Iterator[None]:
        """Notes how long configuring took, where that was done."""
        before, started = self._driver.counters, self._monotonic()
        yield
        after, seconds = self._driver.counters, self._monotonic() - started
        full = after.reconfigurations > before.reconfigurations
        if full or after.partial > before.partial:
            self._turns.configured(overlay, seconds, partial=not full)

    def _prefetch(self, overlay: Overlay) -> None:
        with self._guard:
            known = [one for one in self._overlays.values() if one.overlay == overlay]
        try:
            with self._holding():
                for loaded in known:
                    self._configure(loaded)
        except BackendError as error:
            _LOG.warning("an overlay was not configured ahead: %s", error)
            self._turns.forget(overlay)


def _unexpected(error: Exception) -> BackendUnavailable:
    _LOG.error("request failed", exc_info=error)
    return BackendUnavailable(f"the fabric process failed: {error!r}")
