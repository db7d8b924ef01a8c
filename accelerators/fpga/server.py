"""Serves the fabric protocol: one thread per connection, which has the fabric when it is its turn.

There is no thread in between, whose wake-up would cost more than a transfer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BackendError, LoadError
from .board import Board
from .driver import FabricDriver
from .packages import probe
from .protocol import (
    INFERENCE_BYTES,
    INFERRED,
    PROTOCOL_VERSION,
    Inference,
    ProtocolError,
    decode_message,
    encode_message,
    error_header,
    receive_request,
    signature_in,
    split_inference,
)
from .schedule import Policy
from .service import Client, FabricService, Work
from .shared_memory import Segment, open_segment

_LOG = logging.getLogger(__name__)

CONNECTION_LIMIT = 64
KEPT_WORK = 64
"""Inferences that were found good and are kept as such, per connection."""

_DO_NOT_WAIT = int(socket.MSG_DONTWAIT)

Header = dict[str, Any]


@dataclass(eq=False, slots=True)
class _Connection:
    """One connection: whose it is, the memory it shares with us, and what it asked for in there.

    `unloads` is that of the client when `work` was found good.
    """

    socket: socket.socket
    client: Client
    client_id: str
    segment: Segment | None = None
    work: dict[bytes, Work] = field(default_factory=dict)
    unloads: int = 0

    def send(self, packet: bytes) -> None:
        # A client that reads no answers is not waited for.
        self.socket.send(packet, _DO_NOT_WAIT)


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
        self._service = FabricService(driver, board, monotonic, policy)
        self._path = path
        self._stuck_after = stuck_after
        self._monotonic = monotonic
        self._guard = threading.Lock()
        self._connections: set[socket.socket] = set()
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
        self._service.start()

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
        self._service.close()
        self._path.unlink(missing_ok=True)

    @property
    def stuck(self) -> bool:
        since = self._service.busy_since
        return since is not None and self._monotonic() - since > self._stuck_after

    def status(self) -> dict[str, Any]:
        """See `FabricService.status`."""
        return self._service.status()

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
                target=self._serve, args=(connection,), name="fabric-connection", daemon=True
            ).start()

    def _serve(self, sock: socket.socket) -> None:
        connection: _Connection | None = None
        try:
            connection = self._greet(sock)
            if connection is not None:
                self._answer_all(connection)
        except ProtocolError as error:
            _LOG.warning("a client broke the protocol: %s", error)
        except OSError as error:
            _LOG.debug("connection ended: %s", error)
        finally:
            with self._guard:
                self._connections.discard(sock)
            sock.close()
            if connection is not None:
                self._service.leave(connection.client_id, unload=not self._closing.is_set())

    def _greet(self, sock: socket.socket) -> _Connection | None:
        """The connection of who says hello first, None when nobody does."""
        request = receive_request(sock)
        if request is None:
            return None
        packet, descriptor = request
        if descriptor is not None:
            os.close(descriptor)
        message = decode_message(packet)
        client_id = None if isinstance(message, Inference) else message.get("client")
        if (
            isinstance(message, Inference)
            or message.get("op") != "hello"
            or not isinstance(client_id, str)
            or len(client_id) > 128
        ):
            raise ProtocolError("the first request has to be hello with a client id")
        connection = _Connection(sock, self._service.enter(client_id), client_id)
        try:
            connection.send(self._answer(connection.client, message))
        except OSError as error:
            _LOG.debug("connection ended: %s", error)
        return connection

    def _answer_all(self, connection: _Connection) -> None:
        """Serve the connection until the client goes. Raises OSError and ProtocolError."""
        sock, client = connection.socket, connection.client
        # Reads wait as long as the client is silent; the kernel ends them when it goes.
        while (request := receive_request(sock)) is not None:
            packet, descriptor = request
            if descriptor is not None:
                connection.work.clear()
                try:
                    connection.segment = open_segment(descriptor)
                finally:
                    os.close(descriptor)
            if len(packet) == INFERENCE_BYTES and packet.startswith(INFERRED):
                head, deadline = split_inference(packet)
                work = connection.work.get(head)
                if work is None or connection.unloads != client.unloads:
                    work = self._found(connection, head, packet)
                if work is not None:
                    self._service.infer(work, deadline, connection.send)
                continue
            message = decode_message(packet)
            assert not isinstance(message, Inference)
            connection.send(self._answer(client, message))

    def _found(self, connection: _Connection, head: bytes, packet: bytes) -> Work | None:
        """What an inference asks for; None, and answered, when it cannot be done."""
        client, request = connection.client, decode_message(packet)
        assert isinstance(request, Inference)
        if connection.unloads != client.unloads or len(connection.work) >= KEPT_WORK:
            connection.work.clear()
            connection.unloads = client.unloads
        try:
            work = self._service.work(client, connection.segment, request)
        except BackendError as error:
            connection.send(encode_message(error_header(error)))
            return None
        connection.work[head] = work
        return work

    def _answer(self, client: Client, message: Mapping[str, Any]) -> bytes:
        try:
            return encode_message(self._operate(client, message))
        except BackendError as error:
            return encode_message(error_header(error))

    def _operate(self, client: Client, message: Mapping[str, Any]) -> Header:
        operation = message.get("op")
        if operation in ("hello", "status"):
            return {"ok": True, "protocol": PROTOCOL_VERSION, "status": self.status()}
        if operation == "load":
            return {"ok": True, "handle": self._load(client, message)}
        if operation == "unload":
            self._service.unload(client, str(message.get("handle")))
            return {"ok": True}
        raise BackendError(f"unknown request {operation!r}")

    def _load(self, client: Client, message: Mapping[str, Any]) -> str:
        directory = message.get("directory")
        if not isinstance(directory, str) or not Path(directory).is_absolute():
            raise LoadError("load needs the absolute path of a package directory")
        kind = message.get("kind")
        package = probe(
            Path(directory), signature_in(message), kind if isinstance(kind, str) else None
        )
        return self._service.load(client, package)
