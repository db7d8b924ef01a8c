"""Header blocks (HPACK, RFC 7541): read once for requests that look alike, written literally."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from hpack import Decoder, HPACKError
from hpack.table import HeaderTable

from .h2_frames import ConnectionRefused, ErrorCode

H = TypeVar("H")
Pairs = list[tuple[bytes, bytes]]

TABLE_BYTES = 4096
_MOST_REMEMBERED = 16
_LONGEST_REMEMBERED = 1024


class _Table(HeaderTable):
    """Knows how often it was changed."""

    changes = 0

    def add(self, name: bytes, value: bytes) -> None:
        self.changes += 1
        super().add(name, value)


class HeaderReader(Generic[H]):
    """Decodes the blocks of one connection. What `interpret` made of a block is given again for
    the same bytes as long as the dynamic table stays as it was."""

    def __init__(self, interpret: Callable[[Pairs], H], most_bytes: int) -> None:
        """`most_bytes`: of the decoded names and values of one block, with 32 for each."""
        self._interpret = interpret
        self._table = _Table()
        self._decoder = Decoder(most_bytes)
        self._decoder.header_table = self._table
        self._decoder.max_allowed_table_size = TABLE_BYTES
        self._known: dict[bytes, H] = {}

    def read(self, block: bytes) -> H:
        """Raises ConnectionRefused: the table is unknown from then on."""
        known = self._known.get(block)
        if known is not None:
            return known
        changes, most = self._table.changes, self._table.maxsize
        try:
            pairs = [(bytes(n), bytes(v)) for n, v in self._decoder.decode(block, raw=True)]
        except (HPACKError, IndexError, ValueError) as error:
            raise ConnectionRefused(
                ErrorCode.COMPRESSION_ERROR, f"the headers cannot be read: {error}"
            ) from None
        head = self._interpret(pairs)
        if changes != self._table.changes or most != self._table.maxsize:
            self._known.clear()
        elif len(block) <= _LONGEST_REMEMBERED and block and block[0] & 0xE0 != 0x20:
            # A block that begins with a size update changes the table even when it stays.
            if len(self._known) >= _MOST_REMEMBERED:
                self._known.clear()
            self._known[block] = head
        return head


def literals(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Fields "without indexing", names and values as they are."""
    return b"".join(
        b"\0" + _length(len(name)) + name + _length(len(value)) + value for name, value in pairs
    )


def _length(size: int) -> bytes:
    """An integer with a prefix of seven bits (section 5.1)."""
    if size < 127:
        return bytes((size,))
    out, size = bytearray((127,)), size - 127
    while size >= 128:
        out.append(size & 127 | 128)
        size >>= 7
    out.append(size)
    return bytes(out)
