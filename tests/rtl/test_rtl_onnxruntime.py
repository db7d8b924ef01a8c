"""The Verilog against onnxruntime: more than 20,000 random vectors, both streams waiting at random.

onnxruntime's int8 by int8 kernels saturate 16-bit sums on x86 without VNNI, and its precision
option (`session.x64quantprecision`) makes it refuse these operators: it turns the weights into
uint8, and for int8 by uint8 there is no kernel. Moving every value and zero point by 128 changes
nothing in the arithmetic and leads to the uint8 kernels, which are exact everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime
import pytest
from gatelet.accelerators.rtl import CoreDriver, lower
from gatelet.accelerators.rtl.layers import Conv, GlobalSum, MaxPool, Rescale, Window, dense
from gatelet.simulator.board.rtl_core import RtlEngine
from onnx import TensorProto, helper, numpy_helper

COUNTED: dict[str, int] = {}
"""Vectors compared so far, by test."""

BACK_PRESSURE = [(0, 0), (30, 50), (70, 20)]


@pytest.fixture(scope="module")
def driver(engine: RtlEngine) -> Iterator[CoreDriver]:
    yield CoreDriver(engine)
    engine.waits = (0, 0)


def run_node(node: Any, x: Any, constants: dict[str, Any], domain: str = "") -> Any:
    """One ONNX operator on `x`, in onnxruntime."""
    kind = TensorProto.UINT8 if x.dtype == np.uint8 else TensorProto.INT8
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


def int8(rng: np.random.Generator, *shape: int) -> Any:
    return rng.integers(-128, 128, shape).astype(np.int8)


def moved(values: Any) -> Any:
    """int8 -> uint8, 128 higher."""
    return (np.asarray(values).astype(np.int16) + 128).astype(np.uint8)


def ratio(macs: int, cycles: int, driver: CoreDriver) -> str:
    ideal = macs / driver.config.macs_per_cycle
    return f"{cycles} cycles, ideal {ideal:.0f} ({100 * ideal / cycles:.0f} %)"


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(64, 32), (32, 10), (1, 5), (13, 17), (8, 16), (300, 40), (784, 33)]
)
def test_matrix_products_have_the_bits_of_qlinearmatmul(
    engine: RtlEngine, driver: CoreDriver, inputs: int, outputs: int, per_channel: bool
) -> None:
    rng = np.random.default_rng(inputs * 1000 + outputs * 2 + per_channel)
    for waits in BACK_PRESSURE:
        rows = 400
        weights, x = int8(rng, inputs, outputs), int8(rng, rows, inputs)
        x_scale = np.float32(rng.uniform(0.02, 0.1))
        y_scale = np.float32(rng.uniform(0.03, 0.08) * np.sqrt(inputs))
        w_scale = rng.uniform(0.001, 0.02, outputs if per_channel else 1).astype(np.float32)
        x_zero, y_zero = int8(rng, 2)
        node = helper.make_node(
            "QLinearMatMul", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"]
        )
        shifted = run_node(
            node,
            moved(x),
            {
                "xs": x_scale, "xz": moved(x_zero), "w": moved(weights),
                "ws": w_scale if per_channel else w_scale[0],
                "wz": np.full(outputs, 128, np.uint8) if per_channel else np.uint8(128),
                "ys": y_scale, "yz": moved(y_zero),
            },
        )  # fmt: skip
        expected = (shifted.astype(np.int16) - 128).astype(np.int8)
        multiplier = np.broadcast_to(x_scale * w_scale / y_scale, (outputs,)).astype(np.float32)
        layer = dense(
            "dense",
            weights,
            np.zeros(outputs, np.int32),
            Rescale(multiplier, int(y_zero)),
            int(x_zero),
        )
        engine.waits = waits
        driver.load(lower([layer], (1, 1, inputs), driver.config))
        np.testing.assert_array_equal(driver.run(x), expected)
        assert len(np.unique(expected)) > 9
        COUNTED["matmul"] = COUNTED.get("matmul", 0) + rows


CONVOLUTIONS = [
    # height, width, channels, outputs, kernel, stride, dilation, pads (top, left, bottom, right)
    (8, 8, 3, 16, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1)),
    (9, 7, 12, 20, (3, 2), (2, 1), (1, 1), (0, 1, 2, 0)),
    (12, 12, 8, 8, (3, 3), (1, 1), (2, 2), (2, 2, 2, 2)),
    (16, 16, 1, 6, (5, 5), (1, 1), (1, 1), (0, 0, 0, 0)),
    (6, 5, 32, 24, (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)),
    (7, 9, 5, 33, (2, 3), (3, 2), (1, 1), (1, 2, 0, 1)),
]


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda c: f"{c[4][0]}x{c[4][1]}x{c[2]}to{c[3]}")
def test_convolutions_have_the_bits_of_qlinearconv(
    engine: RtlEngine, driver: CoreDriver, case: Any, per_channel: bool
) -> None:
    height, width, channels, outputs, kernel, stride, dilation, pads = case
    rng = np.random.default_rng(height * 100 + channels + per_channel)
    for waits in BACK_PRESSURE:
        items = 5
        weights, x = (
            int8(rng, outputs, channels, *kernel),
            int8(rng, items, channels, height, width),
        )
        bias = rng.integers(-20000, 20000, outputs).astype(np.int32)
        x_scale = np.float32(rng.uniform(0.02, 0.1))
        y_scale = np.float32(rng.uniform(0.03, 0.08) * np.sqrt(weights[0].size))
        w_scale = rng.uniform(0.001, 0.02, outputs if per_channel else 1).astype(np.float32)
        x_zero, y_zero = int8(rng, 2)
        node = helper.make_node(
            "QLinearConv", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["y"],
            kernel_shape=kernel, strides=stride, dilations=dilation, pads=pads,
        )  # fmt: skip
        shifted = run_node(
            node,
            moved(x),
            {
                "xs": x_scale, "xz": moved(x_zero),
                "w": moved(weights),
                "ws": w_scale if per_channel else w_scale[0],
                "wz": np.full(outputs, 128, np.uint8) if per_channel else np.uint8(128),
                "ys": y_scale, "yz": moved(y_zero), "b": bias,
            },
        )  # fmt: skip
        expected = (shifted.astype(np.int16) - 128).astype(np.int8)
        multiplier = np.broadcast_to(x_scale * w_scale / y_scale, (outputs,)).astype(np.float32)
        layer = Conv(
            "conv",
            Window(kernel, expected.shape[2:], stride, dilation, pads[:2]),
            np.ascontiguousarray(weights.transpose(0, 2, 3, 1)),
            bias,
            Rescale(multiplier, int(y_zero)),
            int(x_zero),
        )
        engine.waits = waits
        program = lower([layer], (height, width, channels), driver.config)
        driver.load(program)
        given = driver.run(np.ascontiguousarray(x.transpose(0, 2, 3, 1)).reshape(items, -1))
        np.testing.assert_array_equal(
            given.reshape(items, *expected.shape[2:], outputs), expected.transpose(0, 2, 3, 1)
        )
        COUNTED["conv"] = COUNTED.get("conv", 0) + items * expected.shape[2] * expected.shape[3]


def test_int8_products_with_weights_of_seven_bits(engine: RtlEngine, driver: CoreDriver) -> None:
    rng = np.random.default_rng(5)
    x, weights = int8(rng, 300, 50), rng.integers(-64, 64, (50, 24)).astype(np.int8)
    node = helper.make_node("QLinearMatMul", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"])
    constants = {
        "xs": np.float32(0.03), "xz": np.int8(11), "w": weights, "ws": np.float32(0.02),
        "wz": np.int8(0), "ys": np.float32(0.4), "yz": np.int8(-20),
    }  # fmt: skip
    expected = run_node(node, x, constants)
    multiplier = np.float32(0.03) * np.float32(0.02) / np.float32(0.4)
    rescale = Rescale(np.full(24, multiplier, np.float32), -20)
    engine.waits = (20, 20)
    layer = dense("dense", weights, np.zeros(24, np.int32), rescale, 11)
    driver.load(lower([layer], (1, 1, 50), driver.config))
    assert np.array_equal(driver.run(x), expected)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_int8_convolutions_with_weights_of_seven_bits(
    engine: RtlEngine, driver: CoreDriver, stride: tuple[int, int]
) -> None:
    rng = np.random.default_rng(7)
    x, bias = int8(rng, 8, 6, 9, 9), rng.integers(-999, 999, 11).astype(np.int32)
    # onnxruntime's int8 kernels are exact on every CPU as long as pairs of products fit 16 bits.
    weights = rng.integers(-64, 64, (11, 6, 3, 3)).astype(np.int8)
    node = helper.make_node(
        "QLinearConv", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["y"], strides=stride
    )
    constants = {
        "xs": np.float32(0.05), "xz": np.int8(-3), "w": weights, "ws": np.float32(0.01),
        "wz": np.int8(0), "ys": np.float32(0.7), "yz": np.int8(9), "b": bias,
    }  # fmt: skip
    expected = run_node(node, x, constants)
    multiplier = np.float32(0.05) * np.float32(0.01) / np.float32(0.7)
    layer = Conv(
        "conv",
        Window((3, 3), expected.shape[2:], stride),
        np.ascontiguousarray(weights.transpose(0, 2, 3, 1)),
        bias,
        Rescale(np.full(11, multiplier, np.float32), 9),
        -3,
    )
    engine.waits = (20, 20)
    driver.load(lower([layer], (9, 9, 6), driver.config))
    given = driver.run(np.ascontiguousarray(x.transpose(0, 2, 3, 1)).reshape(8, -1))
    assert np.array_equal(given, expected.transpose(0, 2, 3, 1).reshape(8, -1))


@pytest.mark.parametrize(
    ("size", "channels", "kernel", "stride", "pad"), [(8, 5, 2, 2, 0), (9, 20, 3, 2, 1)]
)
def test_maximum_over_windows(
    driver: CoreDriver, size: int, channels: int, kernel: int, stride: int, pad: int
) -> None:
    x = int8(np.random.default_rng(size), 6, channels, size, size)
    node = helper.make_node(
        "MaxPool", ["x"], ["y"], kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4
    )
    expected = run_node(node, x, {})
    window = Window((kernel, kernel), expected.shape[2:], (stride, stride), (1, 1), (pad, pad))
    driver.load(lower([MaxPool("pool", window)], (size, size, channels), driver.config))
    given = driver.run(np.ascontiguousarray(x.transpose(0, 2, 3, 1)).reshape(6, -1))
    assert np.array_equal(given, expected.transpose(0, 2, 3, 1).reshape(6, -1))


@pytest.mark.parametrize(("height", "width", "channels"), [(7, 7, 20), (5, 3, 8), (1, 1, 3)])
def test_average_over_everything(
    driver: CoreDriver, height: int, width: int, channels: int
) -> None:
    x = int8(np.random.default_rng(height), 60, channels, height, width)
    node = helper.make_node(
        "QLinearGlobalAveragePool",
        ["x", "xs", "xz", "ys", "yz"],
        ["y"],
        domain="com.microsoft",
        channels_last=0,
    )
    x_scale, y_scale = np.float32(0.02), np.float32(0.013)
    expected = run_node(
        node, x, {"xs": x_scale, "xz": np.int8(5), "ys": y_scale, "yz": np.int8(-9)}
    )
    multiplier = np.full(channels, x_scale / (y_scale * np.float32(height * width)), np.float32)
    layer = GlobalSum("average", Rescale(multiplier, -9), 5)
    driver.load(lower([layer], (height, width, channels), driver.config))
    given = driver.run(np.ascontiguousarray(x.transpose(0, 2, 3, 1)).reshape(60, -1))
    assert np.array_equal(given, expected.reshape(60, -1))


def test_requantisation_over_the_whole_range_of_sums_and_multipliers(driver: CoreDriver) -> None:
    """Against the float32 arithmetic itself: ties, overflow, underflow, both ends of int32."""
    rng = np.random.default_rng(3)
    channels = 2000
    bias = np.where(
        rng.random(channels) < 0.5,
        rng.integers(-(2**31) + 40000, 2**31 - 40000, channels),
        rng.integers(-2, 3, channels) << rng.integers(0, 29, channels),
    ).astype(np.int32)
    bias[:4] = 2**31 - 40000, -(2**31) + 40000, 0, 1
    exponents = np.where(rng.random(channels) < 0.8, -np.log2(np.abs(bias) + 1.0) + 5, 0)
    exponents = np.clip(exponents + rng.integers(-7, 7, channels), -120, 120)
    multiplier = np.exp2(np.round(exponents)).astype(np.float32)
    odd = rng.random(channels) < 0.5
    multiplier[odd] *= rng.uniform(1, 2, int(odd.sum())).astype(np.float32)
    multiplier[4:8] = np.finfo(np.float32).tiny, np.float32(3e38), 0.5, 1.5
    driver.load(
        lower(
            [dense("law", np.ones((1, channels), np.int8), bias, Rescale(multiplier, -5), 0)],
            (1, 1, 1),
            driver.config,
        )
    )
    x = np.arange(-128, 128, 15, dtype=np.int8)[:, None]
    sums = (x.astype(np.int64) + bias).astype(np.int32)
    with np.errstate(over="ignore", under="ignore"):
        product = sums.astype(np.float32) * multiplier
    expected = (np.rint(np.clip(product, -123, 132)) - 5).astype(np.int8)
    np.testing.assert_array_equal(driver.run(x), expected)
    assert len(np.unique(expected)) > 200


def test_cycles_per_layer_are_near_the_ideal(
    engine: RtlEngine, driver: CoreDriver, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    engine.waits = (0, 0)
    rescale = Rescale(np.full(32, 0.001, np.float32))
    lines = []
    for name, layer, shape, items, least in (
        ("dense 512 to 32", dense("d", int8(rng, 512, 32), np.zeros(32, np.int32), rescale),
         (1, 1, 512), 64, 0.98),
        ("3x3 conv 32 to 32 on 10x10", Conv("c", Window((3, 3), (10, 10), pad=(1, 1)),
         int8(rng, 32, 3, 3, 32), np.zeros(32, np.int32), rescale), (10, 10, 32), 4, 0.98),
    ):  # fmt: skip
        program = lower([layer], shape, driver.config)
        driver.load(program)
        driver.run(int8(rng, items, program.in_bytes))
        (cycles,) = driver.layer_cycles()
        macs = program.costs[0].macs * items
        lines.append(f"{name}, {items} items: {ratio(macs, cycles, driver)}")
        assert macs / driver.config.macs_per_cycle / cycles > least
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_enough_vectors_were_compared() -> None:
    """Runs last: what the tests above went through, when all of them ran in this process."""
    if set(COUNTED) != {"matmul", "conv"}:
        pytest.skip("the comparisons did not run in this process")
    assert sum(COUNTED.values()) >= 20_000, COUNTED
