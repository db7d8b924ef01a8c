"""The boards that can be simulated."""

from __future__ import annotations

from dataclasses import dataclass

from ...accelerators.fpga.board import KNOWN_PARTS


@dataclass(frozen=True, slots=True)
class SimulatedBoard:
    """`arch` is what `platform.machine()` says on the board; memory sizes are in bytes."""

    name: str
    part: str
    arch: str
    memory_base: int
    memory_size: int


def _zynq7(name: str) -> SimulatedBoard:
    # As large as the smallest of its kind in practice; a PYNQ-Z1 image reserves 128 MiB, which
    # a simulated board need not hold twice.
    return SimulatedBoard(name, KNOWN_PARTS[name], "armv7l", 0x1000_0000, 16 << 20)


def _zynqmp(name: str) -> SimulatedBoard:
    return SimulatedBoard(name, KNOWN_PARTS[name], "aarch64", 0x6000_0000, 16 << 20)


BOARDS: dict[str, SimulatedBoard] = {
    board.name: board
    for board in (
        *(_zynq7(name) for name in ("pynq-z1", "pynq-z2")),
        *(_zynqmp(name) for name in ("zcu104", "kv260", "kr260", "ultra96", "ultra96v2")),
    )
}
"""Name in lower case -> board."""


def simulated_board(name: str) -> SimulatedBoard:
    """The board called `name`. Raises ValueError naming those there are."""
    try:
        return BOARDS[name.strip().lower()]
    except KeyError:
        raise ValueError(
            f"no simulated board {name!r}; there are {', '.join(sorted(BOARDS))}"
        ) from None
