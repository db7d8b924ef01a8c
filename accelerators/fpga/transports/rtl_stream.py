"""gatelet's own core behind an AXI DMA: its program first, then items as in any stream."""

from __future__ import annotations

import numpy as np

from ...errors import BackendUnavailable, LoadError
from ...rtl.core import CoreDriver
from ...rtl.package import read_program
from ..package import RtlStream
from ..protocol import FabricSick
from . import PROGRAM_PACKET, Workplace
from .axi_dma import AxiDmaEngine
from .registers import Registers

_PACKET_SECONDS = 0.5


class FabricPort:
    """A `CorePort` over pynq: registers through MMIO, packets through the DMA."""

    def __init__(self, place: Workplace, engine: AxiDmaEngine, registers: Registers) -> None:
        self._place = place
        self._engine = engine
        self._registers = registers

    def read(self, address: int) -> int:
        return self._registers.read(address)

    def write(self, address: int, value: int) -> None:
        self._registers.write(address, value)

    def send(self, packet: bytes) -> None:
        self._fill(packet)
        self._engine.start_send(len(packet))
        self._place.until(self._engine.drained, "the core does not take a packet", _PACKET_SECONDS)

    def exchange(self, packet: bytes, expected: int) -> bytes:
        receive = self._place.receives[0].buffer
        if expected > receive.nbytes:
            raise BackendUnavailable(f"{expected} bytes do not fit the buffer of {receive.nbytes}")
        self._fill(packet)
        self._engine.start_receive(expected)
        self._engine.start_send(len(packet))
        self._place.until(self._engine.finished, "the core gives no answer", _PACKET_SECONDS)
        self._place.until(self._engine.drained, "the core does not take a packet", _PACKET_SECONDS)
        receive.invalidate()
        return bytes(np.asarray(receive).view(np.uint8)[:expected])

    def _fill(self, packet: bytes) -> None:
        send = self._place.sends[0].buffer
        if len(packet) > send.nbytes:
            raise BackendUnavailable(
                f"a packet of {len(packet)} bytes does not fit the buffer of {send.nbytes}"
            )
        send[: len(packet)] = np.frombuffer(packet, np.uint8)
        send.flush()


class RtlStreamEngine(AxiDmaEngine):
    """See `Engine`."""

    def __init__(self, place: Workplace, transport: RtlStream) -> None:
        super().__init__(place, transport.dma)
        self._transport = transport
        self._port = FabricPort(place, self, place.registers(transport.core))
        self._core: CoreDriver | None = None

    def prepare(self) -> None:
        super().prepare()
        program = read_program(self._transport.program, self._transport.program_sha256)
        package = self._place.package
        sizes = (package.inputs[0].wire.item_bytes, package.outputs[0].wire.item_bytes)
        if sizes != (program.in_bytes, program.out_bytes):
            raise LoadError(
                f"{self._transport.program}: takes and gives {program.in_bytes} and "
                f"{program.out_bytes} bytes per item, overlay.json says {sizes[0]} and {sizes[1]}"
            )
        limit = min(self._place.hardware.dma_limit(self._transport.dma), PROGRAM_PACKET)
        try:
            self._core = CoreDriver(self._port)
            self._core.load(program, min(limit, self._place.sends[0].buffer.nbytes))
        except BackendUnavailable as error:
            raise FabricSick(f"{self._transport.core}: {error}") from error

    def stop(self) -> bool:
        quiet = super().stop()
        if self._core is not None:
            self._core.reset()
        return quiet

    def diagnosis(self) -> str:
        failure = self._core.failure() if self._core is not None else None
        return f"{self._transport.core}: {failure}" if failure else ""
