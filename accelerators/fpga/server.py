"""Serves the fabric protocol: one thread per connection, which has the fabric when it is its turn.

There is no thread in between, whose wake-up would cost more than a transfer. What waits for its
turn (see `schedule`) is answered by its deadline; what is being done ends by it, or by the driver's
own limit.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import (
    BackendError,
    BackendUnavailable,
    InvalidTensor,
    LoadError,
)
from .board import Board
from .driver import FabricDriver
from .package import Package
from .packages import probe
from .protocol import (
    INFERRED,
    PROTOCOL_VERSION,
    Inference,
    Message,
    ProtocolError,
    UnknownHandle,
    decode_message,
    encode_message,
    error_header,
    receive_request,
    signature_in,
)
from .schedule import Overlay, Policy
from .shared_memory import Segment, lay_out, open_segment
from .turns import Turns

_LOG = logging.getLogger(__name__)

CONNECTION_LIMIT = 64
LOAD_SECONDS = 30.0

Header = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A package behind a handle, what stands for its overlay, and bytes per item of its tensors."""

    package: Package
    overlay: Overlay
    input_bytes: tuple[int, ...]
    output_bytes: tuple[int, ...]


@dataclass(eq=False, slots=True)
class _Client:
    """One scoring process: its connections, and the packages it loaded, by handle."""

    connections: int = 0
    packages: dict[str, _Loaded] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Connection:
    """One connection: whose it is, and the memory it shares with us."""

    socket: socket.socket
    client_id: str | None = None
    segment: Segment | None = None
    hurt: bool = False


class FabricServer:
    """Serves the fabric protocol on a Unix socket from a `driver` that has been opened.

    `stuck_after` is how long (seconds) one piece of work may keep the turn before
    `stuck` says so: a bus access that never returns can only be ended with the process.
    """

    def __init__(
        self,
        driver: FabricDriver,
        path: Path,
        board: Board | None,
        *,
        stuck_after: float = 60.0,
        monotonic: Callable[[], float] = time.monotonic,
        policy: Policy | None = None,
    ) -> None:
        self._driver = driver
        self._path = path
        self._board = board
        self._stuck_after = stuck_after
        self._monotonic = monotonic
        self._started = monotonic()
        self._turns = Turns(self._prefetch, policy, monotonic)
        self._overlays: dict[tuple[object, ...], _Loaded] = {}
        self._next_overlay = 0
        # Identities are large: what was in the fabric last is not looked up again.
        self._seen: tuple[Package | None, Overlay | None] = (None, None)
        self._guard = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._clients: dict[str, _Client] = {}
        self._requests = 0
        self._closing = threading.Event()
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None

    def start(self) -> None:
        """Listen and serve in the background. Raises OSError."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # The lock on the fabric is held, so whoever left this socket behind is gone.
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(str(self._path))
            self._path.chmod(0o660)
            listener.listen(16)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        self._acceptor = threading.Thread(target=self._accept, name="fabric-accept", daemon=True)
        self._acceptor.start()
        self._turns.start()

    def stop(self) -> None:
        """Stop serving and close the driver. Idempotent."""
        with self._guard:
            if self._closing.is_set():
                return
            self._closing.set()
            connections = list(self._connections)
        if self._listener is not None:
            # A close alone does not wake a thread in accept.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if self._acceptor is not None:
            self._acceptor.join(timeout=5.0)
        # Whoever has the fabric ends by itself; nobody gets it after us.
        if self._turns.close():
            self._driver.close()
        self._path.unlink(missing_ok=True)

    @property
    def stuck(self) -> bool:
        since = self._turns.busy_since
        return since is not None and self._monotonic() - since > self._stuck_after

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
            _LOG.exception("request failed")
            raise BackendUnavailable(f"the fabric process failed: {error!r}") from error
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

    def _configure(self, loaded: _Loaded) -> None:
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

    def _recover(self) -> None:
        try:
            with self._fabric() as driver:
                driver.recover()
        except BackendError as error:
            _LOG.warning("the fabric did not recover: %s", error)

    # One thread per connection.

    def _accept(self) -> None:
        listener = self._listener
        assert listener is not None
        while not self._closing.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with self._guard:
                if self._closing.is_set():
                    connection.close()
                    return
                if len(self._connections) >= CONNECTION_LIMIT:
                    _LOG.warning("a connection was refused: there are %d", CONNECTION_LIMIT)
                    connection.close()
                    continue
                self._connections.add(connection)
            threading.Thread(
                target=self._serve, args=(_Connection(connection),), name="fabric-connection",
                daemon=True,
            ).start()  # fmt: skip

    def _serve(self, connection: _Connection) -> None:
        sock = connection.socket
        try:
            # Reads wait as long as the client is silent; the kernel ends them when it goes.
            while (request := receive_request(sock)) is not None:
                packet, descriptor = request
                if descriptor is not None:
                    try:
                        connection.segment = open_segment(descriptor)
                    finally:
                        os.close(descriptor)
                # A client that reads no answers is not waited for.
                sock.send(self._answer(connection, decode_message(packet)), socket.MSG_DONTWAIT)
                if connection.hurt:
                    connection.hurt = False
                    self._recover()
        except ProtocolError as error:
            _LOG.warning("a client broke the protocol: %s", error)
        except OSError as error:
            _LOG.debug("connection ended: %s", error)
        finally:
            with self._guard:
                self._connections.discard(sock)
            sock.close()
            if connection.client_id is not None:
                self._leave(connection.client_id)

    def _enter(self, message: Message) -> str:
        client = None if isinstance(message, Inference) else message.get("client")
        if (
            isinstance(message, Inference)
            or message.get("op") != "hello"
            or not isinstance(client, str)
            or len(client) > 128
        ):
            raise ProtocolError("the first request has to be hello with a client id")
        with self._guard:
            self._clients.setdefault(client, _Client()).connections += 1
        return client

    def _leave(self, client_id: str) -> None:
        with self._guard:
            client = self._clients[client_id]
            client.connections -= 1
            if client.connections:
                return
            del self._clients[client_id]
            closing = self._closing.is_set()
        if not closing:
            for handle in list(client.packages):
                with contextlib.suppress(BackendError):
                    self._unload(client, handle)

    def _answer(self, connection: _Connection, message: Message) -> bytes:
        if connection.client_id is None:
            connection.client_id = self._enter(message)
        client = self._clients[connection.client_id]
        try:
            if isinstance(message, Inference):
                self._infer(client, connection, message)
                return INFERRED
            return encode_message(self._operate(client, message))
        except BackendError as error:
            return encode_message(error_header(error))

    def _operate(self, client: _Client, message: Mapping[str, Any]) -> Header:
        operation = message.get("op")
        if operation in ("hello", "status"):
            return {"ok": True, "protocol": PROTOCOL_VERSION, "status": self.status()}
        if operation == "load":
            return self._load(client, message)
        if operation == "unload":
            self._unload(client, str(message.get("handle")))
            return {"ok": True}
        raise BackendError(f"unknown request {operation!r}")

    def _load(self, client: _Client, message: Mapping[str, Any]) -> Header:
        directory = message.get("directory")
        if not isinstance(directory, str) or not Path(directory).is_absolute():
            raise LoadError("load needs the absolute path of a package directory")
        kind = message.get("kind")
        package = probe(
            Path(directory), signature_in(message), kind if isinstance(kind, str) else None
        )
        loaded = self._known(package)
        until = self._monotonic() + LOAD_SECONDS
        with self._fabric(until) as driver, self._timing(loaded.overlay):
            driver.load(package)
        # Unique beyond this process: a client may still unload what it had from the one before.
        handle = uuid.uuid4().hex
        with self._guard:
            client.packages[handle] = loaded
        return {"ok": True, "handle": handle}

    def _known(self, package: Package) -> _Loaded:
        """What the package is called among turns: the same for packages with one identity."""
        with self._guard:
            known = self._overlays.get(package.identity)
            if known is None:
                self._next_overlay += 1
                known = _Loaded(
                    package,
                    self._next_overlay,
                    tuple(port.wire.item_bytes for port in package.inputs),
                    tuple(port.wire.item_bytes for port in package.outputs),
                )
                self._overlays[package.identity] = known
                self._turns.described(known.overlay, package.static)
            return known

    def _infer(self, client: _Client, connection: _Connection, request: Inference) -> None:
        loaded = client.packages.get(request.handle.hex())
        if loaded is None:
            raise UnknownHandle("this package is not loaded here (any more)")
        package = loaded.package
        segment = connection.segment
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
        self._requests += 1
        items = [segment.view(place) for place in layout.inputs]
        results = [segment.view(place) for place in layout.outputs]
        swap = self._turns.enter(loaded.overlay, request.deadline)
        # Until shown otherwise: set before anything can fail.
        connection.hurt = True
        with self._holding():
            if swap:
                self._configure(loaded)
            self._driver.infer(package, items, request.deadline, results)
        connection.hurt = False

    def _unload(self, client: _Client, handle: str) -> None:
        with self._guard:
            dropped = client.packages.pop(handle, None)
        if dropped is None or self._held(dropped):
            return
        with self._fabric(self._monotonic() + LOAD_SECONDS) as driver:
            driver.unload(dropped.package)
        with self._guard:
            if not self._held(dropped):
                self._overlays.pop(dropped.package.identity, None)
        self._turns.forget(dropped.overlay)

    def _held(self, loaded: _Loaded) -> bool:
        return any(
            other.package.identity == loaded.package.identity
            for holder in list(self._clients.values())
            for other in list(holder.packages.values())
        )
