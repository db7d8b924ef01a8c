"""ONNX -> program and what stays on the CPU; whole models split between both have the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from gatelet.accelerators.rtl import PRESETS, CoreConfig, CoreDriver
from gatelet.accelerators.rtl.offload import CostModel, Offload, compile_model
from gatelet.simulator.board.rtl_core import RtlEngine
from gatelet.simulator.demo.dataset import load_heldout, model_directory
from onnx import TensorProto, helper, numpy_helper

from ..quantised_networks import Qdq, random_network

CORE = PRESETS["pynq-z2"]
SLOW_CPU = CostModel(cpu_ns_per_mac=1000.0, cpu_us_per_node=1000.0)


def session(model: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Exact sums on x86 without VNNI, too.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_split(offload: Offload, engine: RtlEngine, feeds: dict[str, Any]) -> Any:
    """The model's first output: CPU, then the Verilog, then CPU."""
    quantised = feeds.get(offload.source)
    if offload.before is not None:
        quantised = session(offload.before).run([offload.source], feeds)[0]
    driver = CoreDriver(engine)
    driver.load(offload.program)
    result = offload.unpack(driver.run(offload.pack(quantised)))
    if offload.after is None:
        return result
    part = session(offload.after)
    wanted = {value.name for value in part.get_inputs()}
    both = {**feeds, offload.target: result}
    return part.run(None, {name: both[name] for name in wanted})[0]


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_demo_models_have_the_same_bits_for_every_heldout_image(
    engine: RtlEngine, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = (model_directory(version) / "onnx" / "model.onnx").read_bytes()
    images, labels = load_heldout()
    compilation = compile_model(model, CORE, CostModel(batch=len(images)))
    assert compilation.offload is not None, compilation.report
    engine.waits = (10, 30)
    scores = run_split(compilation.offload, engine, {"x": images})
    expected = session(model).run(None, {"x": images})[0]
    assert np.array_equal(scores, expected)
    assert (scores.argmax(axis=1) == labels).mean() > 0.9
    engine.waits = (0, 0)
    driver = CoreDriver(engine)
    driver.load(compilation.offload.program)
    driver.run(np.zeros((len(images), 64), np.int8))
    with capsys.disabled():
        print()
        for cost, cycles in zip(
            compilation.offload.program.costs, driver.layer_cycles(), strict=True
        ):
            ideal = cost.macs * len(images) / CORE.macs_per_cycle
            print(f"{version} {cost.name}, {len(images)} items: {cycles} cycles, ideal {ideal:.0f}")


def cnn(channels: int = 3) -> Qdq:
    return (
        Qdq((channels, 10, 12))
        .affine("Conv", (12, channels, 3, 3), relu=True, pads=[1, 1, 1, 1])
        .keep("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
        .affine("Conv", (20, 12, 3, 3), relu=True)
        .keep("Flatten")
        .affine("Gemm", (240, 10))
    )


@pytest.mark.parametrize("channels", [1, 3, 9])
def test_a_convolutional_network_has_the_bits_of_onnxruntime(
    engine: RtlEngine, channels: int
) -> None:
    network = cnn(channels)
    model, images = network.model(), network.images(12)
    compilation = compile_model(model, CORE, SLOW_CPU)
    offload = compilation.offload
    assert offload is not None, compilation.report
    assert [cost.name.rstrip("0123456789") for cost in offload.program.costs] == [
        "Conv", "MaxPool", "Conv", "Gemm",
    ]  # fmt: skip
    # One channel would leave most of a word empty: the host lays the first taps out.
    assert (offload.patches is not None) == (channels == 1)
    engine.waits = (25, 25)
    result = run_split(offload, engine, {"x": images})
    expected = session(model).run(None, {"x": images})[0]
    assert np.array_equal(result, expected)
    assert len(np.unique(expected)) > 30


def test_pooling_to_one_pixel_and_grouped_convolution(engine: RtlEngine) -> None:
    network = (
        Qdq((8, 6, 6), seed=4)
        .affine("Conv", (16, 2, 3, 3), relu=True, group=4, strides=[2, 1], pads=[1, 0, 1, 2])
        .average()
        .keep("Flatten")
        .affine("MatMul", (16, 5))
    )
    model, images = network.model(), network.images(20)
    offload = compile_model(model, CORE, SLOW_CPU).offload
    assert offload is not None
    assert len(offload.program.costs) == 3
    engine.waits = (0, 0)
    result = run_split(offload, engine, {"x": images})
    assert np.array_equal(result, session(model).run(None, {"x": images})[0])


def test_what_the_core_cannot_do_stays_on_the_cpu(engine: RtlEngine) -> None:
    network = (
        Qdq((40,), seed=2)
        .affine("Gemm", (40, 24), relu=True)
        .floating("Sigmoid")
        .affine("Gemm", (24, 64), relu=True)
        .affine("Gemm", (64, 10))
        .floating("Softmax")
    )
    model, images = network.model(), network.images(30)
    compilation = compile_model(model, CORE, SLOW_CPU)
    offload = compilation.offload
    assert offload is not None
    assert len(offload.program.costs) == 2
    assert any("Sigmoid is not an operator of the core" in line for line in compilation.report)
    assert any("on the core: Gemm" in line for line in compilation.report)
    engine.waits = (0, 0)
    result = run_split(offload, engine, {"x": images})
    assert np.array_equal(result, session(model).run(None, {"x": images})[0])


def test_a_layer_that_does_not_fit_ends_the_chain(engine: RtlEngine) -> None:
    network = Qdq((64,)).affine("Gemm", (64, 64), relu=True).affine("Gemm", (64, 700))
    model, images = network.model(), network.images(9)
    small = CoreConfig(weight_words=64, activation_words=1024)
    compilation = compile_model(model, small, SLOW_CPU)
    assert compilation.offload is not None
    assert len(compilation.offload.program.costs) == 1
    assert any("weights need" in line for line in compilation.report)
    # The same cut, on the core that is built anyway.
    offload = compile_model(model, CORE, SLOW_CPU).offload
    assert offload is not None
    assert len(offload.program.costs) == 2
    result = run_split(offload, engine, {"x": images})
    assert np.array_equal(result, session(model).run(None, {"x": images})[0])


def test_a_fast_cpu_keeps_everything_and_the_report_says_so() -> None:
    compilation = compile_model(cnn().model(), CORE, CostModel(cpu_ns_per_mac=1e-6))
    assert compilation.offload is None
    assert any("all on the CPU" in line and "on the core" in line for line in compilation.report)


def test_an_inner_tensor_with_two_readers_is_not_hidden_in_the_core(engine: RtlEngine) -> None:
    network = Qdq((32,)).affine("Gemm", (32, 32), relu=True)
    middle = network.dequantised()
    network.affine("Gemm", (32, 32))
    total = network.node("Add", [middle, network.dequantised()])
    network.quantise(total, float(network.scale), 0)
    model, images = network.model(), network.images(11)
    offload = compile_model(model, CORE, SLOW_CPU).offload
    assert offload is not None
    assert len(offload.program.costs) == 1
    result = run_split(offload, engine, {"x": images})
    assert np.array_equal(result, session(model).run(None, {"x": images})[0])


def test_a_tensor_that_a_branch_looks_at_is_not_hidden_in_the_core(engine: RtlEngine) -> None:
    """The branches of an If name tensors of the graph around it without listing them."""
    network = Qdq((32,)).affine("Gemm", (32, 32), relu=True)
    inner, scale, zero = network.tensor, network.scale, network.zero
    network.affine("Gemm", (32, 32))
    names = [network.constant(scale), network.constant(zero), network.constant(True)]

    def branch(name: str) -> Any:
        nodes = [helper.make_node("DequantizeLinear", [inner, *names[:2]], [name])]
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [out])

    chosen = network.node("If", [names[2]], then_branch=branch("t"), else_branch=branch("e"))
    total = network.node("Add", [chosen, network.dequantised()])
    network.quantise(total, float(network.scale), 0)
    model, images = network.model(), network.images(11)
    offload = compile_model(model, CORE, SLOW_CPU).offload
    assert offload is not None
    assert len(offload.program.costs) == 1
    result = run_split(offload, engine, {"x": images})
    assert np.array_equal(result, session(model).run(None, {"x": images})[0])


def test_functions_of_the_model_go_with_what_stays_on_the_cpu(engine: RtlEngine) -> None:
    network = Qdq((32,)).affine("Gemm", (32, 32), relu=True)
    y = network.dequantised()
    doubled = network.node("Doubled", [y], domain="local")
    network.quantise(doubled, float(network.scale), 0)
    import onnx

    model = onnx.load_model_from_string(network.model())
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.functions.append(
        helper.make_function(
            "local", "Doubled", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])],
            [helper.make_opsetid("", 17)],
        )
    )  # fmt: skip
    content, images = model.SerializeToString(), network.images(5)
    offload = compile_model(content, CORE, SLOW_CPU).offload
    assert offload is not None
    result = run_split(offload, engine, {"x": images})
    assert np.array_equal(result, session(content).run(None, {"x": images})[0])


def test_random_networks_have_the_bits_of_onnxruntime(engine: RtlEngine) -> None:
    offloaded = 0
    for seed in range(40):
        network = random_network(seed)
        model, images = network.model(), network.images(1 + seed % 6)
        offload = compile_model(model, CORE, SLOW_CPU).offload
        if offload is not None:
            offloaded += 1
            expected = session(model).run(None, {"x": images})[0]
            result = run_split(offload, engine, {"x": images})
            assert np.array_equal(result, expected), (seed, network.described)
    assert offloaded > 30


def test_windows_in_the_padding_alone_are_no_windows(engine: RtlEngine) -> None:
    """With ceil_mode onnx's shape inference counts them, and onnxruntime does not."""
    for ceil, kernel, strides, pads, on_core in (
        (1, [1, 1], [3, 2], [0, 0, 0, 0], False),
        (1, [2, 1], [3, 2], [0, 0, 1, 0], False),
        (1, [2, 2], [2, 2], [0, 0, 0, 0], True),
        (0, [1, 1], [3, 2], [0, 0, 0, 0], True),
    ):
        network = Qdq((10, 9, 7)).keep(
            "MaxPool", kernel_shape=kernel, strides=strides, pads=pads, ceil_mode=ceil
        )
        model, images = network.model(), network.images(4)
        offload = compile_model(model, CORE, SLOW_CPU).offload
        expected = session(model).run(None, {"x": images})[0]
        if offload is not None:
            assert np.array_equal(run_split(offload, engine, {"x": images}), expected)
        assert (offload is not None) is on_core, kernel


def test_a_maximum_over_uint8_stays_on_the_cpu() -> None:
    """It keeps its values without naming their type; taken for int8, they would be others."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("MaxPool", ["q"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("DequantizeLinear", ["m", "s", "z"], ["y"]),
    ]
    for zero, on_core in ((np.uint8(3), False), (np.int8(3), True)):
        graph = helper.make_graph(
            nodes, "pool",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, 4, 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8, 2, 2])],
            [numpy_helper.from_array(np.asarray(np.float32(0.1)), "s"),
             numpy_helper.from_array(np.asarray(zero), "z")],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        compilation = compile_model(model, CORE, SLOW_CPU)
        assert (compilation.offload is not None) is on_core, compilation.report


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Qdq((8,)).affine("Gemm", (8, 8), relu=True, zero=0), "zero point -128"),
        (Qdq((8,)).affine("Gemm", (8, 8), alpha=0.5), "alpha"),
        (Qdq((4, 5, 5)).affine("Conv", (4, 4, 3, 3), auto_pad="SAME_UPPER"), "auto_pad"),
        (Qdq((8,)).floating("Tanh"), "Tanh is not an operator"),
    ],
)
def test_reasons_against_a_node(network: Qdq, reason: str) -> None:
    compilation = compile_model(network.model(), CORE, SLOW_CPU)
    assert compilation.offload is None
    assert any(reason in line for line in compilation.report), compilation.report


def test_fp32_models_and_files_that_are_no_models() -> None:
    compilation = compile_model(model_directory("v1") / "onnx" / "model.onnx", CORE)
    assert compilation.offload is None
    assert compilation.report[-1].startswith("all on the CPU: no int8 layer")
    with pytest.raises(ValueError, match="not an ONNX file"):
        compile_model(b"\xff" * 40, CORE)
    with pytest.raises(ValueError, match="No such file"):
        compile_model("/nowhere/model.onnx", CORE)
