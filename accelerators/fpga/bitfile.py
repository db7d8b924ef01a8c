"""The header of a Xilinx .bit file: read to check a bitstream before download, written by tests.

Layout: a 2-byte length and that many bytes, the number 1 as two bytes, then tagged fields: "a"
design, "b" part, "c" date and "d" time as 2-byte length and zero-terminated ASCII, and "e" with a
4-byte length before the configuration data. All numbers are big-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..errors import LoadError

_PREAMBLE = b"\x0f\xf0\x0f\xf0\x0f\xf0\x0f\xf0\x00"
_TEXT_FIELDS = {0x61: "design", 0x62: "part", 0x63: "date", 0x64: "time"}
_DATA_FIELD = 0x65
HEADER_LIMIT = 16 << 10
"""Bytes in which a header has to end; Vivado's have about 130."""


@dataclass(frozen=True, slots=True)
class Bitfile:
    """The fields of a .bit file. `design` still carries Vivado's ";UserID=...;Version=..."."""

    design: str
    part: str
    date: str
    time: str
    data: bytes


@dataclass(frozen=True, slots=True)
class BitfileHeader:
    """What stands before the data, which begins at `offset` and has `length` bytes."""

    design: str
    part: str
    date: str
    time: str
    offset: int
    length: int


def parse_bitfile(content: bytes, name: str = ".bit file") -> Bitfile:
    """Take a .bit file apart; `name` is for messages. Raises LoadError when it is damaged."""
    header = read_header(content, name)
    data = content[header.offset :]
    if len(data) != header.length:
        raise _damaged(name, f"{len(data)} bytes of data where the header says {header.length}")
    return Bitfile(header.design, header.part, header.date, header.time, data)


def read_header(content: bytes, name: str = ".bit file") -> BitfileHeader:
    """The header at the start of `content`, whose first HEADER_LIMIT bytes are enough.

    Raises LoadError.
    """
    try:
        return _parse(content[:HEADER_LIMIT])
    except (struct.error, IndexError, UnicodeDecodeError, ValueError) as error:
        raise _damaged(name, str(error)) from error


def _damaged(name: str, why: str) -> LoadError:
    return LoadError(
        f"{name}: not a valid .bit file ({why}); copy it again from the Vivado project"
    )


def _parse(content: bytes) -> BitfileHeader:
    (length,) = struct.unpack_from(">H", content)
    offset = 2 + length
    (one,) = struct.unpack_from(">H", content, offset)
    if one != 1:
        raise ValueError(f"{one} where the header has 1")
    offset += 2
    text: dict[str, str] = {}
    while True:
        tag = content[offset]
        offset += 1
        if tag == _DATA_FIELD:
            (length,) = struct.unpack_from(">I", content, offset)
            if missing := [field for field in _TEXT_FIELDS.values() if field not in text]:
                raise ValueError(f"no {missing[0]} field")
            return BitfileHeader(offset=offset + 4, length=length, **text)
        if tag not in _TEXT_FIELDS:
            raise ValueError(f"unknown field 0x{tag:02x}")
        (length,) = struct.unpack_from(">H", content, offset)
        raw = content[offset + 2 : offset + 2 + length]
        if len(raw) != length:
            raise ValueError("cut off in the header")
        text[_TEXT_FIELDS[tag]] = raw.rstrip(b"\0").decode("ascii")
        offset += 2 + length


def encode_bitfile(bitfile: Bitfile) -> bytes:
    """The bytes of a .bit file. `data` must be whole 32-bit words, as configuration data is."""
    if len(bitfile.data) % 4:
        raise ValueError(f"configuration data of {len(bitfile.data)} bytes is not whole words")
    parts = [struct.pack(">H", len(_PREAMBLE)), _PREAMBLE, b"\x00\x01"]
    for tag, field in _TEXT_FIELDS.items():
        raw = str(getattr(bitfile, field)).encode("ascii") + b"\0"
        parts.append(struct.pack(">BH", tag, len(raw)) + raw)
    parts.append(struct.pack(">BI", _DATA_FIELD, len(bitfile.data)) + bitfile.data)
    return b"".join(parts)
