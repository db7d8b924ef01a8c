"""Frames between the scoring process and the fabric process over a Unix socket.

A frame is a prefix (magic, header size, payload size: little-endian), a JSON header and the raw
little-endian bytes of its tensors, in the order the header lists them. Requests carry "op", and
every request gets one answer: "ok" true, or false with "code" and "message". Tensors of infer are
items in wire format, uint8 [n, bytes per item] (see `package.Port`); moving them into shared memory
later changes only this module. `kind`, `inputs` and `outputs` are those of model.json (or null).

======== ===================================== ========================================
op       request                               answer
======== ===================================== ========================================
hello    client (an id shared by connections)  protocol, status
load     directory, kind, inputs, outputs      handle
infer    handle, deadlineMs (or null), tensors tensors
unload   handle                                -
status   -                                     status
======== ===================================== ========================================
"""

from __future__ import annotations

import json
import math
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    InvalidTensor,
    LoadError,
)
from ..tensors import NUMPY_DTYPES, Array, TensorSpec
from .package import Signature

PROTOCOL_VERSION = 1
MAGIC = b"GLF1"
HEADER_LIMIT = 64 << 10
PAYLOAD_LIMIT = 64 << 20
_PREFIX = struct.Struct("<4sII")
PREFIX_SIZE = _PREFIX.size
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("int8", "uint8", "float32")}
_MAX_DIMENSIONS = 8
_MAX_RANK = 16


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
class Frame:
    """A decoded frame. Tensors share the memory of the received payload."""

    header: Mapping[str, Any]
    tensors: Mapping[str, Array] = field(default_factory=dict)


def encode_frame(header: Mapping[str, Any], tensors: Mapping[str, Array] | None = None) -> bytes:
    """One frame. Raises ProtocolError when it would exceed a limit or has another dtype."""
    listed = []
    parts = []
    for name, tensor in (tensors or {}).items():
        if tensor.dtype.name not in _DTYPES:
            raise ProtocolError(f"tensor {name}: dtype {tensor.dtype} is not sent")
        listed.append({"name": name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)})
        parts.append(tensor.astype(_DTYPES[tensor.dtype.name], copy=False).tobytes())
    text = json.dumps({**header, "tensors": listed}, separators=(",", ":")).encode()
    size = sum(map(len, parts))
    if len(text) > HEADER_LIMIT or size > PAYLOAD_LIMIT:
        raise ProtocolError(f"a frame of {len(text)} + {size} bytes is over the limit")
    return b"".join((_PREFIX.pack(MAGIC, len(text), size), text, *parts))


def decode_prefix(prefix: bytes) -> tuple[int, int]:
    """Sizes of header and payload, in bytes. Raises ProtocolError."""
    magic, header, payload = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise ProtocolError("not a frame of the fabric protocol")
    if header > HEADER_LIMIT or payload > PAYLOAD_LIMIT:
        raise ProtocolError(f"a frame of {header} + {payload} bytes is over the limit")
    return header, payload


def decode_frame(text: bytes, payload: bytes | bytearray) -> Frame:
    """Header and tensors of a frame. Raises ProtocolError."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the header is not JSON ({error})") from error
    if not isinstance(header, dict) or not isinstance(header.get("tensors"), list):
        raise ProtocolError("the header is not an object with a list of tensors")
    tensors: dict[str, Array] = {}
    offset = 0
    for entry in header.pop("tensors"):
        name, dtype, shape = _described(entry)
        count = math.prod(shape)
        end = offset + count * dtype.itemsize
        if end > len(payload) or name in tensors:
            raise ProtocolError(f"tensor {name}: listed twice or longer than the payload")
        array = np.frombuffer(payload, dtype, count, offset) if count else np.empty(0, dtype)
        tensors[name] = array.reshape(shape)
        offset = end
    if offset != len(payload):
        raise ProtocolError(f"{len(payload) - offset} bytes of payload belong to no tensor")
    return Frame(header, tensors)


def _described(entry: Any) -> tuple[str, np.dtype[Any], tuple[int, ...]]:
    if not isinstance(entry, dict):
        raise ProtocolError("a tensor is described by an object")
    name, dtype, shape = entry.get("name"), entry.get("dtype"), entry.get("shape")
    if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ProtocolError(f"tensor {name!r}: dtype {dtype!r} is not known")
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size <= PAYLOAD_LIMIT for size in shape)
    ):
        raise ProtocolError(f"tensor {name}: bad shape")
    return name, _DTYPES[dtype], tuple(shape)


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


def send_frame(
    connection: socket.socket, header: Mapping[str, Any], tensors: Mapping[str, Array] | None = None
) -> None:
    """Send one frame. Raises OSError (TimeoutError when the socket has a timeout)."""
    connection.sendall(encode_frame(header, tensors))


def receive_frame(connection: socket.socket, deadline: float | None = None) -> Frame | None:
    """The next frame, None at a clean end; waits until `deadline` (monotonic) at most.

    Raises TimeoutError, another OSError, or ProtocolError.
    """
    prefix = _receive(connection, PREFIX_SIZE, deadline)
    if prefix is None:
        return None
    header_size, payload_size = decode_prefix(bytes(prefix))
    header = _receive(connection, header_size, deadline)
    payload = _receive(connection, payload_size, deadline)
    if header is None or payload is None:
        raise ConnectionResetError("the connection ended within a frame")
    return decode_frame(bytes(header), payload)


def _receive(connection: socket.socket, size: int, deadline: float | None) -> bytearray | None:
    buffer = bytearray(size)
    view = memoryview(buffer)
    have = 0
    while have < size:
        if deadline is not None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            connection.settimeout(remaining)
        count = connection.recv_into(view[have:])
        if count == 0:
            if have:
                raise ConnectionResetError("the connection ended within a frame")
            return None
        have += count
    return buffer
