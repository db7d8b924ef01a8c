"""The board's contiguous memory, as two memories that only cache maintenance joins.

On a Zynq the CPU sees a buffer through its cache and a DMA sees it in DRAM. Each buffer here has
one copy for either side, filled with different patterns, so that a forgotten flush or invalidate
gives wrong data as it does on the board.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PAGE = 4096
_CPU_PATTERN, _DRAM_PATTERN = 0xA5, 0x5A


class ContiguousMemory:
    """`size` bytes at physical address `base`, handed out in whole pages, first fit."""

    def __init__(self, base: int, size: int) -> None:
        self.base = base
        self.size = size
        self._cpu: npt.NDArray[np.uint8] = np.full(size, _CPU_PATTERN, np.uint8)
        self._dram: npt.NDArray[np.uint8] = np.full(size, _DRAM_PATTERN, np.uint8)
        self._used: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Bytes handed out now."""
        return sum(self._used.values())

    def allocate(self, nbytes: int) -> int:
        """An offset with room for `nbytes`. Raises MemoryError when there is none."""
        length = max(PAGE, -(-nbytes // PAGE) * PAGE)
        start = 0
        for offset in sorted(self._used):
            if offset - start >= length:
                break
            start = offset + self._used[offset]
        if start + length > self.size:
            raise MemoryError(
                f"{nbytes} bytes of contiguous memory asked for, {self.size - self.used} of "
                f"{self.size} are free"
            )
        self._used[start] = length
        self._cpu[start : start + length] = _CPU_PATTERN
        self._dram[start : start + length] = _DRAM_PATTERN
        return start

    def free(self, offset: int) -> None:
        """Take back what `allocate` gave. A second free is an error, as on the board."""
        del self._used[offset]

    def cpu(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """The CPU's view, writable, uint8 [nbytes]."""
        return self._cpu[offset : offset + nbytes]

    def flush(self, offset: int, nbytes: int) -> None:
        """CPU to DRAM."""
        part = slice(offset, offset + nbytes)
        self._dram[part] = self._cpu[part]

    def invalidate(self, offset: int, nbytes: int) -> None:
        """DRAM to CPU."""
        part = slice(offset, offset + nbytes)
        self._cpu[part] = self._dram[part]

    def covers(self, address: int, nbytes: int) -> bool:
        """Whether a bus access of `nbytes` at physical `address` hits this memory."""
        return self.base <= address and address + nbytes <= self.base + self.size

    def bus_read(self, address: int, nbytes: int) -> bytes:
        """What a DMA reads from DRAM at physical `address`."""
        offset = address - self.base
        return self._dram[offset : offset + nbytes].tobytes()

    def bus_write(self, address: int, data: bytes) -> None:
        """What a DMA writes into DRAM at physical `address`."""
        offset = address - self.base
        self._dram[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
