"""Models that share a design swap by the part that differs, and by all of it when in doubt."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gatelet.accelerators.errors import LoadError
from gatelet.accelerators.fpga.driver import FabricDriver
from gatelet.accelerators.fpga.package import Package
from gatelet.accelerators.fpga.packages import probe
from gatelet.accelerators.fpga.preflight import Device, examine, look
from gatelet.accelerators.fpga.protocol import FabricSick
from gatelet.agent.main import main
from gatelet.simulator.board.boards import simulated_board
from gatelet.simulator.board.faults import Fault, FaultFile, write_fault
from gatelet.simulator.board.handoff import LiteCore
from gatelet.simulator.board.network import DenseLayer, run_network
from gatelet.simulator.board.partial_packages import DECOUPLER, write_partial_package

Z2 = simulated_board("pynq-z2").part
SHUTDOWN = LiteCore("dfx_shutdown_0", "xilinx.com:ip:dfx_axi_shutdown_manager:1.0", 0x43C10000)
FULL, PART = 4 << 20, 256 << 10


@pytest.fixture
def sleeps() -> list[float]:
    """How long configurations took, in order."""
    return []


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    return tmp_path / "faults.json"


@pytest.fixture
def device(sleeps: list[float], faults: Path, tmp_path: Path) -> Any:
    with warnings.catch_warnings():
        # pynq warns about x86 and about pkg_resources when it is imported.
        warnings.simplefilter("ignore")
        from gatelet.simulator.board.device import activate

    return activate(
        simulated_board("pynq-z2"), FaultFile(faults), tmp_path / "pl_state.json", sleeps.append
    )


@pytest.fixture
def driver(device: Any, tmp_path: Path) -> Iterator[FabricDriver]:
    driver = FabricDriver(tmp_path / "lock", Z2, hang_after=0.1)
    driver.open()
    yield driver
    driver.close()
    assert device.memory.used == 0, "a buffer was not given back"


def layers(seed: int) -> tuple[DenseLayer, ...]:
    rng = np.random.default_rng(seed)
    weights = rng.integers(-128, 128, (16, 6), np.int8)
    return (DenseLayer(weights, rng.integers(-99, 99, 6, np.int32), 0.1, 0.01, 0.5),)


def package(directory: Path, seed: int, **options: Any) -> Package:
    return write_partial_package(
        directory, name=f"net{seed}", board="pynq-z2", part=Z2, layers=layers(seed),
        static_padding=FULL, partial_padding=PART, **options,
    )  # fmt: skip


def serves(driver: FabricDriver, package: Package, seed: int) -> None:
    x = np.random.default_rng(9).integers(-128, 128, (5, 16), np.int8)
    (y,) = driver.infer(package, [x.view(np.uint8)], time.monotonic() + 10)
    np.testing.assert_array_equal(y.view(np.int8), run_network(layers(seed), x))


Pair = tuple[Package, Package]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return package(tmp_path / "1", 1), package(tmp_path / "2", 2)


def counted(driver: FabricDriver) -> tuple[int, int]:
    return driver.counters.reconfigurations, driver.counters.partial


def test_two_models_of_one_design_swap_by_their_parts(
    driver: FabricDriver, device: Any, pair: Pair, sleeps: list[float]
) -> None:
    for one in pair:
        driver.load(one)
    for _ in range(3):
        for seed, one in enumerate(pair, 1):
            serves(driver, one, seed)
    assert counted(driver) == (1, 2 + 6)
    assert (device.downloads, device.partial_downloads) == counted(driver)
    assert sleeps[0] > 10 * max(sleeps[1:]), "time goes with the size"
    assert not any(d.decoupled for d in device._decouplers.values())


@pytest.mark.parametrize(
    "cores", [(), (DECOUPLER,), (SHUTDOWN,), (DECOUPLER, SHUTDOWN)], ids=["none", "d", "s", "ds"]
)
def test_the_region_is_cut_off_while_it_is_configured(
    driver: FabricDriver, device: Any, tmp_path: Path, cores: tuple[LiteCore, ...]
) -> None:
    seen = []
    exchange = device._exchange

    def watched(fabric: Any) -> None:
        seen.append([d.decoupled for d in device._decouplers.values()])
        exchange(fabric)

    device._exchange = watched
    for seed in (1, 2):
        one = package(tmp_path / str(seed), seed, decouplers=cores)
        driver.load(one)
        serves(driver, one, seed)
    assert seen == [[True] * len(cores)] * 2


def test_a_region_that_is_not_cut_off_gets_its_streams_stuck(device: Any, pair: Pair) -> None:
    """What the simulated board does to who forgets it; unmodified pynq does not decouple."""
    from pynq import Bitstream, Overlay

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        overlay = Overlay(str(pair[0].bit), download=False)
    for clock in overlay.clock_dict.values():
        clock["frequency"] = clock.get("frequency") or 100.0
    overlay.download()
    assert pair[0].partial is not None
    Bitstream(str(pair[0].partial.bit), partial=True).download()
    assert [dma._wedged for dma in device._dmas] == ["stuck"]


def test_another_design_and_other_kinds_of_bitstreams_are_refused_by_the_board(
    device: Any, pair: Pair, tmp_path: Path
) -> None:
    from pynq import Bitstream

    other = package(tmp_path / "3", 3, static="other")
    assert pair[0].partial is not None
    partial = Bitstream(str(pair[0].partial.bit), partial=True)
    with pytest.raises(OSError, match="a part of shell into no design"):
        partial.download()
    Bitstream(str(other.bit)).download()
    with pytest.raises(OSError, match="a part of shell into other"):
        partial.download()
    with pytest.raises(OSError, match="a partial bitstream was given as a full one"):
        device.download(Bitstream(str(pair[0].partial.bit)), device.get_bitfile_metadata(
            str(pair[0].bit)))  # fmt: skip


def fail(error: str) -> Callable[[Path], None]:
    return lambda faults: write_fault(faults, Fault(error, times=1))


@pytest.mark.parametrize("kind", ["hang", "stuck", "error"])
def test_after_a_failure_all_of_it_comes_anew(
    driver: FabricDriver, pair: Pair, faults: Path, kind: str
) -> None:
    for one in pair:
        driver.load(one)
    before = counted(driver)
    fail(kind)(faults)
    with pytest.raises(FabricSick):
        serves(driver, pair[1], 2)
    driver.recover()
    serves(driver, pair[0], 1)
    assert counted(driver)[0] == before[0] + 1


def test_after_another_process_all_of_it_comes_anew(
    driver: FabricDriver, device: Any, pair: Pair
) -> None:
    for one in pair:
        driver.load(one)
    device.configure_elsewhere()
    serves(driver, pair[0], 1)
    assert (counted(driver)[0], driver.counters.replaced) == (2, 1)
    # Also when nothing of ours was in use at that time.
    driver.unload(pair[0])
    device.configure_elsewhere()
    serves(driver, pair[1], 2)
    assert (counted(driver)[0], driver.counters.replaced) == (3, 2)


def test_a_decoupler_that_does_not_follow_costs_a_full_configuration(
    driver: FabricDriver, device: Any, pair: Pair
) -> None:
    driver.load(pair[0])
    (decoupler,) = device._decouplers.values()
    decoupler.deaf = True
    with pytest.raises(FabricSick, match="dfx_decoupler_0: does not decouple"):
        driver.load(pair[1])
    driver.load(pair[1])
    serves(driver, pair[1], 2)
    assert counted(driver)[0] == 2


def test_cores_that_do_not_come_to_rest_cost_a_full_configuration(
    driver: FabricDriver, device: Any, pair: Pair
) -> None:
    """The DMA is outside of the region: exchanging the part again does not help it."""
    driver.load(pair[0])
    (dma,) = device._dmas
    dma.read = lambda offset: 0x4
    with pytest.raises(FabricSick, match="does not end its reset"):
        driver.load(pair[1])
    driver.load(pair[1])
    serves(driver, pair[1], 2)
    assert counted(driver)[0] == 2


def test_a_whole_design_between_two_parts(driver: FabricDriver, pair: Pair, tmp_path: Path) -> None:
    other = package(tmp_path / "3", 3, static="other")
    for one in (*pair, other):
        driver.load(one)
    assert counted(driver) == (2, 3)
    serves(driver, pair[0], 1)
    serves(driver, pair[1], 2)
    assert counted(driver) == (3, 5)


def edit(directory: Path, **partial: Any) -> Package:
    path = directory / "overlay.json"
    document = json.loads(path.read_text())
    document["partial"].update(partial)
    path.write_text(json.dumps(document))
    return probe(directory)


def test_what_is_wrong_with_the_part_is_said_before_the_fabric_is_touched(
    driver: FabricDriver, pair: Pair, tmp_path: Path
) -> None:
    one = pair[0].directory
    for change, words in (
        ({"sha256": "0" * 64}, "net1.bit: sha256 is .* but overlay.json says 0000"),
        ({"decouplers": ["nobody"]}, "no core nobody with registers"),
        ({"decouplers": ["axi_dma_0"]}, "axi_dma_0 is of kind axi_dma, which decouples nothing"),
    ):
        document = json.loads((one / "overlay.json").read_text())
        with pytest.raises(LoadError, match=words):
            driver.load(edit(one, **change))
        (one / "overlay.json").write_text(json.dumps(document))
    for change, words in (
        ({"sha256": "x"}, "partial.sha256"),
        ({"bitstream": "../x.bit"}, "partial.bitstream"),
        ({"decouplers": [1]}, "partial.decouplers"),
    ):
        document = json.loads((one / "overlay.json").read_text())
        with pytest.raises(LoadError, match=words):
            edit(one, **change)
        (one / "overlay.json").write_text(json.dumps(document))
    foreign = write_partial_package(
        tmp_path / "x", name="x", board="zcu104", part=simulated_board("zcu104").part,
        layers=layers(1),
    )  # fmt: skip
    assert foreign.partial is not None
    (one / "net1.bit").write_bytes(foreign.partial.bit.read_bytes())
    with pytest.raises(LoadError, match="built for part xczu7ev"):
        driver.load(edit(one, sha256=foreign.partial.sha256))
    assert counted(driver) == (0, 0)


def test_a_compressed_part_and_what_inspect_says(
    driver: FabricDriver, pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    import gzip

    bit = pair[0].directory / "net1.bit"
    bit.with_name("net1.bit.gz").write_bytes(gzip.compress(bit.read_bytes()))
    bit.unlink()
    one = probe(pair[0].directory)
    assert one.identity == pair[0].identity
    for package, seed in ((one, 1), (pair[1], 2), (one, 1)):
        driver.load(package)
        serves(driver, package, seed)
    assert counted(driver)[0] == 1
    assert main(["fpga", "inspect", str(one.directory)]) == 0
    assert "bytes into shell.bit, decoupled by dfx_decoupler_0" in capsys.readouterr().out
    (check,) = (c for c in examine(one, look(one), Device()) if c.name == "partial bitstream")
    assert check.ok is True
