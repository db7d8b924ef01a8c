"""Which nodes of an int8 ONNX graph the core can compute, and as what. Pure.

Both forms are read: QOperator (QLinearConv, QLinearMatMul, com.microsoft's QGemm) and QDQ, where a
float operator stands between DequantizeLinear and QuantizeLinear. `model` is an onnx.ModelProto
throughout; this module only imports onnx when it is called.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .layers import Conv, GlobalSum, Layer, MaxPool, Rescale, Shape, Window, dense

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class Unsupported(ValueError):
    """Why a node stays on the CPU."""


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


@dataclass(frozen=True, slots=True)
class _Quantised:
    tensor: str
    scale: np.float32
    zero: int


class _Reader:
    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        self._nodes = list(model.graph.node)
        self._constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
        self._outputs = {value.name for value in model.graph.output}
        self._producer: dict[str, int] = {}
        self._consumers: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self._nodes):
            if node.op_type == "Constant":
                for attribute in node.attribute:
                    if attribute.name == "value":
                        self._constants[node.output[0]] = numpy_helper.to_array(attribute.t)
            for name in node.output:
                self._producer[name] = index
            for name in node.input:
                self._consumers[name].append(index)
        graph = model.graph
        self._shapes = {
            value.name: tuple(
                d.dim_value if d.HasField("dim_value") else -1
                for d in value.type.tensor_type.shape.dim
            )
            for value in (*graph.input, *graph.value_info, *graph.output)
            if value.type.tensor_type.HasField("shape")
        }

    def read(self) -> Reading:
        steps = []
        rejected = {}
        for index, node in enumerate(self._nodes):
            if node.op_type in _FREE:
                continue
            name = node.name or node.output[0]
            try:
                if node.op_type not in _COMPUTED:
                    raise Unsupported(f"{node.op_type} is not an operator of the core")
                steps.append(self._step(index, name))
            except Unsupported as error:
                rejected[name] = str(error)
        return Reading(tuple(steps), rejected, self._shapes)

    def _step(self, index: int, name: str) -> Step:
        node = self._nodes[index]
        kind = node.op_type
        if kind in ("Flatten", "Reshape", "MaxPool") and self._int8_in_place(node):
            make = self._rename(node) if kind != "MaxPool" else self._max_pool(node, name)
            return Step(name, kind, (index,), node.input[0], node.output[0], make)
        if kind.startswith("Q"):
            return self._q_operator(index, name)
        x, before = self._dequantised(node.input[0])
        y, relu, after = self._quantised(node.output[0])
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
            weights, scale, axis, used = self._weights(node.input[1])
            bias, bias_nodes = self._bias(node, x, scale)
            nodes = (*nodes, *used, *bias_nodes)
            make = self._affine(node, name, x, weights, scale, axis, bias, y)
        return Step(name, kind, tuple(sorted(nodes)), x.tensor, y.tensor, make)

    # ------------------------------------------------------------ operators

    def _q_operator(self, index: int, name: str) -> Step:
        node = self._nodes[index]
        x = self._point(node.input[0], node.input[1], node.input[2])
        if node.op_type == "QLinearGlobalAveragePool":
            if _attribute(node, "channels_last", 0):
                raise Unsupported("channels_last is not supported")
            y = self._point(node.output[0], node.input[3], node.input[4])
            make = self._average(name, x, y)
            return Step(name, node.op_type, (index,), x.tensor, y.tensor, make)
        weights = self._constant(node.input[3], np.int8, "weights")
        scale = self._constant(node.input[4], np.float32, "the weights' scale")
        if np.any(self._constant(node.input[5], np.int8, "the weights' zero point")):
            raise Unsupported("weights with a zero point other than 0")
        gemm = node.op_type == "QGemm"
        first = 7 if gemm else 6
        if len(node.input) < first + 2 or not node.input[first]:
            raise Unsupported("its output is not int8")
        y = self._point(node.output[0], node.input[first], node.input[first + 1])
        at = 6 if gemm else 8
        bias: Ints | None = None
        if node.op_type != "QLinearMatMul" and len(node.input) > at and node.input[at]:
            bias = self._constant(node.input[at], np.int32, "the bias")
        axis = None
        if scale.size > 1:
            conv, transposed = node.op_type == "QLinearConv", _attribute(node, "transB", 0)
            axis = 0 if conv or transposed else 1
        make = self._affine(node, name, x, weights, scale, axis, bias, y)
        return Step(name, node.op_type, (index,), x.tensor, y.tensor, make)

    def _affine(
        self,
        node: Any,
        name: str,
        x: _Quantised,
        weights: npt.NDArray[Any],
        scale: Floats,
        axis: int | None,
        bias: Ints | None,
        y: _Quantised,
    ) -> Callable[[Activation], Layer]:
        conv = "Conv" in node.op_type
        if _attribute(node, "alpha", 1.0) != 1.0 or _attribute(node, "beta", 1.0) != 1.0:
            raise Unsupported("alpha and beta other than 1")
        if _attribute(node, "transA", 0):
            raise Unsupported("transA")
        if weights.ndim != (4 if conv else 2):
            raise Unsupported(f"weights of {weights.ndim} dimensions")
        transposed = not conv and bool(_attribute(node, "transB", 0))
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
        x: _Quantised,
    ) -> Callable[[Activation], Layer]:
        groups = _attribute(node, "group", 1)
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
        kernel = tuple(_attribute(node, "kernel_shape", ()))
        if len(kernel) != 2 or len(node.output) > 1:
            raise Unsupported("only two-dimensional pooling without indices")
        window = self._window(node, (kernel[0], kernel[1]))

        def make(activation: Activation) -> Layer:
            _need_pixels(activation)
            return MaxPool(name, window)

        return make

    def _average(self, name: str, x: _Quantised, y: _Quantised) -> Callable[[Activation], Layer]:
        def make(activation: Activation) -> Layer:
            _need_pixels(activation)
            height, width, channels = activation.shape
            multiplier = x.scale / (y.scale * np.float32(height * width))
            return GlobalSum(
                name, Rescale(np.full(channels, multiplier, np.float32), y.zero), x.zero
            )

        return make

    def _rename(self, node: Any) -> Callable[[Activation], None]:
        shape = self._shapes.get(node.output[0], ())
        if len(shape) != 2 or _attribute(node, "axis", 1) != 1:
            raise Unsupported("only flattening of everything but the batch")

        def make(activation: Activation) -> None:
            if shape[1] not in (-1, math.prod(activation.shape)):
                raise Unsupported("the batch does not stay the first dimension")

        return make

    def _window(self, node: Any, kernel: tuple[int, int]) -> Window:
        if _attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            raise Unsupported("auto_pad; export with explicit pads")
        shape = self._shapes.get(node.output[0], ())
        if len(shape) != 4 or min(shape[2:]) < 1:
            raise Unsupported("the size of its output is not fixed")
        strides, dilations = (_attribute(node, key, (1, 1)) for key in ("strides", "dilations"))
        pads = _attribute(node, "pads", (0, 0, 0, 0))
        return Window(
            kernel,
            (shape[2], shape[3]),
            (strides[0], strides[1]),
            (dilations[0], dilations[1]),
            (pads[0], pads[1]),
        )

    # ------------------------------------------------------------ quantisation

    def _constant(self, name: str, dtype: type, what: str) -> npt.NDArray[Any]:
        value = self._constants.get(name)
        if value is None:
            raise Unsupported(f"{what} must be constant")
        if value.dtype != dtype:
            raise Unsupported(f"{what} must be {np.dtype(dtype)}, not {value.dtype}")
        return value

    def _point(self, tensor: str, scale: str, zero: str) -> _Quantised:
        step = self._constant(scale, np.float32, "the scale")
        if not zero:
            raise Unsupported("a quantisation without zero point is uint8; the core takes int8")
        point = self._constant(zero, np.int8, "the zero point")
        if step.size != 1 or point.size != 1:
            raise Unsupported("activations quantised per channel")
        return _Quantised(tensor, np.float32(step.reshape(-1)[0]), int(point.reshape(-1)[0]))

    def _dequantised(self, name: str) -> tuple[_Quantised, int]:
        index = self._producer.get(name)
        if index is None or self._nodes[index].op_type != "DequantizeLinear":
            raise Unsupported("its input is not a dequantised int8 tensor")
        self._alone(name)
        node = self._nodes[index]
        zero = node.input[2] if len(node.input) > 2 else ""
        return self._point(node.input[0], node.input[1], zero), index

    def _quantised(self, name: str) -> tuple[_Quantised, bool, list[int]]:
        relu, passed = False, []
        while True:
            self._alone(name)
            index = self._consumers[name][0]
            node = self._nodes[index]
            passed.append(index)
            if node.op_type == "Relu" and not relu:
                relu, name = True, node.output[0]
                continue
            if node.op_type != "QuantizeLinear":
                raise Unsupported(f"its result goes into {node.op_type} in floating point")
            zero = node.input[2] if len(node.input) > 2 else ""
            return self._point(node.output[0], node.input[1], zero), relu, passed

    def _alone(self, name: str) -> None:
        if name in self._outputs or len(self._consumers[name]) != 1:
            raise Unsupported("a floating-point tensor beside it is used elsewhere, too")

    def _weights(self, name: str) -> tuple[npt.NDArray[Any], Floats, int | None, list[int]]:
        index = self._producer.get(name)
        if index is None or self._nodes[index].op_type != "DequantizeLinear":
            raise Unsupported("its weights are not quantised")
        node = self._nodes[index]
        weights = self._constant(node.input[0], np.int8, "weights")
        scale = self._constant(node.input[1], np.float32, "the weights' scale")
        if len(node.input) > 2 and np.any(self._constant(node.input[2], np.int8, "zero point")):
            raise Unsupported("weights with a zero point other than 0")
        if _attribute(node, "block_size", 0):
            raise Unsupported("weights quantised by blocks")
        return weights, scale, _attribute(node, "axis", 1) if scale.size > 1 else None, [index]

    def _bias(self, node: Any, x: _Quantised, scale: Floats) -> tuple[Ints | None, list[int]]:
        if len(node.input) < 3 or not node.input[2]:
            return None, []
        index = self._producer.get(node.input[2])
        if index is None or self._nodes[index].op_type != "DequantizeLinear":
            raise Unsupported("its bias is not quantised to int32")
        source = self._nodes[index]
        bias = self._constant(source.input[0], np.int32, "the bias")
        given = self._constant(source.input[1], np.float32, "the bias' scale").reshape(-1)
        if not np.allclose(given, x.scale * scale.reshape(-1), rtol=1e-4, atol=0):
            raise Unsupported("the bias' scale is not that of input times weights")
        if len(source.input) > 2 and np.any(self._constants.get(source.input[2], 0)):
            raise Unsupported("a bias with a zero point other than 0")
        return bias, [index]

    def _int8_in_place(self, node: Any) -> bool:
        """Whether a value-keeping operator works directly on an int8 tensor."""
        index = self._producer.get(node.input[0])
        before = self._nodes[index].op_type if index is not None else ""
        return before.startswith(("QLinear", "QuantizeLinear", "QGemm")) or (
            before in ("MaxPool", "Flatten", "Reshape")
            and index is not None
            and self._int8_in_place(self._nodes[index])
        )


def _need_pixels(activation: Activation) -> None:
    if activation.flat:
        raise Unsupported("needs height and width, but was flattened before")


def _attribute(node: Any, name: str, default: Any) -> Any:
    from onnx import helper

    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default
