"""A package in the fabric: its buffers in contiguous memory, and the engine that moves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import LoadError
from .handoff import Hardware
from .package import DmaStream, Package, RtlStream, StartedCores, Transport
from .transports import PROGRAM_PACKET, Engine, Slot, Workplace, open_engine

_ANY = 64


@dataclass(slots=True)
class Active:
    """The overlay in the fabric, and the buffers that belong to it."""

    package: Package
    engine: Engine
    chunk: int
    sends: tuple[Slot, ...]
    receives: tuple[Slot, ...]
    buffers: list[Any]


def arrange(
    device: Any, package: Package, hardware: Hardware, limit: int, monotonic: Callable[[], float]
) -> Active:
    """Buffers for as many items as `limit` bytes per transfer allow, and cores that are at rest.

    Raises LoadError, FabricSick, and what pynq does when there is no memory. Nothing is kept then.
    """
    from pynq import allocate

    buffers: list[Any] = []
    bits = address_bits(package.transport, hardware)

    def obtain(nbytes: int) -> Any:
        buffer = allocate((nbytes,), dtype=np.uint8, target=device)
        buffers.append(buffer)
        address = int(buffer.device_address)
        if address + nbytes > 1 << bits:
            raise LoadError(
                f"{package.name}: memory at 0x{address:X} is out of reach of its cores, which have "
                f"addresses of {bits} bits; have the kernel keep contiguous memory below (cma= on "
                "its command line), or build the overlay with wider addresses"
            )
        return buffer

    ports = (*package.inputs, *package.outputs)
    widest = max(port.wire.item_bytes for port in ports)
    chunk = max(1, min(package.max_batch, limit // widest))
    least = PROGRAM_PACKET if isinstance(package.transport, RtlStream) else 0
    try:
        sends, receives = (
            tuple(
                Slot.over(obtain(max(chunk * port.wire.item_bytes, least)), port.wire.item_bytes)
                for port in side
            )
            for side in (package.inputs, package.outputs)
        )
        place = Workplace(device, hardware, package, sends, receives, obtain, monotonic)
        engine = open_engine(place)
        engine.prepare()
    except BaseException:
        # Nobody else knows of these buffers yet. Whatever it was is raised again.
        for buffer in buffers:
            buffer.freebuffer()
        raise
    return Active(package, engine, chunk, sends, receives, buffers)


def address_bits(transport: Transport, hardware: Hardware) -> int:
    """Bits of an address that all cores which fetch and store can take, as the handoff tells.

    Sources: PG021, "Address Width"; of HLS cores, whether a pointer has a register for its upper
    half. What the handoff does not tell is taken to be wide enough.
    """
    if isinstance(transport, DmaStream | RtlStream):
        cell = hardware.cells.get(transport.dma)
        width = cell.parameters.get("c_addr_width", "") if cell is not None else ""
        return int(width) if width.isdecimal() and 32 <= int(width) <= _ANY else _ANY
    if isinstance(transport, StartedCores):
        for core in transport.cores:
            cell = hardware.cells.get(core.core)
            offsets = set(cell.registers.values()) if cell is not None else set()
            if offsets and any(pointer.offset + 4 not in offsets for pointer in core.pointers):
                return 32
    return _ANY
