"""Wire format against onnxruntime's own QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from gatelet.accelerators.errors import InvalidTensor
from gatelet.accelerators.fpga.package import WireFormat
from gatelet.accelerators.fpga.wire import dequantise, quantise
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

SCALES = st.floats(2.0**-20, 2.0**10, width=32)
POINTS = st.integers(-128, 127)
VALUES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.just(7)),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=True),
)


@functools.cache
def session(operator: str) -> ort.InferenceSession:
    source, target = (
        (TensorProto.FLOAT, TensorProto.INT8)
        if operator == "QuantizeLinear"
        else (TensorProto.INT8, TensorProto.FLOAT)
    )
    inputs = [
        helper.make_tensor_value_info("x", source, ["n", "m"]),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
        helper.make_tensor_value_info("zero", TensorProto.INT8, []),
    ]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "scale", "zero"], ["y"])],
        "one",
        inputs,
        [helper.make_tensor_value_info("y", target, ["n", "m"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def reference(operator: str, x: np.ndarray, wire: WireFormat) -> np.ndarray:
    feeds = {
        "x": x,
        "scale": np.array(wire.scale, np.float32),
        "zero": np.array(wire.zero_point, np.int8),
    }
    return session(operator).run(None, feeds)[0]


@settings(max_examples=300, deadline=None)
@given(VALUES, SCALES, POINTS)
def test_quantise_is_onnxruntimes(values: np.ndarray, scale: float, zero: int) -> None:
    wire = WireFormat("int8", scale, zero, 7)
    ours = quantise(values, wire)
    assert ours.dtype == np.int8
    np.testing.assert_array_equal(ours, reference("QuantizeLinear", values, wire))


@settings(max_examples=200, deadline=None)
@given(st.integers(-200, 200), SCALES, POINTS)
def test_ties_round_as_in_onnxruntime(half: int, scale: float, zero: int) -> None:
    wire = WireFormat("int8", scale, zero, 7)
    tie = np.float32(half + 0.5) * np.float32(scale)
    values = np.array(
        [[tie, np.nextafter(tie, np.float32(np.inf)), np.nextafter(tie, np.float32(-np.inf)),
          -tie, tie * 2, tie / 2, 0.0]], np.float32)  # fmt: skip
    np.testing.assert_array_equal(quantise(values, wire), reference("QuantizeLinear", values, wire))


@settings(max_examples=100, deadline=None)
@given(SCALES, POINTS)
def test_dequantise_is_onnxruntimes_for_every_value(scale: float, zero: int) -> None:
    wire = WireFormat("int8", scale, zero, 256)
    every = np.arange(-128, 128, dtype=np.int8).reshape(1, 256)
    ours = dequantise(every, wire, (-1, 16, 16))
    assert ours.shape == (1, 16, 16)
    assert ours.dtype == np.float32
    theirs = reference("DequantizeLinear", every, wire)
    np.testing.assert_array_equal(ours.reshape(1, 256).view(np.int32), theirs.view(np.int32))


def test_nan_is_refused() -> None:
    with pytest.raises(InvalidTensor, match="NaN"):
        quantise(np.array([[0.0, np.nan]], np.float32), WireFormat("int8", 1.0, 0, 2))


def test_an_empty_batch_stays_empty() -> None:
    wire = WireFormat("int8", 1.0, 0, 6)
    items = quantise(np.empty((0, 2, 3), np.float32), wire)
    assert items.shape == (0, 6)
    assert dequantise(items, wire, (-1, 2, 3)).shape == (0, 2, 3)
