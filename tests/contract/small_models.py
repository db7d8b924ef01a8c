"""Models of few operators, and what numpy and onnxruntime answer to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from gatelet.accelerators.numpy_backend import NumpySession
from gatelet.accelerators.onnx_file import parse_onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
FLOAT, INT8, UINT8 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8
I64 = TensorProto.INT64


def build(
    nodes: list[Any],
    inputs: dict[str, Array],
    outputs: dict[str, int],
    constants: dict[str, Array] | None = None,
    opset: int = 17,
) -> bytes:
    """A model whose outputs have any shape; `outputs`: element type by name."""
    graph = helper.make_graph(
        nodes,
        "test",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in inputs.items()
        ],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    sets = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=8)
    return bytes(model.SerializeToString())


def both(content: bytes, inputs: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """What numpy and onnxruntime answer."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        theirs = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # Some int8 operators have no kernel in the exact form, as in `CpuBackend`.
        if "find kernel" not in str(error).lower():
            raise
        options.add_session_config_entry("session.x64quantprecision", "0")
        theirs = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in theirs.get_outputs()]
    expected = dict(zip(names, theirs.run(names, inputs), strict=True))
    return NumpySession("model.onnx", parse_onnx(content)).run(inputs), expected


def assert_close(content: bytes, inputs: dict[str, Array], *, exact: bool = False) -> None:
    ours, theirs = both(content, inputs)
    for name, expected in theirs.items():
        expected = np.asarray(expected)
        assert (ours[name].dtype, ours[name].shape) == (expected.dtype, expected.shape)
        if exact or expected.dtype.kind != "f":
            np.testing.assert_array_equal(ours[name], expected)
        else:
            # Relative to the largest element: sums are taken in another order.
            size = float(np.max(np.abs(expected), initial=1e-3))
            np.testing.assert_allclose(ours[name], expected, rtol=1e-5, atol=1e-5 * size)


def floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def node(operator: str, *inputs: str, **attributes: Any) -> Any:
    return helper.make_node(operator, list(inputs), ["y"], **attributes)


X = floats(3, 4, 5)
IMAGE = floats(2, 4, 9, 8)
ints = lambda *values: np.array(values, np.int64)  # noqa: E731
ONE_NODE: dict[str, tuple[Any, Array, dict[str, Array], int, int]] = {
    "add": (node("Add", "x", "b"), X, {"b": floats(5, seed=1)}, FLOAT, 17),
    "sub": (node("Sub", "b", "x"), X, {"b": floats(4, 1, seed=1)}, FLOAT, 17),
    "mul": (node("Mul", "x", "b"), X, {"b": floats(1, seed=1)}, FLOAT, 17),
    "div": (node("Div", "x", "b"), X, {"b": floats(5, seed=1)}, FLOAT, 17),
    "div-int": (node("Div", "x", "b"), ints(-7, 7, -8, 0), {"b": ints(2, -2, 4, 3)}, I64, 17),
    "relu": (node("Relu", "x"), X, {}, FLOAT, 17),
    "leaky": (node("LeakyRelu", "x", alpha=0.2), X, {}, FLOAT, 17),
    "clip": (
        node("Clip", "x", "l", "h"),
        X,
        {"l": np.float32([-0.5])[0:1].reshape(()), "h": np.array(0.7, np.float32)},
        FLOAT,
        17,
    ),
    "clip-low": (node("Clip", "x", "l"), X, {"l": np.array(0.1, np.float32)}, FLOAT, 17),
    "clip-6": (node("Clip", "x", min=-0.5, max=0.5), X, {}, FLOAT, 9),
    "sigmoid": (node("Sigmoid", "x"), X * 50, {}, FLOAT, 17),
    "tanh": (node("Tanh", "x"), X, {}, FLOAT, 17),
    "softmax": (node("Softmax", "x"), X * 30, {}, FLOAT, 17),
    "softmax-axis": (node("Softmax", "x", axis=1), X, {}, FLOAT, 17),
    "softmax-11": (node("Softmax", "x"), X, {}, FLOAT, 11),
    "flatten": (node("Flatten", "x", axis=2), X, {}, FLOAT, 17),
    "flatten-0": (node("Flatten", "x", axis=0), X, {}, FLOAT, 17),
    "reshape": (node("Reshape", "x", "s"), X, {"s": ints(0, -1, 2)}, FLOAT, 17),
    "transpose": (node("Transpose", "x"), X, {}, FLOAT, 17),
    "transpose-perm": (node("Transpose", "x", perm=[1, 2, 0]), X, {}, FLOAT, 17),
    "cast": (node("Cast", "x", to=TensorProto.INT32), X * 9, {}, TensorProto.INT32, 17),
    "cast-bool": (node("Cast", "x", to=TensorProto.BOOL), X * 9, {}, TensorProto.BOOL, 17),
    "concat": (node("Concat", "x", "x", "b", axis=-1), X, {"b": floats(3, 4, 1)}, FLOAT, 17),
    "squeeze": (node("Squeeze", "x", "a"), floats(1, 3, 1), {"a": ints(0)}, FLOAT, 17),
    "squeeze-11": (node("Squeeze", "x", axes=[2]), floats(1, 3, 1), {}, FLOAT, 11),
    "unsqueeze": (node("Unsqueeze", "x", "a"), X, {"a": ints(0, 3)}, FLOAT, 17),
    "matmul": (node("MatMul", "x", "b"), X, {"b": floats(5, 7, seed=1)}, FLOAT, 17),
    "gemm": (
        node("Gemm", "x", "b", "c", transA=1, transB=1, alpha=0.5, beta=2.0),
        floats(6, 3),
        {"b": floats(7, 6), "c": floats(7)},
        FLOAT,
        17,
    ),
    "norm": (
        node("BatchNormalization", "x", "s", "b", "m", "v", epsilon=1e-3),
        IMAGE,
        {"s": floats(4), "b": floats(4, seed=1), "m": floats(4, seed=2), "v": abs(floats(4)) + 1},
        FLOAT,
        17,
    ),
    "mean": (node("ReduceMean", "x", axes=[0, 2], keepdims=0), X, {}, FLOAT, 17),
    "mean-18": (node("ReduceMean", "x", "a"), X, {"a": ints(-1)}, FLOAT, 18),
    "mean-all": (node("ReduceMean", "x"), X, {}, FLOAT, 17),
    "max": (node("ReduceMax", "x", axes=[1]), X, {}, FLOAT, 17),
    "argmax": (node("ArgMax", "x", axis=-1, keepdims=0), X, {}, I64, 17),
    "argmax-last": (
        node("ArgMax", "x", axis=1, select_last_index=1),
        np.zeros((2, 3), np.float32),
        {},
        I64,
        17,
    ),
    "gather": (node("Gather", "x", "i", axis=1), X, {"i": ints(3, 0, -1)}, FLOAT, 17),
    "shape": (node("Shape", "x"), X, {}, I64, 14),
    "conv-1d": (
        node("Conv", "x", "w", pads=[2, 1], strides=[2]),
        floats(2, 4, 9),
        {"w": floats(3, 4, 4)},
        FLOAT,
        17,
    ),
    "global": (node("GlobalAveragePool", "x"), IMAGE, {}, FLOAT, 17),
    "max-ceil": (
        node("MaxPool", "x", kernel_shape=[3, 2], strides=[2, 3], pads=[1, 0, 1, 1], ceil_mode=1),
        IMAGE,
        {},
        FLOAT,
        17,
    ),
    "max-int8": (
        node("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2]),
        (IMAGE * 40).astype(np.int8),
        {},
        INT8,
        17,
    ),
    "quantize": (
        node("QuantizeLinear", "x", "s", "z"),
        np.arange(-400, 400, dtype=np.float32) / 4,
        {"s": np.array(0.5, np.float32), "z": np.array(-3, np.int8)},
        INT8,
        17,
    ),
    "quantize-channel": (
        node("QuantizeLinear", "x", "s", "z", axis=1),
        X,
        {"s": np.float32([0.1, 0.02, 0.3, 0.011]), "z": np.uint8([0, 128, 255, 7])},
        UINT8,
        17,
    ),
    "dequantize-channel": (
        node("DequantizeLinear", "x", "s", "z", axis=0),
        (X * 60).astype(np.int8),
        {"s": np.float32([0.1, 0.02, 0.3]), "z": np.int8([0, -128, 7])},
        FLOAT,
        17,
    ),
    "matmul-integer": (
        node("MatMulInteger", "x", "b", "az", "bz"),
        np.random.default_rng(0).integers(0, 256, (5, 300), np.uint8),
        {
            "b": np.random.default_rng(1).integers(0, 256, (300, 6), np.uint8),
            "az": np.array(131, np.uint8),
            "bz": np.array(9, np.uint8),
        },
        TensorProto.INT32,
        17,
    ),
    "conv-integer": (
        node("ConvInteger", "x", "w", "xz", pads=[1, 1, 1, 1]),
        np.random.default_rng(0).integers(0, 256, (2, 3, 6, 6), np.uint8),
        {
            "w": np.random.default_rng(1).integers(0, 256, (4, 3, 3, 3), np.uint8),
            "xz": np.array(131, np.uint8),
        },
        TensorProto.INT32,
        17,
    ),
}
