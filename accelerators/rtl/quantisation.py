"""An ONNX graph for who looks for its int8 tensors: who makes them, reads them, what they mean.

Everything that is not as the core needs it raises Unsupported. `model` is an onnx.ModelProto; this
module only imports onnx when it is called.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
_INT8 = 3
# Where the zero point of the result is among the inputs, for operators without type inference.
_ZERO_POINTS = {
    "QuantizeLinear": 2, "QLinearConv": 7, "QLinearMatMul": 7, "QGemm": 8,
    "QLinearGlobalAveragePool": 4,
}  # fmt: skip


class Unsupported(ValueError):
    """Why a node stays on the CPU."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """An int8 tensor by name; real = (value - zero) * scale."""

    tensor: str
    scale: np.float32
    zero: int


class QuantisedGraph:
    """Nodes by index, constants, producers and readers of tensors by name, and known shapes."""

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        graph = model.graph
        self.nodes = list(graph.node)
        self.constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.producer: dict[str, int] = {}
        self.consumers: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            if node.op_type == "Constant":
                for one in node.attribute:
                    if one.name == "value":
                        self.constants[node.output[0]] = numpy_helper.to_array(one.t)
            for name in node.output:
                self.producer[name] = index
            for name in read_by(node):
                self.consumers[name].append(index)
        described = [
            value
            for value in (*graph.input, *graph.value_info, *graph.output)
            if value.type.HasField("tensor_type")
        ]
        self.shapes = {
            value.name: tuple(
                d.dim_value if d.HasField("dim_value") else -1
                for d in value.type.tensor_type.shape.dim
            )
            for value in described
            if value.type.tensor_type.HasField("shape")
        }
        self._types = {value.name: value.type.tensor_type.elem_type for value in described}
        self._forget_doubtful()

    def _forget_doubtful(self) -> None:
        """Forget shapes behind pooling where onnx's inference and onnxruntime disagree.

        With ceil_mode, onnx counts a last window that lies in the padding alone, onnxruntime does
        not.
        """
        doubtful: set[str] = set()
        for node in self.nodes:
            if not doubtful.isdisjoint(node.input) or self._miscounted(node):
                doubtful.update(node.output)
        for name in doubtful:
            self.shapes.pop(name, None)

    def _miscounted(self, node: Any) -> bool:
        if not attribute(node, "ceil_mode", 0):
            return False
        size = self.shapes.get(node.input[0], ())[2:]
        kernel = attribute(node, "kernel_shape", ())
        rank = len(kernel)
        strides, dilations = (attribute(node, key, (1,) * rank) for key in ("strides", "dilations"))
        pads = attribute(node, "pads", (0,) * (2 * rank))
        if len(size) != rank or min(size, default=0) < 1:
            return True
        counts = []
        for at in range(rank):
            room = size[at] + pads[at] + pads[rank + at] - (kernel[at] - 1) * dilations[at] - 1
            last = -(-room // strides[at])
            counts.append(last + (last * strides[at] < size[at] + pads[at]))
        return tuple(counts) != self.shapes.get(node.output[0], ())[2:]

    def is_int8(self, name: str) -> bool:
        """Whether the tensor is known to hold int8: by its type, or by its zero point's."""
        known = self._types.get(name)
        if known:
            return bool(known == _INT8)
        index = self.producer.get(name)
        if index is None:
            return False
        node = self.nodes[index]
        place = _ZERO_POINTS.get(node.op_type, len(node.input))
        zero = self.constants.get(node.input[place]) if place < len(node.input) else None
        return zero is not None and bool(zero.dtype == np.int8)

    def constant(self, name: str, dtype: type, what: str) -> npt.NDArray[Any]:
        """The constant called `name`; `what` is for the message when it is none."""
        value = self.constants.get(name)
        if value is None:
            raise Unsupported(f"{what} must be constant")
        if value.dtype != dtype:
            raise Unsupported(f"{what} must be {np.dtype(dtype)}, not {value.dtype}")
        return value

    def point(self, tensor: str, scale: str, zero: str) -> Quantised:
        """`tensor` with the constants that quantise it, as a whole, to int8."""
        step = self.constant(scale, np.float32, "the scale")
        if not zero:
            raise Unsupported("a quantisation without zero point is uint8; the core takes int8")
        point = self.constant(zero, np.int8, "the zero point")
        if step.size != 1 or point.size != 1:
            raise Unsupported("activations quantised per channel")
        return Quantised(tensor, np.float32(step.reshape(-1)[0]), int(point.reshape(-1)[0]))

    def dequantised(self, name: str) -> tuple[Quantised, int]:
        """The int8 tensor that the floating-point one comes from, and the node between them."""
        index = self.producer.get(name)
        if index is None or self.nodes[index].op_type != "DequantizeLinear":
            raise Unsupported("its input is not a dequantised int8 tensor")
        self.alone(name)
        node = self.nodes[index]
        zero = node.input[2] if len(node.input) > 2 else ""
        return self.point(node.input[0], node.input[1], zero), index

    def quantised(self, name: str) -> tuple[Quantised, bool, list[int]]:
        """What the floating-point tensor becomes, whether by a Relu, and the nodes in between."""
        relu, passed = False, []
        while True:
            self.alone(name)
            index = self.consumers[name][0]
            node = self.nodes[index]
            passed.append(index)
            if node.op_type == "Relu" and not relu:
                relu, name = True, node.output[0]
                continue
            if node.op_type != "QuantizeLinear":
                raise Unsupported(f"its result goes into {node.op_type} in floating point")
            zero = node.input[2] if len(node.input) > 2 else ""
            return self.point(node.output[0], node.input[1], zero), relu, passed

    def alone(self, name: str) -> None:
        """Refuse a tensor that more than one node, or the caller, looks at."""
        if name in self.outputs or len(self.consumers[name]) != 1:
            raise Unsupported("a floating-point tensor beside it is used elsewhere, too")

    def weights(self, name: str) -> tuple[npt.NDArray[Any], Floats, int | None, list[int]]:
        """int8 weights, their scales, the axis of those, and the nodes that dequantise them."""
        index = self.producer.get(name)
        if index is None or self.nodes[index].op_type != "DequantizeLinear":
            raise Unsupported("its weights are not quantised")
        node = self.nodes[index]
        weights = self.constant(node.input[0], np.int8, "weights")
        scale = self.constant(node.input[1], np.float32, "the weights' scale")
        if len(node.input) > 2 and np.any(self.constant(node.input[2], np.int8, "zero point")):
            raise Unsupported("weights with a zero point other than 0")
        if attribute(node, "block_size", 0):
            raise Unsupported("weights quantised by blocks")
        return weights, scale, attribute(node, "axis", 1) if scale.size > 1 else None, [index]

    def bias(self, node: Any, x: Quantised, scale: Floats) -> tuple[Ints | None, list[int]]:
        """The int32 bias of a node where it has one, and the nodes that dequantise it."""
        if len(node.input) < 3 or not node.input[2]:
            return None, []
        index = self.producer.get(node.input[2])
        if index is None or self.nodes[index].op_type != "DequantizeLinear":
            raise Unsupported("its bias is not quantised to int32")
        source = self.nodes[index]
        bias = self.constant(source.input[0], np.int32, "the bias")
        given = self.constant(source.input[1], np.float32, "the bias' scale").reshape(-1)
        if not np.allclose(given, x.scale * scale.reshape(-1), rtol=1e-4, atol=0):
            raise Unsupported("the bias' scale is not that of input times weights")
        if len(source.input) > 2 and np.any(self.constants.get(source.input[2], 0)):
            raise Unsupported("a bias with a zero point other than 0")
        return bias, [index]


def read_by(node: Any) -> Iterator[str]:
    """Names of all tensors that a node reads, those of its subgraphs included."""
    yield from node.input
    for one in node.attribute:
        for graph in (one.g, *one.graphs) if one.HasField("g") or one.graphs else ():
            own = {value.name for value in (*graph.input, *graph.initializer)}
            for inner in graph.node:
                yield from (name for name in read_by(inner) if name not in own)
                own.update(inner.output)
            yield from (value.name for value in graph.output if value.name not in own)


def attribute(node: Any, name: str, default: Any) -> Any:
    """The value of a node's attribute."""
    from onnx import helper

    for one in node.attribute:
        if one.name == name:
            return helper.get_attribute_value(one)
    return default
