"""Small networks as FINN builds them, as QONNX graphs, with integer references in plain numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gatelet.simulator.board.vendor_packages import FinnTensor
from onnx import TensorProto, helper, numpy_helper

DOMAIN = "qonnx.custom_op.general"
Array = np.ndarray


@dataclass(frozen=True)
class Network:
    """`draw(count, seed)` gives inputs, `reference(inputs)` the outputs, all integers."""

    name: str
    model: bytes
    inputs: tuple[FinnTensor, ...]
    outputs: tuple[FinnTensor, ...]
    draw: Callable[[int, int], list[Array]]
    reference: Callable[[list[Array]], list[Array]]


def graph(nodes: list, inputs: dict, outputs: dict, weights: dict) -> bytes:
    def values(shapes: dict) -> list:
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *shape])
            for name, shape in shapes.items()
        ]

    constants = [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()]
    made = helper.make_graph(nodes, "finn", values(inputs), values(outputs), constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=8).SerializeToString()


def thresholds(values: Array, steps: Array) -> Array:
    return (values[..., None] >= steps).sum(-1)


def mlp(weight_bits: int = 4, in_type: str = "UINT8", simd: int = 4, pe: int = 2) -> Network:
    """Two layers: MatMul, MultiThreshold to UINT4, MatMul to INT32."""
    from gatelet.accelerators.fpga.elements import finn_element

    element = finn_element(in_type)
    low, high = element.low, element.high
    rng = np.random.default_rng(weight_bits)
    top = 1 << weight_bits - 1
    first = rng.integers(-top, top, (24, 10))
    steps = np.sort(rng.integers(-3000, 3000, (10, 15)), axis=1)
    second = rng.integers(-top, top, (10, 6))
    scale = 2.0**-element.fraction

    def draw(count: int, seed: int) -> list[Array]:
        values = np.random.default_rng(seed)
        if element.kind == "bipolar":
            return [values.choice([-1.0, 1.0], (count, 24)).astype(np.float32)]
        codes = values.integers(low, high, (count, 24), endpoint=True)
        return [(codes * scale).astype(np.float32)]

    def reference(inputs: list[Array]) -> list[Array]:
        hidden = thresholds(np.rint(inputs[0] / scale).astype(np.int64) @ first, steps)
        return [hidden @ second]

    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        helper.make_node("MultiThreshold", ["a", "t0"], ["h"], domain=DOMAIN, out_dtype="UINT4"),
        helper.make_node("MatMul", ["h", "w1"], ["y"]),
    ]
    model = graph(
        nodes, {"x": [24]}, {"y": [6]},
        {"w0": first / scale, "t0": steps, "w1": second},
    )  # fmt: skip
    return Network(
        f"mlp-{in_type}-{simd}-{pe}",
        model,
        (FinnTensor(in_type, (1, 24), (1, 24 // simd, simd)),),
        (FinnTensor("INT32", (1, 6), (1, 6 // pe, pe)),),
        draw,
        reference,
    )


def binary() -> Network:
    """BIPOLAR in, agreements of bits, TERNARY out: XnorPopcountMatMul on 0 and 1."""
    rng = np.random.default_rng(5)
    weights = rng.integers(0, 2, (21, 9))
    steps = np.sort(rng.integers(6, 15, (9, 2)), axis=1)

    def draw(count: int, seed: int) -> list[Array]:
        return [np.random.default_rng(seed).integers(0, 2, (count, 21)) * 2.0 - 1]

    def reference(inputs: list[Array]) -> list[Array]:
        bits = (inputs[0].astype(np.int64) + 1) // 2
        agreements = (bits[:, :, None] == weights[None]).sum(1)
        return [thresholds(agreements, steps) - 1]

    nodes = [
        helper.make_node("Add", ["x", "one"], ["twice"]),
        helper.make_node("Mul", ["twice", "half"], ["bits"]),
        helper.make_node("XnorPopcountMatMul", ["bits", "w"], ["a"], domain=DOMAIN),
        helper.make_node("MultiThreshold", ["a", "t"], ["y"], domain=DOMAIN, out_bias=-1.0),
    ]
    model = graph(
        nodes, {"x": [21]}, {"y": [9]},
        {"one": np.ones(1), "half": np.full(1, 0.5), "w": weights, "t": steps},
    )  # fmt: skip
    return Network(
        "binary",
        model,
        (FinnTensor("BIPOLAR", (1, 21), (1, 3, 7)),),
        (FinnTensor("TERNARY", (1, 9), (1, 3, 3)),),
        draw,
        reference,
    )


def convolution() -> Network:
    """An image in NHWC of UINT3, 3x3 convolution, thresholds per channel, INT5 out."""
    rng = np.random.default_rng(6)
    weights = rng.integers(-4, 4, (4, 2, 3, 3))
    steps = np.sort(rng.integers(-60, 60, (4, 31)), axis=1)

    def draw(count: int, seed: int) -> list[Array]:
        values = np.random.default_rng(seed).integers(0, 8, (count, 6, 5, 2))
        return [values.astype(np.float32)]

    def reference(inputs: list[Array]) -> list[Array]:
        images = inputs[0].astype(np.int64)
        out = np.zeros((len(images), 4, 3, 4), np.int64)
        for row in range(4):
            for column in range(3):
                window = images[:, row : row + 3, column : column + 3]
                out[:, row, column] = np.einsum("nhwc,ochw->no", window, weights)
        return [thresholds(out, steps) - 16]

    nodes = [
        helper.make_node("Transpose", ["x"], ["c"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["c", "w"], ["a"]),
        helper.make_node("MultiThreshold", ["a", "t"], ["h"], domain=DOMAIN, out_bias=-16.0),
        helper.make_node("Transpose", ["h"], ["y"], perm=[0, 2, 3, 1]),
    ]
    model = graph(nodes, {"x": [6, 5, 2]}, {"y": [4, 3, 4]}, {"w": weights, "t": steps})
    return Network(
        "convolution",
        model,
        (FinnTensor("UINT3", (1, 6, 5, 2), (1, 6, 5, 1, 2)),),
        (FinnTensor("INT5", (1, 4, 3, 4), (1, 4, 3, 2, 2)),),
        draw,
        reference,
    )


def two_sided() -> Network:
    """Two inputs of different types, their sum and difference as two outputs."""

    def draw(count: int, seed: int) -> list[Array]:
        rng = np.random.default_rng(seed)
        return [
            rng.integers(-8, 8, (count, 12)).astype(np.float32),
            rng.integers(0, 128, (count, 12)).astype(np.float32),
        ]

    def reference(inputs: list[Array]) -> list[Array]:
        one, other = (value.astype(np.int64) for value in inputs)
        return [one + other, one - other]

    nodes = [
        helper.make_node("Add", ["a", "b"], ["s"]),
        helper.make_node("Sub", ["a", "b"], ["d"]),
    ]
    model = graph(nodes, {"a": [12], "b": [12]}, {"s": [12], "d": [12]}, {})
    return Network(
        "two-sided",
        model,
        (FinnTensor("INT4", (1, 12), (1, 4, 3)), FinnTensor("UINT7", (1, 12), (1, 2, 6))),
        (FinnTensor("INT9", (1, 12), (1, 12, 1)), FinnTensor("INT12", (1, 12), (1, 3, 4))),
        draw,
        reference,
    )


NETWORKS = (
    mlp(),
    mlp(2, "INT8", 8, 6),
    mlp(3, "UINT2", 3, 1),
    mlp(2, "INT6", 12, 2),
    mlp(1, "BIPOLAR", 24, 3),
    mlp(2, "FIXED<7,3>", 6, 3),
    binary(),
    convolution(),
    two_sided(),
)
