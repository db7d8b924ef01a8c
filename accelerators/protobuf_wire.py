"""Protobuf's wire format, as far as it takes to read messages field by field. Pure.

Source: Protocol Buffers, "Encoding". Everything raises Malformed for bytes that are none of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TypeAlias

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class Malformed(Exception):
    """The bytes are not those of such a message."""


Field: TypeAlias = "tuple[int, int, int | memoryview]"


def varint(data: memoryview, at: int) -> tuple[int, int]:
    """The unsigned number at `at`, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise Malformed("a number is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise Malformed("a number is too long")


def fields(data: memoryview) -> Iterator[Field]:
    """(number, wire type, value) of each field of a message."""
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise Malformed("a field has the number 0")
        if wire == VARINT:
            value, at = varint(data, at)
            yield number, wire, value
            continue
        if wire == BYTES:
            size, at = varint(data, at)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise Malformed(f"a field has wire type {wire}")
        if size > len(data) - at:
            raise Malformed("a field is cut off")
        yield number, wire, data[at : at + size]
        at += size


def message(one: Field) -> memoryview:
    """The bytes of a message, a string or packed numbers."""
    number, wire, value = one
    if wire != BYTES or isinstance(value, int):
        raise Malformed(f"field {number} is no message")
    return value


def text(one: Field) -> str:
    """A string."""
    try:
        return bytes(message(one)).decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed(f"field {one[0]} is no text") from None


def integer(one: Field) -> int:
    """An int64 or an enumeration."""
    number, _, value = one
    if not isinstance(value, int):
        raise Malformed(f"field {number} is no integer")
    return value - (1 << 64) if value >> 63 else value


def integers(one: Field) -> list[int]:
    """One element, or many packed ones, of a repeated integer field."""
    if one[1] == VARINT:
        return [integer(one)]
    data, values, at = message(one), [], 0
    while at < len(data):
        value, at = varint(data, at)
        values.append(value - (1 << 64) if value >> 63 else value)
    return values


def numbers(one: Field, letter: str, wire: int) -> memoryview | bytes:
    """The bytes of one element, or of many packed ones, of fixed size."""
    number, actual, value = one
    if isinstance(value, int) or actual not in (wire, BYTES):
        raise Malformed(f"field {number} holds no numbers")
    if len(value) % struct.calcsize(letter):
        raise Malformed(f"field {number} ends within a number")
    return value


def floats(one: Field) -> list[float]:
    """One float, or many packed ones."""
    data = numbers(one, "<f", FIXED32)
    return [number for (number,) in struct.iter_unpack("<f", data)]
