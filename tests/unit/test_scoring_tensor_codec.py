from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from gatelet.accelerators.tensors import NUMPY_DTYPES
from gatelet.agent.scoring.errors import Code, ScoringError
from gatelet.agent.scoring.tensor_codec import (
    TYPED_FIELDS,
    decode_raw,
    decode_typed,
    encode_raw,
    typed_values,
)
from gatelet.agent.scoring.types import Tensor
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

NUMERIC = sorted(set(NUMPY_DTYPES) - {"BYTES"})
SHAPES = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@st.composite
def tensors(draw: st.DrawFn, datatypes: list[str]) -> Tensor:
    datatype = draw(st.sampled_from(datatypes))
    shape = draw(SHAPES)
    if datatype == "BYTES":
        size = math.prod(shape)
        array = np.empty(size, np.object_)
        array[:] = draw(st.lists(st.binary(max_size=9), min_size=size, max_size=size))
        return Tensor("t", datatype, array.reshape(shape))
    return Tensor("t", datatype, draw(npst.arrays(NUMPY_DTYPES[datatype], shape)))


def same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.array.dtype != other.array.dtype:
        return False
    if one.datatype == "BYTES":
        return bool(one.array.tolist() == other.array.tolist())
    return one.array.tobytes() == other.array.tobytes()


@given(tensors([*NUMERIC, "BYTES"]))
def test_raw_contents_come_back(tensor: Tensor) -> None:
    raw = encode_raw(tensor)
    assert same(decode_raw("t", tensor.datatype, tensor.shape, raw), tensor)


@given(tensors(sorted(TYPED_FIELDS)))
def test_typed_contents_come_back(tensor: Tensor) -> None:
    values = typed_values(tensor)
    decoded = decode_typed("t", tensor.datatype, tensor.shape, values)
    if tensor.array.dtype.kind == "f":
        np.testing.assert_array_equal(decoded.array, tensor.array)
    else:
        assert same(decoded, tensor)


@given(tensors([*NUMERIC, "BYTES"]), st.data())
def test_any_other_length_is_refused(tensor: Tensor, data: st.DataObject) -> None:
    raw = encode_raw(tensor)
    if raw:
        cut = raw[: data.draw(st.integers(0, len(raw) - 1))]
        with pytest.raises(ScoringError, match="tensor 't'") as caught:
            decode_raw("t", tensor.datatype, tensor.shape, cut)
        assert caught.value.code is Code.INVALID_ARGUMENT
    with pytest.raises(ScoringError, match="tensor 't'"):
        decode_raw("t", tensor.datatype, tensor.shape, raw + b"\0")


@given(st.binary(max_size=64), SHAPES, st.sampled_from([*NUMERIC, "BYTES"]))
def test_garbage_decodes_or_is_refused(raw: bytes, shape: tuple[int, ...], datatype: str) -> None:
    try:
        tensor = decode_raw("t", datatype, shape, raw)
    except ScoringError:
        return
    assert encode_raw(tensor) == raw


def test_numbers_are_read_in_place_and_little_endian() -> None:
    raw = struct.pack("<3f", 1.0, -2.5, 3.0)
    array = decode_raw("x", "FP32", [3], raw).array
    assert array.tolist() == [1.0, -2.5, 3.0]
    assert np.shares_memory(array, np.frombuffer(raw, np.uint8))


def test_bytes_elements_are_length_prefixed() -> None:
    array = np.array([b"", b"a\0", "ä".encode()], np.object_)
    raw = encode_raw(Tensor("s", "BYTES", array))
    assert raw == b"\0\0\0\0" + b"\2\0\0\0a\0" + b"\2\0\0\0\xc3\xa4"
    assert decode_raw("s", "BYTES", [3, 1], raw).array.tolist() == [[b""], [b"a\0"], [b"\xc3\xa4"]]


def test_a_message_tells_expected_and_actual_sizes() -> None:
    with pytest.raises(ScoringError, match=r"tensor 'x': .*have 7 bytes, expected 8 for FP32\[2\]"):
        decode_raw("x", "FP32", [2], bytes(7))


@pytest.mark.parametrize(
    ("datatype", "shape", "raw", "message"),
    [
        ("FP99", [1], b"", "unknown datatype 'FP99'"),
        ("FP32", [-1, 2], b"", r"shape \[-1, 2\] must not have negative"),
        ("FP32", [1] * 33, b"", "33 dimensions"),
        ("BOOL", [2], b"\1\2", "0 or 1"),
        ("BYTES", [2**40], bytes(64), "too few for 1099511627776 BYTES"),
        ("BYTES", [1], b"\xff\xff\xff\xff", "element 0 of 1 ends at byte 4294967299"),
        ("FP64", [2**62, 2**62], b"", "have 0 bytes, expected"),
    ],
)
def test_bad_raw_contents(datatype: str, shape: list[int], raw: bytes, message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        decode_raw("t", datatype, shape, raw)


@pytest.mark.parametrize(
    ("datatype", "values", "message"),
    [
        ("FP16", [1.0], "FP16 has no typed contents"),
        ("INT8", [128], "-128 to 127"),
        ("UINT16", [65536], "0 to 65535"),
        ("FP32", [1.0, 2.0], "fp32_contents has 2 elements, expected 1"),
        ("FP32", [], "fp32_contents has 0 elements, expected 1"),
    ],
)
def test_bad_typed_contents(datatype: str, values: list[float], message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        decode_typed("t", datatype, [1], values)
