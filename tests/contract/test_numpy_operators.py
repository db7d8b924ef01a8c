"""Each operator of the numpy backend against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from small_models import FLOAT, INT8, ONE_NODE, Array, assert_close, both, build, floats, node

from ..quantised_networks import random_network


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


def test_random_quantised_networks_have_the_bits_of_onnxruntime() -> None:
    for seed in range(60):
        network = random_network(seed)
        ours, theirs = both(network.model(), {"x": network.images(1 + seed % 6)})
        assert np.array_equal(ours["y"], theirs["y"]), (seed, network.described)
