"""Serves the fabric protocol: one thread owns pynq, one thread per connection queues for it.

A connection's thread answers by the deadline of its request, whether the work is done or not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    InvalidTensor,
    LoadError,
)
from ..tensors import Array
from .board import Board
from .driver import FabricDriver
from .package import Package
from .packages import probe
from .packing import Bytes
from .protocol import (
    PROTOCOL_VERSION,
    Frame,
    ProtocolError,
    UnknownHandle,
    error_header,
    receive_frame,
    send_frame,
    signature_in,
)

_LOG = logging.getLogger(__name__)

QUEUE_LIMIT = 64
SEND_SECONDS = 5.0
LOAD_SECONDS = 30.0

Answer = tuple[dict[str, Any], dict[str, Array]]


@dataclass(eq=False, slots=True)
class _Job:
    """Work for the thread that owns pynq."""

    work: Callable[[], Answer]
    deadline: float | None
    done: threading.Event = field(default_factory=threading.Event)
    answer: Answer | None = None
    error: BackendError | None = None


@dataclass(eq=False, slots=True)
class _Client:
    """One scoring process: its connections, and the packages it loaded, by handle."""

    connections: int = 0
    packages: dict[str, Package] = field(default_factory=dict)


class FabricServer:
    """Serves the fabric protocol on a Unix socket from a `driver` that has been opened.

    `stuck_after` is how long (seconds) one piece of work may keep the pynq thread before
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
    ) -> None:
        self._driver = driver
        self._path = path
        self._board = board
        self._stuck_after = stuck_after
        self._monotonic = monotonic
        self._started = monotonic()
        self._jobs: queue.Queue[_Job | None] = queue.Queue(QUEUE_LIMIT)
        self._busy_since: float | None = None
        self._guard = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._clients: dict[str, _Client] = {}
        self._requests = self._expired = 0
        self._closing = threading.Event()
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Listen and serve in the background. Raises OSError."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # The lock on the fabric is held, so whoever left this socket behind is gone.
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(self._path))
            self._path.chmod(0o660)
            listener.listen(16)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        for name, target in (("fabric-pynq", self._work), ("fabric-accept", self._accept)):
            thread = threading.Thread(target=target, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

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
        self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout=5.0)
        self._path.unlink(missing_ok=True)

    @property
    def stuck(self) -> bool:
        since = self._busy_since
        return since is not None and self._monotonic() - since > self._stuck_after

    def status(self) -> dict[str, Any]:
        """What `status` and `hello` answer: identity, counters, and what is loaded."""
        counters = asdict(self._driver.counters)
        return {
            "board": self._board.name if self._board else None,
            "part": self._board.part if self._board else None,
            "loaded": self._driver.loaded,
            "reconfigurations": counters["reconfigurations"],
            "transfers": counters["transfers"],
            "dmaErrors": counters["dma_errors"],
            "hangs": counters["hangs"],
            "replaced": counters["replaced"],
            "requests": self._requests,
            "expired": self._expired,
            "queued": self._jobs.qsize(),
            "uptimeSeconds": round(self._monotonic() - self._started, 3),
            "pid": os.getpid(),
        }

    # The thread that owns pynq.

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.deadline is not None and self._monotonic() >= job.deadline:
                self._expired += 1
                job.error = DeadlineExceeded("the deadline passed while the request was queued")
                job.done.set()
                continue
            self._busy_since = self._monotonic()
            try:
                job.answer = job.work()
            except BackendError as error:
                job.error = error
            except Exception as error:  # noqa: BLE001 - a fault of one request must not end this thread
                _LOG.exception("request failed")
                job.error = BackendUnavailable(f"the fabric process failed: {error!r}")
            job.done.set()
            if job.error is not None:
                self._recover()
            self._busy_since = None
        self._driver.close()

    def _recover(self) -> None:
        try:
            self._driver.recover()
        except BackendError as error:
            _LOG.warning("the fabric did not recover: %s", error)

    def _run(self, work: Callable[[], Answer], deadline: float | None) -> Answer:
        job = _Job(work, deadline)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise BackendUnavailable(
                f"{QUEUE_LIMIT} requests wait for the fabric already"
            ) from None
        remaining = None if deadline is None else max(0.0, deadline - self._monotonic())
        if not job.done.wait(remaining):
            raise DeadlineExceeded("the fabric did not answer within the deadline")
        if job.error is not None:
            raise job.error
        assert job.answer is not None
        return job.answer

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
                self._connections.add(connection)
            threading.Thread(
                target=self._serve, args=(connection,), name="fabric-connection", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        client_id: str | None = None
        try:
            # Reads wait as long as the client is silent; the kernel ends them when it goes.
            while (frame := receive_frame(connection)) is not None:
                if client_id is None:
                    client_id = self._enter(frame)
                header, tensors = self._answer(client_id, frame)
                connection.settimeout(SEND_SECONDS)
                send_frame(connection, header, tensors)
                connection.settimeout(None)
        except ProtocolError as error:
            _LOG.warning("a client broke the protocol: %s", error)
        except OSError as error:
            _LOG.debug("connection ended: %s", error)
        finally:
            with self._guard:
                self._connections.discard(connection)
            connection.close()
            if client_id is not None:
                self._leave(client_id)

    def _enter(self, frame: Frame) -> str:
        client = frame.header.get("client")
        if frame.header.get("op") != "hello" or not isinstance(client, str) or len(client) > 128:
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

    def _answer(self, client_id: str, frame: Frame) -> Answer:
        operations: dict[str, Callable[[_Client, Frame], Answer]] = {
            "hello": self._hello,
            "status": self._hello,
            "load": self._load,
            "infer": self._infer,
            "unload": lambda client, frame: self._unload(client, _handle(frame.header)),
        }
        operation = operations.get(str(frame.header.get("op")))
        try:
            if operation is None:
                raise BackendError(f"unknown request {frame.header.get('op')!r}")
            return operation(self._clients[client_id], frame)
        except BackendError as error:
            return error_header(error), {}

    def _hello(self, _client: _Client, _frame: Frame) -> Answer:
        return {"ok": True, "protocol": PROTOCOL_VERSION, "status": self.status()}, {}

    def _load(self, client: _Client, frame: Frame) -> Answer:
        directory = frame.header.get("directory")
        if not isinstance(directory, str) or not Path(directory).is_absolute():
            raise LoadError("load needs the absolute path of a package directory")
        kind = frame.header.get("kind")
        package = probe(
            Path(directory), signature_in(frame.header), kind if isinstance(kind, str) else None
        )

        def work() -> Answer:
            self._driver.load(package)
            return {"ok": True}, {}

        self._run(work, self._monotonic() + LOAD_SECONDS)
        # Unique beyond this process: a client may still unload what it had from the one before.
        handle = uuid.uuid4().hex
        with self._guard:
            client.packages[handle] = package
        return {"ok": True, "handle": handle}, {}

    def _infer(self, client: _Client, frame: Frame) -> Answer:
        package = client.packages.get(_handle(frame.header))
        if package is None:
            raise UnknownHandle("this package is not loaded here (any more)")
        items = _items(package, frame.tensors)
        deadline = _deadline(frame.header, self._monotonic())
        self._requests += 1

        def work() -> Answer:
            results = self._driver.infer(package, items, deadline)
            names = (port.spec.name for port in package.outputs)
            return {"ok": True}, dict(zip(names, results, strict=True))

        return self._run(work, deadline)

    def _unload(self, client: _Client, handle: str) -> Answer:
        with self._guard:
            package = client.packages.pop(handle, None)
            shared = package is not None and any(
                other.identity == package.identity
                for holder in self._clients.values()
                for other in holder.packages.values()
            )
        if package is not None and not shared:
            dropped = package

            def work() -> Answer:
                self._driver.unload(dropped)
                return {"ok": True}, {}

            return self._run(work, self._monotonic() + LOAD_SECONDS)
        return {"ok": True}, {}


def _handle(header: Mapping[str, Any]) -> str:
    return str(header.get("handle"))


def _deadline(header: Mapping[str, Any], now: float) -> float | None:
    milliseconds = header.get("deadlineMs")
    if milliseconds is None:
        return None
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, (int, float)):
        raise BackendError("deadlineMs must be a number of milliseconds")
    return now + milliseconds / 1000


def _items(package: Package, tensors: Mapping[str, Array]) -> list[Bytes]:
    if set(tensors) != {port.spec.name for port in package.inputs}:
        names = ", ".join(port.spec.name for port in package.inputs)
        raise InvalidTensor(f"{package.name} takes {names}")
    items = []
    for port in package.inputs:
        tensor, size = tensors[port.spec.name], port.wire.item_bytes
        if tensor.dtype != np.uint8 or tensor.ndim != 2 or tensor.shape[1] != size:
            raise InvalidTensor(
                f"{port.spec.name} must be uint8 [n, {size}] on the wire, not "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
        items.append(tensor.view(np.uint8))
    if len({len(item) for item in items}) != 1:
        raise InvalidTensor(f"{package.name}: inputs have unequal numbers of items")
    return items
