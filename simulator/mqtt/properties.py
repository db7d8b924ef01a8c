"""The MQTT 5 property section: which exist, where they may stand, and their bytes (2.2.2)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from .packets import NO_PROPERTIES, Properties, ReasonCode
from .topics import topic_problem
from .wire import MalformedPacket, Reader, binary, text, varint

WILL: Final = 0  # the will's own property section inside CONNECT
CONNECT: Final = 1
CONNACK: Final = 2
PUBLISH: Final = 3
PUBACK: Final = 4
PUBREC: Final = 5
PUBREL: Final = 6
PUBCOMP: Final = 7
SUBSCRIBE: Final = 8
SUBACK: Final = 9
UNSUBSCRIBE: Final = 10
UNSUBACK: Final = 11
DISCONNECT: Final = 14
AUTH: Final = 15

_ACKS = {PUBACK, PUBREC, PUBREL, PUBCOMP}
_EVERYWHERE = {CONNECT, CONNACK, PUBLISH, SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK, WILL} | _ACKS


@dataclass(frozen=True, slots=True)
class _Type:
    read: Callable[[Reader], Any]
    write: Callable[[Any], bytes]


def _bit(reader: Reader) -> int:
    value = reader.byte()
    if value > 1:
        raise reader.malformed("a property that is 0 or 1 is neither", ReasonCode.PROTOCOL_ERROR)
    return value


def _pair(reader: Reader) -> tuple[str, str]:
    return reader.text(), reader.text()


_BYTE = _Type(_bit, struct.Struct("!B").pack)
_TWO = _Type(Reader.two, struct.Struct("!H").pack)
_FOUR = _Type(Reader.four, struct.Struct("!I").pack)
_VARINT = _Type(Reader.varint, varint)
_TEXT = _Type(Reader.text, text)
_BINARY = _Type(Reader.binary, binary)
_PAIR = _Type(_pair, lambda pair: text(pair[0]) + text(pair[1]))

_Row = tuple[int, str, _Type, "set[int]"]
_ROWS: Final[tuple[_Row, ...]] = (
    (0x01, "payload_format_indicator", _BYTE, {PUBLISH, WILL}),
    (0x02, "message_expiry_interval", _FOUR, {PUBLISH, WILL}),
    (0x03, "content_type", _TEXT, {PUBLISH, WILL}),
    (0x08, "response_topic", _TEXT, {PUBLISH, WILL}),
    (0x09, "correlation_data", _BINARY, {PUBLISH, WILL}),
    (0x0B, "subscription_identifiers", _VARINT, {PUBLISH, SUBSCRIBE}),
    (0x11, "session_expiry_interval", _FOUR, {CONNECT, CONNACK, DISCONNECT}),
    (0x12, "assigned_client_identifier", _TEXT, {CONNACK}),
    (0x13, "server_keep_alive", _TWO, {CONNACK}),
    (0x15, "authentication_method", _TEXT, {CONNECT, CONNACK, AUTH}),
    (0x16, "authentication_data", _BINARY, {CONNECT, CONNACK, AUTH}),
    (0x17, "request_problem_information", _BYTE, {CONNECT}),
    (0x18, "will_delay_interval", _FOUR, {WILL}),
    (0x19, "request_response_information", _BYTE, {CONNECT}),
    (0x1A, "response_information", _TEXT, {CONNACK}),
    (0x1C, "server_reference", _TEXT, {CONNACK, DISCONNECT}),
    (0x1F, "reason_string", _TEXT, {CONNACK, SUBACK, UNSUBACK, DISCONNECT, AUTH} | _ACKS),
    (0x21, "receive_maximum", _TWO, {CONNECT, CONNACK}),
    (0x22, "topic_alias_maximum", _TWO, {CONNECT, CONNACK}),
    (0x23, "topic_alias", _TWO, {PUBLISH}),
    (0x24, "maximum_qos", _BYTE, {CONNACK}),
    (0x25, "retain_available", _BYTE, {CONNACK}),
    (0x26, "user_properties", _PAIR, _EVERYWHERE | {DISCONNECT, AUTH}),
    (0x27, "maximum_packet_size", _FOUR, {CONNECT, CONNACK}),
    (0x28, "wildcard_subscription_available", _BYTE, {CONNACK}),
    (0x29, "subscription_identifier_available", _BYTE, {CONNACK}),
    (0x2A, "shared_subscription_available", _BYTE, {CONNACK}),
)
_BY_ID: Final = {identifier: (name, kind, where) for identifier, name, kind, where in _ROWS}
_REPEATED: Final = {"subscription_identifiers", "user_properties"}
_NEVER_ZERO: Final = {"receive_maximum", "maximum_packet_size", "subscription_identifiers"}


def read_properties(reader: Reader, packet: int) -> Properties:
    """The property section that starts at the reader's position; `packet` is WILL, CONNECT, ..."""
    length = reader.varint()
    if length == 0:
        return NO_PROPERTIES
    body = reader.sub(length, "2.2.2")
    found: dict[str, Any] = {}
    while body.left:
        identifier = body.varint()
        row = _BY_ID.get(identifier)
        if row is None:
            raise body.malformed(f"there is no property 0x{identifier:02X}")
        name, kind, where = row
        if packet not in where:
            raise body.malformed(
                f"property {name} is not allowed in this packet", ReasonCode.PROTOCOL_ERROR
            )
        value = kind.read(body)
        if name in _NEVER_ZERO and value == 0:
            raise body.malformed(f"property {name} is 0", ReasonCode.PROTOCOL_ERROR)
        if name in _REPEATED:
            if packet == SUBSCRIBE and name == "subscription_identifiers" and name in found:
                raise _twice(body, name)
            found.setdefault(name, []).append(value)
        elif name in found:
            raise _twice(body, name)
        else:
            found[name] = value
    for name in _REPEATED & found.keys():
        found[name] = tuple(found[name])
    _check(found, body, packet)
    return Properties(**found)


def _twice(reader: Reader, name: str) -> MalformedPacket:
    return reader.malformed(f"property {name} appears twice", ReasonCode.PROTOCOL_ERROR)


def _check(found: dict[str, Any], reader: Reader, packet: int) -> None:
    if found.get("topic_alias") == 0:
        raise reader.malformed("topic alias 0", ReasonCode.TOPIC_ALIAS_INVALID)
    if "authentication_data" in found and "authentication_method" not in found:
        raise reader.malformed("authentication data without a method", ReasonCode.PROTOCOL_ERROR)
    response_topic = found.get("response_topic")
    if response_topic is not None and (problem := topic_problem(response_topic)):
        raise reader.malformed(f"response topic: {problem}", ReasonCode.TOPIC_NAME_INVALID)


def write_properties(properties: Properties, packet: int) -> bytes:
    """The property section with its length. Raises ValueError for one that has no place here."""
    if properties is NO_PROPERTIES or properties == NO_PROPERTIES:
        return b"\0"
    parts: list[bytes] = []
    for identifier, name, kind, where in _ROWS:
        value = getattr(properties, name)
        if value is None or value == ():
            continue
        if packet not in where:
            raise ValueError(f"property {name} is not allowed in packet type {packet}")
        values = value if name in _REPEATED else (value,)
        for one in values:
            if name in _NEVER_ZERO and one == 0:
                raise ValueError(f"property {name} must not be 0")
            if kind is _BYTE and one not in (0, 1):
                raise ValueError(f"property {name} is 0 or 1, not {one}")
            try:
                parts.append(bytes((identifier,)) + kind.write(one))
            except struct.error as error:
                raise ValueError(f"property {name}={one}: {error}") from None
    body = b"".join(parts)
    return varint(len(body)) + body
