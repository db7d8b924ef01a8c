"""Unmodified pynq on the simulated board: overlays, buffers, DMA, clocks, and its traps."""

from __future__ import annotations

import gc
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gatelet.accelerators.fpga.bitfile import Bitfile, encode_bitfile
from gatelet.accelerators.fpga.machine import mark_of, noted, state_file
from gatelet.accelerators.fpga.package import Package
from gatelet.accelerators.tensors import TensorSpec
from gatelet.simulator.board.bitstream import DenseLayer, write_overlay_package
from gatelet.simulator.board.boards import BOARDS, simulated_board
from gatelet.simulator.board.network import run_network

RNG = np.random.default_rng(11)
LAYERS = (
    DenseLayer(
        RNG.integers(-128, 128, (16, 12), dtype=np.int8),
        RNG.integers(-900, 900, 12, dtype=np.int32),
        0.05, 0.01, 0.06, output_zero_point=-128, relu=True,
    ),
    DenseLayer(
        RNG.integers(-128, 128, (12, 6), dtype=np.int8),
        RNG.integers(-900, 900, 6, dtype=np.int32),
        0.06, 0.01, 0.2, input_zero_point=-128,
    ),
)  # fmt: skip


@pytest.fixture
def board(pynq: Any) -> Iterator[Any]:
    from gatelet.simulator.board.device import activate

    device = activate(simulated_board("pynq-z2"))
    yield device
    gc.collect()
    assert device.memory.used == 0, "a buffer was not given back"


def package(directory: Path, board: str = "pynq-z2", **options: Any) -> Package:
    return write_overlay_package(
        directory,
        name="net",
        board=board,
        part=simulated_board(board).part,
        clock_mhz=options.pop("clock_mhz", 100.0),
        layers=LAYERS,
        input=TensorSpec("x", "FP32", (-1, 16)),
        output=TensorSpec("y", "FP32", (-1, 6)),
        **options,
    )


def exchange(pynq: Any, overlay: Any, items: np.ndarray, outputs: int) -> np.ndarray:
    """The sequence of every pynq DMA tutorial."""
    dma = overlay.axi_dma_0
    with pynq.allocate(items.shape, items.dtype) as send, pynq.allocate((outputs,), "i1") as got:
        send[:] = items
        dma.recvchannel.transfer(got)
        dma.sendchannel.transfer(send)
        dma.sendchannel.wait()
        dma.recvchannel.wait()
        return np.array(got)


def test_an_overlay_computes_what_the_network_does(pynq: Any, board: Any, tmp_path: Path) -> None:
    overlay = pynq.Overlay(str(package(tmp_path).bit))
    assert overlay.is_loaded()
    assert set(overlay.ip_dict) == {"axi_dma_0", "processing_system7_0"}
    assert overlay.axi_dma_0.buffer_max_size == 2**14 - 1
    assert board.design.dmas[0].core == "dense_network_0"
    items = RNG.integers(-128, 128, (20, 16), dtype=np.int8)
    for _ in range(2):
        result = exchange(pynq, overlay, items, 20 * 6).reshape(20, 6)
        np.testing.assert_array_equal(result, run_network(LAYERS, items))
    registers = overlay.axi_dma_0.register_map
    assert registers.MM2S_DMASR.Idle == 1
    assert registers.S2MM_DMASR.DMAIntErr == 0
    assert registers.S2MM_LENGTH[31:0] == 120


@pytest.mark.parametrize("forgotten", ["flush", "invalidate"])
def test_forgotten_cache_maintenance_shows(
    pynq: Any, board: Any, tmp_path: Path, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pynq.buffer import PynqBuffer

    overlay = pynq.Overlay(str(package(tmp_path).bit))
    items = RNG.integers(-128, 128, (4, 16), dtype=np.int8)
    expected = run_network(LAYERS, items).reshape(-1)
    monkeypatch.setattr(PynqBuffer, forgotten, lambda self: None)
    assert not np.array_equal(exchange(pynq, overlay, items, 24), expected)
    monkeypatch.undo()
    np.testing.assert_array_equal(exchange(pynq, overlay, items, 24), expected)


@pytest.mark.parametrize("name", ["pynq-z2", "zcu104", "kv260"])
def test_clocks_are_set_from_the_design(pynq: Any, name: str, tmp_path: Path) -> None:
    from gatelet.simulator.board.device import activate

    activate(simulated_board(name))
    # At boot the PLLs run at what the board's firmware sets.
    assert pynq.Clocks.fclk0_mhz == pytest.approx(100, rel=1e-3)
    pynq.Overlay(str(package(tmp_path, name, clock_mhz=50.0).bit))
    assert pynq.Clocks.fclk0_mhz == pytest.approx(50, rel=1e-2)


def test_a_bitstream_for_another_part_fails_as_on_hardware(
    pynq: Any, board: Any, tmp_path: Path
) -> None:
    foreign = package(tmp_path, "zcu104")
    with pytest.raises(OSError, match=r"xczu7ev-ffvc1156-2-e.*xc7z020clg400-1"):
        pynq.Overlay(str(foreign.bit))


def test_pynq_reads_the_header_we_write(pynq: Any, tmp_path: Path) -> None:
    from pynq.pl_server.embedded_device import bit2bin, parse_bit_header

    content = package(tmp_path).bit.read_bytes()
    header = parse_bit_header(content)
    assert (header["design"], header["part"]) == ("net", "7z020clg400")
    assert bit2bin(content)[:4] == header["data"][3::-1]


def test_damaged_configuration_data_fails(pynq: Any, board: Any, tmp_path: Path) -> None:
    written = package(tmp_path)
    content = bytearray(written.bit.read_bytes())
    content[-8] ^= 1
    written.bit.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        pynq.Overlay(str(written.bit))


def test_contiguous_memory_runs_out_and_comes_back(pynq: Any, board: Any) -> None:
    held = [pynq.allocate((4 << 20,), "u1") for _ in range(4)]
    with pytest.raises(RuntimeError, match=r"0 of .* are free"):
        pynq.allocate((1,), "u1")
    buffer = held.pop()
    buffer.freebuffer()
    buffer.freebuffer()
    assert board.memory.used == 12 << 20
    view = pynq.allocate((4, 4), "u2")[1]
    assert view.physical_address % 4096 == 8


def test_a_design_of_someone_else_runs_with_a_loopback(
    pynq: Any, board: Any, tmp_path: Path
) -> None:
    import pynqmetadata

    handoff = Path(pynqmetadata.__file__).parent / "tests/hwhs/resizer.hwh"
    shutil.copy(handoff, tmp_path / "resizer.hwh")
    bitstream = Bitfile("resizer", "7z020clg400", "2020/02/12", "16:19:27", bytes(64))
    (tmp_path / "resizer.bit").write_bytes(encode_bitfile(bitstream))
    overlay = pynq.Overlay(str(tmp_path / "resizer.bit"))
    assert board.design.dmas[0].core == "resize_accel_0"
    items = RNG.integers(-128, 128, 4096, dtype=np.int8)
    np.testing.assert_array_equal(exchange(pynq, overlay, items, 4096), items)
    overlay.resize_accel_0.register_map.src_rows = 480
    assert overlay.resize_accel_0.read(0x10) == 480


def test_a_second_overlay_unloads_the_first(pynq: Any, board: Any, tmp_path: Path) -> None:
    first = pynq.Overlay(str(package(tmp_path / "one").bit))
    second = pynq.Overlay(str(package(tmp_path / "two").bit))
    assert second.axi_dma_0 is not None
    with pytest.raises(RuntimeError, match="not currently loaded"):
        _ = first.axi_dma_0
    assert board.downloads == 2


def test_every_board_has_a_part() -> None:
    assert {"pynq-z1", "pynq-z2", "zcu104", "kv260", "kr260", "ultra96"} <= set(BOARDS)


def test_pynqs_note_of_what_is_in_the_fabric_is_found(
    pynq: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By it we notice that somebody else configured the fabric; its name changed with releases."""
    from pynq.pl_server import global_state

    (tmp_path / "base.bit").write_bytes(b"x")
    monkeypatch.setattr(global_state, "STATE_DIR", str(tmp_path))
    place = state_file(object())
    assert place is not None
    assert (mark_of(place), noted(place)) == (None, None)
    told = global_state.GlobalState(
        bitfile_name=str(tmp_path / "base.bit"), active_name="Pynq-Z2", timestamp="now", psddr={}
    )
    with warnings.catch_warnings():
        # pynq writes it with a method that pydantic calls old.
        warnings.simplefilter("ignore")
        global_state.save_global_state(told)
    assert mark_of(place) is not None
    assert noted(place) == str(tmp_path / "base.bit")
    for text in ("", "[1]", '{"bitfile_name": 3}', "\xff"):
        place.write_text(text, "latin-1")
        assert noted(place) is None
