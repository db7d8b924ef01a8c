"""A compiled model as an overlay package: files, and the core behind a DMA on a simulated board."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gatelet.accelerators.errors import LoadError
from gatelet.accelerators.fpga.driver import FabricDriver
from gatelet.accelerators.fpga.protocol import FabricSick
from gatelet.accelerators.rtl import PRESETS, Conv, CoreConfig, CoreDriver, MaxPool, Program, lower
from gatelet.accelerators.rtl.layers import Rescale, Window, dense
from gatelet.accelerators.rtl.offload import Offload, Patches
from gatelet.accelerators.rtl.package import (
    OFFLOAD_FILE,
    PROGRAM_FILE,
    encode_program,
    read_offload,
    read_program,
    write_offload,
)
from gatelet.simulator.board.boards import simulated_board
from gatelet.simulator.board.faults import Fault, FaultFile, write_fault
from gatelet.simulator.board.rtl_core import RtlEngine
from gatelet.simulator.board.vendor_packages import write_rtl_package
from hypothesis import given, settings
from hypothesis import strategies as st

Z2 = simulated_board("pynq-z2").part
RNG = np.random.default_rng(3)


def program(config: CoreConfig = PRESETS["pynq-z2"]) -> Program:
    rescale = Rescale(np.full(6, 0.003, np.float32), 4)
    weights = RNG.integers(-128, 128, (6, 3, 3, 8), dtype=np.int8)
    bias = RNG.integers(-900, 900, 6, dtype=np.int32)
    layers = [
        Conv("conv", Window((3, 3), (6, 6), pad=(1, 1)), weights, bias, rescale, 2),
        MaxPool("pool", Window((2, 2), (3, 3), (2, 2))),
        dense(
            "fc", RNG.integers(-128, 128, (54, 10), dtype=np.int8),
            RNG.integers(-900, 900, 10, dtype=np.int32),
            Rescale(np.full(10, 0.002, np.float32)), 4, over=(3, 3, 6),
        ),
    ]  # fmt: skip
    return lower(layers, (6, 6, 8), config)


def offload(compiled: Program, patches: Patches | None = None) -> Offload:
    return Offload(
        program=compiled, source="a", target="b", source_shape=(8, 6, 6), target_shape=(10,),
        before=b"before", after=None, core_us=1.0, cpu_us=2.0, patches=patches,
    )  # fmt: skip


def same(one: Program, other: Program) -> None:
    for name in ("config", "input", "output", "tile", "costs"):
        assert getattr(one, name) == getattr(other, name)
    for name in ("instructions", "weights", "parameters"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_programs_and_offloads_round_trip(tmp_path: Path) -> None:
    compiled = program()
    patches = Patches(Window((3, 3), (6, 6), (1, 2), (2, 1), (1, 0)), -7)
    digest = write_offload(tmp_path, offload(compiled, patches))
    same(read_program(tmp_path / PROGRAM_FILE, digest), compiled)
    assert encode_program(compiled) == (tmp_path / PROGRAM_FILE).read_bytes()
    halves = read_offload(tmp_path)
    assert (halves.before, halves.after) == (tmp_path / "before.onnx", None)
    assert halves.offload.patches is not None
    assert halves.offload.patches.zero == -7
    for name in ("kernel", "output", "stride", "dilation", "pad"):
        assert getattr(halves.offload.patches.window, name) == getattr(patches.window, name)
    with pytest.raises(LoadError, match=r"overlay\.json names"):
        read_program(tmp_path / PROGRAM_FILE, "0" * 64)
    (tmp_path / OFFLOAD_FILE).write_text('{"before": "/etc/passwd"}')
    with pytest.raises(LoadError, match="damaged"):
        read_offload(tmp_path)


@settings(max_examples=60)
@given(st.data())
def test_damaged_programs_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = encode_program(program())
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(LoadError):
        read_program(path)
    path.write_bytes(content + b"x")
    with pytest.raises(LoadError, match="bytes too many"):
        read_program(path)


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    return tmp_path / "faults.json"


@pytest.fixture
def driver(engine: RtlEngine, faults: Path, tmp_path: Path) -> Iterator[FabricDriver]:
    with warnings.catch_warnings():
        # pynq warns about x86 and about pkg_resources when it is imported.
        warnings.simplefilter("ignore")
        import pynq
        import pynq.lib  # noqa: F401
    from gatelet.simulator.board.device import activate

    device = activate(simulated_board("pynq-z2"), FaultFile(faults))
    driver = FabricDriver(tmp_path / "lock", Z2, hang_after=1.0)
    driver.open()
    yield driver
    driver.close()
    assert device.memory.used == 0, "a buffer was not given back"


def package(directory: Path, compiled: Program) -> Any:
    return write_rtl_package(directory, offload(compiled), name="net", board="pynq-z2", part=Z2)


def test_the_core_behind_a_dma_gives_what_it_gives_alone(
    driver: FabricDriver, engine: RtlEngine, tmp_path: Path, faults: Path
) -> None:
    compiled = program()
    alone = CoreDriver(engine)
    alone.load(compiled)
    items = RNG.integers(-128, 128, (70, compiled.in_bytes), dtype=np.int8)
    expected = alone.run(items)
    loaded = package(tmp_path / "p", compiled)
    driver.load(loaded)

    def run() -> np.ndarray:
        (result,) = driver.infer(loaded, [items.view(np.uint8)], time.monotonic() + 20)
        return result.view(np.int8)

    np.testing.assert_array_equal(run(), expected)
    assert driver.counters.transfers == 2
    write_fault(faults, Fault("hang", times=1))
    with pytest.raises(FabricSick, match="no end of the transfer"):
        driver.infer(loaded, [items.view(np.uint8)], None)
    # The fabric was configured anew, and the program is in the core again.
    np.testing.assert_array_equal(run(), expected)
    assert driver.counters.reconfigurations == 2


def test_a_program_for_another_core_is_refused(driver: FabricDriver, tmp_path: Path) -> None:
    loaded = package(tmp_path / "p", program())
    other = CoreConfig(activation_words=2048)
    digest = write_offload(tmp_path / "p", offload(program(other)))
    path = tmp_path / "p/overlay.json"
    text = path.read_text()
    path.write_text(text.replace(loaded.transport.program_sha256, digest))
    from gatelet.accelerators.fpga.packages import probe

    with pytest.raises(LoadError, match="compile it again for this core"):
        driver.load(probe(tmp_path / "p"))
