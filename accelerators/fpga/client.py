"""The scoring process's end of the fabric protocol: a few connections, used by many threads.

The thread that asks waits in the kernel for its own answer; there is none in between.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import struct
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackendUnavailable, DeadlineExceeded, InvalidTensor
from ..tensors import Array
from .protocol import (
    INFERRED,
    MESSAGE_LIMIT,
    PROTOCOL_VERSION,
    Inference,
    ProtocolError,
    decode_message,
    encode_inference,
    encode_message,
    inference_head,
    raise_for,
    receive_packet,
    send_packet,
)
from .shared_memory import Layout, Place, Segment, lay_out, make_segment

CONNECTIONS = 4
CONNECT_SECONDS = 2.0
CALL_SECONDS = 30.0
KEPT_BYTES = 8 << 20
"""A connection with a larger segment is closed after use, and with it the memory."""
KEPT_VIEWS = 64
"""Prepared inferences of which a connection keeps the views."""
_PRECISE_SECONDS = 0.1
# The old option has the C type long, the new one of 32-bit systems 64 bits.
_TIMEOUT = struct.Struct("@ll" if socket.SO_RCVTIMEO == 20 else "=qq")


class FabricGone(BackendUnavailable):
    """There is no connection to the fabric process (any more)."""


@dataclass(frozen=True, slots=True)
class Form:
    """How the items of a tensor lie in memory: `dtype` [n, *shape]."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """An inference that is asked for again and again, with other values; see `prepare`."""

    head: bytes
    layout: Layout
    inputs: tuple[Form, ...]
    outputs: tuple[Form, ...]


def prepare(
    handle: str, items: int, inputs: tuple[Form, ...], outputs: tuple[Form, ...]
) -> Prepared:
    """`items` items with the package behind `handle`. Raises InvalidTensor when it is too much."""
    layout = lay_out(
        tuple([form.item_bytes for form in inputs]),
        tuple([form.item_bytes for form in outputs]),
        items,
    )
    if layout is None:
        raise InvalidTensor(f"{items} items are too large for one request; send fewer")
    head = inference_head(bytes.fromhex(handle), items, layout.nbytes)
    return Prepared(head, layout, inputs, outputs)


_Views = tuple[list[Array], list[Array]]


@dataclass(eq=False, slots=True)
class _Connection:
    """A socket, the memory the fabric process has mapped for it, and what lies where in there.

    `patience` is the timeout that the kernel has for it, in seconds.
    """

    socket: socket.socket
    generation: int
    segment: Segment | None = None
    views: dict[Prepared, _Views] = field(default_factory=dict)
    patience: float = math.inf


class FabricClient:
    """Calls to the fabric process at `path`. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._id = f"{os.getpid()}-{uuid.uuid4()}"
        # One entry per connection there may be, None for those to be made. The last one used is
        # the next: its memory is in the caches.
        self._free: deque[_Connection | None] = deque([None] * CONNECTIONS)
        self._freed = threading.Condition()
        self._waiting = 0
        self._generation = 0

    def call(self, header: Mapping[str, Any], deadline: float | None = None) -> Mapping[str, Any]:
        """Send one request and wait for its answer until `deadline` (monotonic).

        Raises FabricGone, DeadlineExceeded, or the error in the answer.
        """
        end = time.monotonic() + CALL_SECONDS if deadline is None else deadline
        connection = self._take(end)
        kept = None
        try:
            send_packet(connection.socket, encode_message(header))
            answer = _decoded(_answer(connection, end))
            kept = connection
        except (OSError, ProtocolError) as error:
            raise self._failed(error) from error
        finally:
            self._put(connection, kept)
        raise_for(answer)
        return answer

    def infer(
        self,
        prepared: Prepared,
        tensors: Sequence[Array],
        deadline: float | None = None,
        *,
        margin: float = 0.0,
    ) -> list[Array]:
        """Have one tensor per input, in its `Form`, computed; one per output in its own.

        The fabric gives up `margin` seconds before `deadline` (monotonic), so that its answer is
        here in time. Raises FabricGone, DeadlineExceeded, or what the answer says.
        """
        if deadline is None:
            end, until = time.monotonic() + CALL_SECONDS, math.inf
        else:
            end, until = deadline, deadline - margin
        packet = encode_inference(prepared.head, until)
        connection = self._take(end)
        kept = None
        try:
            views = connection.views.get(prepared)
            if views is None:
                views = _first(connection, prepared, tensors, packet)
            else:
                for view, tensor in zip(views[0], tensors):  # noqa: B905 - per request
                    view[...] = tensor
                connection.socket.send(packet)
            answer = _answer(connection, end)
            if answer == INFERRED:
                arrays = [view.copy() for view in views[1]]
                kept = connection
                return arrays
            refusal = _decoded(answer)
            kept = connection
        except (OSError, ProtocolError) as error:
            raise self._failed(error) from error
        finally:
            self._put(connection, kept)
        raise_for({**refusal, "ok": False})
        raise AssertionError

    def watch(self) -> socket.socket:
        """A connection of its own, whose end tells that the fabric process is gone.

        Raises FabricGone.
        """
        return self._connect().socket

    def close(self) -> None:
        """Drop idle connections, and those in use when they come back."""
        with self._freed:
            self._generation += 1
        for _ in range(CONNECTIONS):
            try:
                connection = self._free.pop()
            except IndexError:
                return
            if connection is not None:
                connection.socket.close()
            self._give(None)

    def _take(self, end: float) -> _Connection:
        try:
            connection = self._free.pop()
        except IndexError:
            connection = self._wait(end)
        if connection is not None:
            if connection.generation == self._generation:
                return connection
            connection.socket.close()
        try:
            return self._connect()
        except BaseException:
            # The place in the pool is free again, whatever ended the attempt; it is raised again.
            self._give(None)
            raise

    def _wait(self, end: float) -> _Connection | None:
        with self._freed:
            self._waiting += 1
            try:
                while True:
                    with contextlib.suppress(IndexError):
                        return self._free.pop()
                    remaining = end - time.monotonic()
                    if remaining <= 0:
                        raise DeadlineExceeded("the deadline passed before the fabric was free")
                    self._freed.wait(min(remaining, threading.TIMEOUT_MAX))
            finally:
                self._waiting -= 1

    def _put(self, connection: _Connection, kept: _Connection | None) -> None:
        """Back for others, where it is `kept`: after a failure an answer may still come."""
        if (
            kept is None
            or connection.generation != self._generation
            or (connection.segment is not None and connection.segment.size > KEPT_BYTES)
        ):
            connection.socket.close()
            kept = None
        self._give(kept)

    def _give(self, connection: _Connection | None) -> None:
        if connection is None:
            self._free.appendleft(None)
        else:
            self._free.append(connection)
        # Whoever waits has said so before it looked for the last time.
        if self._waiting:
            with self._freed:
                self._freed.notify()

    def _failed(self, error: OSError | ProtocolError) -> BackendUnavailable | DeadlineExceeded:
        if isinstance(error, TimeoutError):
            return DeadlineExceeded("the fabric did not answer within the deadline")
        return FabricGone(
            f"lost the fabric process at {self._path} ({error}); it is started again by its "
            "supervisor"
        )

    def _connect(self) -> _Connection:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        generation = self._generation
        try:
            sock.settimeout(CONNECT_SECONDS)
            sock.connect(str(self._path))
            send_packet(sock, encode_message({"op": "hello", "client": self._id}))
            packet = receive_packet(sock, time.monotonic() + CONNECT_SECONDS)
            spoken = _decoded(_present(packet)).get("protocol")
            if spoken != PROTOCOL_VERSION:
                raise ProtocolError(
                    f"it speaks version {spoken} of the protocol and this process "
                    f"{PROTOCOL_VERSION}: install the same gatelet on both sides"
                )
            sock.settimeout(None)
        except (OSError, ProtocolError) as error:
            sock.close()
            raise FabricGone(
                f"no fabric process at {self._path} ({error}); start it with gatelet run or the "
                "gatelet-fabric unit"
            ) from error
        return _Connection(sock, generation)


def _first(
    connection: _Connection, prepared: Prepared, tensors: Sequence[Array], packet: bytes
) -> _Views:
    """Sends an inference that this connection has not seen, with new memory where it takes more."""
    layout = prepared.layout
    segment, descriptor = connection.segment, None
    if segment is None or segment.size < layout.nbytes:
        segment, descriptor = make_segment(layout.nbytes)
        connection.segment = segment
        connection.views.clear()
    elif len(connection.views) >= KEPT_VIEWS:
        connection.views.clear()
    views = (
        _views(segment, layout.inputs, prepared.inputs),
        _views(segment, layout.outputs, prepared.outputs),
    )
    connection.views[prepared] = views
    try:
        for view, tensor in zip(views[0], tensors, strict=True):
            view[...] = tensor
        send_packet(connection.socket, packet, descriptor)
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return views


def _views(segment: Segment, places: Sequence[Place], forms: Sequence[Form]) -> list[Array]:
    return [
        segment.tensor(place, form.dtype, form.shape)
        for place, form in zip(places, forms, strict=True)
    ]


def _answer(connection: _Connection, end: float) -> bytes:
    """The next packet. Raises TimeoutError at `end`, another OSError, ProtocolError."""
    sock = connection.socket
    while True:
        remaining = end - time.monotonic()
        if remaining < _PRECISE_SECONDS:
            packet = receive_packet(sock, end)
            sock.settimeout(None)
            return _present(packet)
        # Coarse, but set once for many answers, where Python's own timeout polls before each.
        if connection.patience > remaining:
            connection.patience = min(remaining / 2, 60.0)
            whole, fraction = divmod(connection.patience, 1)
            sock.setsockopt(
                socket.SOL_SOCKET,
                socket.SO_RCVTIMEO,
                _TIMEOUT.pack(int(whole), int(fraction * 1e6)),
            )
        try:
            packet = sock.recv(MESSAGE_LIMIT + 1)
        except BlockingIOError:
            connection.patience = math.inf
            continue
        if len(packet) > MESSAGE_LIMIT:
            raise ProtocolError("a message is over the limit")
        return _present(packet)


def _present(packet: bytes | None) -> bytes:
    if not packet:
        raise ConnectionResetError("the fabric process closed the connection")
    return packet


def _decoded(packet: bytes) -> Mapping[str, Any]:
    message = decode_message(packet)
    if isinstance(message, Inference):
        raise ProtocolError("the fabric process sent a request")
    return message
