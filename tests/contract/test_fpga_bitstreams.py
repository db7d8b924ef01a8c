"""From a package's files to the configured fabric: compressed, without a header, of one name."""

from __future__ import annotations

import gzip
import lzma
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finn_networks import Network, mlp
from gatelet.accelerators.errors import BackendUnavailable, LoadError
from gatelet.accelerators.fpga import driver as driver_module
from gatelet.accelerators.fpga.bitfile import parse_bitfile
from gatelet.accelerators.fpga.codec import decode, encode
from gatelet.accelerators.fpga.driver import FabricDriver
from gatelet.accelerators.fpga.package import Package
from gatelet.accelerators.fpga.packages import probe
from gatelet.simulator.board.boards import simulated_board
from gatelet.simulator.board.vendor_packages import write_finn_package

Z2 = simulated_board("pynq-z2").part


@pytest.fixture
def firmware(tmp_path: Path) -> Path:
    folder = tmp_path / "firmware"
    folder.mkdir()
    return folder


@pytest.fixture
def driver(pynq: Any, firmware: Path, tmp_path: Path) -> Iterator[FabricDriver]:
    from gatelet.simulator.board.device import activate

    device = activate(simulated_board("pynq-z2"), firmware=firmware)
    driver = FabricDriver(tmp_path / "run/lock", Z2)
    driver.open()
    yield driver
    driver.close()
    assert device.memory.used == 0, "a buffer was not given back"
    assert not list((tmp_path / "run").glob("lock.*")), "a bitstream was left expanded"


def finn(directory: Path, network: Network) -> Package:
    return write_finn_package(directory, network.model, network.inputs, network.outputs, part=Z2)


def serves(driver: FabricDriver, package: Package, network: Network) -> None:
    (x,) = network.draw(5, 1)
    (items,) = driver.infer(package, [encode(x, package.inputs[0])], time.monotonic() + 10)
    np.testing.assert_array_equal(decode(items, package.outputs[0]), network.reference([x])[0])


def repacked(package: Package, suffix: str) -> Package:
    """The package with its bitstream as .bin, compressed, or both, and nothing else of it."""
    content = package.bit.read_bytes()
    if suffix.startswith(".bin"):
        # What the kernel takes: no header, the bytes of each word in the other order.
        content = np.frombuffer(parse_bitfile(content).data, "<u4").byteswap().tobytes()
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(Path(suffix).suffix, bytes)
    package.bit.with_name(f"{package.bit.stem}{suffix}").write_bytes(pack(content))
    package.bit.unlink()
    return probe(package.directory)


@pytest.mark.parametrize("suffix", [".bit.gz", ".bit.xz", ".bin", ".bin.gz", ".bin.xz"])
def test_bitstreams_of_every_form_serve_and_leave_nothing_behind(
    driver: FabricDriver, firmware: Path, tmp_path: Path, suffix: str
) -> None:
    network = mlp()
    package = repacked(finn(tmp_path / "p", network), suffix)
    for _ in range(2):
        driver.load(package)
        serves(driver, package, network)
        driver.unload(package)
        assert not list((tmp_path / "run").glob("lock.bitstreams/*"))
        assert not list(firmware.iterdir())


def test_two_packages_of_one_file_name_take_turns(
    driver: FabricDriver, firmware: Path, tmp_path: Path
) -> None:
    """pynq keeps what it configured under the name of the file, which all of FINN's share."""
    networks = (mlp(4), mlp(2))
    packages = [finn(tmp_path / str(n), network) for n, network in enumerate(networks)]
    assert packages[0].bit.name == packages[1].bit.name
    for package in packages:
        driver.load(package)
    for _ in range(2):
        for package, network in zip(packages, networks, strict=True):
            serves(driver, package, network)
    assert len(list(firmware.iterdir())) == 2
    driver.unload(packages[0])
    assert len(list(firmware.iterdir())) == 1
    serves(driver, packages[1], networks[1])


def test_one_bitstream_of_two_packages_stays_until_both_are_gone(
    driver: FabricDriver, tmp_path: Path
) -> None:
    network = mlp()
    one = repacked(finn(tmp_path / "p", network), ".bit.xz")
    # The same overlay with other limits is another package.
    other = replace(one, max_batch=3)
    driver.load(one)
    driver.load(other)
    driver.unload(one)
    serves(driver, other, network)
    assert len(list((tmp_path / "run/lock.bitstreams").iterdir())) == 1


def test_content_that_changed_since_it_was_checked_is_not_configured(
    driver: FabricDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = repacked(finn(tmp_path / "p", mlp()), ".bit.gz")
    other = repacked(finn(tmp_path / "q", mlp(2)), ".bit.gz")
    checked = driver_module.preflight

    def then_changed(*given: Any) -> int:
        limit = checked(*given)
        package.bit.write_bytes(other.bit.read_bytes())
        return limit

    monkeypatch.setattr(driver_module, "preflight", then_changed)
    with pytest.raises(LoadError, match="when it was looked at"):
        driver.load(package)
    assert driver.counters.reconfigurations == 0
    assert not list((tmp_path / "run").glob("lock.bitstreams/*"))


def test_what_an_earlier_process_left_is_removed(pynq: Any, firmware: Path, tmp_path: Path) -> None:
    left = tmp_path / "run/lock.bitstreams/gatelet-0/gatelet-0.bit"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x")
    from gatelet.simulator.board.device import activate

    activate(simulated_board("pynq-z2"))
    driver = FabricDriver(tmp_path / "run/lock", Z2)
    driver.open()
    try:
        assert not left.exists()
        # Whoever does not get the fabric leaves alone what belongs to it.
        left.parent.mkdir(parents=True)
        left.write_bytes(b"x")
        second = FabricDriver(tmp_path / "run/lock", Z2)
        with pytest.raises(BackendUnavailable):
            second.open()
        second.close()
        assert left.exists()
    finally:
        driver.close()
    assert not left.exists()
