"""What a server answers, as functions of what it decided."""

from __future__ import annotations

from typing import Any, Final

from msgspec.structs import replace

from .handler import Limits
from .packets import NO_PROPERTIES, V5, V311, ConnAck, Packet, PingResp, Properties, ReasonCode

_V311_RETURN_CODES: Final[dict[int, int]] = {
    ReasonCode.SUCCESS: 0,
    ReasonCode.UNSUPPORTED_PROTOCOL_VERSION: 1,
    ReasonCode.CLIENT_IDENTIFIER_NOT_VALID: 2,
    ReasonCode.SERVER_UNAVAILABLE: 3,
    ReasonCode.SERVER_BUSY: 3,
    ReasonCode.BAD_USER_NAME_OR_PASSWORD: 4,
    ReasonCode.NOT_AUTHORIZED: 5,
    ReasonCode.BANNED: 5,
    ReasonCode.BAD_AUTHENTICATION_METHOD: 5,
}


def refusal(reason_code: int, reason: str, version: int) -> tuple[ConnAck, int] | None:
    """The CONNACK that refuses and the version to write it in; None: close without a word."""
    if reason_code == ReasonCode.UNSUPPORTED_PROTOCOL_VERSION:
        # The one answer every version's client understands.
        return ConnAck(False, 1), V311
    if version == V5:
        properties = Properties(reason_string=reason) if reason else NO_PROPERTIES
        return ConnAck(False, reason_code, properties), V5
    code = _V311_RETURN_CODES.get(reason_code)
    return None if code is None else (ConnAck(False, code), V311)


def without_explanations(packet: Any) -> Packet:
    """What a packet may lose when the client takes only small ones [MQTT-3.2.2-19]."""
    if isinstance(packet, PingResp):
        return packet
    properties = replace(packet.properties, reason_string=None, user_properties=())
    shorter: Packet = replace(packet, properties=properties)
    return shorter


def connack_properties(limits: Limits, wanted: Properties) -> Properties:
    """The handler's properties with the limits that differ from what a client assumes."""
    return replace(
        wanted,
        receive_maximum=limits.receive_maximum,
        maximum_packet_size=limits.max_packet_size,
        topic_alias_maximum=limits.topic_alias_maximum or None,
        maximum_qos=limits.maximum_qos if limits.maximum_qos < 2 else None,
        retain_available=None if limits.retain_available else 0,
    )
