"""VitisUnified's kernels, addresses beyond 32 bits, the DPU's sequence, on simulated boards."""

from __future__ import annotations

import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gatelet.accelerators.errors import LoadError
from gatelet.accelerators.fpga.codec import decode, encode
from gatelet.accelerators.fpga.driver import FabricDriver
from gatelet.accelerators.fpga.package import Package, Signature
from gatelet.accelerators.fpga.packages import probe
from gatelet.accelerators.fpga.protocol import FabricSick
from gatelet.accelerators.tensors import TensorSpec
from gatelet.simulator.board.boards import SimulatedBoard, simulated_board
from gatelet.simulator.board.container import Container
from gatelet.simulator.board.handoff import LiteCore, StreamDesign
from gatelet.simulator.board.vendor_packages import write_bitstream, write_finn_package

sys.path.insert(0, str(Path(__file__).parent))
from finn_networks import graph, mlp

PART = simulated_board("zcu104").part
HIGH = SimulatedBoard("zcu104", PART, "aarch64", 0x8_7000_0000, 16 << 20)


@pytest.fixture(scope="module")
def pynq() -> Any:
    with warnings.catch_warnings():
        # pynq warns about x86 and about pkg_resources when it is imported.
        warnings.simplefilter("ignore")
        import pynq
        import pynq.lib

    return pynq


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


def test_a_kernel_of_vitis_unified_serves(open_driver: Any, tmp_path: Path) -> None:
    from onnx import helper

    # Whole numbers, so that no order of sums matters.
    weights = np.random.default_rng(0).integers(-9, 9, (6, 4)).astype(np.float32)
    model = graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [6]}, {"y": [4]}, {"w": weights}
    )
    registers = (
        ("CTRL", 0), ("GIER", 4), ("IP_IER", 8), ("IP_ISR", 12), ("gmem_in0_ptr_1", 0x10),
        ("gmem_in0_ptr_2", 0x14), ("gmem_out0_ptr_1", 0x1C), ("gmem_out0_ptr_2", 0x20),
        ("amtQuery", 0x28),
    )  # fmt: skip
    core = LiteCore("net_0", "xilinx.com:hls:net:1.0", 0xA0000000, registers, masters_memory=True)
    engine = {
        "kind": "graph",
        "inputs": [{"element": "FLOAT32", "shape": [6], "inner": 6}],
        "outputs": [{"element": "FLOAT32", "shape": [4], "inner": 4}],
    }
    described = {"name": "net_0", "pointers": [[0x10, "in", 0], [0x1C, "out", 0]], "count": 0x28}
    folder = tmp_path / "p"
    write_bitstream(
        folder / "export/system.bit", PART, Container(engine, (described,), {"model": model}),
        StreamDesign("system", PART, 187.5, dma=None, lite=(core,)),
    )  # fmt: skip
    (folder / "hls4ml_config.yml").write_text("Backend: VitisUnified\nProjectName: net\n")
    signature = Signature(
        (TensorSpec("x", "FP32", (-1, 2, 3)),), (TensorSpec("y", "FP32", (-1, 4)),)
    )
    package = probe(folder, signature)
    driver = open_driver(HIGH)
    driver.load(package)
    x = np.random.default_rng(1).integers(-99, 99, (9, 2, 3)).astype(np.float32)
    np.testing.assert_array_equal(run(driver, package, x), x.reshape(9, 6) @ weights)


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
