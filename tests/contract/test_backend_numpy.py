"""The numpy backend against onnxruntime, and its reader against damaged files."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from gatelet.accelerators.backend import LoadOptions, Variant
from gatelet.accelerators.cpu import CpuBackend
from gatelet.accelerators.errors import BackendError, DeadlineExceeded, LoadError
from gatelet.accelerators.numpy_backend import OPERATORS, NumpyBackend, NumpySession
from gatelet.accelerators.onnx_file import parse_onnx
from gatelet.simulator.demo.dataset import load_heldout, model_directory
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ..bench import onnx_models
from ..quantised_networks import random_network

Array = np.ndarray[Any, Any]
FLOAT, INT8, UINT8 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8


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


I64 = TensorProto.INT64
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


@pytest.mark.parametrize("case", ONE_NODE)
def test_every_operator_is_onnxruntimes(case: str) -> None:
    one, x, constants, kind, opset = ONE_NODE[case]
    inputs = {"x": x}
    assert_close(build([one], inputs, {"y": kind}, constants, opset), inputs)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_convolutions_and_pools_are_onnxruntimes(data: st.DataObject) -> None:
    draw = data.draw
    number = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    groups, kernel = number(1, 3), [number(1, 3), number(1, 3)]
    attributes: dict[str, Any] = {"strides": [number(1, 3), number(1, 3)]}
    auto = draw(st.sampled_from(["", "", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if auto:
        attributes["auto_pad"] = auto
        # onnxruntime's pools pad by less than nothing where the stride is larger than the kernel.
        steps = zip(attributes["strides"], kernel, strict=True)
        attributes["strides"] = [min(step, width) for step, width in steps]
    else:
        attributes["pads"] = [number(0, kernel[at % 2] - 1) for at in range(4)]
    x = floats(number(1, 3), 2 * groups, number(6, 10), number(6, 10), seed=number(0, 99))
    operator = draw(st.sampled_from(["Conv", "MaxPool", "AveragePool"]))
    if operator == "Conv":
        dilations = [1, 1] if auto else [number(1, 2), number(1, 2)]
        weights = {"w": floats(3 * groups, 2, *kernel), "b": floats(3 * groups, seed=1)}
        one = node("Conv", "x", "w", "b", group=groups, dilations=dilations, **attributes)
        assert_close(build([one], {"x": x}, {"y": FLOAT}, weights), {"x": x})
        return
    if operator == "AveragePool":
        attributes["count_include_pad"] = number(0, 1)
    one = node(operator, "x", kernel_shape=kernel, **attributes)
    assert_close(build([one], {"x": x}, {"y": FLOAT}), {"x": x})


@st.composite
def quantised_graphs(draw: st.DrawFn) -> tuple[bytes, dict[str, Array]]:
    """Two layers in QDQ form with any scales: dense or convolution, per tensor or per channel."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    operator = draw(st.sampled_from(["Gemm", "Gemm", "MatMul", "Conv"]))
    per_channel, transposed = draw(st.booleans()), draw(st.booleans()) and operator == "Gemm"
    width = 3 if operator == "Conv" else draw(st.integers(1, 700))
    x = random.standard_normal((4, width, *((6, 5) if operator == "Conv" else ())), np.float32)
    nodes, constants = [], {}
    scale = float(random.uniform(0.005, 0.05))

    def quantiser(name: str, scale: Any, zero: Any) -> list[str]:
        constants[f"{name}s"] = np.array(scale, np.float32)
        constants[f"{name}z"] = np.array(zero, np.int8 if name[0] != "b" else np.int32)
        return [f"{name}s", f"{name}z"]

    pair = quantiser("x", scale, int(random.integers(-128, 128)))
    nodes.append(helper.make_node("QuantizeLinear", ["x", *pair], ["q0"]))
    for at in (1, 2):
        outputs = int(random.integers(1, 9))
        shape = {"Conv": (outputs, width, 3, 2), "MatMul": (width, outputs)}.get(
            operator, (outputs, width) if transposed else (width, outputs)
        )
        channel = 0 if operator == "Conv" or transposed else 1
        count = outputs if per_channel else None
        constants[f"w{at}"] = random.integers(-127, 128, shape).astype(np.int8)
        wscale = np.asarray(random.uniform(0.001, 0.02, count), np.float32)
        wpair = quantiser(f"w{at}", wscale, np.zeros(count or (), np.int8))
        inputs = [f"d{at}", f"v{at}"]
        nodes.append(helper.make_node("DequantizeLinear", [f"q{at - 1}", *pair], [f"d{at}"]))
        nodes.append(
            helper.make_node("DequantizeLinear", [f"w{at}", *wpair], [f"v{at}"], axis=channel)
        )
        if operator != "MatMul":
            constants[f"b{at}"] = random.integers(-5000, 5000, outputs).astype(np.int32)
            bpair = quantiser(f"b{at}", np.float32(scale) * wscale, np.zeros(count or (), np.int32))
            nodes.append(
                helper.make_node("DequantizeLinear", [f"b{at}", *bpair], [f"c{at}"], axis=0)
            )
            inputs.append(f"c{at}")
        more = {"transB": 1} if transposed else {}
        nodes.append(helper.make_node(operator, inputs, [f"m{at}"], **more))
        last = f"m{at}"
        if draw(st.booleans()):
            nodes.append(helper.make_node("Relu", [last], [f"r{at}"]))
            last, zero = f"r{at}", -128
        else:
            zero = int(random.integers(-100, 100))
        scale = float(random.uniform(0.01, 0.3))
        pair = quantiser(f"y{at}", scale, zero)
        nodes.append(helper.make_node("QuantizeLinear", [last, *pair], [f"q{at}"]))
        width = outputs
        if operator == "Conv":
            break
    inputs = {"x": x}
    return build(nodes, inputs, {f"q{at}": INT8}, constants), inputs


@settings(max_examples=120, deadline=None)
@given(quantised_graphs())
def test_quantised_graphs_have_the_bits_of_onnxruntime(
    graph: tuple[bytes, dict[str, Array]],
) -> None:
    assert_close(*graph, exact=True)


@pytest.mark.parametrize("per_channel", [False, True])
def test_qlinear_operators_have_the_bits_of_onnxruntime(per_channel: bool) -> None:
    random = np.random.default_rng(5)
    scales = np.asarray(random.uniform(0.001, 0.01, 6 if per_channel else None), np.float32)
    common = {
        "xs": np.array(0.037, np.float32),
        "xz": np.array(-11, np.int8),
        "ws": np.array(scales, np.float32),
        "wz": np.zeros(scales.shape, np.int8),
        "ys": np.array(0.21, np.float32),
        "yz": np.array(5, np.int8),
    }
    names = ("x", "xs", "xz", "w", "ws", "wz", "ys", "yz")
    x = random.integers(-128, 128, (50, 333)).astype(np.int8)
    w = random.integers(-127, 128, (333, 6)).astype(np.int8)
    content = build([node("QLinearMatMul", *names)], {"x": x}, {"y": INT8}, {**common, "w": w})
    assert_close(content, {"x": x}, exact=True)
    image = random.integers(-128, 128, (2, 4, 9, 7)).astype(np.int8)
    kernels = random.integers(-127, 128, (6, 2, 3, 3)).astype(np.int8)
    bias = random.integers(-3000, 3000, 6).astype(np.int32)
    one = node("QLinearConv", *names, "b", group=2, pads=[1, 1, 1, 1], strides=[2, 1])
    constants = {**common, "w": kernels, "b": bias}
    assert_close(build([one], {"x": image}, {"y": INT8}, constants), {"x": image}, exact=True)


@pytest.mark.parametrize("content", [onnx_models.mlp(), onnx_models.cnn()], ids=["mlp", "cnn"])
def test_the_networks_of_the_benchmarks(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    variant = Variant("onnx", "m.onnx")
    theirs = CpuBackend().load(tmp_path, variant, LoadOptions())
    ours = NumpyBackend().load(tmp_path, variant, LoadOptions())
    assert (ours.inputs, ours.outputs) == (theirs.inputs, theirs.outputs)
    x = floats(7, *ours.inputs[0].shape[1:])
    expected = theirs.run({"x": x})["y"]
    size = float(np.abs(expected).max())
    np.testing.assert_allclose(ours.run({"x": x})["y"], expected, rtol=1e-5, atol=1e-5 * size)


def test_a_logistic_regression_as_skl2onnx_writes_it() -> None:
    x = floats(20, 4)
    ml = {"domain": "ai.onnx.ml"}
    nodes = [
        helper.make_node(
            "Scaler", ["x"], ["s"], offset=[0.1, 0.2, 0.3, 0.4], scale=[1.0, 2.0, 0.5, 1.5], **ml
        ),
        helper.make_node(
            "LinearClassifier",
            ["s"],
            ["label", "scores"],
            coefficients=floats(12).tolist(),
            intercepts=[0.1, -0.2, 0.3],
            classlabels_ints=[3, 5, 9],
            multi_class=1,
            post_transform="LOGISTIC",
            **ml,
        ),
        helper.make_node("Normalizer", ["scores"], ["p"], norm="L1", **ml),
    ]
    assert_close(build(nodes, {"x": x}, {"label": I64, "p": FLOAT}), {"x": x})


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_the_demos_digits_are_the_same(version: str) -> None:
    directory, variant = model_directory(version), Variant("onnx", "onnx/model.onnx")
    images, _ = load_heldout()
    assert len(images) == 450
    theirs = CpuBackend().load(directory, variant, LoadOptions()).run({"x": images})["scores"]
    session = NumpyBackend().load(directory, variant, LoadOptions())
    ours = session.run({"x": images})["scores"]
    np.testing.assert_array_equal(ours.argmax(axis=1), theirs.argmax(axis=1))
    if version == "v1":
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(ours, theirs)


def test_an_operator_without_a_kernel_is_named_with_what_to_do() -> None:
    content = build([helper.make_node("Erf", ["x"], ["y"], "gelu")], {"x": X}, {"y": FLOAT})
    with pytest.raises(LoadError, match=r"operator Erf \(gelu\).*onnxruntime is installed"):
        NumpySession("m.onnx", parse_onnx(content))


def test_maps_of_skl2onnx_are_refused_with_a_hint() -> None:
    one = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    content = build([one], {"x": X}, {"y": FLOAT})
    with pytest.raises(LoadError, match=r"ZipMap.*zipmap=False"):
        NumpySession("m.onnx", parse_onnx(content))


LIST = numpy_helper.from_array(np.arange(3), "list")
LINEAR = {"domain": "ai.onnx.ml", "coefficients": [1.0, 2.0, 3.0]}


@pytest.mark.parametrize(
    "one",
    [
        helper.make_node("Cast", ["x"], ["y"], to=LIST),
        helper.make_node("QuantizeLinear", ["x", "x"], ["y"], block_size=LIST),
        helper.make_node("Dropout", ["x"], ["y"], training_mode=LIST),
        helper.make_node("LinearClassifier", ["x"], ["y", "z"], classlabels_ints=LIST, **LINEAR),
        helper.make_node(
            "LinearClassifier", ["x"], ["y", "z"], classlabels_ints=[1], intercepts=LIST, **LINEAR
        ),
        helper.make_node(
            "LinearClassifier", ["x"], ["y", "z", "u"], classlabels_ints=[1], **LINEAR
        ),
        helper.make_node("Relu", ["x"], ["y", "z"]),
        helper.make_node("BatchNormalization", ["x"] * 5, ["y", "mean", "variance"]),
    ],
    ids=["to", "block", "training", "labels", "intercepts", "third", "second", "norm"],
)
@pytest.mark.parametrize("told", [1, 3])
def test_nodes_that_are_none_are_refused_and_nothing_else(one: Any, told: int) -> None:
    """Attributes of another kind than the operator's, and outputs that nobody computes."""
    x = np.ones(3, np.float32)
    content = build([one], {"x": x}, dict.fromkeys(one.output[:told], FLOAT))
    with pytest.raises(LoadError, match="does not run without onnxruntime"):
        NumpySession("m.onnx", parse_onnx(content))


def test_the_deadline_is_kept_between_operators() -> None:
    session = NumpySession("m.onnx", parse_onnx(onnx_models.mlp()))
    with pytest.raises(DeadlineExceeded, match="Gemm"):
        session.run({"x": floats(1, 64)}, None, time.monotonic() - 1)


def test_a_result_that_is_too_large_is_not_computed() -> None:
    one = node("Add", "x", "t")
    x = np.zeros((1, 40_000), np.float32)
    content = build([helper.make_node("Transpose", ["x"], ["t"]), one], {"x": x}, {"y": FLOAT})
    with pytest.raises(BackendError, match=r"Add.*MiB.*smaller batches"):
        NumpySession("m.onnx", parse_onnx(content)).run({"x": x})


def test_answers_are_the_callers_own() -> None:
    session = NumpySession("m.onnx", parse_onnx(onnx_models.identity("FP32")))
    x = np.ones((1, 2), np.float32)
    session.run({"x": x})["y"][:] = 7
    np.testing.assert_array_equal(x, 1)


SEEDS = [
    onnx_models.mlp(4, 3, 2),
    build(*(lambda c: ([c[0]], {"x": c[1]}, {"y": c[3]}, c[2]))(ONE_NODE["clip"])),
    (model_directory("v2") / "onnx/model.onnx").read_bytes(),
]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=5),
    st.floats(0, 1),
)
def test_a_damaged_file_is_a_load_error_and_nothing_else(
    seed: bytes, changes: list[tuple[float, int]], end: float
) -> None:
    damaged = bytearray(seed)
    for place, byte in changes:
        damaged[int(place * len(damaged))] = byte
    content = bytes(damaged[: int(end * len(damaged)) or None])
    try:
        session = NumpySession("m.onnx", parse_onnx(content))
    except LoadError:
        return
    inputs = {
        spec.name: np.zeros([max(size, 1) for size in spec.shape], np.float32)
        for spec in session.inputs
        if spec.datatype == "FP32" and np.prod([max(size, 1) for size in spec.shape]) < 10**6
    }
    try:
        session.run(inputs)
    except BackendError:
        pass


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise_is_a_load_error(content: bytes) -> None:
    with pytest.raises(LoadError):
        NumpySession("m.onnx", parse_onnx(content))


def test_the_documented_operators_are_those_that_run() -> None:
    document = (Path(__file__).parents[2] / "docs" / "fpga.md").read_text()
    section = document.split("## Boards without onnxruntime", 1)[1].split("\n## ", 1)[0]
    missing = [name for name in OPERATORS if not re.search(rf"\b{name}\b", section)]
    assert not missing


@pytest.mark.parametrize(
    ("element", "values"),
    [
        (TensorProto.FLOAT, [0.5, -1.25, 3e38, -0.0]),
        (TensorProto.DOUBLE, [0.1, -1e300, 5e-324]),
        (TensorProto.FLOAT16, [0.5, -65504.0, 6e-8]),
        (TensorProto.INT8, [-128, -1, 127]),
        (TensorProto.UINT8, [0, 255, 3]),
        (TensorProto.INT16, [-32768, 7, 32767]),
        (TensorProto.UINT16, [0, 65535]),
        (TensorProto.INT32, [-(2**31), 2**31 - 1, 0]),
        (TensorProto.UINT32, [0, 2**32 - 1]),
        (TensorProto.INT64, [-(2**63), 2**63 - 1, 5]),
        (TensorProto.UINT64, [0, 2**64 - 1]),
        (TensorProto.BOOL, [True, False, True]),
        (TensorProto.STRING, [b"", b"\xff\x01", "é".encode()]),
    ],
)
def test_constants_in_fields_of_their_type_are_onnxs(element: int, values: list[Any]) -> None:
    """Exporters write raw bytes; onnx's own helpers, and older tools, a field per type."""
    tensor = helper.make_tensor("c", element, [len(values)], values)
    assert not tensor.HasField("raw_data")
    graph = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["y"])], "typed", [],
        [helper.make_tensor_value_info("y", element, [len(values)])], [tensor],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = parse_onnx(model.SerializeToString()).constants["c"]
    if element == TensorProto.STRING:
        assert list(found) == values
    else:
        expected = numpy_helper.to_array(tensor)
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("opset", [7, 11, 12, 13, 17])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_softmax_counts_negative_axes_from_the_end(opset: int, axis: int) -> None:
    """Before operator set 13 it flattened everything behind the axis."""
    x = np.random.default_rng(1).normal(0, 2, (2, 3, 4)).astype(np.float32)
    nodes = [helper.make_node("Softmax", ["x"], ["y"], axis=axis)]
    assert_close(build(nodes, {"x": x}, {"y": FLOAT}, opset=opset), {"x": x})


@pytest.mark.parametrize("opset", [11, 17, 19, 22])
@pytest.mark.parametrize("include", [0, 1])
def test_averages_at_the_end_count_what_onnxruntime_counts(opset: int, include: int) -> None:
    """With ceil_mode the last windows reach beyond the padding; operator set 19 changed that."""
    for pads, kernel, strides in (
        ([0, 0, 0, 0], [3, 3], [2, 2]),
        ([1, 1, 1, 1], [3, 2], [2, 3]),
        ([1, 0, 0, 1], [3, 3], [3, 1]),
    ):
        x = np.random.default_rng(2).normal(0, 2, (2, 2, 7, 8)).astype(np.float32)
        node = helper.make_node(
            "AveragePool", ["x"], ["y"], kernel_shape=kernel, strides=strides, pads=pads,
            ceil_mode=1, count_include_pad=include,
        )  # fmt: skip
        assert_close(build([node], {"x": x}, {"y": FLOAT}, opset=opset), {"x": x})


def test_random_quantised_networks_have_the_bits_of_onnxruntime() -> None:
    for seed in range(60):
        network = random_network(seed)
        ours, theirs = both(network.model(), {"x": network.images(1 + seed % 6)})
        assert np.array_equal(ours["y"], theirs["y"]), (seed, network.described)
