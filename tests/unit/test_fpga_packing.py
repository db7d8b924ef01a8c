"""Packing against its definition, one bit at a time, and against FINN's own where it installs."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gatelet.accelerators.errors import InvalidTensor, LoadError
from gatelet.accelerators.fpga.elements import (
    OVERFLOWS,
    ROUNDINGS,
    Element,
    finn_element,
    hls4ml_element,
    to_codes,
    to_values,
)
from gatelet.accelerators.fpga.packing import pack, packed_size, unpack
from hypothesis import given
from hypothesis import strategies as st
from required import unavailable

NAMES = [
    "BIPOLAR", "BINARY", "TERNARY",
    *(f"{sign}INT{bits}" for sign in ("", "U") for bits in range(2, 33)),
    "FIXED<8,3>", "FIXED<13,5>", "FIXED<24,0>",
]  # fmt: skip


def draw_codes(element: Element, rows: int, inner: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if element.kind == "bipolar":
        return rng.choice(np.array([-1, 1], np.int8), (rows, inner))
    codes = rng.integers(element.low, element.high, (rows, inner), endpoint=True, dtype=np.int64)
    extremes = rng.random((rows, inner))
    codes[extremes < 0.1] = element.low
    codes[extremes > 0.9] = element.high
    return codes.astype(element.container)


def by_definition(codes: np.ndarray, element: Element) -> np.ndarray:
    """Every row as a Python integer: element i at bit i * bits, the lowest byte first."""
    rows = []
    for row in codes.tolist():
        total = 0
        for place, code in enumerate(row):
            bits = (code + 1) // 2 if element.kind == "bipolar" else code
            total |= (bits & ((1 << element.bits) - 1)) << (place * element.bits)
        rows.append(list(total.to_bytes(-(-len(row) * element.bits // 8), "little")))
    return np.array(rows, np.uint8)


@given(st.sampled_from(NAMES), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32))
def test_packing_is_its_definition_and_unpacking_its_inverse(
    name: str, rows: int, inner: int, seed: int
) -> None:
    element = finn_element(name)
    codes = draw_codes(element, rows, inner, seed)
    packed = pack(codes, element)
    assert packed.dtype == np.uint8
    assert packed.shape == (rows, packed_size(inner, element))
    np.testing.assert_array_equal(packed, by_definition(codes, element))
    back = unpack(packed, inner, element)
    assert back.dtype == element.container
    np.testing.assert_array_equal(back, codes)


def test_eight_bits_are_moved_without_a_copy() -> None:
    for name in ("INT8", "UINT8", "INT16", "UINT32"):
        element = finn_element(name)
        codes = draw_codes(element, 4, 64, 1)
        values = to_codes(codes, element)
        assert np.shares_memory(pack(values, element), codes)
        assert np.shares_memory(unpack(pack(codes, element), 64, element), codes)


@given(st.sampled_from(NAMES), st.integers(0, 2**32))
def test_values_survive_the_journey(name: str, seed: int) -> None:
    element = finn_element(name)
    codes = draw_codes(element, 3, 7, seed)
    values = to_values(codes, element, np.dtype(np.float64))
    np.testing.assert_array_equal(to_codes(values, element), codes)
    if element.bits <= 24:
        narrow = to_values(codes, element, np.dtype(np.float32))
        np.testing.assert_array_equal(narrow.astype(np.float64), values)
        np.testing.assert_array_equal(to_codes(narrow, element), codes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("UINT4", 16), ("UINT4", -1), ("INT4", 8), ("TERNARY", -2), ("BIPOLAR", 0), ("BINARY", 2),
     ("INT8", 0.5), ("UINT8", np.nan), ("INT32", np.inf), ("FIXED<8,3>", 0.01)],
)  # fmt: skip
def test_what_a_type_cannot_hold_is_named_with_its_place(name: str, value: float) -> None:
    values = np.ones((2, 3), np.float32)
    values[1, 2] = value
    with pytest.raises(InvalidTensor, match=rf"at \[1, 2\] is not one of {name.split('<')[0]}"):
        to_codes(values, finn_element(name))


@pytest.mark.parametrize("name", ["INT33", "UINT0", "FLOAT16", "INT", "SCALEDINT<8>", "FIXED<8,9>"])
def test_unknown_types_are_refused(name: str) -> None:
    with pytest.raises(LoadError, match="is not supported"):
        finn_element(name)


@pytest.mark.parametrize(
    ("text", "bits", "fraction", "signed"),
    [("ap_fixed<16,6>", 16, 10, True), ("ap_fixed<12, 6>", 16, 10, True),
     ("fixed<8,3>", 8, 5, True),
     ("ap_ufixed<8,0,AP_RND,AP_SAT>", 8, 8, False), ("ap_int<6>", 8, 0, True),
     ("ap_uint<8>", 8, 0, False), ("ap_fixed<16,6,TRN,WRAP,0>", 16, 10, True)],
)  # fmt: skip
def test_precisions_of_hls4ml(text: str, bits: int, fraction: int, signed: bool) -> None:
    element = hls4ml_element(text)
    assert (element.bits, element.fraction, element.signed) == (bits, fraction, signed)


@pytest.mark.parametrize(
    "text", ["ap_fixed<24,6>", "ap_fixed<16>", "half", "ap_fixed<8,9>", "ap_fixed<16,6,AP_UP>",
             "ap_fixed<16,6,AP_RND,AP_WRAP_SM>", "ap_fixed<16,6,AP_RND,AP_SAT,2>", "ap_fixed<a,b>"]
)  # fmt: skip
def test_other_precisions_are_refused(text: str) -> None:
    with pytest.raises(LoadError, match="precision"):
        hls4ml_element(text)


def exact_fixed(value: float, element: Element) -> int:
    """ap_fixed's conversion in exact arithmetic."""
    from fractions import Fraction

    scaled = Fraction(value) * 2**element.fraction
    floor = scaled.numerator // scaled.denominator
    rest = scaled - floor
    half = Fraction(1, 2)
    up = {
        "TRN": False,
        "TRN_ZERO": rest > 0 and scaled < 0,
        "RND": rest >= half,
        "RND_ZERO": rest > half or (rest == half and scaled < 0),
        "RND_MIN_INF": rest > half,
        "RND_INF": rest > half or (rest == half and scaled > 0),
        "RND_CONV": rest > half or (rest == half and floor % 2 == 1),
    }[element.rounding or "TRN"]
    code = floor + up
    if element.low <= code <= element.high:
        return max(code, -element.high) if element.overflow == "SAT_SYM" and code < 0 else code
    if element.overflow == "WRAP":
        return (code - element.low) % 2**element.bits + element.low
    if element.overflow == "SAT_ZERO":
        return 0
    bottom = -element.high if element.overflow == "SAT_SYM" and element.signed else element.low
    return element.high if code > 0 else bottom


@given(
    st.sampled_from(["ap_fixed<16,6", "ap_fixed<8,3", "ap_ufixed<8,2", "ap_fixed<32,16"]),
    st.sampled_from(ROUNDINGS),
    st.sampled_from(OVERFLOWS),
    st.lists(
        st.floats(-(2.0**20), 2.0**20, width=32)
        | st.integers(-4000, 4000).map(lambda n: n / 64)
        | st.floats(-(2.0**100), 2.0**100, width=32),
        min_size=1, max_size=20,
    ),
)  # fmt: skip
def test_fixed_point_is_that_of_cpp(
    text: str, rounding: str, overflow: str, values: list[float]
) -> None:
    element = hls4ml_element(f"{text},AP_{rounding},AP_{overflow}>")
    codes = to_codes(np.array(values, np.float32), element)
    assert codes.tolist() == [exact_fixed(float(np.float32(v)), element) for v in values]


FINN = {"finn-plus": "1.6.1", "qonnx": "1.0.0", "bitstring": "5.0.0", "tibs": "2.0.2"}


@functools.cache
def finn(folder: str) -> Any:
    """FINN's own packing, from the release of its successor that installs from PyPI."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile"]
    subprocess.run(
        [*command, "--target", folder, *(f"{name}=={version}" for name, version in FINN.items())],
        check=True, timeout=100, capture_output=True, text=True,
    )  # fmt: skip
    sys.path.insert(0, folder)
    try:
        from finn.util import data_packing
        from qonnx.core.datatype import DataType
    finally:
        sys.path.remove(folder)
    return data_packing, DataType


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("finn")
    try:
        return finn(str(folder))
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        unavailable(f"FINN's packing does not install: {str(error.stderr)[-2000:]}")


@pytest.mark.parametrize("name", NAMES)
def test_packing_is_finns(reference: Any, name: str) -> None:
    packing, data_type = reference
    element = finn_element(name)
    for inner in (1, 3, 8, 13):
        codes = draw_codes(element, 4, inner, inner)
        values = to_values(codes, element, np.dtype(np.float32))
        # FINN's containers are float32: beyond 24 bits only what they hold can be compared.
        if element.bits > 24:
            values = np.round(values / 512) * 512
            values = np.clip(values, element.low, element.high - 255).astype(np.float32)
            codes = values.astype(np.int64).astype(element.container)
        theirs = packing.finnpy_to_packed_bytearray(
            values, data_type[name], reverse_inner=True, reverse_endian=True
        )
        np.testing.assert_array_equal(pack(codes, element), theirs)
        if element.fraction:
            continue  # Its way back fails on fixed point.
        theirs = np.ascontiguousarray(theirs)
        back = packing.packed_bytearray_to_finnpy(
            theirs, data_type[name], (4, inner), reverse_inner=True, reverse_endian=True
        )
        ours = to_values(unpack(theirs, inner, element), element, np.dtype(np.float32))
        np.testing.assert_array_equal(ours, back)
