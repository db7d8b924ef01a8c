"""A network between the channels of an AXI DMA that is started for each transfer: VitisUnified.

Sources: hls4ml, templates/vitis_unified/drivers/axi_stream_driver; UG1399, "S_AXILITE Control
Register Map".
"""

from __future__ import annotations

from ..package import StartedCore
from . import REGISTER_SECONDS, Workplace
from .axi_dma import AxiDmaEngine

_CONTROL, _START, _IDLE, _CONTINUE = 0x00, 0x1, 0x4, 0x10


class StartedStreamEngine(AxiDmaEngine):
    """The core gets the number of items and is started, then both channels are. See `Engine`."""

    def __init__(self, place: Workplace, dma: str, starter: StartedCore) -> None:
        super().__init__(place, dma)
        self._core = place.registers(starter.core)
        self._starter = starter

    def begin(self, count: int) -> None:
        core, starter = self._core, self._starter
        if starter.chained:
            core.write(_CONTROL, _CONTINUE)
        # The last beat of a packet leaves the core a moment before it is idle.
        self._place.until(
            lambda: bool(core.read(_CONTROL) & _IDLE),
            f"{self._place.package.name}: {starter.core} is busy before it was started",
            REGISTER_SECONDS,
        )
        if starter.count is not None:
            core.write(starter.count, count)
        core.write(_CONTROL, _START)
        super().begin(count)

    def diagnosis(self) -> str:
        idle = self._core.read(_CONTROL) & _IDLE
        return f"{self._starter.core} {'idle' if idle else 'busy'}"
