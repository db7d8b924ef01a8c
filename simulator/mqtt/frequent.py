"""What almost all traffic consists of, read in one loop: PUBLISH without properties, short answers.

A shortcut of `codec.Decoder` and no second opinion: whatever is not whole, valid and of these
shapes is left to it, so that every rule stays in one place (and the tests hold both to the same).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .packets import Packet, PubAck, PubComp, Publish, PubRec, PubRel
from .topics import topic_problem

_REMEMBERED: Final = 1024
_REMEMBERED_LENGTH: Final = 256

# By first byte: QoS, RETAIN, DUP. QoS 3 and DUP with QoS 0 are missing.
_PUBLISH: Final[dict[int, tuple[int, bool, bool]]] = {
    0x30 | dup << 3 | qos << 1 | retain: (qos, bool(retain), bool(dup))
    for qos, dups in ((0, (0,)), (1, (0, 1)), (2, (0, 1)))
    for dup in dups
    for retain in (0, 1)
}
_ANSWERS: Final[dict[int, Callable[[int], Packet]]] = {
    0x40: PubAck,
    0x50: PubRec,
    0x62: PubRel,
    0x70: PubComp,
}
# Valid topics by their bytes, of all connections: devices publish to the same few again and again.
_topics: dict[bytes, str] = {}


def read_frequent(
    data: bytes, position: int, has_properties: bool, most: int, packets: list[Packet]
) -> int:
    """Append the packets from `position` on; where the first stands that is left to the caller.

    `has_properties`: MQTT 5, whose empty property section is one byte; `most`: the largest packet.
    """
    available = len(data)
    while available - position >= 4:
        first = data[position]
        length = data[position + 1]
        if length == 2 and (answer := _ANSWERS.get(first)) is not None:
            identifier = data[position + 2] << 8 | data[position + 3]
            if not identifier or most < 4:
                break
            packets.append(answer(identifier))
            position += 4
            continue
        flags = _PUBLISH.get(first)
        if flags is None:
            break
        start = position + 2
        if length > 0x7F:
            high = data[start]
            if not 0 < high < 0x80:
                break
            length += (high << 7) - 0x80
            start += 1
        end = start + length
        if end > available or end - position > most:
            break
        qos, retain, dup = flags
        topic_end = start + 2 + (data[start] << 8 | data[start + 1])
        payload = topic_end
        identifier = 0
        if qos:
            payload += 2
            if payload > end:
                break
            identifier = data[topic_end] << 8 | data[topic_end + 1]
            if not identifier:
                break
        if has_properties:
            if payload >= end or data[payload]:
                break
            payload += 1
        if payload > end:
            break
        raw = data[start + 2 : topic_end]
        topic = _topics.get(raw) or _read_topic(raw)
        if topic is None:
            break
        packets.append(Publish(topic, data[payload:end], qos, retain, dup, identifier))
        position = end
    return position


def _read_topic(raw: bytes) -> str | None:
    try:
        topic = raw.decode()
    except UnicodeDecodeError:
        return None
    if topic_problem(topic):
        return None
    if len(raw) <= _REMEMBERED_LENGTH:
        if len(_topics) >= _REMEMBERED:
            _topics.clear()
        _topics[raw] = topic
    return topic
