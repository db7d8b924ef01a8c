"""Register models of the simulated board: DMA, memory, bus, and faults from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gatelet.simulator.board import install
from gatelet.simulator.board.boards import simulated_board
from gatelet.simulator.board.cores import LoopbackCore
from gatelet.simulator.board.dma import AxiDma
from gatelet.simulator.board.faults import Fault, FaultFile, parse_fault, write_fault
from gatelet.simulator.board.memory import PAGE, ContiguousMemory
from gatelet.simulator.board.registers import Bus, BusError, RegisterBank
from hypothesis import given
from hypothesis import strategies as st

BASE = 0x1000_0000
HALTED, IDLE, IOC = 0x1, 0x2, 0x1000


class Bench:
    """A DMA between two buffers, with a clock that only the test moves."""

    def __init__(self, faults: FaultFile | None = None, width: int = 14) -> None:
        self.now = 0.0
        self.memory = ContiguousMemory(BASE, 16 * PAGE)
        self.source = self.memory.allocate(PAGE)
        self.target = self.memory.allocate(PAGE)
        self.dma = AxiDma(
            self.memory, LoopbackCore(), width, faults or FaultFile(), lambda: self.now
        )

    def run(self) -> None:
        self.dma.write(0x00, 1)
        self.dma.write(0x30, 1)

    def receive(self, length: int, address: int | None = None) -> None:
        self.dma.write(0x48, BASE + self.target if address is None else address)
        self.dma.write(0x58, length)

    def send(self, data: bytes, address: int | None = None) -> None:
        self.memory.cpu(self.source, len(data))[:] = np.frombuffer(data, np.uint8)
        self.memory.flush(self.source, len(data))
        self.dma.write(0x18, BASE + self.source if address is None else address)
        self.dma.write(0x28, len(data))

    def received(self, length: int) -> bytes:
        self.memory.invalidate(self.target, length)
        return self.memory.cpu(self.target, length).tobytes()


def test_a_transfer_moves_bytes_and_reports_its_length() -> None:
    bench = Bench()
    assert bench.dma.read(0x04) & HALTED
    bench.run()
    assert not bench.dma.read(0x04) & (HALTED | IDLE)
    bench.receive(100)
    bench.send(b"0123456789abcdef")
    for status in (0x04, 0x34):
        assert bench.dma.read(status) & (IDLE | IOC) == IDLE | IOC
    assert bench.dma.read(0x58) == 16
    assert bench.received(16) == b"0123456789abcdef"
    bench.dma.write(0x34, IOC)
    assert not bench.dma.read(0x34) & IOC


def test_the_order_of_the_channels_does_not_matter() -> None:
    bench = Bench()
    bench.run()
    bench.send(b"abcd")
    assert bench.dma.read(0x04) & IDLE
    bench.receive(4)
    assert bench.received(4) == b"abcd"


def test_nothing_moves_while_halted() -> None:
    bench = Bench()
    bench.send(b"abcd")
    bench.receive(4)
    assert bench.dma.read(0x34) & HALTED
    assert bench.received(4) != b"abcd"


@pytest.mark.parametrize(
    ("act", "register", "bit"),
    [
        (lambda b: b.send(b""), 0x04, 0x10),
        (lambda b: b.receive(1 << 14), 0x34, 0x10),
        (lambda b: b.send(b"abcd", BASE - 4), 0x04, 0x40),
        (lambda b: b.receive(8, BASE + 16 * PAGE - 4), 0x34, 0x40),
        (lambda b: (b.receive(2), b.send(b"abcd")), 0x34, 0x10),
    ],
)
def test_errors_set_their_bit_and_halt_until_reset(act, register: int, bit: int) -> None:
    bench = Bench()
    bench.run()
    act(bench)
    assert bench.dma.read(register) & 0x71 == bit | HALTED
    bench.run()
    assert bench.dma.read(register) & HALTED, "an error needs a reset"
    bench.dma.write(0x00, 4)
    assert bench.dma.read(0x00) & 4 == 0
    bench.run()
    bench.receive(4)
    bench.send(b"wxyz")
    assert bench.received(4) == b"wxyz"


def test_faults_come_from_the_file_at_each_transfer(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    bench = Bench(FaultFile(path))
    bench.run()

    def exchange() -> int:
        bench.receive(4)
        bench.send(b"abcd")
        return bench.dma.read(0x34) & IDLE

    assert exchange()
    write_fault(path, Fault("wrong-data", times=1))
    assert exchange()
    assert bench.received(4) == b"`cbe"
    assert exchange()
    assert bench.received(4) == b"abcd"
    write_fault(path, Fault("error", error="slave"))
    bench.send(b"abcd")
    assert bench.dma.read(0x04) & 0x20


@pytest.mark.parametrize(("kind", "sent"), [("hang", IDLE), ("stuck", 0)])
def test_a_wedged_core_survives_the_reset_of_its_dma(tmp_path: Path, kind: str, sent: int) -> None:
    path = tmp_path / "faults.json"
    write_fault(path, Fault(kind, times=1))
    bench = Bench(FaultFile(path))
    for _ in range(2):
        bench.run()
        bench.receive(4)
        bench.send(b"abcd")
        assert bench.dma.read(0x04) & IDLE == sent
        assert not bench.dma.read(0x34) & IDLE
        bench.dma.write(0x00, 4)


def test_a_slow_transfer_ends_when_its_time_has_come(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    write_fault(path, Fault("slow", seconds=2.0))
    bench = Bench(FaultFile(path))
    bench.run()
    bench.receive(4)
    bench.send(b"abcd")
    bench.now = 1.9
    assert not bench.dma.read(0x34) & IDLE
    bench.now = 2.0
    assert bench.dma.read(0x34) & IDLE
    assert bench.received(4) == b"abcd"


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"fault": "fire"}', '{"fault": "error", "error": "x"}']
)
def test_a_bad_fault_file_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError):
        parse_fault(text)
    path = tmp_path / "faults.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"faults\.json"):
        FaultFile(path).next()


@given(st.lists(st.integers(1, 3 * PAGE), max_size=30), st.randoms())
def test_memory_never_overlaps_and_comes_back_whole(sizes: list[int], random) -> None:
    memory = ContiguousMemory(BASE, 32 * PAGE)
    held: list[tuple[int, int]] = []
    for size in sizes:
        try:
            offset = memory.allocate(size)
        except MemoryError:
            if held:
                memory.free(held.pop(random.randrange(len(held)))[0])
            continue
        assert all(offset + size <= other or other + n <= offset for other, n in held)
        held.append((offset, size))
    for offset, _ in held:
        memory.free(offset)
    assert memory.used == 0
    assert memory.allocate(32 * PAGE) == 0


def test_cpu_and_dram_are_two_memories() -> None:
    memory = ContiguousMemory(BASE, PAGE)
    offset = memory.allocate(4)
    memory.cpu(offset, 4)[:] = 7
    assert memory.bus_read(BASE + offset, 4) != bytes([7] * 4)
    memory.flush(offset, 4)
    assert memory.bus_read(BASE + offset, 4) == bytes([7] * 4)
    memory.bus_write(BASE + offset, b"\x09" * 4)
    assert memory.cpu(offset, 1)[0] == 7
    memory.invalidate(offset, 4)
    assert memory.cpu(offset, 1)[0] == 9


def test_the_bus_finds_models_and_refuses_holes() -> None:
    bus = Bus()
    high, low = RegisterBank({4: 0x01020304}), RegisterBank()
    bus.attach(0x2000, 0x100, high)
    bus.attach(0x1000, 0x100, low)
    assert bus.read(0x2004, 4) == b"\x04\x03\x02\x01"
    bus.write(0x1000, b"\x01\0\0\0\x02\0\0\0")
    assert (low.read(0), low.read(4)) == (1, 2)
    for address in (0x0FFC, 0x1100, 0x2100, 0x1002):
        with pytest.raises(BusError):
            bus.read(address, 4)


def test_unknown_boards_are_named() -> None:
    with pytest.raises(ValueError, match="pynq-z2"):
        simulated_board("zx81")
    with pytest.raises(ValueError, match="zx81"):
        install("zx81")
