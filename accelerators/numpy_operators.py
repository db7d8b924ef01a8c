"""ONNX operators in numpy: arithmetic, shapes, reductions and scikit-learn's linear models.

Source: ONNX operator documentation (ai.onnx opset 7 to 22, ai.onnx.ml 1 to 3). A kernel takes the
`Call` and the arrays of the inputs, None for one that is left out, and gives one array or a tuple.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from .errors import BackendError
from .onnx_file import ELEMENTS, Node
from .tensors import NUMPY_DTYPES

LARGEST_TENSOR = 256 * 1024 * 1024
"""Bytes of one intermediate result."""

# What numpy gives and takes here changes its dtype from line to line.
Value: TypeAlias = Any
Kernel: TypeAlias = "Callable[..., Value]"


@dataclass(frozen=True, slots=True)
class Call:
    """A node with the version of its operator set; attributes by kind, with their defaults."""

    node: Node
    opset: int

    def integer(self, name: str, default: int) -> int:
        value = self.node.attributes.get(name, default)
        return value if isinstance(value, int) else default

    def number(self, name: str, default: float) -> float:
        value = self.node.attributes.get(name, default)
        return float(value) if isinstance(value, (int, float)) else default

    def integers(self, name: str) -> tuple[int, ...] | None:
        value = self.node.attributes.get(name)
        return tuple(int(one) for one in value) if isinstance(value, tuple) else None

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self.node.attributes.get(name)
        return tuple(float(one) for one in value) if isinstance(value, tuple) else ()

    def text(self, name: str, default: str) -> str:
        value = self.node.attributes.get(name)
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else default


def bounded(shape: tuple[int, ...], itemsize: int) -> None:
    """Raises BackendError for a result that is larger than this backend may hold."""
    size = math.prod(shape) * itemsize
    if size > LARGEST_TENSOR:
        raise BackendError(
            f"a result of {size >> 20} MiB, shape {list(shape)[:8]}; without onnxruntime at most "
            f"{LARGEST_TENSOR >> 20} MiB are held: send smaller batches"
        )


def _pairs(operation: Kernel) -> Kernel:
    def kernel(_: Call, a: Value, b: Value) -> Value:
        bounded(np.broadcast_shapes(a.shape, b.shape), a.dtype.itemsize)
        return operation(a, b)

    return kernel


def _each(operation: Kernel) -> Kernel:
    return lambda _, x: operation(x)


def _divide(a: Value, b: Value) -> Value:
    if a.dtype.kind == "f":
        return a / b
    if not np.all(b):
        raise BackendError("division of integers by zero")
    # Towards zero, as in C.
    quotient = np.floor_divide(a, b)
    return quotient + ((np.remainder(a, b) != 0) & ((a < 0) != (b < 0))).astype(a.dtype)


def _sigmoid(_: Call, x: Value) -> Value:
    # Either branch only sees the half where exp cannot overflow.
    small = np.exp(-np.abs(x))
    return (np.where(x >= 0, 1, small) / (1 + small)).astype(x.dtype)


def _softmax(call: Call, x: Value) -> Value:
    axis = call.integer("axis", -1 if call.opset >= 13 else 1)
    shape = x.shape
    if call.opset < 13:
        # Counted from the end of the shape, as elsewhere; the whole shape's end counts as well.
        axis = axis + x.ndim if axis < 0 else axis
        x, axis = x.reshape(math.prod(shape[:axis]), -1) if x.size else x, -1
    if x.size == 0:
        return x.reshape(shape)
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return (powers / powers.sum(axis=axis, keepdims=True)).reshape(shape)


def _leaky_relu(call: Call, x: Value) -> Value:
    return np.where(x >= 0, x, x * x.dtype.type(call.number("alpha", 0.01)))


def _clip(call: Call, x: Value, low: Value = None, high: Value = None) -> Value:
    if call.opset < 11:
        limits = np.finfo(x.dtype)
        low = call.number("min", float(limits.min))
        high = call.number("max", float(limits.max))
    # Maximum first: where the bounds cross, ONNX gives the upper one.
    if low is not None:
        x = np.maximum(x, np.asarray(low, x.dtype).reshape(()))
    return x if high is None else np.minimum(x, np.asarray(high, x.dtype).reshape(()))


def _cast(call: Call, x: Value) -> Value:
    dtype = NUMPY_DTYPES[ELEMENTS[call.integer("to", 0)]]
    if dtype.kind in "iu" and x.dtype.kind == "f":
        # A float beyond the target has no defined value; through int64 it is at least no warning.
        return np.trunc(x).astype(np.int64).astype(dtype)
    return x.astype(dtype)


def _matmul(_: Call, a: Value, b: Value) -> Value:
    if a.ndim and b.ndim:
        rows, columns = a.shape[-2:-1], b.shape[-1:] if b.ndim > 1 else ()
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        bounded((*batch, *rows, *columns), a.dtype.itemsize)
    return np.matmul(a, b)


def _gemm(call: Call, a: Value, b: Value, c: Value = None) -> Value:
    if a.ndim != 2 or b.ndim != 2:
        raise BackendError(f"Gemm takes matrices, not {list(a.shape)} and {list(b.shape)}")
    a = a.T if call.integer("transA", 0) else a
    b = b.T if call.integer("transB", 0) else b
    bounded((a.shape[0], b.shape[1]), a.dtype.itemsize)
    product = a @ b
    alpha, beta = call.number("alpha", 1.0), call.number("beta", 1.0)
    if alpha != 1.0:
        product = product * product.dtype.type(alpha)
    if c is None:
        return product
    return product + (c if beta == 1.0 else c * c.dtype.type(beta))


def _batch_normalization(
    call: Call, x: Value, scale: Value, bias: Value, mean: Value, variance: Value
) -> Value:
    factor = scale / np.sqrt(variance + variance.dtype.type(call.number("epsilon", 1e-5)))
    shape = (-1, *(1,) * (x.ndim - 2))
    return (x - mean.reshape(shape)) * factor.reshape(shape) + bias.reshape(shape)


def _flatten(call: Call, x: Value) -> Value:
    axis = call.integer("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _reshape(call: Call, x: Value, shape: Value) -> Value:
    sizes = [int(size) for size in shape]
    if not call.integer("allowzero", 0):
        sizes = [x.shape[at] if size == 0 else size for at, size in enumerate(sizes)]
    return x.reshape(sizes)


def _transpose(call: Call, x: Value) -> Value:
    return x.transpose(call.integers("perm"))


def _concat(call: Call, *parts: Value) -> Value:
    bounded((sum(part.size for part in parts),), parts[0].dtype.itemsize)
    return np.concatenate(parts, axis=call.integer("axis", 0))


def _axes(call: Call, axes: Value) -> tuple[int, ...] | None:
    return call.integers("axes") if axes is None else tuple(int(axis) for axis in axes)


def _squeeze(call: Call, x: Value, axes: Value = None) -> Value:
    return np.squeeze(x, _axes(call, axes))


def _unsqueeze(call: Call, x: Value, axes: Value = None) -> Value:
    return np.expand_dims(x, _axes(call, axes) or ())


def _reduce(operation: Kernel) -> Kernel:
    def kernel(call: Call, x: Value, axes: Value = None) -> Value:
        chosen = _axes(call, axes)
        if not chosen:
            if call.integer("noop_with_empty_axes", 0):
                return x
            chosen = None
        return np.asarray(operation(x, axis=chosen, keepdims=bool(call.integer("keepdims", 1))))

    return kernel


def _mean(x: Value, **options: Value) -> Value:
    return np.mean(x, dtype=x.dtype if x.dtype.kind == "f" else None, **options).astype(x.dtype)


def _sum(x: Value, **options: Value) -> Value:
    return np.sum(x, dtype=x.dtype, **options)


def _argmax(call: Call, x: Value) -> Value:
    axis = call.integer("axis", 0)
    if call.integer("select_last_index", 0):
        index = x.shape[axis] - 1 - np.argmax(np.flip(x, axis), axis=axis)
    else:
        index = np.argmax(x, axis=axis)
    index = np.asarray(index, np.int64)
    return np.expand_dims(index, axis) if call.integer("keepdims", 1) else index


def _constant(call: Call) -> Value:
    attributes = call.node.attributes
    if "value" in attributes:
        return attributes["value"]
    if "value_float" in attributes or "value_floats" in attributes:
        return np.array(attributes.get("value_float", call.numbers("value_floats")), np.float32)
    return np.array(attributes.get("value_int", call.integers("value_ints")), np.int64)


def _shape(call: Call, x: Value) -> Value:
    end = call.integers("end") or call.node.attributes.get("end")
    return np.array(x.shape[call.integer("start", 0) : end], np.int64)


def _gather(call: Call, x: Value, indices: Value) -> Value:
    axis = call.integer("axis", 0)
    bounded((indices.size, x.size // max(x.shape[axis], 1)), x.dtype.itemsize)
    return np.take(x, indices, axis=axis)


def _scaler(call: Call, x: Value) -> Value:
    offset = np.array(call.numbers("offset"), np.float32)
    scale = np.array(call.numbers("scale"), np.float32)
    return (x.astype(np.float32) - offset) * scale


def _normalizer(call: Call, x: Value) -> Value:
    x = x.astype(np.float32)
    norm = call.text("norm", "MAX")
    if norm == "L1":
        size = np.abs(x).sum(axis=-1, keepdims=True)
    elif norm == "L2":
        size = np.sqrt(np.square(x).sum(axis=-1, keepdims=True))
    else:
        size = x.max(axis=-1, keepdims=True)
    return np.divide(x, size, out=x.copy(), where=size != 0)


def _linear(call: Call, x: Value, classes: int) -> Value:
    coefficients = np.array(call.numbers("coefficients"), np.float32).reshape(classes, -1)
    scores = x.astype(np.float32) @ coefficients.T
    intercepts = call.numbers("intercepts")
    return scores + np.array(intercepts, np.float32) if intercepts else scores


def _transformed(call: Call, scores: Value) -> Value:
    how = call.text("post_transform", "NONE")
    if how == "LOGISTIC":
        return _sigmoid(call, scores)
    if how == "SOFTMAX":
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)
    return scores


def _linear_classifier(call: Call, x: Value) -> Value:
    strings = call.node.attributes.get("classlabels_strings")
    labels = np.array(call.integers("classlabels_ints") or (), np.int64)
    if isinstance(strings, tuple) and strings:
        labels = np.empty(len(strings), np.object_)
        labels[:] = strings
    scores = _linear(call, x, len(labels))
    return labels[scores.argmax(axis=-1)], _transformed(call, scores)


def _linear_regressor(call: Call, x: Value) -> Value:
    return _transformed(call, _linear(call, x, call.integer("targets", 1)))


KERNELS: Mapping[tuple[str, str], Kernel] = {
    ("", "Abs"): _each(np.abs),
    ("", "Add"): _pairs(np.add),
    ("", "ArgMax"): _argmax,
    ("", "BatchNormalization"): _batch_normalization,
    ("", "Cast"): _cast,
    ("", "Clip"): _clip,
    ("", "Concat"): _concat,
    ("", "Constant"): _constant,
    ("", "Div"): _pairs(_divide),
    ("", "Dropout"): lambda _, x, *__: x,
    ("", "Exp"): _each(np.exp),
    ("", "Flatten"): _flatten,
    ("", "Gather"): _gather,
    ("", "Gemm"): _gemm,
    ("", "Identity"): _each(lambda x: x),
    ("", "LeakyRelu"): _leaky_relu,
    ("", "MatMul"): _matmul,
    ("", "Mul"): _pairs(np.multiply),
    ("", "Neg"): _each(np.negative),
    ("", "ReduceMax"): _reduce(np.max),
    ("", "ReduceMean"): _reduce(_mean),
    ("", "ReduceSum"): _reduce(_sum),
    ("", "Relu"): lambda _, x: np.maximum(x, x.dtype.type(0)),
    ("", "Reshape"): _reshape,
    ("", "Shape"): _shape,
    ("", "Sigmoid"): _sigmoid,
    ("", "Softmax"): _softmax,
    ("", "Sqrt"): _each(np.sqrt),
    ("", "Squeeze"): _squeeze,
    ("", "Sub"): _pairs(np.subtract),
    ("", "Tanh"): _each(np.tanh),
    ("", "Transpose"): _transpose,
    ("", "Unsqueeze"): _unsqueeze,
    ("ai.onnx.ml", "LinearClassifier"): _linear_classifier,
    ("ai.onnx.ml", "LinearRegressor"): _linear_regressor,
    ("ai.onnx.ml", "Normalizer"): _normalizer,
    ("ai.onnx.ml", "Scaler"): _scaler,
}
