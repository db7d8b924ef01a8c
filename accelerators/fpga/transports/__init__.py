"""Moving items through a configured fabric: one engine per register map, all waits with an end.

Written from PG021 and the register maps of FINN, hls4ml and BNN-PYNQ; not tried on a board.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...errors import LoadError
from ..handoff import Hardware
from ..package import DmaStream, Package, RtlStream, StartedCores, VartRunner
from ..protocol import FabricSick
from .registers import Registers

REGISTER_SECONDS = 0.1
"""How long a core may take to follow a write to its control register."""
PROGRAM_PACKET = 1 << 13
"""Bytes of one packet of a program for gatelet's core, which go through its first buffer."""


class Engine(Protocol):
    """Moves up to a chunk of items between buffers and the fabric. One transfer at a time."""

    warm_up: bool
    """Whether one transfer has to be made and thrown away before results count."""

    def prepare(self) -> None:
        """Bring the cores from configuration to rest. Raises FabricSick, LoadError."""

    def begin(self, count: int) -> None:
        """Start moving `count` items; the input buffers are flushed. Raises FabricSick."""

    def finished(self) -> bool:
        """Whether all results are there. Raises FabricSick with the name of the error."""

    def check(self, count: int) -> None:
        """Raise FabricSick when another number of bytes came than `count` items have."""

    def drained(self) -> bool:
        """Whether the inputs were read to their end too, once all results are there.

        Raises FabricSick.
        """

    def stop(self) -> bool:
        """Stop a transfer; True when the cores certainly touch no memory any more."""

    def diagnosis(self) -> str:
        """What the cores say about themselves after something went wrong; may be empty."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A buffer of the fabric: its address, bytes per item, and its memory as plain uint8.

    `cached` is the device that has to be told when the memory changes, None where it is coherent.
    """

    address: int
    item_bytes: int
    buffer: Any
    view: npt.NDArray[np.uint8]
    virtual: int
    cached: Any
    bo: Any
    offset: int

    @classmethod
    def over(cls, buffer: Any, item_bytes: int) -> Slot:
        return cls(
            int(buffer.device_address), item_bytes, buffer, buffer.view(np.ndarray),
            int(buffer.virtual_address), None if buffer.coherent else buffer.device, buffer.bo,
            buffer.offset,
        )  # fmt: skip

    def flush(self, nbytes: int) -> None:
        """CPU to memory, of the part that is used: on a Zynq the time goes with the size."""
        if self.cached is not None:
            self.cached.flush(self.bo, self.offset, self.virtual, nbytes)

    def invalidate(self, nbytes: int) -> None:
        """Memory to CPU, of the part that is used."""
        if self.cached is not None:
            self.cached.invalidate(self.bo, self.offset, self.virtual, nbytes)


@dataclass(frozen=True, slots=True)
class Workplace:
    """What an engine works with. `allocate` gives further buffers that live as long as it."""

    device: Any
    hardware: Hardware
    package: Package
    sends: tuple[Slot, ...]
    receives: tuple[Slot, ...]
    allocate: Callable[[int], Any]
    monotonic: Callable[[], float]

    def registers(self, name: str) -> Registers:
        cell = self.hardware.addressed(name)
        assert cell.base is not None
        return Registers(self.device, cell.base, max(cell.size, 0x80))

    def until(self, condition: Callable[[], bool], otherwise: str, seconds: float) -> None:
        """Poll until `condition`. Raises FabricSick with `otherwise` after `seconds`."""
        end = self.monotonic() + seconds
        while not condition():
            if self.monotonic() >= end:
                raise FabricSick(otherwise)


def require_runtime(package: Package) -> None:
    """Raise LoadError when this environment lacks what drives `package`."""
    if isinstance(package.transport, VartRunner):
        missing = [name for name in ("vart", "xir") if importlib.util.find_spec(name) is None]
        if missing:
            raise LoadError(
                f"{package.transport.xmodel}: a DPU is driven by Vitis AI's runtime, and "
                f"{' and '.join(missing)} cannot be imported in the fabric process; install it "
                "into the board's Python environment"
            )


def open_engine(place: Workplace) -> Engine:
    """The engine for a package's transport. Raises LoadError."""
    from .axi_dma import AxiDmaEngine
    from .started import StartedEngine

    transport = place.package.transport
    if isinstance(transport, DmaStream):
        if transport.starter is not None:
            from .started_stream import StartedStreamEngine

            return StartedStreamEngine(place, transport.dma, transport.starter)
        return AxiDmaEngine(place, transport.dma)
    if isinstance(transport, StartedCores):
        return StartedEngine(place, transport)
    if isinstance(transport, RtlStream):
        from .rtl_stream import RtlStreamEngine

        return RtlStreamEngine(place, transport)
    from .vart_runner import VartEngine

    return VartEngine(place, transport)
