"""Bitstreams in packages: .bit and .bin, plain and compressed, with bounds that hold."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import lzma
from pathlib import Path

import pytest
from gatelet.accelerators.errors import LoadError
from gatelet.accelerators.fpga.bitfile import Bitfile, encode_bitfile
from gatelet.accelerators.fpga.bitstream_file import expanded_limit, scan
from gatelet.accelerators.fpga.board import KNOWN_PARTS
from gatelet.accelerators.fpga.packages import probe
from gatelet.accelerators.fpga.preflight import preflight
from gatelet.agent.main import main
from gatelet.simulator.board.vendor_packages import FinnTensor, write_finn_package
from hypothesis import given
from hypothesis import strategies as st

Z2 = KNOWN_PARTS["pynq-z2"]
IN = FinnTensor("UINT4", (1, 28, 28, 1), (1, 28, 28, 1))
OUT = FinnTensor("INT16", (1, 10), (1, 5, 2))
PACK = {
    ".gz": lambda data: gzip.compress(data, 1),
    ".xz": lambda data: lzma.compress(data, preset=0),
}
FULL = 4_045_564
"""Bytes of a Z7020's configuration (UG585)."""


def bitfile(data: bytes, part: str = "7z020clg400") -> bytes:
    return encode_bitfile(Bitfile("d;Version=2022.1", part, "2024/01/01", "00:00:00", data))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(PACK[path.suffix](content) if path.suffix in PACK else content)
    return path


@given(
    data=st.binary(max_size=600_000).map(lambda data: data + bytes(-len(data) % 4)),
    suffix=st.sampled_from(["", ".gz", ".xz"]),
)
def test_hash_size_and_content_are_those_of_the_expanded_bitstream(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str
) -> None:
    content = bitfile(data)
    path = written(tmp_path_factory.mktemp("bits") / f"x.bit{suffix}", content)
    into = io.BytesIO()
    found = scan(path, into)
    assert into.getvalue() == content
    assert (found.part, found.size) == ("7z020clg400", len(content))
    assert found.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_a_full_configuration_and_one_that_vivado_compressed_are_taken(
    tmp_path: Path, suffix: str
) -> None:
    for size in (FULL, 412_340):
        frames = bytes(size)
        assert scan(written(tmp_path / f"x.bit{suffix}", bitfile(frames))).size > size


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
@pytest.mark.parametrize("form", [".bit", ".bin"])
def test_what_expands_beyond_its_part_is_refused_before_it_is_all_there(
    tmp_path: Path, suffix: str, form: str
) -> None:
    zeros = bytes(24 << 20)
    path = written(tmp_path / f"x{form}{suffix}", bitfile(zeros) if form == ".bit" else zeros)
    into = io.BytesIO()
    with pytest.raises(LoadError, match=r"more than 5073339 bytes, which no bitstream for .*7z020"):
        scan(path, into, Z2)
    assert into.tell() <= expanded_limit(Z2) < 2 * FULL


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_damaged_compressed_data_is_refused_with_its_reason(tmp_path: Path, suffix: str) -> None:
    good = PACK[suffix](bitfile(bytes(range(256)) * 64))
    path = tmp_path / f"x.bit{suffix}"
    for content, words in (
        (good[: len(good) // 2], "cut off"),
        (good + b"more", "goes on after the end"),
        (good + good, "goes on after the end"),
        (b"no compressed data at all", f"not valid {suffix[1:]} data"),
        (b"", "cut off"),
    ):
        path.write_bytes(content)
        with pytest.raises(LoadError, match=words):
            scan(path)


def test_every_flipped_bit_of_compressed_data_is_refused_or_harmless(tmp_path: Path) -> None:
    content = bitfile(bytes(range(256)))
    for suffix, pack in PACK.items():
        good = pack(content)
        path = tmp_path / f"x.bit{suffix}"
        for place in range(len(good)):
            path.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
            with contextlib.suppress(LoadError):
                assert scan(path).sha256 == hashlib.sha256(content).hexdigest()


def test_xz_data_that_asks_for_gigabytes_is_refused(tmp_path: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 512 << 20}]
    path = tmp_path / "x.bit.xz"
    path.write_bytes(lzma.compress(bitfile(bytes(4096)), filters=filters))
    with pytest.raises(LoadError, match="xz"):
        scan(path)


@pytest.mark.parametrize("size", [0, 4097])
def test_a_bin_that_is_no_configuration_data_is_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(LoadError, match="whole words"):
        scan(written(tmp_path / "x.bin", bytes(size)))


def compressed(directory: Path, suffix: str) -> Path:
    """A package of FINN whose bitstream was compressed in place."""
    write_finn_package(directory, b"", [IN], [OUT], part=Z2)
    bit = directory / "bitfile/finn-accel.bit"
    written(bit.with_name(bit.name + suffix), bit.read_bytes())
    bit.unlink()
    return directory


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_package_stays_the_same_when_its_bitstream_is_compressed(
    tmp_path: Path, suffix: str
) -> None:
    plain = write_finn_package(tmp_path / "plain", b"", [IN], [OUT], part=Z2)
    packed = probe(compressed(tmp_path / "packed", suffix))
    assert packed.bit.name == f"finn-accel.bit{suffix}"
    assert (packed.name, packed.part) == ("finn-accel", plain.part)
    assert packed.identity == plain.identity
    preflight(packed, Z2)


def test_a_compressed_file_beside_its_original_says_nothing_new(tmp_path: Path) -> None:
    package = write_finn_package(tmp_path, b"", [IN], [OUT], part=Z2)
    written(package.bit.with_name("finn-accel.bit.xz"), package.bit.read_bytes())
    assert probe(tmp_path).bit == package.bit


def test_a_bin_takes_its_part_from_the_handoff(tmp_path: Path) -> None:
    package = write_finn_package(tmp_path, b"", [IN], [OUT], part=Z2)
    package.bit.unlink()
    written(package.bit.with_name("finn-accel.bin.gz"), bytes(1 << 16))
    found = probe(tmp_path)
    assert (found.bit.name, found.part) == ("finn-accel.bin.gz", Z2.removeprefix("xc"))
    with pytest.raises(LoadError, match="this board carries xczu7ev"):
        preflight(found, KNOWN_PARTS["zcu104"])


def test_inspect_tells_both_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = compressed(tmp_path, ".xz")
    assert main(["fpga", "inspect", str(directory), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["bitstream"]
    assert told["storedBytes"] == (directory / "bitfile/finn-accel.bit.xz").stat().st_size
    assert told["bytes"] == scan(directory / "bitfile/finn-accel.bit.xz").size
    assert main(["fpga", "inspect", str(directory)]) == 0
    assert f"({told['storedBytes']} compressed)" in capsys.readouterr().out
