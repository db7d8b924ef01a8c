"""Overlay packages: what is read, what is refused, and that messages name both sides."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gatelet.accelerators.errors import LoadError
from gatelet.accelerators.fpga.bitfile import Bitfile, encode_bitfile, parse_bitfile
from gatelet.accelerators.fpga.board import (
    KNOWN_PARTS,
    Board,
    board_named,
    detect_board,
    same_part,
)
from gatelet.accelerators.fpga.packages.overlay_json import read_overlay_json
from gatelet.accelerators.fpga.preflight import preflight
from gatelet.accelerators.tensors import TensorSpec
from gatelet.simulator.board.bitstream import DenseLayer, write_overlay_package
from hypothesis import given
from hypothesis import strategies as st

ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
Z2 = "xc7z020clg400-1"


def write(directory: Path, part: str = Z2, **options: Any) -> Path:
    layer = DenseLayer(
        np.ones((8, 3), np.int8), np.zeros(3, np.int32), 0.1, 0.01, 0.2, input_zero_point=-3
    )
    write_overlay_package(
        directory,
        name="tiny",
        board="PYNQ-Z2",
        part=part,
        clock_mhz=100.0,
        layers=[layer],
        input=TensorSpec("x", "FP32", (-1, 2, 4)),
        output=TensorSpec("y", "FP32", (-1, 3)),
        **options,
    )
    return directory


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "overlay.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_written_package_reads_back(tmp_path: Path) -> None:
    package = read_overlay_json(write(tmp_path))
    assert (package.name, package.board, package.transport.dma) == ("tiny", "pynq-z2", "axi_dma_0")
    assert package.inputs[0].spec == TensorSpec("x", "FP32", (-1, 2, 4))
    assert package.inputs[0].wire.zero_point == -3
    assert package.inputs[0].wire.scale == float(np.float32(0.1))
    assert package.outputs[0].wire.elements == 3
    assert preflight(package, Z2) == 2**14 - 1


def test_packages_are_reproducible(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    names = sorted(path.name for path in one.iterdir())
    assert names == ["overlay.json", "tiny.bit", "tiny.hwh"]
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"schema": 2}, "schema"),
        ({"kind": "finn"}, "kind"),
        ({"bitstream": "../tiny.bit"}, "bitstream"),
        ({"bitstream": "other.bit"}, "named other.hwh"),
        ({"clockMhz": -1}, "clockMhz"),
        ({"clockMhz": True}, "clockMhz"),
        ({"maxBatch": 0}, "maxBatch"),
        ({"sha256": "abc"}, "sha256"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [{"name": "x", "datatype": "INT8"}]}, "inputs[0].datatype"),
        ({"outputs": [{"name": "y", "datatype": "FP32", "shape": [3]}]}, "outputs[0].shape"),
        ({"part": None}, "part"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    edit(write(tmp_path), **change)
    with pytest.raises(LoadError) as caught:
        read_overlay_json(tmp_path)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("scale", 0), ("scale", float("inf")), ("zeroPoint", 128), ("elements", 7), ("dtype", "int4")],
)
def test_a_wrong_wire_format_is_named(tmp_path: Path, field: str, value: Any) -> None:
    write(tmp_path)
    document = json.loads((tmp_path / "overlay.json").read_text())
    document["inputs"][0]["wire"][field] = value
    edit(tmp_path, inputs=document["inputs"])
    with pytest.raises(LoadError, match=rf"inputs\[0\]\.wire\.{field}"):
        read_overlay_json(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_no_json_is_no_traceback(tmp_path: Path, text: str) -> None:
    (tmp_path / "overlay.json").write_text(text)
    with pytest.raises(LoadError):
        read_overlay_json(tmp_path)


def test_a_changed_bitstream_is_refused(tmp_path: Path) -> None:
    package = read_overlay_json(write(tmp_path))
    content = bytearray(package.bit.read_bytes())
    content[-1] ^= 1
    package.bit.write_bytes(content)
    with pytest.raises(LoadError) as caught:
        preflight(package, Z2)
    assert hashlib.sha256(content).hexdigest() in str(caught.value)
    assert package.sha256 in str(caught.value)


def test_a_bitstream_for_another_part_names_both(tmp_path: Path) -> None:
    package = read_overlay_json(write(tmp_path, part="xc7z010clg400-1"))
    with pytest.raises(LoadError) as caught:
        preflight(package, Z2)
    assert "7z010clg400" in str(caught.value)
    assert Z2 in str(caught.value)
    assert preflight(package, None) > 0


def test_an_item_longer_than_a_transfer_is_refused(tmp_path: Path) -> None:
    layer = DenseLayer(np.ones((300, 3), np.int8), np.zeros(3, np.int32), 0.1, 0.01, 0.2)
    package = write_overlay_package(
        tmp_path, name="wide", board="pynq-z2", part=Z2, clock_mhz=100.0, layers=[layer],
        input=TensorSpec("x", "FP32", (-1, 300)), output=TensorSpec("y", "FP32", (-1, 3)),
        dma_length_width=8,
    )  # fmt: skip
    with pytest.raises(LoadError, match=r"300 bytes .* at most 255"):
        preflight(package, Z2)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('c_include_sg" VALUE="0', 'c_include_sg" VALUE="1', "scatter-gather mode.*Enable Scatter"),
        ('c_include_s2mm" VALUE="1', 'c_include_s2mm" VALUE="0', "no channel from the network"),
        ('c_include_mm2s" VALUE="1', 'c_include_mm2s" VALUE="0', "no channel to the network"),
        ('c_micro_dma" VALUE="0', 'c_micro_dma" VALUE="1', None),
        ('INSTANCE="axi_dma_0" IS_DATA', 'INSTANCE="nobody" IS_DATA', "no core axi_dma_0 with reg"),
    ],
    ids=["scatter-gather", "send only", "receive only", "micro", "no registers"],
)
def test_dmas_of_other_kinds_are_told_apart(
    tmp_path: Path, old: str, new: str, words: str | None
) -> None:
    package = read_overlay_json(write(tmp_path))
    text = package.hwh.read_text()
    assert old in text
    package.hwh.write_text(text.replace(old, new))
    if words is None:
        assert preflight(package, Z2) == 64, "one burst of 16 words"
        return
    with pytest.raises(LoadError, match=words):
        preflight(package, Z2)


def test_a_missing_dma_is_named(tmp_path: Path) -> None:
    edit(write(tmp_path), dma="axi_dma_7")
    with pytest.raises(LoadError, match="no AXI DMA named axi_dma_7; it has axi_dma_0"):
        preflight(read_overlay_json(tmp_path), Z2)


def test_missing_files_are_named(tmp_path: Path) -> None:
    package = read_overlay_json(write(tmp_path))
    package.hwh.unlink()
    with pytest.raises(LoadError, match=r"tiny\.hwh"):
        preflight(package, Z2)


@given(
    ASCII, ASCII, ASCII, ASCII, st.binary(max_size=64).map(lambda raw: raw + bytes(-len(raw) % 4))
)
def test_bit_headers_round_trip(design: str, part: str, date: str, time: str, data: bytes) -> None:
    bitfile = Bitfile(design, part, date, time, data)
    assert parse_bitfile(encode_bitfile(bitfile)) == bitfile


@given(st.data())
def test_damaged_bit_files_are_refused(data: st.DataObject) -> None:
    whole = encode_bitfile(Bitfile("d", "7z020clg400", "2024/01/01", "00:00:00", b"abcd"))
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(LoadError):
        parse_bitfile(whole[:cut])
    with pytest.raises(LoadError):
        parse_bitfile(whole + b"x")


def test_a_clock_the_design_was_not_built_for_names_both(tmp_path: Path) -> None:
    for name, part in (("z2", Z2), ("zcu", KNOWN_PARTS["zcu104"])):
        directory = write(tmp_path / name, part=part)
        edit(directory, clockMhz=200)
        with pytest.raises(LoadError, match=r"200\.0 MHz .* 100\.0 MHz"):
            preflight(read_overlay_json(directory), part)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("7z020clg400", Z2, True),
        ("XC7Z020CLG400-2", Z2, True),
        ("7z010clg400", Z2, False),
        ("7z020clg484", Z2, False),
        ("xczu7ev-ffvc1156-2-e", "xczu7ev-ffvc1156-2-i", True),
        ("xczu7ev-ffvc1156-2-e", "xczu9eg-ffvb1156-2-e", False),
        ("xck26-sfvc784-2LV-c", KNOWN_PARTS["kr260"], True),
        ("", Z2, False),
    ],
)
def test_parts_are_compared_by_die_and_package(one: str, other: str, same: bool) -> None:
    assert same_part(one, other) is same
    assert same_part(other, one) is same


def test_the_board_is_found_where_pynq_puts_it(tmp_path: Path) -> None:
    z2 = Board("pynq-z2", Z2)
    assert detect_board({}, tmp_path) is None
    assert detect_board({"BOARD": "Pynq-Z2"}, tmp_path) == z2
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/environment").write_text('PATH=/bin\nBOARD="Pynq-Z2"\n')
    assert detect_board({}, tmp_path) == z2
    tree = tmp_path / "proc/device-tree/chosen"
    tree.mkdir(parents=True)
    (tree / "pynq_board").write_bytes(b"KV260\0")
    assert detect_board({}, tmp_path) == board_named("kv260")
    assert board_named("home-made") == Board("home-made", None)
