"""Quantised networks in QDQ form, for whoever computes them in integers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper


class Qdq:
    """Writes a QDQ model operator by operator."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = shape
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.tensor, self.scale, self.count = "x", np.float32(0.05), 0
        self.described: list[object] = [shape]
        self.tensor = self.quantise("x", 0.05, 3)

    def constant(self, value: Any) -> str:
        self.count += 1
        self.constants.append(numpy_helper.from_array(np.asarray(value), f"c{self.count}"))
        return f"c{self.count}"

    def node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        self.count += 1
        name = f"{kind}{self.count}"
        self.nodes.append(helper.make_node(kind, inputs, [f"t{self.count}"], name, **attributes))
        return f"t{self.count}"

    def quantise(self, tensor: str, scale: float, zero: int) -> str:
        self.scale, self.zero = np.float32(scale), np.int8(zero)
        self.tensor = self.node(
            "QuantizeLinear", [tensor, self.constant(self.scale), self.constant(self.zero)]
        )
        return self.tensor

    def dequantised(self) -> str:
        return self.node(
            "DequantizeLinear",
            [self.tensor, self.constant(self.scale), self.constant(self.zero)],
        )

    def affine(
        self, kind: str, weights: tuple[int, ...], relu: bool = False, zero: int | None = None,
        **attributes: Any,
    ) -> Qdq:  # fmt: skip
        out = weights[0] if kind == "Conv" else weights[1]
        axis = 0 if kind == "Conv" else 1
        fan = int(np.prod(weights)) // out
        scale = self.rng.uniform(0.005, 0.02, out).astype(np.float32)
        x = self.dequantised()
        values = self.rng.integers(-128, 128, weights).astype(np.int8)
        w = self.node(
            "DequantizeLinear",
            [self.constant(values), self.constant(scale), self.constant(np.zeros(out, np.int8))],
            axis=axis,
        )
        bias = self.rng.integers(-3000, 3000, out).astype(np.int32)
        b = self.node(
            "DequantizeLinear", [self.constant(bias), self.constant(self.scale * scale)], axis=0
        )
        inputs = [x, w] if kind == "MatMul" else [x, w, b]
        y = self.node(kind, inputs, **attributes)
        if relu:
            y = self.node("Relu", [y])
        point = zero if zero is not None else -128 if relu else 4
        self.quantise(y, float(self.scale) * 0.012 * 74 * 60 * np.sqrt(fan) / 50, point)
        return self

    def keep(self, kind: str, **attributes: Any) -> Qdq:
        """An operator that keeps scale and zero point."""
        y = self.node(kind, [self.dequantised()], **attributes)
        self.quantise(y, float(self.scale), int(self.zero))
        return self

    def average(self) -> Qdq:
        y = self.node("GlobalAveragePool", [self.dequantised()])
        self.quantise(y, float(self.scale) * 0.5, -100)
        return self

    def floating(self, kind: str, **attributes: Any) -> Qdq:
        y = self.node(kind, [self.dequantised()], **attributes)
        self.quantise(y, 0.01, 0)
        return self

    def model(self) -> bytes:
        y = self.dequantised()
        self.nodes.append(helper.make_node("Identity", [y], ["y"]))
        graph = helper.make_graph(
            self.nodes,
            "qdq",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *self.shape])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        content: bytes = model.SerializeToString()
        return content

    def images(self, count: int) -> Any:
        return self.rng.normal(0, 2.5, (count, *self.shape)).astype(np.float32)


def random_network(seed: int) -> Qdq:
    """Up to four layers over an image, and maybe up to two behind it; `described` says which."""
    rng = np.random.default_rng(seed)

    def draw(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    channels, size = draw(1, 19), [draw(3, 11), draw(3, 11)]
    network = Qdq((channels, *size), seed)
    for _ in range(draw(1, 4)):
        kind = rng.choice(["Conv", "Conv", "MaxPool", "GlobalAveragePool"])
        if kind == "GlobalAveragePool":
            network.average()
            network.described.append("average")
            size = [1, 1]
            continue
        kernel = [draw(1, min(3, size[at])) for at in range(2)]
        steps = {"strides": [draw(1, 3), draw(1, 3)], "kernel_shape": kernel}
        steps["pads"] = [draw(0, kernel[at % 2] - 1) for at in range(4)]
        if kind == "MaxPool":
            ceil = draw(0, 1)
            network.keep("MaxPool", ceil_mode=ceil, **steps)
            network.described.append(("maximum", ceil, steps))
        else:
            ceil = 0
            steps["dilations"] = [
                2 if 2 * kernel[at] - 1 <= size[at] and draw(0, 2) == 0 else 1 for at in range(2)
            ]
            groups = int(rng.choice([1, *(g for g in (2, 3, channels) if channels % g == 0)]))
            outputs = draw(1, 11) * groups
            relu = bool(draw(0, 1))
            network.affine(
                "Conv", (outputs, channels // groups, *kernel), relu=relu, group=groups, **steps
            )
            network.described.append(("convolution", outputs, groups, relu, steps))
            channels = outputs
        size = [_positions(size[at], at, steps, ceil) for at in range(2)]
    if draw(0, 2):
        outputs = draw(1, 39)
        network.keep("Flatten").affine("Gemm", (channels * math.prod(size), outputs))
        if draw(0, 1):
            network.affine("Gemm", (outputs, 10), relu=True)
        network.described.append(("dense", outputs))
    return network


def _positions(size: int, at: int, steps: dict[str, Any], ceil: int) -> int:
    dilation = steps.get("dilations", [1, 1])[at]
    before, after = steps["pads"][at], steps["pads"][2 + at]
    stride = steps["strides"][at]
    room = size + before + after - (steps["kernel_shape"][at] - 1) * dilation - 1
    last = -(-room // stride) if ceil else room // stride
    # A window in the padding alone is none.
    return last + (last * stride < size + before)
