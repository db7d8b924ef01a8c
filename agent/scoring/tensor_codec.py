"""Tensor contents between the wire and numpy.

Raw form (Open Inference Protocol v2, "Raw tensor contents"): elements in row-major order,
little-endian, without padding; a BYTES element is its length (4 bytes, little-endian) and its data.
Typed form: a flat list of numbers, booleans or byte strings, row-major; FP16 and BF16 have none.
BF16 is the upper half of an FP32 number and is FP32 in memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...accelerators.tensors import NUMPY_DTYPES, Array
from .errors import Code, ScoringError
from .types import Tensor

TYPED_FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""datatype -> the list of InferTensorContents that carries it."""

_MOST_DIMENSIONS = 32  # numpy's limit before version 2
_MOST_ELEMENTS = 2**31
_LENGTH = struct.Struct("<I")
BF16 = "BF16"
_BF16_BYTES = 2


def decode_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Tensor:
    """The tensor in `raw`, without copying it (so the array is read-only) except for BYTES and
    BF16.

    Raises ScoringError INVALID_ARGUMENT.
    """
    dtype, dimensions, count = _layout(name, datatype, shape)
    if datatype == "BYTES":
        return Tensor(name, datatype, _split_bytes(name, raw, count).reshape(dimensions))
    expected = count * (_BF16_BYTES if datatype == BF16 else dtype.itemsize)
    if len(raw) != expected:
        raise _invalid(
            name,
            f"raw contents have {len(raw)} bytes, expected {expected} for "
            f"{_described(datatype, dimensions)}",
        )
    if datatype == BF16:
        wide = np.frombuffer(raw, "<u2").astype("<u4") << np.uint32(16)
        return Tensor(name, datatype, wide.view("<f4").reshape(dimensions))
    array: Array = np.frombuffer(raw, dtype)
    if datatype == "BOOL" and count and int(array.view(np.uint8).max()) > 1:
        raise _invalid(name, "raw contents of BOOL must be bytes of 0 or 1")
    return Tensor(name, datatype, array.reshape(dimensions))


def encode_raw(tensor: Tensor) -> bytes:
    """The raw form of `tensor`; BF16 is rounded to the nearest, ties to even."""
    if tensor.datatype == BF16:
        return _to_bf16(tensor.array)
    if tensor.datatype != "BYTES":
        return tensor.array.tobytes()
    parts: list[bytes] = []
    for element in tensor.array.ravel().tolist():
        parts += (_LENGTH.pack(len(element)), element)
    return b"".join(parts)


def _to_bf16(array: Array) -> bytes:
    numbers = np.ascontiguousarray(array, "<f4")
    bits = numbers.view("<u4")
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    # Rounding must not make an infinity of a NaN.
    rounded = np.where(np.isnan(numbers), bits | np.uint32(0x00400000), rounded)
    return (rounded >> np.uint32(16)).astype("<u2").tobytes()


def decode_typed(name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Tensor:
    """The tensor with `values` in row-major order. Raises ScoringError INVALID_ARGUMENT."""
    dtype, dimensions, count = _layout(name, datatype, shape)
    if datatype not in TYPED_FIELDS:
        raise _invalid(name, f"{datatype} has no typed contents; send raw contents")
    if len(values) != count:
        raise _invalid(
            name,
            f"{TYPED_FIELDS[datatype]} has {len(values)} elements, expected {count} for "
            f"{_described(datatype, dimensions)}",
        )
    array: Array
    if dtype.kind in "iu" and dtype.itemsize < 4:
        # These travel as 32-bit numbers: one that does not fit must not wrap around.
        wide = np.array(values, np.int32 if dtype.kind == "i" else np.uint32)
        limits = np.iinfo(dtype)  # type: ignore[type-var]
        if count and not limits.min <= int(wide.min()) <= int(wide.max()) <= limits.max:
            raise _invalid(name, f"values must be {limits.min} to {limits.max} for {datatype}")
        array = wide.astype(dtype)
    elif datatype == "BYTES":
        array = np.empty(count, np.object_)
        array[:] = values
    else:
        array = np.array(values, dtype)
    return Tensor(name, datatype, array.reshape(dimensions))


def typed_values(tensor: Tensor) -> list[Any]:
    """Python values in row-major order, for a datatype of TYPED_FIELDS."""
    return list(tensor.array.ravel().tolist())


def _layout(
    name: str, datatype: str, shape: Sequence[int]
) -> tuple[np.dtype[np.generic], tuple[int, ...], int]:
    dtype = NUMPY_DTYPES.get("FP32" if datatype == BF16 else datatype)
    if dtype is None:
        known = ", ".join((*NUMPY_DTYPES, BF16))
        raise _invalid(name, f"unknown datatype {datatype!r}, expected {known}")
    dimensions = tuple(shape)
    return dtype, dimensions, check_shape(name, dimensions)


def check_shape(name: str, dimensions: tuple[int, ...]) -> int:
    """The number of elements. Raises ScoringError INVALID_ARGUMENT for what no array can have."""
    if len(dimensions) > _MOST_DIMENSIONS:
        raise _invalid(name, f"{len(dimensions)} dimensions, at most {_MOST_DIMENSIONS} are served")
    if min(dimensions, default=0) < 0:
        raise _invalid(name, f"shape {list(dimensions)} must not have negative sizes")
    count = math.prod(dimensions)
    # Beside a size of 0 the others could be anything; without one the contents are too few.
    if not count and math.prod(size or 1 for size in dimensions) > _MOST_ELEMENTS:
        raise _invalid(name, f"shape {list(dimensions)} is too large")
    return count


def _split_bytes(name: str, raw: bytes, count: int) -> Array:
    # Each element takes 4 bytes at least: a shape may not reserve memory that the sender did
    # not pay for.
    if count * _LENGTH.size > len(raw):
        raise _invalid(
            name, f"raw contents have {len(raw)} bytes, too few for {count} BYTES elements"
        )
    elements = np.empty(count, np.object_)
    position = 0
    for index in range(count):
        start = position + _LENGTH.size
        if start > len(raw):
            raise _truncated(name, index, count, len(raw), start)
        position = start + _LENGTH.unpack_from(raw, position)[0]
        if position > len(raw):
            raise _truncated(name, index, count, len(raw), position)
        elements[index] = raw[start:position]
    if position != len(raw):
        raise _invalid(
            name, f"raw contents have {len(raw)} bytes, expected {position} for {count} elements"
        )
    return elements


def _truncated(name: str, index: int, count: int, actual: int, expected: int) -> ScoringError:
    return _invalid(
        name,
        f"raw contents have {actual} bytes, but element {index} of {count} ends at byte {expected}",
    )


def _described(datatype: str, dimensions: tuple[int, ...]) -> str:
    return f"{datatype}[{','.join(map(str, dimensions))}]"


def _invalid(name: str, what: str) -> ScoringError:
    return ScoringError(Code.INVALID_ARGUMENT, f"tensor {name!r}: {what}")
