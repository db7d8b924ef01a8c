"""VitisUnified's kernels, addresses beyond 32 bits, the DPU's sequence, on simulated boards."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finn_networks import graph, mlp
from gatelet.accelerators.errors import LoadError
from gatelet.accelerators.fpga.codec import decode, encode
from gatelet.accelerators.fpga.driver import FabricDriver
from gatelet.accelerators.fpga.package import Package, Signature
from gatelet.accelerators.fpga.packages import probe
from gatelet.accelerators.fpga.protocol import FabricSick
from gatelet.accelerators.tensors import TensorSpec
from gatelet.simulator.board.bitstream import DenseLayer, write_overlay_package
from gatelet.simulator.board.boards import SimulatedBoard, simulated_board
from gatelet.simulator.board.container import Container
from gatelet.simulator.board.handoff import LiteCore, StreamDesign
from gatelet.simulator.board.vendor_packages import write_bitstream, write_finn_package

PART = simulated_board("zcu104").part
HIGH = SimulatedBoard("zcu104", PART, "aarch64", 0x8_7000_0000, 16 << 20)


@pytest.fixture
def open_driver(pynq: Any, tmp_path: Path) -> Iterator[Callable[[SimulatedBoard], FabricDriver]]:
    opened = []

    def open_one(board: SimulatedBoard) -> FabricDriver:
        from gatelet.simulator.board.device import activate

        device = activate(board)
        driver = FabricDriver(tmp_path / "lock", PART, hang_after=0.2)
        driver.open()
        opened.append((driver, device))
        return driver

    yield open_one
    for driver, device in opened:
        driver.close()
        assert device.memory.used == 0, "a buffer was not given back"


def run(driver: FabricDriver, package: Package, tensor: np.ndarray) -> np.ndarray:
    source, target = package.inputs[0], package.outputs[0]
    (items,) = driver.infer(package, [encode(tensor, source)], time.monotonic() + 10)
    return decode(items, target)


@pytest.mark.parametrize("board", [simulated_board("kr260"), HIGH], ids=["kr260", "high"])
def test_a_finn_package_on_other_boards_and_above_four_gibibytes(
    open_driver: Any, tmp_path: Path, board: SimulatedBoard
) -> None:
    network = mlp()
    package = write_finn_package(
        tmp_path / "p", network.model, network.inputs, network.outputs, part=board.part
    )
    driver = open_driver(board)
    driver._part = board.part
    driver.load(package)
    (x,) = network.draw(7, 0)
    np.testing.assert_array_equal(run(driver, package, x), network.reference([x])[0])


def unified(
    folder: Path, core: LiteCore, container: Container, config: str, dma: str | None = None
) -> None:
    """What VitisUnified leaves behind, as far as a device needs it."""
    design = StreamDesign(
        "system", PART, 187.5, 23, dma=dma, core=core.name, core_vlnv=core.vlnv, lite=(core,)
    )
    write_bitstream(folder / "export/system.bit", PART, container, design)
    (folder / "hls4ml_config.yml").write_text(f"Backend: VitisUnified\nProjectName: net\n{config}")


def floats(*sizes: int) -> list[dict[str, Any]]:
    return [{"element": "FLOAT32", "shape": [size], "inner": size} for size in sizes]


CONTROL = (("CTRL", 0), ("GIER", 4), ("IP_IER", 8), ("IP_ISR", 12))
NAME = "xilinx.com:hls:net_axi_master:1.0"


@pytest.mark.parametrize("chained", [False, True], ids=["ap_ctrl_hs", "ap_ctrl_chain"])
def test_a_kernel_of_vitis_unified_serves(open_driver: Any, tmp_path: Path, chained: bool) -> None:
    from onnx import helper

    # Whole numbers, so that no order of sums matters.
    rng = np.random.default_rng(0)
    weights = rng.integers(-9, 9, (6, 4)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Add", ["z", "z"], ["t"]),
    ]
    model = graph(nodes, {"x": [6], "z": [3]}, {"y": [4], "t": [3]}, {"w": weights})
    # An input whose name has "out" in it, and outputs before inputs.
    ports = ("out0_ptr_y", "in0_ptr_outer", "out1_ptr_t", "in1_ptr_z")
    registers = (
        *CONTROL,
        *(
            (f"gmem_{port}_{half}", 0x10 + 12 * place + 4 * (half - 1))
            for place, port in enumerate(ports) for half in (1, 2)
        ),
        ("batch_size", 0x40),
    )  # fmt: skip
    core = LiteCore("net_axi_master_1", NAME, 0xA0000000, registers, masters_memory=True,
                    chained=chained)  # fmt: skip
    described = {
        "name": core.name, "count": 0x40, "chained": chained,
        "pointers": [[0x10, "out", 0], [0x1C, "in", 0], [0x28, "out", 1], [0x34, "in", 1]],
    }  # fmt: skip
    engine = {"kind": "graph", "inputs": floats(6, 3), "outputs": floats(4, 3)}
    folder = tmp_path / "p"
    unified(
        folder, core, Container(engine, (described,), {"model": model}),
        "VitisUnifiedConfig:\n  axi_mode: axi_master\n  InputDtype: float\n  OutputDtype: float\n",
    )  # fmt: skip
    x, z = TensorSpec("x", "FP32", (-1, 2, 3)), TensorSpec("z", "FP32", (-1, 3))
    y, t = TensorSpec("y", "FP32", (-1, 4)), TensorSpec("t", "FP32", (-1, 3))
    with pytest.raises(LoadError, match="the kernel has 2 inputs, 1 are described"):
        probe(folder, Signature((x,), (y, t)))
    package = probe(folder, Signature((x, z), (y, t)))
    driver = open_driver(HIGH)
    driver.load(package)
    for count in (9, 4):
        tensors = [rng.integers(-99, 99, (count, *s.shape[1:])).astype(np.float32) for s in (x, z)]
        items = [encode(t, port) for t, port in zip(tensors, package.inputs, strict=True)]
        sums, twice = driver.infer(package, items, time.monotonic() + 10)
        np.testing.assert_array_equal(
            decode(sums, package.outputs[0]), tensors[0].reshape(count, 6) @ weights
        )
        np.testing.assert_array_equal(decode(twice, package.outputs[1]), 2 * tensors[1])


@pytest.mark.parametrize("chained", [False, True], ids=["ap_ctrl_hs", "ap_ctrl_chain"])
def test_a_streaming_kernel_of_vitis_unified_is_started_for_each_transfer(
    open_driver: Any, tmp_path: Path, chained: bool
) -> None:
    from onnx import helper

    weights = np.random.default_rng(0).integers(-9, 9, (6, 4)).astype(np.float32)
    model = graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [6]}, {"y": [4]}, {"w": weights}
    )
    name = "net_axi_stream_1"
    core = LiteCore(name, NAME, 0xA0000000, (*CONTROL, ("batch_size", 0x10)), chained=chained)
    described = {"name": name, "count": 0x10, "stream": True, "chained": chained}
    engine = {"kind": "graph", "inputs": floats(6), "outputs": floats(4)}
    folder = tmp_path / "p"
    unified(
        folder, core, Container(engine, (described,), {"model": model}),
        "VitisUnifiedConfig:\n  axi_mode: axi_stream\n", dma="axi_dma_0",
    )  # fmt: skip
    signature = Signature(
        (TensorSpec("x", "FP32", (-1, 2, 3)),), (TensorSpec("y", "FP32", (-1, 4)),)
    )
    package = probe(folder, signature)
    driver = open_driver(HIGH)
    driver.load(package)
    for count in (9, 1, 30):
        x = np.random.default_rng(count).integers(-99, 99, (count, 2, 3)).astype(np.float32)
        np.testing.assert_array_equal(run(driver, package, x), x.reshape(count, 6) @ weights)
    # A network that swallows its items without an end is told from one that was never started.
    registers = driver._device.fabric.registers(name)
    registers.process = lambda packet: b""
    with pytest.raises(FabricSick, match=f"{name} busy"):
        run(driver, package, x)


def test_memory_that_cores_cannot_reach_is_refused(open_driver: Any, tmp_path: Path) -> None:
    """Their addresses would be cut off, and the results written into memory of others."""
    layer = DenseLayer(np.ones((4, 2), np.int8), np.zeros(2, np.int32), 0.1, 0.01, 0.2)
    package = write_overlay_package(
        tmp_path / "stream", name="net", board="zcu104", part=PART, clock_mhz=100.0,
        layers=[layer], input=TensorSpec("x", "FP32", (-1, 4)),
        output=TensorSpec("y", "FP32", (-1, 2)),
    )  # fmt: skip
    network = mlp()
    finn = write_finn_package(
        tmp_path / "finn", network.model, network.inputs, network.outputs, part=PART
    )
    driver = open_driver(HIGH)
    for one, wide, narrow in (
        (
            package,
            '<PARAMETER NAME="c_include_mm2s"',
            '<PARAMETER NAME="c_addr_width" VALUE="32"/><PARAMETER NAME="c_include_mm2s"',
        ),
        (finn, 'REGISTER NAME="in0_V_2"', 'REGISTER NAME="in0_V_9"'),
    ):
        driver.load(one)
        driver.unload(one)
        text = one.hwh.read_text()
        assert wide in text
        if one is finn:
            # Without the register for the upper half, wherever it was.
            text = text.replace('ADDRESS_OFFSET" VALUE="0x14"', 'ADDRESS_OFFSET" VALUE="0x18"')
        one.hwh.write_text(text.replace(wide, narrow))
        with pytest.raises(LoadError, match="addresses of 32 bits; have the kernel keep"):
            driver.load(one)


def test_settings_of_vitis_unified_that_are_none_of_its_own(tmp_path: Path) -> None:
    core = LiteCore("k", NAME, 0xA0000000, (*CONTROL, ("batch_size", 0x10)))
    config = "VitisUnifiedConfig:\n  axi_mode: {}\n  InputDtype: double\n"
    unified(tmp_path, core, Container({}), config.format("axi_lite"), "axi_dma_0")
    with pytest.raises(LoadError, match="axi_mode axi_lite is not supported"):
        probe(tmp_path)
    unified(tmp_path, core, Container({}), config.format("axi_stream"), "axi_dma_0")
    signature = Signature((TensorSpec("x", "FP64", (-1, 3)),), ())
    assert probe(tmp_path, signature).inputs[0].wire.item_bytes == 24
    for platform, board in (("null", "kv260"), ("/home/me/mine.xsa", None)):
        more = config.format("axi_stream") + f"  Board: KV260\n  Platform: {platform}\n"
        unified(tmp_path, core, Container({}), more, "axi_dma_0")
        assert probe(tmp_path).board == board
    unified(tmp_path, core, Container({}), config.format("axi_master"), "axi_dma_0")
    with pytest.raises(LoadError, match="no core with control, pointers"):
        probe(tmp_path)
    other = LiteCore("k", NAME, 0xA0000000, (*CONTROL, ("items", 0x10)))
    unified(tmp_path, other, Container({}), config.format("axi_stream"), "axi_dma_0")
    with pytest.raises(LoadError, match="0 cores with control and batch_size"):
        probe(tmp_path)


class _Tensor:
    def __init__(self, size: int, point: int) -> None:
        self.dims = [1, size]
        self._point = point

    def get_attr(self, name: str) -> int:
        assert name == "fix_point"
        return self._point


class _Runner:
    """Gives four times the first half of what it is given."""

    failing = False

    def get_input_tensors(self) -> list[_Tensor]:
        return [_Tensor(6, 4)]

    def get_output_tensors(self) -> list[_Tensor]:
        return [_Tensor(3, 2)]

    def execute_async(self, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> int:
        if self.failing:
            raise RuntimeError("DPU timeout")
        outputs[0][:] = inputs[0][:, :3]
        return 1

    def wait(self, job: int) -> None:
        assert job == 1


class _Part:
    def __init__(self, device: str) -> None:
        self._device = device

    def has_attr(self, name: str) -> bool:
        return name == "device"

    def get_attr(self, _name: str) -> str:
        return self._device


def test_the_sequence_of_the_dpu_on_a_stand_in_for_its_runtime(
    open_driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = _Runner()
    parts = [_Part("CPU"), _Part("DPU")]
    root = types.SimpleNamespace(toposort_child_subgraph=lambda: parts)
    read = types.SimpleNamespace(get_root_subgraph=lambda: root)
    modules = {
        "xir": {"Graph": types.SimpleNamespace(deserialize=lambda path: read)},
        "vart": {"Runner": types.SimpleNamespace(create_runner=lambda part, mode: runner)},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        for key, value in content.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
    write_bitstream(tmp_path / "p/dpu.bit", PART, Container({}), StreamDesign("dpu", PART, 100.0))
    for name in ("dpu.xclbin", "net.xmodel"):
        (tmp_path / "p" / name).write_bytes(b"x")
    signature = Signature((TensorSpec("x", "FP32", (-1, 6)),), (TensorSpec("y", "FP32", (-1, 3)),))
    package = probe(tmp_path / "p", signature)
    driver = open_driver(simulated_board("zcu104"))
    driver.load(package)
    x = np.array([[0.5, -1.25, 100.0, 0, 0, 0], [0.03, 0.04, -100.0, 1, 1, 1]], np.float32)
    expected = np.clip(np.rint(x[:, :3] * 16), -128, 127) / 4
    np.testing.assert_array_equal(run(driver, package, x), expected)
    runner.failing = True
    with pytest.raises(FabricSick, match="DPU timeout"):
        run(driver, package, x)
    runner.failing = False
    np.testing.assert_array_equal(run(driver, package, x), expected)
    other = Signature(signature.inputs, (TensorSpec("y", "FP32", (-1, 5)),))
    with pytest.raises(LoadError, match=r"model\.json has others"):
        driver.load(probe(tmp_path / "p", other))
    parts.append(_Part("DPU"))
    driver.unload(package)
    with pytest.raises(LoadError, match="2 parts for the DPU"):
        driver.load(package)


def test_a_configuration_takes_its_time(pynq: Any, tmp_path: Path) -> None:
    from gatelet.simulator.board.device import activate

    slept: list[float] = []
    activate(simulated_board("pynq-z2"), sleep=slept.append)
    part = simulated_board("pynq-z2").part
    design = StreamDesign("big", part, 100.0)
    write_bitstream(tmp_path / "big.bit", part, Container({}), design, padding=4_045_564)
    pynq.Overlay(str(tmp_path / "big.bit"))
    assert slept == [pytest.approx(0.03, rel=0.02)]
