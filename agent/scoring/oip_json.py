"""Inference requests and answers as the Open Inference Protocol's JSON, with binary tensor data.

Source: KServe, "Open Inference Protocol", REST; Triton Inference Server, "Binary Tensor Data
Extension": the JSON comes first, `Inference-Header-Content-Length` is its size, and the tensors
that have `binary_data_size` follow in raw form (see `tensor_codec`) in their order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from ...accelerators.tensors import NUMPY_DTYPES, TensorSpec
from .errors import Code, ScoringError
from .json_arrays import check_size, decode, json_values, parse_array
from .oip_messages import Placement
from .shared_memory import SharedMemory
from .tensor_codec import check_shape, decode_raw, encode_raw
from .types import InferenceRequest, InferenceResponse, Tensor

_NOTHING = msgspec.Raw()


class _TensorParameters(msgspec.Struct):
    binary_data_size: int | None = None
    binary_data: bool | None = None
    classification: int | str = 0
    shared_memory_region: str | None = None
    shared_memory_byte_size: int | str = 0
    shared_memory_offset: int | str = 0


class _RequestParameters(msgspec.Struct):
    binary_data_output: bool = False
    priority: int | str = 0
    timeout: int | str = 0


class _Input(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = _NOTHING
    parameters: _TensorParameters | None = None


class _Output(msgspec.Struct):
    name: str
    parameters: _TensorParameters | None = None


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: str = ""
    outputs: list[_Output] | None = None
    parameters: _RequestParameters | None = None


_REQUEST = msgspec.json.Decoder(_Request)


@dataclass(frozen=True, slots=True)
class DecodedJson:
    """`binary`: outputs that are to follow the JSON raw; None in `binary_default` counts for those
    not named."""

    request: InferenceRequest
    binary: Mapping[str, bool]
    binary_default: bool
    placements: Mapping[str, Placement]


def decode_json(
    body: bytes | bytearray,
    header_length: int | None,
    model: str,
    version: str,
    deadline: float | None = None,
    memory: SharedMemory | None = None,
    now: Callable[[], float] = time.monotonic,
    headers: Mapping[str, str] | None = None,
) -> DecodedJson:
    """The request in `body`, of which the first `header_length` bytes are JSON (None: all).

    Tensors are views into `body` where it allows that. Raises ScoringError INVALID_ARGUMENT, and
    what `memory` raises.
    """
    if header_length is None:
        text, rest = memoryview(body), memoryview(b"")
    else:
        if not 0 < header_length <= len(body):
            raise _invalid(
                f"Inference-Header-Content-Length is {header_length}, the body has {len(body)} "
                "bytes"
            )
        whole = memoryview(body)
        text, rest = whole[:header_length], whole[header_length:]
    check_size(body, len(text))
    message = decode(_REQUEST, text, "the request")
    tensors: list[Tensor] = []
    start = 0
    for one in message.inputs:
        parameters = one.parameters
        size = None if parameters is None else parameters.binary_data_size
        region = None if parameters is None else parameters.shared_memory_region
        if (one.data is not _NOTHING) + (size is not None) + (region is not None) > 1:
            raise _invalid(
                f"tensor {one.name!r}: send it once: as data, binary or in shared memory"
            )
        if size is not None:
            if size < 0 or start + size > len(rest):
                raise _invalid(
                    f"tensor {one.name!r}: binary_data_size is {size}, but {len(rest) - start} "
                    "bytes are left after the JSON and earlier tensors"
                )
            tensors.append(_decode_binary(one, rest[start : start + size]))
            start += size
        elif region is not None and parameters is not None:
            if memory is None:
                raise ScoringError(Code.UNIMPLEMENTED, "shared memory is not served here")
            placement = _placement(region, parameters)
            data = memory.read(placement.region, placement.offset, placement.byte_size)
            tensors.append(decode_raw(one.name, one.datatype, one.shape, data))
        elif one.data is _NOTHING:
            raise _invalid(f"tensor {one.name!r}: has no data")
        else:
            tensors.append(_decode_data(one, one.data))
    if start != len(rest):
        raise _invalid(
            f"{len(rest) - start} bytes follow the last tensor; give each a binary_data_size"
        )
    return _decoded(message, tuple(tensors), model, version, deadline, now, headers or {})


def _decoded(
    message: _Request,
    tensors: tuple[Tensor, ...],
    model: str,
    version: str,
    deadline: float | None,
    now: Callable[[], float],
    headers: Mapping[str, str],
) -> DecodedJson:
    priority, binary_default = 0, False
    if message.parameters is not None:
        binary_default = message.parameters.binary_data_output
        priority = _whole("priority", message.parameters.priority)
        microseconds = _whole("timeout", message.parameters.timeout)
        if microseconds:
            own = now() + microseconds / 1e6
            deadline = own if deadline is None else min(deadline, own)
    classes: dict[str, int] = {}
    placements: dict[str, Placement] = {}
    binary: dict[str, bool] = {}
    outputs = message.outputs or ()
    for output in outputs:
        parameters = output.parameters
        if parameters is None:
            continue
        count = _whole("classification", parameters.classification)
        if count:
            classes[output.name] = count
        if parameters.shared_memory_region is not None:
            region = parameters.shared_memory_region
            placements[output.name] = _placement(region, parameters)
        if parameters.binary_data is not None:
            binary[output.name] = parameters.binary_data
    request = InferenceRequest(
        model=model,
        version=version,
        id=message.id,
        inputs=tensors,
        outputs=tuple(output.name for output in outputs),
        deadline=deadline,
        priority=priority,
        classes=classes,
        headers=headers,
    )
    return DecodedJson(request, binary, binary_default, placements)


def decode_only_tensor(
    body: bytes | bytearray,
    spec: TensorSpec,
    model: str,
    version: str,
    headers: Mapping[str, str] | None = None,
) -> DecodedJson:
    """Triton's raw binary request: the body is the only input of a model, and nothing else.

    Its one free size, if there is one, follows from the size of the body. Raises ScoringError.
    """
    shape = list(spec.shape)
    if spec.datatype == "BYTES":
        shape = [1 if size == -1 else size for size in shape]
        size = len(body).to_bytes(4, "little")
        tensor = decode_raw(spec.name, spec.datatype, shape, size + bytes(body))
    else:
        free = [index for index, size in enumerate(shape) if size == -1]
        if len(free) > 1:
            raise _invalid(
                f"input {spec.name!r}: shape {shape} has more than one free size; send the shape "
                "in JSON"
            )
        if free:
            shape[free[0]] = 1
            item = int(np.prod(shape)) * NUMPY_DTYPES[spec.datatype].itemsize
            shape[free[0]] = len(body) // item if item else 0
        tensor = _aligned(decode_raw(spec.name, spec.datatype, shape, memoryview(body)))  # type: ignore[arg-type]
    request = InferenceRequest(model, (tensor,), version, headers=headers or {})
    return DecodedJson(request, {}, True, {})


def _decode_binary(one: _Input, data: memoryview) -> Tensor:
    if one.datatype == "BYTES":
        return decode_raw(one.name, one.datatype, one.shape, bytes(data))
    return _aligned(decode_raw(one.name, one.datatype, one.shape, data))  # type: ignore[arg-type]


def _aligned(tensor: Tensor) -> Tensor:
    if tensor.array.flags.aligned:
        return tensor
    return Tensor(tensor.name, tensor.datatype, tensor.array.copy())


def _decode_data(one: _Input, data: msgspec.Raw) -> Tensor:
    name, shape = one.name, tuple(one.shape)
    count = check_shape(name, shape)
    array = parse_array(name, one.datatype, data, len(shape))
    if array.size != count or (array.ndim > 1 and array.shape != shape):
        raise _invalid(
            f"tensor {name!r}: data has shape {list(array.shape)}, expected {list(shape)}"
        )
    return Tensor(name, one.datatype, array.reshape(shape))


def encode_json(
    response: InferenceResponse, decoded: DecodedJson, memory: SharedMemory | None = None
) -> tuple[bytes, int | None]:
    """The body, and the size of its JSON where raw tensors follow it.

    Raises ScoringError when an output does not fit its place in shared memory, or has no JSON.
    """
    outputs: list[dict[str, Any]] = []
    tails: list[bytes] = []
    for tensor in response.outputs:
        entry: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": tensor.shape,
        }
        placement = decoded.placements.get(tensor.name)
        if placement is not None:
            if memory is None:
                raise ScoringError(Code.UNIMPLEMENTED, "shared memory is not served here")
            data = encode_raw(tensor)
            memory.write(placement.region, placement.offset, placement.byte_size, data)
            entry["parameters"] = {
                "shared_memory_region": placement.region,
                "shared_memory_byte_size": len(data),
                **({"shared_memory_offset": placement.offset} if placement.offset else {}),
            }
        elif decoded.binary.get(tensor.name, decoded.binary_default):
            data = encode_raw(tensor)
            entry["parameters"] = {"binary_data_size": len(data)}
            tails.append(data)
        else:
            entry["data"] = json_values(tensor).ravel().tolist()
        outputs.append(entry)
    message: dict[str, Any] = {
        "model_name": response.model,
        "model_version": response.version,
        "outputs": outputs,
    }
    if response.id:
        message["id"] = response.id
    head = msgspec.json.encode(message)
    binary = any("binary_data_size" in one.get("parameters", ()) for one in outputs)
    if not binary:
        return head, None
    return b"".join((head, *tails)), len(head)


def _placement(region: str, parameters: _TensorParameters) -> Placement:
    size = _whole("shared_memory_byte_size", parameters.shared_memory_byte_size)
    return Placement(region, size, _whole("shared_memory_offset", parameters.shared_memory_offset))


def _whole(key: str, value: int | str) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        value = int(value)
    if isinstance(value, str) or not 0 <= value < 2**63:
        raise _invalid(f"parameter {key!r} must be a whole number of 0 or more")
    return value


def _invalid(message: str) -> ScoringError:
    return ScoringError(Code.INVALID_ARGUMENT, message)
