"""Which nodes of an int8 ONNX graph the core can compute, and as what. Pure.

Both forms are read: QOperator (QLinearConv, QLinearMatMul, com.microsoft's QGemm) and QDQ, where a
float operator stands between DequantizeLinear and QuantizeLinear. `model` is an onnx.ModelProto
throughout; this module only imports onnx when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .layers import Conv, GlobalSum, Layer, MaxPool, Rescale, Shape, Window, dense
from .quantisation import Floats, Ints, Quantised, QuantisedGraph, Unsupported, attribute


@dataclass(frozen=True, slots=True)
class Activation:
    """What flows between steps: height x width x channels; `flat` after ONNX flattened it."""

    shape: Shape
    flat: bool = False


@dataclass(frozen=True, eq=False)
class Step:
    """int8 tensor `source` -> int8 tensor `target`, computed by the graph's `nodes` (indices).

    `make` gives the layer for an input, or None when the step only renames. It raises Unsupported.
    """

    name: str
    operator: str
    nodes: tuple[int, ...]
    source: str
    target: str
    make: Callable[[Activation], Layer | None]


@dataclass(frozen=True, eq=False)
class Reading:
    """`steps` in graph order, `rejected` node name -> reason, `shapes` of all tensors known."""

    steps: tuple[Step, ...]
    rejected: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    """-1 where a size is free."""


def read_graph(model: Any) -> Reading:
    """Find what the core can compute. Raises ValueError when the model is not valid ONNX."""
    from onnx import shape_inference

    return _Reader(shape_inference.infer_shapes(model, strict_mode=False, data_prop=True)).read()


_COMPUTED = {
    "Gemm", "MatMul", "Conv", "MaxPool", "GlobalAveragePool", "Flatten", "Reshape",
    "QLinearConv", "QLinearMatMul", "QGemm", "QLinearGlobalAveragePool",
}  # fmt: skip
_FREE = {"QuantizeLinear", "DequantizeLinear", "Relu", "Identity", "Constant"}


class _Reader:
    def __init__(self, model: Any) -> None:
        self._graph = QuantisedGraph(model)

    def read(self) -> Reading:
        steps = []
        rejected = {}
        for index, node in enumerate(self._graph.nodes):
            if node.op_type in _FREE:
                continue
            name = node.name or node.output[0]
            try:
                if node.op_type not in _COMPUTED:
                    raise Unsupported(f"{node.op_type} is not an operator of the core")
                steps.append(self._step(index, name))
            except Unsupported as error:
                rejected[name] = str(error)
        return Reading(tuple(steps), rejected, self._graph.shapes)

    def _step(self, index: int, name: str) -> Step:
        node = self._graph.nodes[index]
        kind = node.op_type
        if kind in ("Flatten", "Reshape", "MaxPool") and self._int8_in_place(node):
            make = self._rename(node) if kind != "MaxPool" else self._max_pool(node, name)
            return Step(name, kind, (index,), node.input[0], node.output[0], make)
        if kind.startswith("Q"):
            return self._q_operator(index, name)
        x, before = self._graph.dequantised(node.input[0])
        y, relu, after = self._graph.quantised(node.output[0])
        if relu and y.zero != -128:
            raise Unsupported(
                f"Relu with output zero point {y.zero}: onnxruntime computes it in floating point; "
                "quantise with zero point -128 to get the same bits from the core"
            )
        nodes = (before, index, *after)
        if kind in ("Flatten", "Reshape", "MaxPool"):
            if (x.scale, x.zero) != (y.scale, y.zero) or relu:
                raise Unsupported("scale or zero point changes over an operator that keeps values")
            make = self._rename(node) if kind != "MaxPool" else self._max_pool(node, name)
        elif kind == "GlobalAveragePool":
            make = self._average(name, x, y)
        else:
            weights, scale, axis, used = self._graph.weights(node.input[1])
            bias, bias_nodes = self._graph.bias(node, x, scale)
            nodes = (*nodes, *used, *bias_nodes)
            make = self._affine(node, name, x, weights, scale, axis, bias, y)
        return Step(name, kind, tuple(sorted(nodes)), x.tensor, y.tensor, make)

    # ------------------------------------------------------------ operators

    def _q_operator(self, index: int, name: str) -> Step:
        node = self._graph.nodes[index]
        x = self._graph.point(node.input[0], node.input[1], node.input[2])
        if node.op_type == "QLinearGlobalAveragePool":
            if attribute(node, "channels_last", 0):
                raise Unsupported("channels_last is not supported")
            y = self._graph.point(node.output[0], node.input[3], node.input[4])
            make = self._average(name, x, y)
            return Step(name, node.op_type, (index,), x.tensor, y.tensor, make)
        weights = self._graph.constant(node.input[3], np.int8, "weights")
        scale = self._graph.constant(node.input[4], np.float32, "the weights' scale")
        if np.any(self._graph.constant(node.input[5], np.int8, "the weights' zero point")):
            raise Unsupported("weights with a zero point other than 0")
        gemm = node.op_type == "QGemm"
        first = 7 if gemm else 6
        if len(node.input) < first + 2 or not node.input[first]:
            raise Unsupported("its output is not int8")
        y = self._graph.point(node.output[0], node.input[first], node.input[first + 1])
        at = 6 if gemm else 8
        bias: Ints | None = None
        if node.op_type != "QLinearMatMul" and len(node.input) > at and node.input[at]:
            bias = self._graph.constant(node.input[at], np.int32, "the bias")
        axis = None
        if scale.size > 1:
            conv, transposed = node.op_type == "QLinearConv", attribute(node, "transB", 0)
            axis = 0 if conv or transposed else 1
        make = self._affine(node, name, x, weights, scale, axis, bias, y)
        return Step(name, node.op_type, (index,), x.tensor, y.tensor, make)

    def _affine(
        self,
        node: Any,
        name: str,
        x: Quantised,
        weights: npt.NDArray[Any],
        scale: Floats,
        axis: int | None,
        bias: Ints | None,
        y: Quantised,
    ) -> Callable[[Activation], Layer]:
        conv = "Conv" in node.op_type
        if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
            raise Unsupported("alpha and beta other than 1")
        if attribute(node, "transA", 0):
            raise Unsupported("transA")
        if weights.ndim != (4 if conv else 2):
            raise Unsupported(f"weights of {weights.ndim} dimensions")
        transposed = not conv and bool(attribute(node, "transB", 0))
        out_axis = 0 if conv or transposed else 1
        if scale.size > 1 and axis is not None and axis % weights.ndim != out_axis:
            raise Unsupported("weight scales along another axis than the outputs")
        if transposed:
            weights = weights.T
        out = weights.shape[0 if conv else 1]
        if bias is not None and bias.size != out:
            raise Unsupported(f"a bias of {bias.size} values for {out} outputs")
        sums = np.zeros(out, np.int32) if bias is None else bias.reshape(-1).astype(np.int32)
        # In the order of onnxruntime: the product first, then the quotient.
        multiplier = (x.scale * scale.reshape(-1).astype(np.float32)) / y.scale
        rescale = Rescale(np.broadcast_to(multiplier.astype(np.float32), (out,)), y.zero)
        if conv:
            return self._conv(node, name, weights, sums, rescale, x)

        def make(activation: Activation) -> Layer:
            shape = activation.shape
            if not activation.flat:
                raise Unsupported("a matrix product over more than two dimensions")
            if math.prod(shape) != weights.shape[0]:
                raise Unsupported(f"{weights.shape[0]} inputs expected, {math.prod(shape)} given")
            return dense(name, weights, sums, rescale, x.zero, shape)

        return make

    def _conv(
        self,
        node: Any,
        name: str,
        weights: npt.NDArray[Any],
        bias: Ints,
        rescale: Rescale,
        x: Quantised,
    ) -> Callable[[Activation], Layer]:
        groups = attribute(node, "group", 1)
        # A group is a dense kernel with zeros in it; the cost model sees all of them.
        out, per_group, kernel_h, kernel_w = weights.shape
        whole = np.zeros((out, kernel_h, kernel_w, per_group * groups), np.int8)
        for group in range(groups):
            rows = slice(group * out // groups, (group + 1) * out // groups)
            columns = slice(group * per_group, (group + 1) * per_group)
            whole[rows, :, :, columns] = weights[rows].transpose(0, 2, 3, 1)
        window = self._window(node, (kernel_h, kernel_w))

        def make(activation: Activation) -> Layer:
            _need_pixels(activation)
            if activation.shape[2] != whole.shape[3]:
                raise Unsupported(f"{whole.shape[3]} channels expected")
            return Conv(name, window, whole, bias, rescale, x.zero)

        return make

    def _max_pool(self, node: Any, name: str) -> Callable[[Activation], Layer]:
        kernel = tuple(attribute(node, "kernel_shape", ()))
        if len(kernel) != 2 or len(node.output) > 1:
            raise Unsupported("only two-dimensional pooling without indices")
        window = self._window(node, (kernel[0], kernel[1]))

        def make(activation: Activation) -> Layer:
            _need_pixels(activation)
            return MaxPool(name, window)

        return make

    def _average(self, name: str, x: Quantised, y: Quantised) -> Callable[[Activation], Layer]:
        def make(activation: Activation) -> Layer:
            _need_pixels(activation)
            height, width, channels = activation.shape
            multiplier = x.scale / (y.scale * np.float32(height * width))
            return GlobalSum(
                name, Rescale(np.full(channels, multiplier, np.float32), y.zero), x.zero
            )

        return make

    def _rename(self, node: Any) -> Callable[[Activation], None]:
        shape = self._graph.shapes.get(node.output[0], ())
        if len(shape) != 2 or attribute(node, "axis", 1) != 1:
            raise Unsupported("only flattening of everything but the batch")

        def make(activation: Activation) -> None:
            if shape[1] not in (-1, math.prod(activation.shape)):
                raise Unsupported("the batch does not stay the first dimension")

        return make

    def _window(self, node: Any, kernel: tuple[int, int]) -> Window:
        if attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            raise Unsupported("auto_pad; export with explicit pads")
        shape = self._graph.shapes.get(node.output[0], ())
        if len(shape) != 4 or min(shape[2:]) < 1:
            raise Unsupported("the size of its output is not fixed")
        strides, dilations = (attribute(node, key, (1, 1)) for key in ("strides", "dilations"))
        pads = attribute(node, "pads", (0, 0, 0, 0))
        return Window(
            kernel,
            (shape[2], shape[3]),
            (strides[0], strides[1]),
            (dilations[0], dilations[1]),
            (pads[0], pads[1]),
        )

    def _int8_in_place(self, node: Any) -> bool:
        """Whether a value-keeping operator works directly on an int8 tensor."""
        graph = self._graph
        index = graph.producer.get(node.input[0])
        before = graph.nodes[index].op_type if index is not None else ""
        if before in ("MaxPool", "Flatten", "Reshape") and index is not None:
            return self._int8_in_place(graph.nodes[index])
        return before.startswith(("QLinear", "QuantizeLinear", "QGemm")) and graph.is_int8(
            node.input[0]
        )


def _need_pixels(activation: Activation) -> None:
    if activation.flat:
        raise Unsupported("needs height and width, but was flattened before")
