"""Tensor data between JSON and numpy: nested lists or a flat one, checked before they are built.

What is decoded has a type that says how deep it may be, so that no sender chooses the depth.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import msgspec
import numpy as np

from ...accelerators.tensors import NUMPY_DTYPES, Array
from .errors import Code, ScoringError
from .tensor_codec import BF16
from .types import Tensor

MOST_VALUES = 1_000_000
_MOST_DIMENSIONS = 32
_BRACKETS = re.compile(rb"[\[ \t\r\n]*")
# Of the beginning of data, where its brackets are.
_SCANNED = 4096


def parse_array(name: str, datatype: str, data: msgspec.Raw | bytes, rank: int) -> Array:
    """Nested lists of `rank` levels, or one flat list, as an array; a bare value has rank 0.

    Raises ScoringError INVALID_ARGUMENT.
    """
    dtype = NUMPY_DTYPES.get("FP32" if datatype == BF16 else datatype)
    if dtype is None:
        known = ", ".join((*NUMPY_DTYPES, BF16))
        raise _invalid(f"tensor {name!r}: unknown datatype {datatype!r}, expected {known}")
    if rank > _MOST_DIMENSIONS:
        raise _invalid(f"tensor {name!r}: {rank} dimensions, at most {_MOST_DIMENSIONS} are served")
    depth = _depth(memoryview(data), rank)
    values = decode(_decoder(dtype.kind, depth), data, f"tensor {name!r}: data")
    try:
        if dtype.kind == "O":
            return _texts(values, depth)
        if dtype.kind in "iu":
            return _whole_numbers(name, datatype, values, dtype)
        with np.errstate(over="ignore"):
            return np.array(values, dtype)
    except (ValueError, OverflowError):
        raise _invalid(
            f"tensor {name!r}: data is no array of {datatype}: its rows differ in length, or a "
            "value does not fit"
        ) from None


def _depth(data: memoryview, rank: int) -> int:
    """Levels of lists that the data begins with, and at most `rank`."""
    begin = _BRACKETS.match(data[:_SCANNED])
    depth = begin[0].count(b"[") if begin else 0
    return min(depth, rank) if rank else min(depth, 1)


@functools.lru_cache(maxsize=256)
def _decoder(kind: str, depth: int) -> msgspec.json.Decoder[Any]:
    element: Any = {"b": bool, "i": int, "u": int, "f": float, "O": str}[kind]
    for _ in range(depth):
        element = list[element]
    return msgspec.json.Decoder(element)


def _whole_numbers(name: str, datatype: str, values: Any, dtype: np.dtype[Any]) -> Array:
    wide = np.array(values, np.uint64 if dtype == np.uint64 else np.int64)
    if dtype.itemsize < 8 or dtype.kind == "u":
        limits = np.iinfo(dtype)
        if wide.size and not limits.min <= int(wide.min()) <= int(wide.max()) <= limits.max:
            raise _invalid(
                f"tensor {name!r}: values must be {limits.min} to {limits.max} for {datatype}"
            )
    return wide.astype(dtype, copy=False)


def _texts(values: Any, depth: int) -> Array:
    def encoded(value: Any) -> Any:
        return value.encode() if isinstance(value, str) else [encoded(one) for one in value]

    array = np.array(encoded(values), np.object_)
    if array.ndim != depth:
        raise ValueError("the rows differ in length")
    return array


def json_values(tensor: Tensor) -> Array:
    """What `tolist` makes JSON of; what is not a finite number becomes null.

    Raises ScoringError INVALID_ARGUMENT for bytes that are no text.
    """
    if tensor.datatype != "BYTES":
        return tensor.array
    try:
        texts = [element.decode() for element in tensor.array.ravel().tolist()]
    except UnicodeDecodeError:
        raise _invalid(
            f"output {tensor.name!r} has bytes that are no UTF-8; request it with binary_data"
        ) from None
    array = np.empty(len(texts), np.object_)
    array[:] = texts
    return array.reshape(tensor.shape)


def check_size(body: bytes | bytearray, end: int | None = None) -> None:
    """Python takes many times the memory of a number's text. Raises ScoringError."""
    if body.count(b",", 0, len(body) if end is None else end) >= MOST_VALUES:
        raise _invalid(f"the JSON has more than {MOST_VALUES} values; send the tensors binary")


def decode(decoder: msgspec.json.Decoder[Any], data: Any, what: str) -> Any:
    """Raises ScoringError INVALID_ARGUMENT for what is no JSON, or not of the decoder's type."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _invalid(f"{what}: {error}") from None
    except msgspec.DecodeError as error:
        raise _invalid(f"{what} is no JSON: {error}") from None
    except RecursionError:
        raise _invalid(f"{what} is nested too deeply") from None
    except UnicodeDecodeError:
        raise _invalid(f"{what} is no UTF-8") from None


def _invalid(message: str) -> ScoringError:
    return ScoringError(Code.INVALID_ARGUMENT, message)
