"""AXI DMA 7.1 in simple mode. Source: PG021, "Register Space" and "Direct Register Mode"."""

from __future__ import annotations

from ..protocol import FabricSick
from . import REGISTER_SECONDS, Workplace

_SEND, _RECEIVE = 0x00, 0x30
_CONTROL, _STATUS, _ADDRESS, _LENGTH = 0x00, 0x04, 0x18, 0x28
_RUN, _RESET = 0x1, 0x4
_HALTED, _IDLE = 0x1, 0x2
_ERRORS = {
    0x10: "DMAIntErr: internal error (length zero, or a packet longer than the buffer)",
    0x20: "DMASlvErr: slave error (memory answered with an error)",
    0x40: "DMADecErr: decode error (address outside memory)",
}
_ERROR_BITS = 0x70


def decode_errors(status: int) -> str | None:
    """The names of the error bits in a DMASR value, None when there are none."""
    return ", ".join(name for bit, name in _ERRORS.items() if status & bit) or None


class AxiDmaEngine:
    """Items as one packet each way. See `Engine`."""

    warm_up = False

    def __init__(self, place: Workplace, dma: str) -> None:
        self._place = place
        self._dma = dma
        self._registers = place.registers(dma)
        self._send = place.sends[0]
        self._receive = place.receives[0]
        # Whether the addresses stay as they were written: found out after the first transfer.
        self._aimed: bool | None = None

    def prepare(self) -> None:
        if not self._reset():
            raise FabricSick(f"{self._dma}: the DMA does not end its reset")
        registers = self._registers
        for base in (_SEND, _RECEIVE):
            registers.write(base + _CONTROL, _RUN)
        self._place.until(
            lambda: not any(registers.read(b + _STATUS) & _HALTED for b in (_SEND, _RECEIVE)),
            f"{self._dma}: the DMA does not start",
            REGISTER_SECONDS,
        )

    def begin(self, count: int) -> None:
        # Receive first: the core may answer before the sending side is started.
        if self._aimed:
            write = self._registers.write
            write(_RECEIVE + _LENGTH, count * self._receive.item_bytes)
            write(_SEND + _LENGTH, count * self._send.item_bytes)
        else:
            self.start_receive(count * self._receive.item_bytes)
            self.start_send(count * self._send.item_bytes)

    def start_receive(self, nbytes: int) -> None:
        self._registers.write_address(_RECEIVE + _ADDRESS, self._receive.address)
        self._registers.write(_RECEIVE + _LENGTH, nbytes)

    def start_send(self, nbytes: int) -> None:
        self._registers.write_address(_SEND + _ADDRESS, self._send.address)
        self._registers.write(_SEND + _LENGTH, nbytes)

    def finished(self) -> bool:
        status = self._registers.read(_RECEIVE + _STATUS)
        if status & (_IDLE | _ERROR_BITS) == _IDLE:
            return True
        self._refuse(_RECEIVE, status)
        # Asked while nothing has come: an error there means that nothing ever will.
        self.idle(_SEND)
        return False

    def idle(self, side: int) -> bool:
        status = self._registers.read(side + _STATUS)
        self._refuse(side, status)
        return bool(status & _IDLE)

    def _refuse(self, side: int, status: int) -> None:
        if status & _ERROR_BITS:
            raise FabricSick(
                f"{self._dma} ({'receive' if side else 'send'}): {decode_errors(status)}"
            )

    def check(self, count: int) -> None:
        expected = count * self._receive.item_bytes
        moved = self._registers.read(_RECEIVE + _LENGTH)
        if moved != expected:
            raise FabricSick(
                f"{self._place.package.name}: the core gave {moved} bytes, {expected} were "
                "expected; the package does not describe this bitstream"
            )
        if self._aimed is None:
            self._aimed = self._keeps_addresses()

    def drained(self) -> bool:
        return self.idle(_SEND)

    def stop(self) -> bool:
        return self._reset()

    def _keeps_addresses(self) -> bool:
        return all(
            self._registers.read_address(base + _ADDRESS, slot.address) == slot.address
            for base, slot in ((_RECEIVE, self._receive), (_SEND, self._send))
        )

    def diagnosis(self) -> str:
        return ""

    def _reset(self) -> bool:
        registers = self._registers
        self._aimed = None
        registers.write(_SEND + _CONTROL, _RESET)
        try:
            self._place.until(
                lambda: not registers.read(_SEND + _CONTROL) & _RESET, "", REGISTER_SECONDS
            )
        except FabricSick:
            return False
        return True
