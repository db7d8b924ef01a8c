"""Registers on the board's bus: plain banks, the clock controls, and the bus that finds them."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import Protocol

WORD = 4


class RegisterModel(Protocol):
    """Something that answers 32-bit reads and writes at byte offsets from its base."""

    def read(self, offset: int) -> int: ...

    def write(self, offset: int, value: int) -> None: ...


class RegisterBank:
    """Registers that just hold what was written."""

    def __init__(self, presets: Mapping[int, int] | None = None) -> None:
        self._values = dict(presets or {})

    def read(self, offset: int) -> int:
        return self._values.get(offset, 0)

    def write(self, offset: int, value: int) -> None:
        self._values[offset] = value

    def content(self) -> bytes:
        """Everything written, little-endian, from offset 0 on."""
        end = max(self._values, default=-WORD) + WORD
        words = (self._values.get(offset, 0) for offset in range(0, end, WORD))
        return b"".join(word.to_bytes(WORD, "little") for word in words)


class BusError(OSError):
    """An access to an address nothing answers at; on the board the kernel kills the process."""


class Bus:
    """Address ranges and the models behind them. Ranges must not overlap."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._ranges: list[tuple[int, int, RegisterModel]] = []

    def attach(self, base: int, size: int, model: RegisterModel) -> None:
        index = bisect.bisect(self._bases, base)
        self._bases.insert(index, base)
        self._ranges.insert(index, (base, size, model))

    def read(self, address: int, length: int) -> bytes:
        """`length` bytes, whole words, little-endian. Raises BusError."""
        model, offset = self._find(address, length)
        return b"".join(
            model.read(offset + step).to_bytes(WORD, "little") for step in range(0, length, WORD)
        )

    def write(self, address: int, data: bytes) -> None:
        """Whole words, little-endian. Raises BusError."""
        model, offset = self._find(address, len(data))
        for step in range(0, len(data), WORD):
            model.write(offset + step, int.from_bytes(data[step : step + WORD], "little"))

    def _find(self, address: int, length: int) -> tuple[RegisterModel, int]:
        index = bisect.bisect(self._bases, address) - 1
        if index >= 0 and address % WORD == 0 and length % WORD == 0:
            base, size, model = self._ranges[index]
            if address + length <= base + size:
                return model, address - base
        raise BusError(f"bus error: nothing answers {length} bytes at 0x{address:08X}")


def zynq7_clocks() -> dict[int, RegisterBank]:
    """Base address -> registers of a Zynq-7000 after boot (UG585, slcr).

    With the 50 MHz reference pynq assumes: ARM PLL 1300, DDR PLL 1050, IO PLL 1000, FCLK0
    100 and FCLK1..3 10 MHz.
    """
    slcr = {0x100: 26 << 12, 0x104: 21 << 12, 0x108: 20 << 12, 0x120: 2 << 8}
    for index in range(4):
        low, high = (5, 2) if index == 0 else (10, 10)
        slcr[0x170 + 0x10 * index] = high << 20 | low << 8
    return {0xF8000000: RegisterBank(slcr)}


def zynqmp_clocks() -> dict[int, RegisterBank]:
    """Base address -> registers of a Zynq UltraScale+ after boot (UG1087, crl_apb and crf_apb).

    From 33.333 MHz: IO PLL 1500, RPLL 1500, APLL 2400, DPLL 1067, VPLL 1500, pl_clk0 100 MHz.
    """

    def pll(multiplier: int) -> int:
        return 1 << 16 | multiplier << 8

    crl = {0x20: pll(90), 0x30: pll(90)}
    for index in range(4):
        low, high = (15, 1) if index == 0 else (15, 10)
        crl[0xC0 + 4 * index] = 1 << 24 | high << 16 | low << 8
    crf = {0x20: pll(72) & ~(1 << 16), 0x2C: pll(64), 0x38: pll(90), 0x60: 2 << 8}
    return {0xFF5E0000: RegisterBank(crl), 0xFD1A0000: RegisterBank(crf)}
