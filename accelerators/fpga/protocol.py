"""Messages between the scoring process and the fabric process.

One packet of a Unix socket (SOCK_SEQPACKET) is one message, and every request gets one answer. What
is rare is JSON: requests carry "op", answers "ok" true, or false with "code" and "message". `kind`,
`inputs` and `outputs` are those of model.json (or null).

======== ===================================== ========================================
op       request                               answer
======== ===================================== ========================================
hello    client (an id shared by connections)  protocol, status
load     directory, kind, inputs, outputs      handle
unload   handle                                -
status   -                                     status
======== ===================================== ========================================

infer is an `Inference` in 40 bytes, answered by its first 4 or by an error in JSON. Its items, in
wire format (see `package.Port`), lie in the connection's segment (`shared_memory`),
whose descriptor comes with the first request that uses it. All that decides where the server reads
and writes is in the message, never in the memory, which the client can change at any time.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    InvalidTensor,
    LoadError,
)
from ..tensors import NUMPY_DTYPES, TensorSpec
from .package import Signature

PROTOCOL_VERSION = 3
MESSAGE_LIMIT = 64 << 10
PAYLOAD_LIMIT = 64 << 20
"""Bytes of all inputs, or of all outputs, of one request."""
INFERRED = b"GLI3"
_JSON = b"GLJ2"
_HEAD = struct.Struct("<4s16sIQ")
_INFERENCE = struct.Struct("<32sd")
INFERENCE_BYTES = _INFERENCE.size
_MAX_RANK = 16
# Plain numbers: the enumeration's own operators take longer than the system call.
_CUT_OFF = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_CLOSE_ON_EXEC = int(socket.MSG_CMSG_CLOEXEC)
_DESCRIPTOR_SPACE = socket.CMSG_SPACE(array.array("i").itemsize)


class ProtocolError(ValueError):
    """The other side broke the protocol; the connection is of no more use."""


class UnknownHandle(BackendUnavailable):
    """The fabric process does not know this handle (it was restarted); load again."""


class FabricSick(BackendUnavailable):
    """A transfer failed or hung; the fabric process is configuring the fabric anew."""


_CODES: dict[str, type[BackendError]] = {
    "UNKNOWN_HANDLE": UnknownHandle,
    "SICK": FabricSick,
    "UNAVAILABLE": BackendUnavailable,
    "DEADLINE": DeadlineExceeded,
    "INVALID": InvalidTensor,
    "LOAD": LoadError,
    "FAILED": BackendError,
}


@dataclass(frozen=True, slots=True)
class Inference:
    """A request to compute `items` items with the package behind `handle` (16 bytes).

    `deadline` is on the machine's monotonic clock, which both processes share; infinite for none.
    `nbytes` is how much of the segment the client laid its tensors out in.
    """

    handle: bytes
    deadline: float
    items: int
    nbytes: int

    def encode(self) -> bytes:
        return encode_inference(inference_head(self.handle, self.items, self.nbytes), self.deadline)


Message = Inference | Mapping[str, Any]


def inference_head(handle: bytes, items: int, nbytes: int) -> bytes:
    """What is the same in all requests for as many items with one package."""
    return _HEAD.pack(INFERRED, handle, items, nbytes)


def encode_inference(head: bytes, deadline: float) -> bytes:
    """An `Inference` in bytes."""
    return _INFERENCE.pack(head, deadline)


def split_inference(packet: bytes) -> tuple[bytes, float]:
    """Head and deadline of `INFERENCE_BYTES` that begin with `INFERRED`. Raises ProtocolError."""
    head, deadline = _INFERENCE.unpack(packet)
    if deadline != deadline:
        raise ProtocolError("the deadline is not a number")
    return head, deadline


def encode_message(header: Mapping[str, Any]) -> bytes:
    """A message in JSON. Raises ProtocolError when it would exceed the limit."""
    text = _JSON + json.dumps(header, separators=(",", ":")).encode()
    if len(text) > MESSAGE_LIMIT:
        raise ProtocolError(f"a message of {len(text)} bytes is over the limit")
    return text


def decode_message(packet: bytes) -> Message:
    """The message in a packet. Raises ProtocolError."""
    if packet.startswith(INFERRED) and len(packet) == INFERENCE_BYTES:
        head, deadline = split_inference(packet)
        _, handle, items, nbytes = _HEAD.unpack(head)
        return Inference(handle, deadline, items, nbytes)
    if not packet.startswith(_JSON):
        raise ProtocolError("not a message of the fabric protocol")
    try:
        header = json.loads(packet[len(_JSON) :])
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the message is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ProtocolError("the message is not an object")
    return header


def error_header(error: BackendError) -> dict[str, Any]:
    """The answer that carries `error` to the other side."""
    code = next(code for code, kind in _CODES.items() if isinstance(error, kind))
    return {"ok": False, "code": code, "message": str(error)}


def raise_for(header: Mapping[str, Any]) -> None:
    """Raise the error an answer carries, as the type it had on the other side."""
    if header.get("ok") is not True:
        kind = _CODES.get(str(header.get("code")), BackendError)
        raise kind(str(header.get("message", "the fabric process gave no reason")))


def signature_header(signature: Signature) -> dict[str, Any]:
    """Fields of a load request that carry `signature`."""

    def listed(specs: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
        return [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in specs]

    return {"inputs": listed(signature.inputs), "outputs": listed(signature.outputs)}


def signature_in(header: Mapping[str, Any]) -> Signature:
    """The signature a load request carries. Raises LoadError."""
    sides = []
    for side in ("inputs", "outputs"):
        specs = []
        for entry in header.get(side) or ():
            name, datatype, shape = (
                entry.get(field) if isinstance(entry, dict) else None
                for field in ("name", "datatype", "shape")
            )
            if (
                not isinstance(name, str)
                or datatype not in NUMPY_DTYPES
                or not isinstance(shape, list)
                or len(shape) > _MAX_RANK
                or not all(type(size) is int and -1 <= size <= PAYLOAD_LIMIT for size in shape)
            ):
                raise LoadError(f"load: {side} must list name, datatype and shape")
            specs.append(TensorSpec(name, str(datatype), tuple(shape)))
        sides.append(tuple(specs))
    return Signature(*sides)


def send_packet(connection: socket.socket, packet: bytes, descriptor: int | None = None) -> None:
    """Send one packet, with a file descriptor where given. Raises OSError."""
    if descriptor is None:
        connection.send(packet)
    else:
        socket.send_fds(connection, [packet], [descriptor])


def receive_packet(connection: socket.socket, deadline: float | None = None) -> bytes | None:
    """The next packet, None at the end; waits until `deadline` (monotonic) at most.

    Raises TimeoutError, another OSError, or ProtocolError.
    """
    if deadline is not None:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        connection.settimeout(remaining)
    packet = connection.recv(MESSAGE_LIMIT + 1)
    if len(packet) > MESSAGE_LIMIT:
        raise ProtocolError("a message is over the limit")
    return packet or None


def receive_request(connection: socket.socket) -> tuple[bytes, int | None] | None:
    """The next packet and the descriptor that came with it, which is the caller's to close.

    None at the end. Raises OSError or ProtocolError.
    """
    packet, ancillary, flags, _ = connection.recvmsg(
        MESSAGE_LIMIT, _DESCRIPTOR_SPACE, _CLOSE_ON_EXEC
    )
    if not ancillary and not flags & _CUT_OFF:
        return (packet, None) if packet else None
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    if flags & _CUT_OFF or len(descriptors) > 1:
        for descriptor in descriptors:
            os.close(descriptor)
        raise ProtocolError("a message is over the limit, or carries several descriptors")
    if not packet and not descriptors:
        return None
    return packet, descriptors[0] if descriptors else None
