"""Numbers as they travel on the wire: FINN's and hls4ml's types, and their conversion.

A *code* is the integer whose low `bits` bits go out; its *value* is what it stands for. Pure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InvalidTensor, LoadError
from ..tensors import Array

_FINN_FIXED = {"BINARY": (1, 0, 1), "TERNARY": (2, -1, 1)}
_FINN_INTEGER = re.compile(r"(U?)INT([1-9]\d?)")
_FINN_POINT = re.compile(r"(U?)FIXED<(\d{1,2}),(-?\d{1,2})>")
_AP_POINT = re.compile(r"(?:ap_)?(u?)fixed<(.+)>")
_AP_INTEGER = re.compile(r"(?:ap_)?(u?)int<(\d{1,3})>")
ROUNDINGS = ("TRN", "TRN_ZERO", "RND", "RND_ZERO", "RND_MIN_INF", "RND_INF", "RND_CONV")
OVERFLOWS = ("WRAP", "SAT", "SAT_ZERO", "SAT_SYM")
MAX_BITS = 32


@dataclass(frozen=True, slots=True)
class Element:
    """One number on the wire.

    `kind` is "integer" (value = code / 2 ** fraction, from `low` to `high`), "bipolar" (bit 0 is
    -1) or "float" (IEEE, 32 or 64 bits). `rounding` and `overflow` say what becomes of a value
    between or outside of the codes, as in C++ (UG902, "Arbitrary Precision Fixed-Point"); None
    refuses it, as FINN does. A bipolar element with rounding "SIGN" takes every number by its sign,
    0 as positive.
    """

    name: str
    bits: int
    kind: str = "integer"
    low: int = 0
    high: int = 1
    fraction: int = 0
    rounding: str | None = None
    overflow: str | None = None

    @property
    def signed(self) -> bool:
        return self.low < 0

    @property
    def container(self) -> np.dtype[np.generic]:
        """The narrowest numpy dtype that holds every code (for a float: the value)."""
        if self.kind == "float":
            return np.dtype(f"<f{self.bits // 8}")
        size = next(size for size in (1, 2, 4, 8) if self.bits <= 8 * size)
        return np.dtype(f"<{'i' if self.signed or self.kind == 'bipolar' else 'u'}{size}")

    @property
    def datatype(self) -> str:
        """The Open Inference Protocol datatype that holds every value exactly, or FP32."""
        if self.kind == "float":
            return "FP64" if self.bits == 64 else "FP32"
        if self.fraction:
            return "FP32" if self.bits <= 24 else "FP64"
        dtype = self.container
        return f"{'INT' if dtype.kind == 'i' else 'UINT'}{8 * dtype.itemsize}"


def finn_element(name: str) -> Element:
    """A type by the name QONNX gives it. Raises LoadError for one that is not supported."""
    text = name.strip().replace(" ", "")
    if text == "BIPOLAR":
        return Element(text, 1, "bipolar", -1, 1)
    if text == "FLOAT32":
        return Element(text, 32, "float")
    if text in _FINN_FIXED:
        bits, low, high = _FINN_FIXED[text]
        return Element(text, bits, "integer", low, high)
    if (match := _FINN_INTEGER.fullmatch(text)) and int(match[2]) <= MAX_BITS:
        return _integer(text, int(match[2]), not match[1])
    if match := _FINN_POINT.fullmatch(text):
        bits, whole = int(match[2]), int(match[3])
        if 1 <= bits <= MAX_BITS and 0 <= bits - whole <= 64:
            return _integer(text, bits, not match[1], fraction=bits - whole)
    raise LoadError(
        f"datatype {name!r} is not supported; BIPOLAR, BINARY, TERNARY, INT2 to INT32, UINT2 to "
        "UINT32, FIXED<W,I> and FLOAT32 are"
    )


def hls4ml_element(text: str) -> Element:
    """A precision of hls4ml's AcceleratorConfig: float, double, ap_fixed<...>, ap_int<...>.

    Widths are rounded up to whole bytes, as hls4ml does, with the integer bits kept: the fraction
    grows. Source: hls4ml, VivadoAcceleratorConfig. Raises LoadError.
    """
    compact = text.strip().replace(" ", "")
    if compact in ("float", "double"):
        return Element(compact, 32 if compact == "float" else 64, "float")
    if match := _AP_INTEGER.fullmatch(compact):
        return _whole_bytes(compact, int(match[2]), 0, not match[1], "TRN", "WRAP")
    match = _AP_POINT.fullmatch(compact)
    parts = match[2].split(",") if match else []
    try:
        bits, whole = int(parts[0]), int(parts[1])
    except (IndexError, ValueError):
        raise LoadError(
            f"precision {text!r} is not supported; float, double, ap_fixed<W,I> and ap_int<W> are"
        ) from None
    assert match is not None
    modes = [part.removeprefix("AP_") for part in parts[2:]]
    rounding = modes[0] if modes else "TRN"
    overflow = modes[1] if len(modes) > 1 else "WRAP"
    if rounding not in ROUNDINGS or overflow not in OVERFLOWS or modes[2:] not in ([], ["0"]):
        raise LoadError(
            f"precision {text!r}: rounding is one of {', '.join(ROUNDINGS)}, overflow one of "
            f"{', '.join(OVERFLOWS)}"
        )
    if not -64 <= whole <= 64:
        raise LoadError(f"precision {text!r}: {whole} integer bits are not supported")
    return _whole_bytes(compact, bits, whole, not match[1], rounding, overflow, fixed=True)


def _whole_bytes(
    name: str, bits: int, whole: int, signed: bool, rounding: str, overflow: str,
    fixed: bool = False,
) -> Element:  # fmt: skip
    wide = -(-bits // 8) * 8
    if wide not in (8, 16, 32):
        raise LoadError(
            f"precision {name!r}: {wide} bits on the stream; only 8, 16 and 32 can be moved, "
            "choose another width"
        )
    fraction = wide - whole if fixed else 0
    if fraction < 0:
        raise LoadError(f"precision {name!r}: more integer bits than bits is not supported")
    return _integer(name, wide, signed, fraction, rounding, overflow)


def _integer(
    name: str, bits: int, signed: bool, fraction: int = 0,
    rounding: str | None = None, overflow: str | None = None,
) -> Element:  # fmt: skip
    low = -(1 << bits - 1) if signed else 0
    high = (1 << bits - 1) - 1 if signed else (1 << bits) - 1
    return Element(name, bits, "integer", low, high, fraction, rounding, overflow)


def to_codes(values: Array, element: Element) -> Array:
    """Numbers of any shape -> codes in `element.container` (C-contiguous; maybe a view).

    Raises InvalidTensor for NaN, and where the element does not say what becomes of a value that
    it cannot hold.
    """
    container = element.container
    if element.kind == "float":
        return np.ascontiguousarray(values, container)
    if values.dtype == container and element.fraction == 0 and element.kind == "integer":
        full = 8 * container.itemsize == element.bits
        if full or _within(values, element):
            return np.ascontiguousarray(values)
    if element.kind == "bipolar":
        if element.rounding == "SIGN":
            if np.isnan(np.asarray(values, np.float64)).any():
                raise InvalidTensor("the tensor contains NaN, which has no sign")
            return np.where(np.greater_equal(values, 0), 1, -1).astype(container)
        if not np.all((values == 1) | (values == -1)):
            raise _refused(values, element, (values != 1) & (values != -1))
        return np.asarray(values).astype(container)
    if element.rounding is None:
        return _exact(values, element)
    return _fixed(values, element)


def to_values(codes: Array, element: Element, dtype: np.dtype[np.generic]) -> Array:
    """Codes -> numbers of `dtype`: exact product with a power of two, then a cast."""
    if element.kind == "float" or not element.fraction:
        return codes.astype(dtype, copy=False)
    exact = codes.astype(np.float32 if element.bits <= 24 else np.float64)
    values: Array = np.ldexp(exact, -element.fraction).astype(dtype, copy=False)
    return values


def _within(values: Array, element: Element) -> bool:
    if not values.size:
        return True
    return int(values.min()) >= element.low and int(values.max()) <= element.high


def _exact(values: Array, element: Element) -> Array:
    container = element.container
    if element.fraction == 0 and values.dtype.kind in "iub":
        if values.dtype.kind == "b" or _within(values, element):
            return values.astype(container)
        outside = np.less(values, element.low) | np.greater(values, element.high)
        raise _refused(values, element, outside)
    if element.fraction == 0 and values.dtype == np.float32 and element.bits <= 16:
        # The cast of what does not fit is undefined but harmless: the comparison finds it.
        with np.errstate(invalid="ignore"):
            codes = values.astype(np.int32)
        if np.array_equal(codes, values) and _within(codes, element):
            return codes.astype(container)
    scaled = np.ldexp(values.astype(np.float64), element.fraction)
    with np.errstate(invalid="ignore"):
        good = (scaled >= element.low) & (scaled <= element.high) & (scaled == np.rint(scaled))
    if not good.all():
        raise _refused(values, element, ~good)
    return scaled.astype(container)


def _refused(values: Array, element: Element, wrong: npt.NDArray[np.bool_]) -> InvalidTensor:
    place = tuple(int(index) for index in np.argwhere(wrong)[0])
    step = f" in steps of {2.0**-element.fraction:g}" if element.fraction else ""
    low, high = (float(np.ldexp(float(b), -element.fraction)) for b in (element.low, element.high))
    allowed = "-1 or 1" if element.kind == "bipolar" else f"{low:g} to {high:g}{step}"
    return InvalidTensor(
        f"the value {values[place]} at {list(place)} is not one of {element.name} ({allowed})"
    )


def _fixed(values: Array, element: Element) -> Array:
    """Conversion as ap_fixed does it, on float64 (exact for FP32 tensors)."""
    wide = values.astype(np.float64)
    if np.isnan(wide).any():
        raise InvalidTensor(f"the tensor contains NaN, which is no value of {element.name}")
    with np.errstate(over="ignore"):
        rounded = _rounded(np.ldexp(wide, element.fraction), element.rounding or "TRN")
    low, high = float(element.low), float(element.high)
    if element.overflow == "WRAP":
        if np.isinf(rounded).any():
            raise InvalidTensor(f"the tensor contains infinity, which {element.name} cannot wrap")
        span = 2.0**element.bits
        # fmod is exact; the remainder then lies within one span of the range.
        folded = np.fmod(rounded, span)
        folded = np.where(folded > high, folded - span, folded)
        folded = np.where(folded < low, folded + span, folded)
    else:
        bottom = -high if element.overflow == "SAT_SYM" and element.signed else low
        folded = np.clip(rounded, bottom, high)
        if element.overflow == "SAT_ZERO":
            folded = np.where((rounded < low) | (rounded > high), 0.0, rounded)
    return folded.astype(element.container)


def _rounded(scaled: npt.NDArray[np.float64], mode: str) -> npt.NDArray[np.float64]:
    if mode == "RND_CONV":
        return np.asarray(np.rint(scaled), np.float64)
    if mode == "TRN_ZERO":
        return np.asarray(np.trunc(scaled), np.float64)
    floor = np.floor(scaled)
    if mode == "TRN":
        return np.asarray(floor, np.float64)
    with np.errstate(invalid="ignore"):
        rest = scaled - floor
    up = rest > 0.5
    if mode != "RND_MIN_INF":
        tie = rest == 0.5
        if mode == "RND_ZERO":
            tie &= scaled < 0
        elif mode == "RND_INF":
            tie &= scaled > 0
        up |= tie
    return np.asarray(floor + up, np.float64)
