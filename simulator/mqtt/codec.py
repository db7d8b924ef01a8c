"""MQTT 3.1.1 and 5.0 between bytes and packets; no sockets, no clock, no state but the stream's.

    decoder = Decoder(max_packet_size=256 * 1024)
    for packet in decoder.feed(data): ...
    transport.write(encode(ConnAck(), decoder.version))

The decoder checks everything that can be told from one packet alone. What depends on the
connection (CONNECT comes first and once, who may send what, aliases, quotas) is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from . import properties as at
from .encoding import encode
from .frequent import read_frequent
from .packets import (
    NO_PROPERTIES,
    V5,
    V311,
    Auth,
    ConnAck,
    Connect,
    Disconnect,
    Packet,
    PingReq,
    PingResp,
    Properties,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    ReasonCode,
    SubAck,
    Subscribe,
    Subscription,
    UnsubAck,
    Unsubscribe,
    Will,
)
from .properties import read_properties
from .topics import filter_problem, split_shared, topic_problem
from .wire import MalformedPacket, Reader

__all__ = ["Decoder", "MalformedPacket", "decode", "encode"]

PINGREQ: Final = 12
PINGRESP: Final = 13

_SECTIONS: Final = {
    at.CONNECT: "3.1",
    at.CONNACK: "3.2",
    at.PUBLISH: "3.3",
    at.PUBACK: "3.4",
    at.PUBREC: "3.5",
    at.PUBREL: "3.6",
    at.PUBCOMP: "3.7",
    at.SUBSCRIBE: "3.8",
    at.SUBACK: "3.9",
    at.UNSUBSCRIBE: "3.10",
    at.UNSUBACK: "3.11",
    PINGREQ: "3.12",
    PINGRESP: "3.13",
    at.DISCONNECT: "3.14",
    at.AUTH: "3.15",
}
_FLAGS: Final = {at.PUBREL: 2, at.SUBSCRIBE: 2, at.UNSUBSCRIBE: 2}

_CONNACK_CODES: Final = frozenset({0x00, *range(0x80, 0x8B), 0x8C, 0x90, 0x95, 0x97, 0x99, 0x9A,
                                   0x9B, 0x9C, 0x9D, 0x9F})  # fmt: skip
_ACK_CODES: Final = frozenset({0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99})
_RELEASE_CODES: Final = frozenset({0x00, 0x92})
_SUBACK_CODES: Final = frozenset({0, 1, 2, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2})
_UNSUBACK_CODES: Final = frozenset({0x00, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91})
_DISCONNECT_CODES: Final = frozenset({0x00, 0x04, *range(0x80, 0x84), 0x87, 0x89, 0x8B,
                                      *range(0x8D, 0x91), *range(0x93, 0xA3)})  # fmt: skip
_AUTH_CODES: Final = frozenset({0x00, 0x18, 0x19})


class Decoder:
    """Turns a byte stream into packets, keeping at most one incomplete packet in memory.

    A server leaves `version` None and it is learned from CONNECT; a client knows it.
    After MalformedPacket the decoder stays broken: every further `feed` raises the same.
    """

    def __init__(self, max_packet_size: int = 268_435_460, version: int | None = None) -> None:
        """`max_packet_size` counts whole packets with their fixed header, in bytes."""
        self._max = max_packet_size
        self._version = version
        self._buffer = bytearray()
        self._wanted = 0  # bytes of the packet that is under way, 0 while nobody knows
        self._error: MalformedPacket | None = None

    @property
    def version(self) -> int:
        """V311 or V5; V311 while it is still unknown."""
        return V311 if self._version is None else self._version

    def feed(self, data: bytes) -> list[Packet]:
        """All packets that `data` completes.

        Raises MalformedPacket, whose `packets` are the good ones from the same `data`.
        """
        if self._error is not None:
            self._error.packets = ()
            raise self._error
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._wanted:
                return []
            data = bytes(self._buffer)
            self._buffer.clear()
        packets: list[Packet] = []
        position = 0
        try:
            while True:
                has_properties = self._version == V5
                position = read_frequent(data, position, has_properties, self._max, packets)
                frame = self._frame(data, position)
                if frame is None:
                    break
                first, start, end = frame
                packets.append(self._decode(first, data[start:end]))
                position = end
        except MalformedPacket as error:
            error.packets = tuple(packets)
            self._error = error
            raise
        if position < len(data):
            self._buffer += data[position:]
        return packets

    def _frame(self, data: bytes, position: int) -> tuple[int, int, int] | None:
        """(first byte, body start, body end) of the next packet, None when it is incomplete.

        The header is judged as soon as it is here, so an oversized packet is refused, not stored.
        """
        self._wanted = 0
        available = len(data) - position
        if available == 0:
            return None
        first = data[position]
        self._check_first(first)
        length = 0
        for count in range(1, 5):
            if available <= count:
                return None
            byte = data[position + count]
            length |= (byte & 0x7F) << (7 * (count - 1))
            if byte < 0x80:
                if count > 1 and byte == 0:
                    raise MalformedPacket(
                        ReasonCode.MALFORMED_PACKET, "the length is longer than needed", "1.5.5"
                    )
                break
        else:
            raise MalformedPacket(
                ReasonCode.MALFORMED_PACKET, "the length has more than four bytes", "2.1.4"
            )
        if 1 + count + length > self._max:
            raise MalformedPacket(
                ReasonCode.PACKET_TOO_LARGE,
                f"a packet of {1 + count + length} bytes; {self._max} is the most taken",
                "3.1.2.11.4",
            )
        start = position + 1 + count
        end = start + length
        if end > len(data):
            self._wanted = end - position
            return None
        return first, start, end

    def _check_first(self, first: int) -> None:
        kind = first >> 4
        if kind == 0 or (kind == at.AUTH and self.version == V311):
            raise MalformedPacket(
                ReasonCode.MALFORMED_PACKET, f"there is no packet type {kind}", "2.1.2"
            )
        if kind != at.PUBLISH and first & 0x0F != _FLAGS.get(kind, 0):
            raise MalformedPacket(
                ReasonCode.MALFORMED_PACKET, f"flags {first & 0x0F} in packet type {kind}", "2.1.3"
            )

    def _decode(self, first: int, body: bytes) -> Packet:
        kind = first >> 4
        if kind == at.CONNECT:
            reader = Reader(body, "3.1")
            version = _connect_version(reader)
            if self._version is None:
                self._version = version
            return _read_connect(reader, version)
        return _decode_body(first, body, self.version)


def decode(data: bytes, version: int | None = None) -> Packet:
    """The one packet that `data` holds. Raises MalformedPacket, also when it is incomplete."""
    packets = Decoder(version=version).feed(data)
    if len(packets) != 1:
        raise MalformedPacket(ReasonCode.MALFORMED_PACKET, "not exactly one whole packet", "2.1")
    return packets[0]


def _decode_body(first: int, body: bytes, version: int) -> Packet:
    kind = first >> 4
    reader = Reader(body, _SECTIONS[kind])
    if kind == at.PUBLISH:
        return _read_publish(first, reader, version)
    packet: Packet
    if kind in _ACK_TYPES:
        packet = _read_ack(kind, reader, version)
    elif kind == at.SUBSCRIBE:
        packet = _read_subscribe(reader, version)
    elif kind == at.UNSUBSCRIBE:
        packet = _read_unsubscribe(reader, version)
    elif kind == at.CONNACK:
        packet = _read_connack(reader, version)
    elif kind == at.SUBACK:
        packet = _read_suback(reader, version)
    elif kind == at.UNSUBACK:
        packet = _read_unsuback(reader, version)
    elif kind == PINGREQ:
        packet = PingReq()
    elif kind == PINGRESP:
        packet = PingResp()
    elif kind == at.DISCONNECT:
        packet = Disconnect(*_read_reason(kind, reader, version, _DISCONNECT_CODES))
    else:
        packet = Auth(*_read_reason(kind, reader, version, _AUTH_CODES))
    reader.finish()
    return packet


def _connect_version(reader: Reader) -> int:
    name = reader.text()
    if name not in ("MQTT", "MQIsdp"):
        raise reader.malformed(
            f"protocol name {name[:16]!r}", ReasonCode.UNSUPPORTED_PROTOCOL_VERSION
        )
    level = reader.byte()
    if name != "MQTT" or level not in (V311, V5):
        raise reader.malformed(
            f"protocol level {level}; 4 (3.1.1) and 5 are served",
            ReasonCode.UNSUPPORTED_PROTOCOL_VERSION,
        )
    return level


def _read_connect(reader: Reader, version: int) -> Connect:
    flags = reader.byte()
    if flags & 0x01:
        raise reader.malformed("the reserved connect flag is set")
    will_qos = flags >> 3 & 0x03
    if will_qos == 3 or (not flags & 0x04 and flags & 0x38):
        raise reader.malformed("will QoS and will retain do not fit the will flag")
    if version == V311 and flags & 0xC0 == 0x40:
        raise reader.malformed("a password without a user name")
    keepalive = reader.two()
    properties = read_properties(reader, at.CONNECT) if version == V5 else NO_PROPERTIES
    client_id = reader.text()
    will = None
    if flags & 0x04:
        will_properties = read_properties(reader, at.WILL) if version == V5 else NO_PROPERTIES
        topic = reader.text()
        if problem := topic_problem(topic):
            raise reader.malformed(f"will topic: {problem}", ReasonCode.TOPIC_NAME_INVALID)
        will = Will(topic, reader.binary(), will_qos, bool(flags & 0x20), will_properties)
    username = reader.text() if flags & 0x80 else None
    password = reader.binary() if flags & 0x40 else None
    reader.finish()
    return Connect(
        client_id, version, bool(flags & 0x02), keepalive, username, password, will, properties
    )


def _read_connack(reader: Reader, version: int) -> ConnAck:
    flags = reader.byte()
    if flags > 1:
        raise reader.malformed("reserved acknowledge flags are set")
    code = reader.byte()
    if code not in _CONNACK_CODES if version == V5 else code > 5:
        raise _unknown_code(reader, code)
    if flags and code:
        raise reader.malformed("a refusal with session present")
    return ConnAck(
        bool(flags), code, read_properties(reader, at.CONNACK) if version == V5 else NO_PROPERTIES
    )


def _read_publish(first: int, reader: Reader, version: int) -> Publish:
    qos = first >> 1 & 0x03
    dup = bool(first & 0x08)
    if qos == 3:
        raise reader.malformed("QoS 3")
    if dup and not qos:
        raise reader.malformed("DUP with QoS 0")
    topic = reader.text()
    identifier = reader.packet_id() if qos else 0
    properties = read_properties(reader, at.PUBLISH) if version == V5 else NO_PROPERTIES
    if topic:
        if problem := topic_problem(topic):
            raise reader.malformed(problem, ReasonCode.TOPIC_NAME_INVALID)
    elif properties.topic_alias is None:
        raise reader.malformed("neither a topic nor a topic alias", ReasonCode.PROTOCOL_ERROR)
    return Publish(topic, reader.rest(), qos, bool(first & 1), dup, identifier, properties)


_Acknowledgement: TypeAlias = PubAck | PubRec | PubRel | PubComp
_ACK_TYPES: Final[dict[int, Callable[[int, int, Properties], _Acknowledgement]]] = {
    at.PUBACK: PubAck,
    at.PUBREC: PubRec,
    at.PUBREL: PubRel,
    at.PUBCOMP: PubComp,
}


def _read_ack(kind: int, reader: Reader, version: int) -> _Acknowledgement:
    identifier = reader.packet_id()
    codes = _RELEASE_CODES if kind in (at.PUBREL, at.PUBCOMP) else _ACK_CODES
    return _ACK_TYPES[kind](identifier, *_read_reason(kind, reader, version, codes))


def _read_reason(
    kind: int, reader: Reader, version: int, allowed: frozenset[int]
) -> tuple[int, Properties]:
    """The reason code and properties that MQTT 5 lets a sender leave out from the end."""
    if version == V311 or not reader.left:
        return 0, NO_PROPERTIES
    code = reader.byte()
    if code not in allowed:
        raise _unknown_code(reader, code)
    return code, read_properties(reader, kind) if reader.left else NO_PROPERTIES


def _unknown_code(reader: Reader, code: int) -> MalformedPacket:
    return reader.malformed(
        f"reason code 0x{code:02X} has no meaning here", ReasonCode.PROTOCOL_ERROR
    )


def _read_subscribe(reader: Reader, version: int) -> Subscribe:
    identifier = reader.packet_id()
    properties = read_properties(reader, at.SUBSCRIBE) if version == V5 else NO_PROPERTIES
    subscriptions: list[Subscription] = []
    while reader.left:
        topic_filter = _read_filter(reader)
        options = reader.byte()
        if options & (0xC0 if version == V5 else 0xFC) or options & 3 == 3:
            raise reader.malformed(f"subscription options 0x{options:02X}")
        if options >> 4 == 3:
            raise reader.malformed("retain handling 3", ReasonCode.PROTOCOL_ERROR)
        no_local = bool(options & 0x04)
        if no_local and split_shared(topic_filter)[0]:
            raise reader.malformed("no local on a shared subscription", ReasonCode.PROTOCOL_ERROR)
        subscriptions.append(
            Subscription(topic_filter, options & 3, no_local, bool(options & 0x08), options >> 4)
        )
    if not subscriptions:
        raise reader.malformed("no topic filter", ReasonCode.PROTOCOL_ERROR)
    return Subscribe(identifier, tuple(subscriptions), properties)


def _read_filter(reader: Reader) -> str:
    topic_filter = reader.text()
    if problem := filter_problem(topic_filter):
        raise reader.malformed(problem, ReasonCode.TOPIC_FILTER_INVALID)
    return topic_filter


def _read_suback(reader: Reader, version: int) -> SubAck:
    identifier = reader.packet_id()
    properties = read_properties(reader, at.SUBACK) if version == V5 else NO_PROPERTIES
    codes = tuple(reader.rest())
    allowed = _SUBACK_CODES if version == V5 else frozenset({0, 1, 2, 0x80})
    for code in codes:
        if code not in allowed:
            raise _unknown_code(reader, code)
    if not codes:
        raise reader.malformed("no reason code", ReasonCode.PROTOCOL_ERROR)
    return SubAck(identifier, codes, properties)


def _read_unsubscribe(reader: Reader, version: int) -> Unsubscribe:
    identifier = reader.packet_id()
    properties = read_properties(reader, at.UNSUBSCRIBE) if version == V5 else NO_PROPERTIES
    filters: list[str] = []
    while reader.left:
        filters.append(_read_filter(reader))
    if not filters:
        raise reader.malformed("no topic filter", ReasonCode.PROTOCOL_ERROR)
    return Unsubscribe(identifier, tuple(filters), properties)


def _read_unsuback(reader: Reader, version: int) -> UnsubAck:
    identifier = reader.packet_id()
    if version == V311:
        return UnsubAck(identifier)
    properties = read_properties(reader, at.UNSUBACK)
    codes = tuple(reader.rest())
    for code in codes:
        if code not in _UNSUBACK_CODES:
            raise _unknown_code(reader, code)
    if not codes:
        raise reader.malformed("no reason code", ReasonCode.PROTOCOL_ERROR)
    return UnsubAck(identifier, codes, properties)
