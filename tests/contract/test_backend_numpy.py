"""The numpy backend: whole networks, refusals and limits, and its reader against damaged files."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
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
from small_models import FLOAT, I64, ONE_NODE, X, assert_close, build, floats, node

from ..bench import onnx_models


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


@pytest.mark.parametrize("operator", ["GlobalAveragePool", "Gemm", "Conv", "Relu"])
def test_a_node_without_inputs_is_told_by_its_name(operator: str) -> None:
    content = build([helper.make_node(operator, [], ["y"])], {"x": X}, {"y": FLOAT})
    session = NumpySession("m.onnx", parse_onnx(content))
    with pytest.raises(BackendError, match=operator):
        session.run({"x": X})


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


def test_the_documented_operators_are_those_that_run() -> None:
    document = (Path(__file__).parents[2] / "docs" / "fpga.md").read_text()
    section = document.split("## Boards without onnxruntime", 1)[1].split("\n## ", 1)[0]
    missing = [name for name in OPERATORS if not re.search(rf"\b{name}\b", section)]
    assert not missing
