"""ONNX's int8 operators in numpy, and quantised graphs fused into them.

A QDQ graph is run in integers where onnxruntime does so: a Gemm, MatMul, Conv or GlobalAveragePool
between DequantizeLinear and QuantizeLinear becomes one step with the arithmetic of QLinearMatMul.
The accumulator is exact; its float32 value times the float32 quotient of the scales is clamped,
rounded half to even, and the zero point added. Sums of products of bytes are exact in floats too,
whose matrix product is far faster than numpy's of integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .errors import BackendError
from .numpy_operators import Call, Kernel, Value, bounded
from .numpy_windows import convolve
from .onnx_file import ELEMENTS, Node
from .tensors import NUMPY_DTYPES, Array

_BYTE_TYPES = (np.dtype(np.int8), np.dtype(np.uint8))
_EXACT_IN_FLOAT32 = 2**24


def _along(values: Value, rank: int, axis: int) -> Value:
    """A scale or zero point of one number, or of one per element of `axis`, for broadcasting."""
    if values.size == 1:
        return values.reshape(())
    shape = [1] * rank
    shape[axis] = values.size
    return values.reshape(shape)


def quantise(scaled: Value, zero: Value, dtype: Value) -> Value:
    """float32 in units of the scale -> integers: clamp, round half to even, add the zero point."""
    limits = np.iinfo(dtype)
    wide = np.asarray(zero).astype(np.int64)
    low, high = (limits.min - wide).astype(np.float32), (limits.max - wide).astype(np.float32)
    # NaN, which has no quantised value, becomes the lowest one.
    within = np.rint(np.fmin(np.fmax(scaled, low), high))
    return (within.astype(np.int64) + wide).clip(limits.min, limits.max).astype(dtype)


def _quantize_linear(call: Call, x: Value, scale: Value, zero: Value = None) -> Value:
    axis = call.integer("axis", 1)
    asked = ELEMENTS.get(call.integer("output_dtype", 0), "UINT8")
    dtype = NUMPY_DTYPES[asked] if zero is None else zero.dtype
    offset = np.zeros((), dtype) if zero is None else _along(zero, x.ndim, axis)
    scaled = x.astype(np.float32) / _along(scale, x.ndim, axis).astype(np.float32)
    return quantise(scaled, offset, dtype)


def _dequantize_linear(call: Call, x: Value, scale: Value, zero: Value = None) -> Value:
    axis = call.integer("axis", 1)
    centred = x
    if zero is not None:
        centred = x.astype(np.int32) - _along(zero, x.ndim, axis).astype(np.int32)
    return centred.astype(scale.dtype) * _along(scale, x.ndim, axis)


def _exact(depth: int) -> np.dtype[np.generic]:
    """The float in which a sum of `depth` products of bytes is exact."""
    return np.dtype(np.float32 if depth * 255 * 255 < _EXACT_IN_FLOAT32 else np.float64)


def _centred(values: Value, zero: Value, dtype: np.dtype[np.generic], axis: int) -> Value:
    values = values.astype(dtype)
    if zero is None or not np.any(zero):
        return values
    return values - _along(zero, values.ndim, axis).astype(dtype)


def _products(a: Value, a_zero: Value, b: Value, b_zero: Value) -> Value:
    """Exact sums, as floats."""
    if a.dtype not in _BYTE_TYPES or b.dtype not in _BYTE_TYPES or 0 in (a.ndim, b.ndim):
        raise BackendError(f"{a.dtype} by {b.dtype} is no product of bytes")
    dtype = _exact(a.shape[-1])
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    bounded((*batch, *a.shape[-2:-1], b.shape[-1]), 8)
    # A zero point per row of `a`, per column of `b`.
    return np.matmul(_centred(a, a_zero, dtype, -2), _centred(b, b_zero, dtype, -1))


def _matmul_integer(
    _: Call, a: Value, b: Value, a_zero: Value = None, b_zero: Value = None
) -> Value:
    return _wrapped(_products(a, a_zero, b, b_zero))


def _wrapped(sums: Value) -> Value:
    return sums.astype(np.int64).astype(np.int32)


def _qlinear_matmul(
    _: Call,
    a: Value,
    a_scale: Value,
    a_zero: Value,
    b: Value,
    b_scale: Value,
    b_zero: Value,
    y_scale: Value,
    y_zero: Value,
) -> Value:
    sums = _products(a, a_zero, b, b_zero)
    unit = _along(a_scale, sums.ndim, -2) * _along(b_scale, sums.ndim, -1) / y_scale.reshape(())
    return quantise(sums.astype(np.float32) * unit, y_zero.reshape(()), y_zero.dtype)


def _convolved(call: Call, x: Value, x_zero: Value, w: Value, w_zero: Value) -> Value:
    if x.dtype not in _BYTE_TYPES or w.dtype not in _BYTE_TYPES:
        raise BackendError(f"{x.dtype} by {w.dtype} is no product of bytes")
    dtype = _exact(math.prod(w.shape[1:]))
    return convolve(call, _centred(x, x_zero, dtype, 1), _centred(w, w_zero, dtype, 0))


def _conv_integer(
    call: Call, x: Value, w: Value, x_zero: Value = None, w_zero: Value = None
) -> Value:
    return _wrapped(_convolved(call, x, x_zero, w, w_zero))


def _qlinear_conv(
    call: Call,
    x: Value,
    x_scale: Value,
    x_zero: Value,
    w: Value,
    w_scale: Value,
    w_zero: Value,
    y_scale: Value,
    y_zero: Value,
    bias: Value = None,
) -> Value:
    sums = _convolved(call, x, x_zero, w, w_zero)
    if bias is not None:
        sums = sums.astype(np.float64) + _along(bias, sums.ndim, 1)
    unit = x_scale.reshape(()) * _along(w_scale, sums.ndim, 1) / y_scale.reshape(())
    return quantise(sums.astype(np.float32) * unit, y_zero.reshape(()), y_zero.dtype)


KERNELS: Mapping[tuple[str, str], Kernel] = {
    ("", "ConvInteger"): _conv_integer,
    ("", "DequantizeLinear"): _dequantize_linear,
    ("", "MatMulInteger"): _matmul_integer,
    ("", "QLinearConv"): _qlinear_conv,
    ("", "QLinearMatMul"): _qlinear_matmul,
    ("", "QuantizeLinear"): _quantize_linear,
}


@dataclass(frozen=True)
class Fused:
    """Takes the place of `node` and of what follows it up to `output`; `run` on value `source`."""

    node: Node
    source: str
    output: str
    run: Callable[[Value], Value]


@dataclass(frozen=True)
class _Quantised:
    """What a DequantizeLinear or QuantizeLinear of constants says."""

    source: str
    scale: Value
    zero: Value
    axis: int


class Fusion:
    """Finds the layers of a quantised graph that can run in integers."""

    def __init__(
        self,
        nodes: Sequence[Node],
        constants: Mapping[str, Array],
        outputs: Sequence[str],
        call: Callable[[Node], Call],
    ) -> None:
        self._constants = constants
        self._call = call
        self._producers = {name: node for node in nodes for name in node.outputs if name}
        self._users: dict[str, list[Node]] = {}
        for node in nodes:
            for name in node.inputs:
                self._users.setdefault(name, []).append(node)
        self._kept = set(outputs)

    def fuse(self, node: Node) -> Fused | None:
        """None where the layer stays as it is."""
        if not node.inputs:
            return None
        if (node.domain, node.operator) == ("", "GlobalAveragePool"):
            return self._average(node)
        if node.domain or node.operator not in ("Gemm", "MatMul", "Conv") or len(node.inputs) < 2:
            return None
        call = self._call(node)
        x, w = self._dequantised(node.inputs[0]), self._dequantised(node.inputs[1])
        if x is None or w is None or x.scale.size != 1 or x.zero.size != 1:
            return None
        weights = self._constants.get(w.source)
        if weights is None or x.zero.dtype not in _BYTE_TYPES or weights.dtype not in _BYTE_TYPES:
            return None
        if node.operator == "Conv":
            fits, channel = weights.ndim > 2, 0
        else:
            transposed = node.operator == "Gemm" and call.integer("transB", 0)
            fits, channel = weights.ndim == 2, 0 if transposed else 1
        plain = (call.number("alpha", 1.0), call.number("beta", 1.0)) == (1.0, 1.0)
        if not fits or (node.operator == "Gemm" and (not plain or call.integer("transA", 0))):
            return None
        channels = weights.shape[channel]
        if w.scale.size != 1 and (w.axis % weights.ndim, w.scale.size) != (channel, channels):
            return None
        if w.zero.size not in (1, w.scale.size):
            return None
        unit = (x.scale.reshape(()) * w.scale.reshape(-1)).astype(np.float32)
        bias = self._bias(node, unit, channels)
        if bias is None:
            return None
        last, target = self._target(node)
        layer = _Layer(call, x.zero, weights, w.zero, channel, bias)
        if target is None:
            if node.operator == "Conv":
                return None
            return Fused(node, x.source, node.outputs[0], layer.dequantising(unit))
        # The order in which onnxruntime multiplies and divides, in float32.
        factor = unit / target.scale.reshape(()).astype(np.float32)
        return Fused(node, x.source, last, layer.quantising(factor, target.zero.reshape(())))

    def _average(self, node: Node) -> Fused | None:
        """Sums in integers, as onnxruntime's QLinearGlobalAveragePool."""
        x = self._dequantised(node.inputs[0])
        last, target = self._target(node)
        if x is None or target is None or x.scale.size != 1 or x.zero.size != 1:
            return None
        if x.zero.dtype not in _BYTE_TYPES or target.zero.dtype != x.zero.dtype:
            return None
        given, wanted = x.scale.reshape(()), target.scale.reshape(()).astype(np.float32)
        x_zero, y_zero = int(x.zero.reshape(())), target.zero.reshape(())

        def run(values: Value) -> Value:
            if values.ndim < 3:
                raise BackendError(f"GlobalAveragePool over {list(values.shape)}")
            spatial = tuple(range(2, values.ndim))
            count = math.prod(values.shape[2:])
            sums = values.sum(axis=spatial, keepdims=True, dtype=np.int64) - x_zero * count
            factor = given / (wanted * np.float32(count))
            return quantise(sums.astype(np.float32) * factor, y_zero, y_zero.dtype)

        return Fused(node, x.source, last, run)

    def _constant(self, node: Node, at: int) -> Array | None:
        return self._constants.get(node.inputs[at]) if len(node.inputs) > at else None

    def _parameters(self, node: Node) -> _Quantised | None:
        scale, zero = self._constant(node, 1), self._constant(node, 2)
        if scale is None or zero is None or scale.dtype != np.float32:
            return None
        if scale.ndim > 1 or not scale.size or zero.size != scale.size:
            return None
        return _Quantised(node.inputs[0], scale, zero, self._call(node).integer("axis", 1))

    def _dequantised(self, name: str) -> _Quantised | None:
        node = self._producers.get(name)
        if node is None or (node.domain, node.operator) != ("", "DequantizeLinear"):
            return None
        return self._parameters(node)

    def _bias(self, node: Node, unit: Array, channels: int) -> Array | None:
        """int32 values as float64 [channels], zeros where there is none; None for another kind."""
        if len(node.inputs) < 3 or not node.inputs[2]:
            return np.zeros(channels)
        found = self._dequantised(node.inputs[2])
        values = None if found is None else self._constants.get(found.source)
        if found is None or values is None or values.dtype != np.int32 or np.any(found.zero):
            return None
        if values.shape != (channels,) or found.scale.size not in (1, channels):
            return None
        if not np.allclose(found.scale.reshape(-1), unit, rtol=1e-5, atol=0):
            return None
        return values.astype(np.float64)

    def _only_user(self, name: str) -> Node | None:
        users = self._users.get(name, [])
        return users[0] if len(users) == 1 and name not in self._kept else None

    def _target(self, node: Node) -> tuple[str, _Quantised | None]:
        """The value that a QuantizeLinear after `node` gives, through a Relu or Clip that its
        saturation replaces."""
        nothing = node.outputs[0], None
        user = self._only_user(node.outputs[0])
        low, high = -math.inf, math.inf
        if user is not None and not user.domain and user.operator in ("Relu", "Clip"):
            low = 0.0
            if user.operator == "Clip":
                bounds = self._constant(user, 1), self._constant(user, 2)
                if len(user.inputs) != 3 or any(one is None or one.size != 1 for one in bounds):
                    return nothing
                low, high = (float(one.reshape(())) for one in bounds)  # type: ignore[union-attr]
            user = self._only_user(user.outputs[0])
        if user is None or (user.domain, user.operator) != ("", "QuantizeLinear"):
            return nothing
        found = self._parameters(user)
        if found is None or found.scale.size != 1 or found.zero.dtype not in _BYTE_TYPES:
            return nothing
        kind: Value = found.zero.dtype
        limits = np.iinfo(kind)
        scale, zero = float(found.scale.reshape(())), int(found.zero.reshape(()))
        if scale <= 0 or low > scale * (limits.min - zero) or high < scale * (limits.max - zero):
            return nothing
        return user.outputs[0], found


class _Layer:
    """Exact sums of one layer, its weights prepared once."""

    def __init__(
        self, call: Call, x_zero: Array, weights: Array, w_zero: Array, channel: int, bias: Array
    ) -> None:
        centred = _centred(weights, w_zero, np.dtype(np.float64), channel)
        others = tuple(axis for axis in range(weights.ndim) if axis != channel)
        largest = float(np.abs(centred).sum(axis=others).max(initial=0.0)) * 255
        dtype = np.dtype(np.float32 if largest < _EXACT_IN_FLOAT32 else np.float64)
        self._conv = weights.ndim > 2
        self._call = call
        self._zero = x_zero.reshape(()).astype(dtype)
        self._dtype = dtype
        self._weights = centred.astype(dtype)
        if not self._conv and channel == 0:
            self._weights = np.ascontiguousarray(self._weights.T)
        self._bias = bias if np.any(bias) else None

    def _shaped(self, values: Value, rank: int) -> Value:
        return _along(values, rank, 1 if self._conv else -1)

    def _sums(self, x: Value) -> Value:
        if x.dtype not in _BYTE_TYPES:
            raise BackendError(f"{x.dtype} came where bytes were quantised")
        centred = x.astype(self._dtype) - self._zero
        if self._conv:
            sums = convolve(self._call, centred, self._weights)
        else:
            bounded((*x.shape[:-1], self._weights.shape[1]), 8)
            sums = centred @ self._weights
        if self._bias is not None:
            sums = sums.astype(np.float64) + self._shaped(self._bias, sums.ndim)
        return sums.astype(np.float32)

    def quantising(self, factor: Value, zero: Array) -> Callable[[Value], Value]:
        def run(x: Value) -> Value:
            sums = self._sums(x)
            return quantise(sums * self._shaped(factor, sums.ndim), zero, zero.dtype)

        return run

    def dequantising(self, unit: Value) -> Callable[[Value], Value]:
        def run(x: Value) -> Value:
            sums = self._sums(x)
            return sums * self._shaped(unit, sums.ndim)

        return run
