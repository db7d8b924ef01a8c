"""The scoring process's end of the fabric protocol: a few connections, used by many threads."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import BackendUnavailable, DeadlineExceeded, InvalidTensor
from .packing import Bytes
from .protocol import (
    INFERRED,
    Inference,
    ProtocolError,
    decode_message,
    encode_message,
    raise_for,
    receive_packet,
    send_packet,
)
from .shared_memory import Segment, lay_out, make_segment

CONNECTIONS = 4
CONNECT_SECONDS = 2.0
CALL_SECONDS = 30.0
KEPT_BYTES = 8 << 20
"""A connection with a larger segment is closed after use, and with it the memory."""

_T = TypeVar("_T")


class FabricGone(BackendUnavailable):
    """There is no connection to the fabric process (any more)."""


@dataclass(eq=False, slots=True)
class _Connection:
    """A socket, and the memory the fabric process has mapped for it."""

    socket: socket.socket
    segment: Segment | None = None


class FabricClient:
    """Calls to the fabric process at `path`. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._id = f"{os.getpid()}-{uuid.uuid4()}"
        self._slots = threading.BoundedSemaphore(CONNECTIONS)
        self._guard = threading.Lock()
        self._idle: list[_Connection] = []
        self._generation = 0

    def call(self, header: Mapping[str, Any], deadline: float | None = None) -> Mapping[str, Any]:
        """Send one request and wait for its answer until `deadline` (monotonic).

        Raises FabricGone, DeadlineExceeded, or the error in the answer.
        """
        end = time.monotonic() + CALL_SECONDS if deadline is None else deadline

        def exchange(connection: _Connection) -> Mapping[str, Any]:
            send_packet(connection.socket, encode_message(header))
            return _decoded(_answer(connection.socket, end))

        answer = self._exchange(exchange, end)
        raise_for(answer)
        return answer

    def infer(
        self,
        handle: str,
        items: Sequence[Bytes],
        results: Sequence[int],
        deadline: float | None = None,
        *,
        margin: float = 0.0,
    ) -> list[Bytes]:
        """Have uint8 [n, item bytes] per input computed; one such array per item size in `results`.

        The fabric gives up `margin` seconds before `deadline` (monotonic), so that its answer is
        here in time. Raises FabricGone, DeadlineExceeded, InvalidTensor, or what the answer says.
        """
        end = time.monotonic() + CALL_SECONDS if deadline is None else deadline
        count = len(items[0])
        layout = lay_out(tuple([item.shape[1] for item in items]), tuple(results), count)
        if layout is None:
            raise InvalidTensor(f"{count} items are too large for one request; send fewer")
        until = math.inf if deadline is None else deadline - margin
        request = Inference(bytes.fromhex(handle), until, count, layout.nbytes).encode()

        def exchange(connection: _Connection) -> tuple[Mapping[str, Any] | None, list[Bytes]]:
            segment, descriptor = connection.segment, None
            if segment is None or segment.size < layout.nbytes:
                segment, descriptor = make_segment(layout.nbytes)
                connection.segment = segment
            try:
                for place, item in zip(layout.inputs, items, strict=True):
                    segment.view(place)[:] = item
                send_packet(connection.socket, request, descriptor)
            finally:
                if descriptor is not None:
                    os.close(descriptor)
            answer = _answer(connection.socket, end)
            if answer != INFERRED:
                return _decoded(answer), []
            return None, [segment.view(place).copy() for place in layout.outputs]

        refusal, arrays = self._exchange(exchange, end)
        if refusal is not None:
            raise_for({**refusal, "ok": False})
        return arrays

    def watch(self) -> socket.socket:
        """A connection of its own, whose end tells that the fabric process is gone.

        Raises FabricGone.
        """
        return self._connect().socket

    def close(self) -> None:
        """Drop idle connections, and those in use when they come back."""
        with self._guard:
            idle, self._idle = self._idle, []
            self._generation += 1
        for connection in idle:
            connection.socket.close()

    def _exchange(self, exchange: Callable[[_Connection], _T], end: float) -> _T:
        if not self._slots.acquire(timeout=max(0.0, end - time.monotonic())):
            raise DeadlineExceeded("the deadline passed before the fabric was free")
        connection: _Connection | None = None
        try:
            with self._guard:
                generation = self._generation
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                connection = self._connect()
            answer = exchange(connection)
            segment = connection.segment
            with self._guard:
                # An answer may only follow its own request: after any failure the connection goes.
                if generation == self._generation and (
                    segment is None or segment.size <= KEPT_BYTES
                ):
                    self._idle.append(connection)
                    connection = None
            return answer
        except TimeoutError as error:
            raise DeadlineExceeded("the fabric did not answer within the deadline") from error
        except (OSError, ProtocolError) as error:
            raise FabricGone(
                f"lost the fabric process at {self._path} ({error}); it is started again by its "
                "supervisor"
            ) from error
        finally:
            self._slots.release()
            if connection is not None:
                connection.socket.close()

    def _connect(self) -> _Connection:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.settimeout(CONNECT_SECONDS)
            connection.connect(str(self._path))
            send_packet(connection, encode_message({"op": "hello", "client": self._id}))
            _answer(connection, time.monotonic() + CONNECT_SECONDS)
        except (OSError, ProtocolError) as error:
            connection.close()
            raise FabricGone(
                f"no fabric process at {self._path} ({error}); start it with gatelet run or the "
                "gatelet-fabric unit"
            ) from error
        return _Connection(connection)


def _answer(connection: socket.socket, end: float) -> bytes:
    packet = receive_packet(connection, end)
    if packet is None:
        raise ConnectionResetError("the fabric process closed the connection")
    return packet


def _decoded(packet: bytes) -> Mapping[str, Any]:
    message = decode_message(packet)
    if isinstance(message, Inference):
        raise ProtocolError("the fabric process sent a request")
    return message
