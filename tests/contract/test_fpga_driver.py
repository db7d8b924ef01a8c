"""The driver on the simulated board: exact, split, switched, and never waiting for ever."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gatelet.accelerators.errors import BackendUnavailable, DeadlineExceeded, LoadError
from gatelet.accelerators.fpga.driver import FabricDriver
from gatelet.accelerators.fpga.machine import take_lock
from gatelet.accelerators.fpga.package import Package
from gatelet.accelerators.fpga.protocol import FabricSick
from gatelet.accelerators.fpga.transports.axi_dma import decode_errors
from gatelet.accelerators.tensors import TensorSpec
from gatelet.simulator.board.bitstream import DenseLayer, write_overlay_package
from gatelet.simulator.board.boards import simulated_board
from gatelet.simulator.board.dma import AxiDma, _Channel
from gatelet.simulator.board.faults import Fault, FaultFile, write_fault
from gatelet.simulator.board.network import run_network

Z2 = "xc7z020clg400-1"
HANG_AFTER = 0.1


def layers(seed: int, rows: int = 16, columns: int = 6) -> tuple[DenseLayer, ...]:
    rng = np.random.default_rng(seed)
    return (
        DenseLayer(
            rng.integers(-128, 128, (rows, columns), dtype=np.int8),
            rng.integers(-900, 900, columns, dtype=np.int32),
            0.05, 0.01, 0.2, input_zero_point=3, output_zero_point=-5,
        ),
    )  # fmt: skip


def package(directory: Path, seed: int = 0, **options: Any) -> Package:
    return write_overlay_package(
        directory,
        name=f"net{seed}",
        board="pynq-z2",
        part=options.pop("part", Z2),
        clock_mhz=options.pop("clock_mhz", 100.0),
        layers=layers(seed),
        input=TensorSpec("x", "FP32", (-1, 16)),
        output=TensorSpec("y", "FP32", (-1, 6)),
        **options,
    )


def items(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(-128, 128, (count, 16), dtype=np.int8)


def infer(
    driver: FabricDriver, package: Package, batch: np.ndarray, deadline: float | None
) -> np.ndarray:
    return driver.infer(package, [batch.view(np.uint8)], deadline)[0].view(np.int8)


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    return tmp_path / "faults.json"


@pytest.fixture
def device(pynq: Any, faults: Path) -> Any:
    from gatelet.simulator.board.device import activate

    return activate(simulated_board("pynq-z2"), FaultFile(faults))


@pytest.fixture
def driver(device: Any, tmp_path: Path) -> Iterator[FabricDriver]:
    driver = FabricDriver(tmp_path / "lock", Z2, hang_after=HANG_AFTER)
    driver.open()
    yield driver
    driver.close()
    assert device.memory.used == 0, "a buffer was not given back"


def test_results_are_those_of_the_network(driver: FabricDriver, tmp_path: Path) -> None:
    loaded = package(tmp_path / "p")
    driver.load(loaded)
    for count in (1, 2, 31, 0):
        batch = items(count)
        np.testing.assert_array_equal(
            infer(driver, loaded, batch, None), run_network(layers(0), batch)
        )
    assert driver.counters.reconfigurations == 1


@pytest.mark.parametrize(
    ("options", "transfers"), [({"max_batch": 7}, 6), ({"dma_length_width": 8}, 3)]
)
def test_large_batches_are_split(
    driver: FabricDriver, tmp_path: Path, options: dict[str, int], transfers: int
) -> None:
    loaded = package(tmp_path / "p", **options)
    driver.load(loaded)
    batch = items(40)
    np.testing.assert_array_equal(infer(driver, loaded, batch, None), run_network(layers(0), batch))
    assert driver.counters.transfers == transfers


def test_packages_alternate_and_reconfigurations_are_counted(
    driver: FabricDriver, tmp_path: Path
) -> None:
    packages = [package(tmp_path / str(seed), seed) for seed in (1, 2)]
    for one in packages:
        driver.load(one)
    batch = items(5)
    for _ in range(3):
        for seed, one in zip((1, 2), packages, strict=True):
            expected = run_network(layers(seed), batch)
            for _ in range(2):
                np.testing.assert_array_equal(infer(driver, one, batch, None), expected)
            assert driver.loaded == one.name
    assert driver.counters.reconfigurations == 2 + 6
    driver.unload(packages[0])
    with pytest.raises(FabricSick, match="net1 is not loaded"):
        infer(driver, packages[0], batch, None)


def ticking(
    driver: FabricDriver, monkeypatch: pytest.MonkeyPatch, step: float
) -> Callable[[], float]:
    """The driver's time goes on by `step` seconds whenever it looks, however busy the machine."""
    clock = itertools.count(time.monotonic(), step).__next__
    monkeypatch.setattr(driver, "_monotonic", clock)
    return clock


@pytest.mark.parametrize("kind", ["hang", "stuck"])
def test_a_hang_ends_at_the_deadline_and_the_fabric_comes_back(
    driver: FabricDriver,
    tmp_path: Path,
    faults: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = package(tmp_path / "p")
    driver.load(loaded)
    clock = ticking(driver, monkeypatch, 0.001)
    write_fault(faults, Fault(kind, times=1))
    started = clock()
    with pytest.raises(DeadlineExceeded):
        infer(driver, loaded, items(3), started + 0.03)
    assert clock() - started < 0.03 + 0.05
    np.testing.assert_array_equal(
        infer(driver, loaded, items(3), clock() + 5), run_network(layers(0), items(3))
    )
    assert driver.counters.hangs == 1
    assert driver.counters.reconfigurations == 2


def test_a_broken_overlay_does_not_stand_in_the_way_of_another(
    driver: FabricDriver, device: Any, tmp_path: Path, faults: Path
) -> None:
    one, other = package(tmp_path / "1", 1), package(tmp_path / "2", 2)
    driver.load(one)
    write_fault(faults, Fault("hang", times=1))
    with pytest.raises(FabricSick):
        infer(driver, one, items(3), None)
    device.clear_firmware()
    one.bit.unlink()
    driver.load(other)
    np.testing.assert_array_equal(
        infer(driver, other, items(3), None), run_network(layers(2), items(3))
    )
    with pytest.raises(FabricSick, match=r"net1\.bit"):
        infer(driver, one, items(3), None)
    assert infer(driver, other, items(3), None).shape == (3, 6)


def test_the_same_package_elsewhere_needs_no_reconfiguration(
    driver: FabricDriver, tmp_path: Path
) -> None:
    one, other = package(tmp_path / "1"), package(tmp_path / "2")
    narrow = package(tmp_path / "3", max_batch=2)
    for loaded in (one, other):
        driver.load(loaded)
        infer(driver, loaded, items(3), None)
    assert driver.counters.reconfigurations == 1
    driver.load(narrow)
    assert infer(driver, narrow, items(3), None).shape == (3, 6)
    assert driver.counters.reconfigurations == 2


def test_without_a_deadline_a_hang_ends_as_well(
    driver: FabricDriver, tmp_path: Path, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = package(tmp_path / "p")
    driver.load(loaded)
    clock = ticking(driver, monkeypatch, 0.001)
    write_fault(faults, Fault("hang"))
    started = clock()
    with pytest.raises(FabricSick, match="no end of the transfer"):
        infer(driver, loaded, items(3), None)
    assert clock() - started < HANG_AFTER + 1
    write_fault(faults, Fault())
    driver.recover()
    assert driver.counters.reconfigurations == 2
    assert infer(driver, loaded, items(1), None).shape == (1, 6)


def test_a_slow_transfer_past_its_deadline_costs_no_reconfiguration(
    driver: FabricDriver, tmp_path: Path, faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = package(tmp_path / "p")
    driver.load(loaded)
    # Half a second of the board's time; the driver naps too long to look 10,000 times meanwhile.
    clock = ticking(driver, monkeypatch, HANG_AFTER / 10_000)
    write_fault(faults, Fault("slow", seconds=0.5, times=1))
    with pytest.raises(DeadlineExceeded):
        infer(driver, loaded, items(3), clock() + HANG_AFTER / 100)
    np.testing.assert_array_equal(
        infer(driver, loaded, items(9), None), run_network(layers(0), items(9))
    )
    assert driver.counters.reconfigurations == 1


def test_a_pause_of_this_process_is_not_held_against_the_core(
    driver: FabricDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results that came while the process did not run are looked at before the clock decides."""
    loaded = package(tmp_path / "p")
    driver.load(loaded)
    asked = 0
    read = AxiDma.read

    def late(dma: AxiDma, offset: int) -> int:
        nonlocal asked
        status = read(dma, offset)
        if offset != 0x34 or asked == 2:
            return status
        asked += 1
        return status & ~0x2

    monkeypatch.setattr(AxiDma, "read", late)
    now = time.monotonic()
    # The process is left alone for a long time after the second look.
    monkeypatch.setattr(driver, "_monotonic", lambda: now + (100 if asked == 2 else 0))
    np.testing.assert_array_equal(
        infer(driver, loaded, items(3), None), run_network(layers(0), items(3))
    )
    assert (asked, driver.counters.hangs) == (2, 0)


@pytest.mark.parametrize("error", ["internal", "slave", "decode"])
def test_dma_errors_are_named_and_recovered_from(
    driver: FabricDriver, tmp_path: Path, faults: Path, error: str
) -> None:
    loaded = package(tmp_path / "p")
    driver.load(loaded)
    write_fault(faults, Fault("error", error=error, times=1))
    with pytest.raises(FabricSick, match=rf"axi_dma_0 \(send\): DMA\w+Err: {error} error"):
        infer(driver, loaded, items(3), None)
    assert infer(driver, loaded, items(3), None).shape == (3, 6)
    assert driver.counters.dma_errors == 1


def test_addresses_are_written_once_where_the_dma_keeps_them(
    driver: FabricDriver, device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    honest = AxiDma.write

    def noted(dma: AxiDma, offset: int, value: int) -> None:
        written.append(offset)
        honest(dma, offset, value)

    monkeypatch.setattr(AxiDma, "write", noted)
    loaded = package(tmp_path / "p")
    driver.load(loaded)
    infer(driver, loaded, items(3), None)
    del written[:]
    for count in (1, 7):
        np.testing.assert_array_equal(
            infer(driver, loaded, items(count), None), run_network(layers(0), items(count))
        )
    assert written == [0x58, 0x28] * 2


def test_addresses_are_written_each_time_where_the_dma_moves_them(
    driver: FabricDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = _Channel.finish

    def moved(channel: _Channel, count: int) -> None:
        honest(channel, count)
        channel.low += count

    monkeypatch.setattr(_Channel, "finish", moved)
    loaded = package(tmp_path / "p")
    driver.load(loaded)
    for count in (3, 1, 7):
        np.testing.assert_array_equal(
            infer(driver, loaded, items(count), None), run_network(layers(0), items(count))
        )


@pytest.mark.parametrize("times", [3, 10**9])
def test_inputs_that_are_still_read_are_not_written_over(
    driver: FabricDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """The results are there before the DMA says that it has read the inputs; once, or for ever."""
    left = refill = 0
    read, write = AxiDma.read, AxiDma.write

    def busy(dma: AxiDma, offset: int) -> int:
        nonlocal left
        if offset == 0x04 and left:
            left -= 1
            return read(dma, offset) & ~0x2
        return read(dma, offset)

    def watched(dma: AxiDma, offset: int, value: int) -> None:
        nonlocal left
        assert offset != 0x28 or not left, "a transfer began while the one before was reading"
        if offset == 0x28:
            left = refill
        elif offset == 0x00 and value & 0x4:
            left = 0
        write(dma, offset, value)

    monkeypatch.setattr(AxiDma, "read", busy)
    monkeypatch.setattr(AxiDma, "write", watched)
    loaded = package(tmp_path / "p", max_batch=2)
    driver.load(loaded)
    refill = times
    lasting = times > 100
    for _ in range(3):
        np.testing.assert_array_equal(
            infer(driver, loaded, items(2), None), run_network(layers(0), items(2))
        )
    assert driver.counters.hangs == (2 if lasting else 0)
    if lasting:
        with pytest.raises(FabricSick, match="no end of the transfer"):
            infer(driver, loaded, items(4), None)
        refill = 0
    assert infer(driver, loaded, items(4), None).shape == (4, 6)
    assert driver.finish()
    assert driver.counters.hangs == (4 if lasting else 0)
    assert driver.counters.reconfigurations == 1 + driver.counters.hangs


def test_error_bits_are_decoded() -> None:
    assert decode_errors(0x1002) is None
    assert decode_errors(0x71).count("error") >= 3


def test_a_passed_deadline_does_not_touch_the_fabric(driver: FabricDriver, tmp_path: Path) -> None:
    loaded = package(tmp_path / "p")
    driver.load(loaded)
    with pytest.raises(DeadlineExceeded):
        infer(driver, loaded, items(3), time.monotonic() - 1)
    assert driver.counters.transfers == 0


def test_a_package_for_another_part_is_refused(driver: FabricDriver, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"7z010clg400 .* xc7z020clg400-1"):
        driver.load(package(tmp_path / "p", part="xc7z010clg400-1"))


def test_the_declared_clock_is_what_the_network_gets(driver: FabricDriver, tmp_path: Path) -> None:
    from pynq import Clocks

    driver.load(package(tmp_path / "p", clock_mhz=125.0))
    assert Clocks.fclk0_mhz == pytest.approx(125.0)


def test_ten_dozen_switches_leak_nothing(driver: FabricDriver, device: Any, tmp_path: Path) -> None:
    packages = [package(tmp_path / str(seed), seed) for seed in (1, 2)]
    for one in packages:
        driver.load(one)
    used = device.memory.used
    threads = threading.active_count()
    for _ in range(60):
        for one in packages:
            infer(driver, one, items(1), None)
    assert device.memory.used == used
    assert threading.active_count() == threads


def test_two_processes_never_share_a_fabric(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with take_lock(path):
        with pytest.raises(BackendUnavailable, match=str(os.getpid())):
            take_lock(path)
        code = "import sys, pathlib\n" \
            "from gatelet.accelerators.fpga.machine import take_lock\n" \
            "take_lock(pathlib.Path(sys.argv[1]))"  # fmt: skip
        other = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
        )
        assert str(os.getpid()) in other.stderr
    take_lock(path).close()
