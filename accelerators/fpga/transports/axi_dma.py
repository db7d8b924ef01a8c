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
        self.start_receive(count * self._receive.item_bytes)
        self.start_send(count * self._send.item_bytes)

    def start_receive(self, nbytes: int) -> None:
        self._registers.write_address(_RECEIVE + _ADDRESS, self._receive.address)
        self._registers.write(_RECEIVE + _LENGTH, nbytes)

    def start_send(self, nbytes: int) -> None:
        self._registers.write_address(_SEND + _ADDRESS, self._send.address)
        self._registers.write(_SEND + _LENGTH, nbytes)

    def finished(self) -> bool:
        received = self.idle(_RECEIVE)
        # Asked even while nothing has come: an error there means that nothing ever will.
        return self.idle(_SEND) and received

    def sent(self) -> bool:
        """Whether the sending side alone is done. Raises FabricSick."""
        return self.idle(_SEND)

    def idle(self, side: int) -> bool:
        status = self._registers.read(side + _STATUS)
        if status & _ERROR_BITS:
            raise FabricSick(
                f"{self._dma} ({'receive' if side else 'send'}): {decode_errors(status)}"
            )
        return bool(status & _IDLE)

    def check(self, count: int) -> None:
        expected = count * self._receive.item_bytes
        moved = self._registers.read(_RECEIVE + _LENGTH)
        if moved != expected:
            raise FabricSick(
                f"{self._place.package.name}: the core gave {moved} bytes, {expected} were "
                "expected; the package does not describe this bitstream"
            )

    def stop(self) -> bool:
        return self._reset()

    def diagnosis(self) -> str:
        return ""

    def _reset(self) -> bool:
        registers = self._registers
        registers.write(_SEND + _CONTROL, _RESET)
        try:
            self._place.until(
                lambda: not registers.read(_SEND + _CONTROL) & _RESET, "", REGISTER_SECONDS
            )
        except FabricSick:
            return False
        return True
