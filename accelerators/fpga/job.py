"""One inference as the driver does it: memory of a client, cut into transfers of the fabric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .package import Package
from .packing import Bytes
from .transports import Slot


class Copy(NamedTuple):
    """`nbytes` between a client's memory and the buffer of a slot, both as flat uint8."""

    slot: Slot
    client: Bytes
    buffer: Bytes
    nbytes: int


class Transfer(NamedTuple):
    """`items` items that go through the fabric at once."""

    items: int
    sends: tuple[Copy, ...]
    receives: tuple[Copy, ...]


@dataclass(eq=False, slots=True)
class Job:
    """Items in and results out, uint8 [n, item_bytes] each, in memory that stays where it is.

    May be done again with other values in there; cutting it takes as long as a small transfer.
    """

    package: Package
    items: Sequence[Bytes]
    results: Sequence[Bytes]
    transfers: tuple[Transfer, ...] = ()
    owner: object = None

    def cut(
        self, owner: object, sends: Sequence[Slot], receives: Sequence[Slot], chunk: int
    ) -> None:
        """Into transfers of at most `chunk` items, which are good as long as `owner` has these."""
        count = len(self.items[0])
        self.transfers = tuple(
            Transfer(
                min(start + chunk, count) - start,
                _copies(sends, self.items, slice(start, start + chunk)),
                _copies(receives, self.results, slice(start, start + chunk)),
            )
            for start in range(0, count, chunk)
        )
        self.owner = owner


def _copies(slots: Sequence[Slot], arrays: Sequence[Bytes], part: slice) -> tuple[Copy, ...]:
    copies = []
    for slot, array in zip(slots, arrays, strict=True):
        flat = array[part].reshape(-1)
        copies.append(Copy(slot, flat, slot.view[: flat.size], flat.size))
    return tuple(copies)
