"""32-bit registers of one core, through pynq's MMIO."""

from __future__ import annotations

from typing import Any

import numpy as np


class Registers:
    """`size` bytes of registers at physical `base`.

    Where the device maps memory this goes to MMIO's array directly, which saves its checks; a
    device that only reads and writes registers is asked without MMIO's emulated array.
    """

    __slots__ = ("_array", "_base", "_mmio", "_read", "_write")

    def __init__(self, device: Any, base: int, size: int) -> None:
        from pynq import MMIO

        self._base = base
        self._read, self._write = device.read_registers, device.write_registers
        self._mmio = MMIO(base, size, device=device)
        self._array = self._mmio.array if device.has_capability("MEMORY_MAPPED") else None

    def read(self, offset: int) -> int:
        if self._array is not None:
            return int(self._array[offset >> 2])
        return int.from_bytes(self._read(self._base + offset, 4), "little")

    def write(self, offset: int, value: int) -> None:
        if self._array is not None:
            self._array[offset >> 2] = np.uint32(value)
        else:
            self._write(self._base + offset, value.to_bytes(4, "little"))

    def write_address(self, offset: int, address: int) -> None:
        """A physical address into a register and, where it has more than 32 bits, the next."""
        self.write(offset, address & 0xFFFF_FFFF)
        if address >> 32:
            self.write(offset + 4, address >> 32)

    def read_address(self, offset: int, wanted: int) -> int:
        """What `write_address` of `wanted` wrote there."""
        low = self.read(offset)
        return self.read(offset + 4) << 32 | low if wanted >> 32 else low
