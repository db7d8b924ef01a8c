"""Data representation of MQTT (section 1.5): integers, strings, binary data, variable lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .packets import MAX_REMAINING_LENGTH, ReasonCode

if TYPE_CHECKING:
    from .packets import Packet


class MalformedPacket(Exception):
    """The peer broke the protocol; nothing more can be decoded from it.

    `reason_code` is what MQTT 5 wants in the answer; `section` is where the specification says so;
    `packets` are the good packets decoded from the same bytes before the bad one.
    """

    def __init__(self, reason_code: int, message: str, section: str) -> None:
        super().__init__(f"{message} (MQTT 5 section {section})")
        self.reason_code = int(reason_code)
        self.message = message
        self.section = section
        self.packets: tuple[Packet, ...] = ()


class Reader:
    """A cursor over one packet's bytes; reading past the end is MalformedPacket."""

    __slots__ = ("_data", "_end", "_position", "section")

    def __init__(self, data: bytes, section: str, start: int = 0, end: int | None = None) -> None:
        self._data = data
        self._position = start
        self._end = len(data) if end is None else end
        self.section = section

    @property
    def left(self) -> int:
        return self._end - self._position

    def malformed(
        self, message: str, reason_code: int = ReasonCode.MALFORMED_PACKET
    ) -> MalformedPacket:
        return MalformedPacket(reason_code, message, self.section)

    def take(self, count: int) -> bytes:
        start = self._position
        if start + count > self._end:
            raise self.malformed(f"{count} bytes announced, {self._end - start} left")
        self._position = start + count
        return self._data[start : start + count]

    def rest(self) -> bytes:
        return self.take(self.left)

    def byte(self) -> int:
        position = self._position
        if position >= self._end:
            raise self.malformed("a byte is missing")
        self._position = position + 1
        return self._data[position]

    def two(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def four(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def varint(self) -> int:
        value = 0
        for position in range(4):
            byte = self.byte()
            value |= (byte & 0x7F) << (7 * position)
            if byte < 0x80:
                if position and byte == 0:
                    raise self.malformed("a variable byte integer is longer than needed")
                return value
        raise self.malformed("a variable byte integer is longer than four bytes")

    def text(self) -> str:
        raw = self.take(self.two())
        try:
            value = raw.decode()
        except UnicodeDecodeError as error:
            raise self.malformed(f"a string is not UTF-8: {error.reason}") from None
        if "\0" in value:
            raise self.malformed("a string contains U+0000")
        return value

    def binary(self) -> bytes:
        return self.take(self.two())

    def packet_id(self) -> int:
        value = self.two()
        if value == 0:
            raise self.malformed("packet identifier 0", ReasonCode.PROTOCOL_ERROR)
        return value

    def sub(self, length: int, section: str) -> Reader:
        """A reader over the next `length` bytes, which this one skips."""
        if length > self.left:
            raise self.malformed(f"{length} bytes announced, {self.left} left")
        start = self._position
        self._position += length
        return Reader(self._data, section, start, start + length)

    def finish(self) -> None:
        if self.left:
            raise self.malformed(f"{self.left} bytes too many")


def varint(value: int) -> bytes:
    if not 0 <= value <= MAX_REMAINING_LENGTH:
        raise ValueError(f"{value} is no variable byte integer (0 to {MAX_REMAINING_LENGTH})")
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def binary(value: bytes) -> bytes:
    if len(value) > 65_535:
        raise ValueError(f"binary data of {len(value)} bytes; 65535 is the most")
    return len(value).to_bytes(2, "big") + value


def text(value: str) -> bytes:
    """Raises ValueError (also UnicodeEncodeError, which is one) for what MQTT cannot carry."""
    if "\0" in value:
        raise ValueError("a string must not contain U+0000")
    return binary(value.encode())


def packet_id(value: int) -> bytes:
    if not 1 <= value <= 65_535:
        raise ValueError(f"packet identifier {value} is not in 1 to 65535")
    return value.to_bytes(2, "big")
