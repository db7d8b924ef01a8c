"""Packets to bytes; see `codec` for the other direction."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Final, TypeAlias

from . import properties as at
from .packets import (
    MAX_REMAINING_LENGTH,
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
    SubAck,
    Subscribe,
    UnsubAck,
    Unsubscribe,
)
from .properties import write_properties
from .topics import filter_problem, topic_problem
from .wire import binary, packet_id, text, varint

_REMEMBERED_LENGTH: Final = 256

_Acknowledgement: TypeAlias = PubAck | PubRec | PubRel | PubComp


def encode(packet: Packet, version: int) -> bytes:
    """The packet's bytes. For V311, properties and reason codes it cannot carry are left out.

    Raises ValueError for what the version has no bytes for (such as a string over 65,535 bytes,
    packet identifier 0 with QoS 1, AUTH in 3.1.1).
    """
    return _ENCODERS[type(packet)](packet, version)


def _frame(first: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    if len(body) > MAX_REMAINING_LENGTH:
        raise ValueError(f"a packet of {len(body)} bytes; {MAX_REMAINING_LENGTH} is the most")
    return bytes((first,)) + varint(len(body)) + body


def _section(properties: Properties, kind: int, version: int) -> bytes:
    return write_properties(properties, kind) if version == V5 else b""


def _checked(problem: str | None) -> None:
    if problem is not None:
        raise ValueError(problem)


def _write_connect(packet: Connect, version: int) -> bytes:
    if packet.version != version:
        raise ValueError(f"a CONNECT of version {packet.version} on a connection of {version}")
    if version == V311 and packet.password is not None and packet.username is None:
        raise ValueError("3.1.1 has no password without a user name")
    if not 0 <= packet.keepalive <= 65_535:
        raise ValueError(f"keep alive of {packet.keepalive} s is not in 0 to 65535")
    flags = packet.clean_start << 1
    parts = [text(packet.client_id)]
    if (will := packet.will) is not None:
        _checked(topic_problem(will.topic))
        flags |= 0x04 | _qos(will.qos) << 3 | will.retain << 5
        parts += [_section(will.properties, at.WILL, version), text(will.topic)]
        parts.append(binary(will.payload))
    if packet.username is not None:
        flags |= 0x80
        parts.append(text(packet.username))
    if packet.password is not None:
        flags |= 0x40
        parts.append(binary(packet.password))
    header = b"\0\4MQTT" + bytes((version, flags)) + packet.keepalive.to_bytes(2, "big")
    return _frame(0x10, header, _section(packet.properties, at.CONNECT, version), *parts)


def _qos(qos: int) -> int:
    if qos not in (0, 1, 2):
        raise ValueError(f"QoS {qos} is not 0, 1 or 2")
    return qos


def _write_connack(packet: ConnAck, version: int) -> bytes:
    body = bytes((packet.session_present, packet.reason_code))
    return _frame(0x20, body, _section(packet.properties, at.CONNACK, version))


def _write_publish(packet: Publish, version: int) -> bytes:
    return publish_bytes(packet, packet.packet_id, version)


def publish_bytes(packet: Publish, identifier: int, version: int) -> bytes:
    """As `encode`, under another packet identifier."""
    first = 0x30 | packet.dup << 3 | _qos(packet.qos) << 1 | packet.retain
    after = packet_id(identifier) if packet.qos else b""
    if version == V5:
        after += write_properties(packet.properties, at.PUBLISH)
    topic = packet.topic
    size = len(after) + len(packet.payload)
    if len(topic) > _REMEMBERED_LENGTH:
        head = _publish_head(first, topic, size)
    elif topic or version == V311 or packet.properties.topic_alias is None:
        head = _known_publish_head(first, topic, size)
    else:
        head = bytes((first,)) + varint(2 + size) + b"\0\0"
    return b"".join((head, after, packet.payload))


def _publish_head(first: int, topic: str, size: int) -> bytes:
    """Fixed header and topic, after which `size` bytes follow."""
    _checked(topic_problem(topic))
    name = text(topic)
    return bytes((first,)) + varint(len(name) + size) + name


# A topic's messages are often of one size.
_known_publish_head = lru_cache(maxsize=1024)(_publish_head)


def _write_reason(
    first: int, head: bytes, code: int, properties: Properties, version: int
) -> bytes:
    if version == V311 or (code == 0 and properties == NO_PROPERTIES):
        return _frame(first, head)
    if properties == NO_PROPERTIES:
        return _frame(first, head, bytes((code,)))
    return _frame(first, head, bytes((code,)), write_properties(properties, first >> 4))


def _ack_writer(first: int) -> Callable[[_Acknowledgement, int], bytes]:
    short = bytes((first, 2))

    def write(packet: _Acknowledgement, version: int) -> bytes:
        head = packet_id(packet.packet_id)
        if not packet.reason_code and packet.properties is NO_PROPERTIES:
            return short + head
        return _write_reason(first, head, packet.reason_code, packet.properties, version)

    return write


def _write_subscribe(packet: Subscribe, version: int) -> bytes:
    if not packet.subscriptions:
        raise ValueError("a SUBSCRIBE has at least one topic filter")
    parts = [packet_id(packet.packet_id), _section(packet.properties, at.SUBSCRIBE, version)]
    for wanted in packet.subscriptions:
        _checked(filter_problem(wanted.topic_filter))
        options = _qos(wanted.qos)
        if version == V5:
            options |= wanted.no_local << 2 | wanted.retain_as_published << 3
            options |= wanted.retain_handling << 4
        parts += [text(wanted.topic_filter), bytes((options,))]
    return _frame(0x82, *parts)


def _write_suback(packet: SubAck, version: int) -> bytes:
    codes = bytes(packet.reason_codes)
    if version == V311:
        codes = bytes(min(code, 0x80) for code in codes)
    head = packet_id(packet.packet_id)
    return _frame(0x90, head, _section(packet.properties, at.SUBACK, version), codes)


def _write_unsubscribe(packet: Unsubscribe, version: int) -> bytes:
    if not packet.topic_filters:
        raise ValueError("an UNSUBSCRIBE has at least one topic filter")
    parts = [packet_id(packet.packet_id), _section(packet.properties, at.UNSUBSCRIBE, version)]
    for topic_filter in packet.topic_filters:
        _checked(filter_problem(topic_filter))
        parts.append(text(topic_filter))
    return _frame(0xA2, *parts)


def _write_unsuback(packet: UnsubAck, version: int) -> bytes:
    head = packet_id(packet.packet_id)
    if version == V311:
        return _frame(0xB0, head)
    codes = bytes(packet.reason_codes)
    return _frame(0xB0, head, write_properties(packet.properties, at.UNSUBACK), codes)


def _write_disconnect(packet: Disconnect, version: int) -> bytes:
    return _write_reason(0xE0, b"", packet.reason_code, packet.properties, version)


def _write_auth(packet: Auth, version: int) -> bytes:
    if version == V311:
        raise ValueError("3.1.1 has no AUTH packet")
    return _write_reason(0xF0, b"", packet.reason_code, packet.properties, version)


_ENCODERS: Final[dict[type, Callable[..., bytes]]] = {
    Connect: _write_connect,
    ConnAck: _write_connack,
    Publish: _write_publish,
    PubAck: _ack_writer(0x40),
    PubRec: _ack_writer(0x50),
    PubRel: _ack_writer(0x62),
    PubComp: _ack_writer(0x70),
    Subscribe: _write_subscribe,
    SubAck: _write_suback,
    Unsubscribe: _write_unsubscribe,
    UnsubAck: _write_unsuback,
    PingReq: lambda packet, version: b"\xc0\0",
    PingResp: lambda packet, version: b"\xd0\0",
    Disconnect: _write_disconnect,
    Auth: _write_auth,
}
