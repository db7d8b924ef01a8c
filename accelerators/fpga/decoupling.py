"""Cutting a region off from the rest of the fabric while it is configured, and joining it again.

Sources: PG375 (DFX Decoupler: decouple is bit 0 of the register at 0, which reads back), PG376
(DFX AXI Shutdown Manager: bit 0 asks, 0xF says that nothing is under way, as pynq waits for), PG144
(AXI GPIO: data at 0). Not tried on a board.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..errors import LoadError
from .handoff import SHUTDOWN_MANAGERS, Cell, Hardware
from .protocol import FabricSick
from .transports.registers import Registers

DECOUPLERS = ("dfx_decoupler", "pr_decoupler")
_GPIO = "axi_gpio"
_SECONDS = 0.1
_SHUT = 0xF


def decouplers(hardware: Hardware, named: tuple[str, ...] | None) -> tuple[Cell, ...]:
    """The cores that decouple the region: those `named`, or all the design has of their kind.

    An AXI GPIO only counts when it is named, since it may do anything. Raises LoadError.
    """
    if named is None:
        kinds = (*SHUTDOWN_MANAGERS, *DECOUPLERS)
        # Without registers, a core is told by the design itself when to decouple.
        return tuple(cell for cell in hardware.of_kind(*kinds) if cell.base is not None)
    cells = tuple(hardware.addressed(name) for name in named)
    for cell in cells:
        if cell.kind not in (*SHUTDOWN_MANAGERS, *DECOUPLERS, _GPIO):
            raise LoadError(
                f"{hardware.path}: {cell.name} is of kind {cell.kind}, which decouples nothing; "
                f"expected {', '.join((*DECOUPLERS, *SHUTDOWN_MANAGERS, _GPIO))}"
            )
    return cells


def decouple(device: Any, cells: Iterable[Cell], monotonic: Callable[[], float]) -> None:
    """Cut the region off. Raises FabricSick when a core does not follow."""
    for cell in cells:
        _write(device, cell, 1, monotonic)


def couple(device: Any, cells: Iterable[Cell], monotonic: Callable[[], float]) -> None:
    """Join the region again. Raises FabricSick when a core does not follow."""
    for cell in reversed(tuple(cells)):
        _write(device, cell, 0, monotonic)


def _write(device: Any, cell: Cell, value: int, monotonic: Callable[[], float]) -> None:
    assert cell.base is not None
    registers = Registers(device, cell.base, max(cell.size, 0x10))
    registers.write(0, value)
    shut = _SHUT if cell.kind in SHUTDOWN_MANAGERS and value else value
    mask = _SHUT if cell.kind in SHUTDOWN_MANAGERS else 1
    end = monotonic() + _SECONDS
    while registers.read(0) & mask != shut:
        if monotonic() >= end:
            raise FabricSick(
                f"{cell.name}: does not {'decouple' if value else 'couple'} the region to be "
                "configured; the fabric is being configured as a whole"
            )
