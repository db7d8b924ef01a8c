"""The demo's classifiers as ONNX graphs in fp32 and int8, and as layers of the fabric.

All int8 scales are powers of two. Then float32 represents every value and every sum of the
quantised network exactly, so onnxruntime gives the same bits whether it fuses the graph into
integer kernels or runs it in float, and the fabric's integer arithmetic gives them too. Weights
stay within seven bits, since integer kernels for older x86 CPUs are wrong beyond.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from ...accelerators.tensors import TensorSpec
from ..board.bitstream import DenseLayer
from .digits_mlp import Dense, Floats, forward

INPUT = TensorSpec("x", "FP32", (-1, 64))
OUTPUT = TensorSpec("scores", "FP32", (-1, 10))

# Read by every onnxruntime since 1.15.
_OPSET = 17
_IR_VERSION = 8

# Pixels 0..16 in steps of 1/4: a power of two that also has room above the brightest pixel.
_INPUT_SCALE = 0.25
_EXACT_IN_FLOAT32 = 2**24
# Without VNNI, onnxruntime's x86 kernels add pairs of products of an unsigned byte and a weight in
# saturating int16: 2 * 255 * 64 fits, the full range of weights does not.
_WEIGHT_MAX = 64


def quantise(layers: Sequence[Dense], calibration: Floats) -> list[DenseLayer]:
    """int8 layers, calibrated on `calibration` [n, 64].

    Weights are symmetric, within +-64, per output channel. Input and scores have zero point 0;
    activations between layers have -128, so that they use all 256 levels and Relu is plain
    saturation.
    Raises ValueError when a sum could leave the range that float32 holds exactly.
    """
    activations = forward(layers, calibration)
    quantised: list[DenseLayer] = []
    scale, zero_point = _INPUT_SCALE, 0
    for index, (layer, values) in enumerate(zip(layers, activations[1:], strict=True)):
        last = index == len(layers) - 1
        weight_scales = _power_of_two(np.abs(layer.weights).max(axis=0) / _WEIGHT_MAX)
        unit = scale * weight_scales
        output_scale = float(_power_of_two(np.abs(values).max() / (127 if last else 255)))
        dense = DenseLayer(
            weights=np.rint(layer.weights / weight_scales).astype(np.int8),
            bias=np.rint(layer.bias / unit).astype(np.int32),
            input_scale=scale,
            weight_scale=weight_scales.astype(np.float32),
            output_scale=output_scale,
            input_zero_point=zero_point,
            output_zero_point=0 if last else -128,
            relu=not last,
        )
        largest = np.abs(dense.weights.astype(np.int64)).sum(axis=0) * 255 + np.abs(dense.bias)
        if largest.max() >= _EXACT_IN_FLOAT32:
            raise ValueError(f"layer {index}: sums up to {largest.max()} are not exact in float32")
        quantised.append(dense)
        scale, zero_point = output_scale, dense.output_zero_point
    return quantised


def float_model(layers: Sequence[Dense], version: str) -> bytes:
    """An fp32 ONNX file: Gemm and Relu per layer."""
    graph = _Graph()
    value = INPUT.name
    for index, layer in enumerate(layers, 1):
        last = index == len(layers)
        weights = graph.constant(f"w{index}", layer.weights.astype(np.float32))
        bias = graph.constant(f"b{index}", layer.bias.astype(np.float32))
        value = graph.node("Gemm", [value, weights, bias], OUTPUT.name if last else f"dense{index}")
        if not last:
            value = graph.node("Relu", [value], f"relu{index}")
    return graph.encode(version)


def int8_model(layers: Sequence[DenseLayer], version: str) -> bytes:
    """An int8 ONNX file in QDQ form; `scores` are the int8 results times their scale."""
    graph = _Graph()
    first = layers[0]
    scale, zero = graph.scale_and_zero("x", first.input_scale, first.input_zero_point)
    value = graph.node("QuantizeLinear", [INPUT.name, scale, zero], "x_int8")
    for index, layer in enumerate(layers, 1):
        last = index == len(layers)
        unit = np.float32(layer.input_scale) * np.asarray(layer.weight_scale, np.float32)
        value = graph.node(
            "Gemm",
            [
                graph.node("DequantizeLinear", [value, scale, zero], f"in{index}"),
                graph.dequantised(f"w{index}", layer.weights, layer.weight_scale, axis=1),
                graph.dequantised(f"b{index}", layer.bias, unit, axis=0),
            ],
            f"dense{index}",
        )
        if layer.relu:
            value = graph.node("Relu", [value], f"relu{index}")
        scale, zero = graph.scale_and_zero(f"y{index}", layer.output_scale, layer.output_zero_point)
        value = graph.node("QuantizeLinear", [value, scale, zero], f"y{index}_int8")
        if last:
            graph.node("DequantizeLinear", [value, scale, zero], OUTPUT.name)
    return graph.encode(version)


class _Graph:
    """An ONNX graph from `x` to `scores` in the making; each method gives a value's name."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def constant(self, name: str, array: npt.NDArray[Any]) -> str:
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def scale_and_zero(self, name: str, scale: float, zero_point: int) -> tuple[str, str]:
        return (
            self.constant(f"{name}_scale", np.array(scale, np.float32)),
            self.constant(f"{name}_zero", np.array(zero_point, np.int8)),
        )

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        name = f"{operator}_{output}"
        self._nodes.append(helper.make_node(operator, inputs, [output], name, **attributes))
        return output

    def dequantised(self, name: str, values: npt.NDArray[Any], scale: Any, *, axis: int) -> str:
        scales = np.asarray(scale, np.float32)
        inputs = [
            self.constant(f"{name}_quantised", values),
            self.constant(f"{name}_scale", scales),
            self.constant(f"{name}_zero", np.zeros(scales.shape, values.dtype)),
        ]
        return self.node("DequantizeLinear", inputs, name, axis=axis)

    def encode(self, version: str) -> bytes:
        graph = helper.make_graph(
            self._nodes,
            f"digits-{version}",
            [_value_info(INPUT)],
            [_value_info(OUTPUT)],
            self._constants,
        )
        model = helper.make_model(
            graph,
            producer_name="gatelet",
            ir_version=_IR_VERSION,
            opset_imports=[helper.make_opsetid("", _OPSET)],
        )
        onnx.checker.check_model(model, full_check=True)
        encoded: bytes = model.SerializeToString(deterministic=True)
        return encoded


def _value_info(spec: TensorSpec) -> Any:
    shape = ["batch" if size == -1 else size for size in spec.shape]
    return helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, shape)


def _power_of_two(values: Any) -> Any:
    """The smallest power of two that is not below each of `values` (all positive)."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent))
