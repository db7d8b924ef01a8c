"""The fabric in use for long: a hang in the middle of a batch beside the CPU, and hot swaps."""

from __future__ import annotations

import gc
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from gatelet.accelerators.backend import LoadOptions, Variant
from gatelet.accelerators.cpu import cpu_backend
from gatelet.accelerators.fpga.backend import FpgaBackend
from gatelet.accelerators.fpga.bitfile import Bitfile, encode_bitfile
from gatelet.accelerators.fpga.board import board_named
from gatelet.accelerators.fpga.driver import FabricDriver
from gatelet.accelerators.fpga.server import FabricServer
from gatelet.accelerators.tensors import TensorSpec
from gatelet.agent.scoring.batching import BatchConfig
from gatelet.agent.scoring.instances import Instance, Member
from gatelet.simulator.board.bitstream import DATE, TIME, header_part
from gatelet.simulator.board.boards import simulated_board
from gatelet.simulator.board.faults import Fault, FaultFile, write_fault
from gatelet.simulator.board.handoff import StreamDesign, encode_handoff

BOARD = board_named("pynq-z2")
X, Y = TensorSpec("x", "FP32", (-1, 16)), TensorSpec("y", "FP32", (-1, 16))
OPTIONS = LoadOptions(inputs=(X,), outputs=(Y,))
SWAPS = int(os.environ.get("GATELET_SWAPS", "200"))
"""Set it to 10000 for the figure in docs/fpga.md."""


def loopback(directory: Path, seed: int = 0, size: int = 64) -> None:
    """A package whose core gives back what it takes; `size` bytes of bitstream."""
    directory.mkdir()
    design = StreamDesign(
        "loop", BOARD.part, 100.0, 26, dma="hier_0/axi_dma_0", core="hier_0/loop_0"
    )
    data = bytes((seed,) * 4) + bytes(size)
    bitfile = Bitfile(f"loop{seed}", header_part(BOARD.part), DATE, TIME, data)
    (directory / "loop.bit").write_bytes(encode_bitfile(bitfile))
    (directory / "loop.hwh").write_text(encode_handoff(design))
    (directory / "hls4ml_config.yml").write_text("Backend: VivadoAccelerator\n")


def identity(path: Path) -> None:
    tensors = [
        onnx.helper.make_tensor_value_info(spec.name, onnx.TensorProto.FLOAT, ["n", 16])
        for spec in (X, Y)
    ]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "same", tensors[:1], tensors[1:]
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8
    )
    onnx.save(model, path)


def until(condition: Callable[[], Any], seconds: float = 15.0) -> None:
    pause, end = threading.Event(), time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        pause.wait(0.002)


class Site:
    """A fabric on a simulated board, served in this process, and a backend that uses it."""

    def __init__(self, root: Path, hang_after: float, sleep: Callable[[float], object]) -> None:
        with warnings.catch_warnings():
            # pynq warns about x86 and about pkg_resources when it is imported.
            warnings.simplefilter("ignore")
            from gatelet.simulator.board.device import activate
        self.root, self.faults = root, root / "faults.json"
        self.device = activate(simulated_board("pynq-z2"), FaultFile(self.faults), sleep=sleep)
        self.driver = FabricDriver(root / "lock", BOARD.part, hang_after=hang_after)
        self.driver.open()
        self.server = FabricServer(self.driver, root / "fabric.sock", BOARD)
        self.server.start()
        self.backend = FpgaBackend(root / "fabric.sock", BOARD.name, BOARD.part)

    def load(self, name: str) -> Any:
        return self.backend.load(self.root, Variant("hls4ml", name), OPTIONS)

    def close(self) -> None:
        self.backend.close()
        self.server.stop()
        assert self.device.memory.used == 0, "a buffer was not given back"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    threads = set(threading.enumerate())
    sites: list[Site] = []

    def make(hang_after: float = 0.5, sleep: Callable[[float], object] = time.sleep) -> Site:
        sites.append(Site(tmp_path, hang_after, sleep))
        return sites[-1]

    yield make
    for one in sites:
        one.close()
    until(lambda: set(threading.enumerate()) <= threads)


@pytest.mark.parametrize(("kind", "hang_after"), [("hang", 0.2), ("stuck", 0.2), ("hang", 8.0)])
def test_a_hang_in_the_middle_of_a_batch_is_answered_by_the_cpu_in_time(
    site: Callable[..., Site], tmp_path: Path, kind: str, hang_after: float
) -> None:
    """By the fabric's own limit where it is short, else in the time that is kept for the CPU."""
    # As large as a Z7020's: configuring it again is what recovery takes.
    loopback(tmp_path / "p", size=4 << 20)
    identity(tmp_path / "model.onnx")
    board = site(hang_after)
    session = board.load("p")
    cpu = cpu_backend(1).load(tmp_path, Variant("onnx", "model.onnx"), OPTIONS)
    members = [Member(session, "hls4ml p", time.monotonic), Member(cpu, "onnx", time.monotonic)]
    instance = Instance(
        "i", "m", "1", (X,), (Y,), members, batching=BatchConfig(max_batch=8, max_delay=0.05)
    )
    # A quarter of it is kept for the CPU, which is enough on a busy machine, too.
    seconds = 6.0
    answered: list[float] = []
    failures: list[BaseException] = []
    start = threading.Barrier(24)

    def ask(number: int) -> None:
        x = np.full((1, 16), number, np.float32)
        start.wait(10)
        begun = time.monotonic()
        try:
            np.testing.assert_array_equal(instance.run({"x": x}, None, begun + seconds)["y"], x)
            answered.append(time.monotonic() - begun)
        except Exception as error:  # noqa: BLE001 - told below, by the thread that can fail
            failures.append(error)

    write_fault(board.faults, Fault(kind, times=1))
    clients = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(20)
    assert not failures
    assert len(answered) == 24
    assert max(answered) < seconds
    fpga, own = (member.report() for member in members)
    assert own.requests >= 1, "the batch that hung went to the CPU"
    if hang_after < 1:
        until(lambda: board.server.status()["hangs"] == 1)
        reset = time.monotonic()
        x = np.ones((1, 16), np.float32)

        def back() -> bool:
            np.testing.assert_array_equal(instance.run({"x": x}, None, None)["y"], x)
            return members[0].report().requests - members[0].report().failures > good

        good = fpga.requests - fpga.failures
        until(back)
        took = time.monotonic() - reset
        print(f"{kind}: the fabric was back {took:.2f} s after its reset")
        assert took < 15
        assert board.server.status()["reconfigurations"] == 2
    instance.close(5)


def resources(device: Any, root: Path) -> dict[str, int]:
    gc.collect()
    with open("/proc/self/maps") as file:
        maps = sum("memfd:gatelet-fabric" in line for line in file)
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "segments": maps,
        "buffers": device.memory.used,
        "threads": threading.active_count(),
        "files": sum(len(files) for _, _, files in os.walk(root)),
    }


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_hot_swaps_leave_nothing_behind(site: Callable[..., Site], tmp_path: Path) -> None:
    for seed in (1, 2):
        loopback(tmp_path / f"p{seed}", seed, size=4 << 10)
    board = site(sleep=lambda _: None)
    sessions = [board.load(f"p{seed}") for seed in (1, 2)]
    batches = [np.full((count, 16), count, np.float32) for count in (1, 5)]

    def swap(times: int) -> None:
        for number in range(times):
            x = batches[number // 2 % 2]
            result = sessions[number % 2].run({"x": x}, None, time.monotonic() + 20)["y"]
            np.testing.assert_array_equal(result, x)

    swap(100)
    before, objects = resources(board.device, tmp_path), len(gc.get_objects())
    started, swaps, memory = time.monotonic(), board.server.status()["swaps"], resident()
    swap(SWAPS)
    took = time.monotonic() - started
    after = resources(board.device, tmp_path)
    assert {name: count for name, count in after.items() if count > before[name]} == {}
    grown = len(gc.get_objects()) - objects
    assert grown < SWAPS // 4, "objects stay behind with every swap"
    assert board.server.status()["swaps"] - swaps == SWAPS
    print(
        f"{SWAPS} swaps in {took:.1f} s: {before}, {grown} more objects, "
        f"{(resident() - memory) / 1024:.0f} KiB more resident"
    )
    for session in sessions:
        session.close()
