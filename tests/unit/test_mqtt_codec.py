"""The MQTT codec: round trips for every packet and version, and what is malformed."""

from __future__ import annotations

import msgspec
import pytest
from gatelet.simulator.mqtt import codec
from gatelet.simulator.mqtt import properties as at
from gatelet.simulator.mqtt.codec import Decoder, MalformedPacket, decode, encode
from gatelet.simulator.mqtt.packets import (
    V5,
    V311,
    Auth,
    ConnAck,
    Connect,
    Disconnect,
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
from hypothesis import given, settings
from hypothesis import strategies as st

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
binary = st.binary(max_size=12)
byte01 = st.integers(0, 1)
two = st.integers(1, 65_535)
four = st.integers(1, 2**32 - 1)
topic = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0+#/"), max_size=4),
    min_size=1,
    max_size=4,
).map("/".join)
topic = topic.filter(lambda value: value != "")
topic_filter = topic | st.sampled_from(["#", "+", "a/+/b", "a/#", "$share/g/a/#", "+/+", "/"])
packet_id = st.integers(1, 65_535)
qos = st.integers(0, 2)

VALUES = {
    "payload_format_indicator": byte01,
    "message_expiry_interval": four,
    "content_type": text,
    "response_topic": topic,
    "correlation_data": binary,
    "session_expiry_interval": four,
    "assigned_client_identifier": text,
    "server_keep_alive": two,
    "request_problem_information": byte01,
    "will_delay_interval": four,
    "request_response_information": byte01,
    "response_information": text,
    "server_reference": text,
    "reason_string": text,
    "receive_maximum": two,
    "topic_alias_maximum": two,
    "topic_alias": two,
    "maximum_qos": byte01,
    "retain_available": byte01,
    "maximum_packet_size": four,
    "wildcard_subscription_available": byte01,
    "subscription_identifier_available": byte01,
    "shared_subscription_available": byte01,
    "authentication_method": text,
    "authentication_data": binary,
    "user_properties": st.lists(st.tuples(text, text), max_size=3).map(tuple),
}


@st.composite
def properties(draw: st.DrawFn, kind: int) -> Properties:
    found = {}
    for _, name, _, where in at._ROWS:
        if kind not in where or not draw(st.booleans()):
            continue
        if name == "subscription_identifiers":
            most = 1 if kind == at.SUBSCRIBE else 3
            numbers = st.lists(st.integers(1, 268_435_455), max_size=most)
            found[name] = draw(numbers.map(tuple))
        else:
            found[name] = draw(VALUES[name])
    if "authentication_data" in found:
        found.setdefault("authentication_method", "")
    return Properties(**found)


@st.composite
def packets(draw: st.DrawFn, version: int):
    def props(kind: int) -> Properties:
        return draw(properties(kind)) if version == V5 else Properties()

    def code(codes: frozenset[int]) -> int:
        return draw(st.sampled_from(sorted(codes))) if version == V5 else 0

    kind = draw(st.sampled_from([k for k in range(1, 16) if version == V5 or k != at.AUTH]))
    if kind == at.CONNECT:
        username = draw(st.none() | text)
        password = draw(st.none() | binary) if version == V5 or username is not None else None
        will = None
        if draw(st.booleans()):
            retain = draw(st.booleans())
            will = Will(draw(topic), draw(binary), draw(qos), retain, props(at.WILL))
        return Connect(
            draw(text),
            version,
            draw(st.booleans()),
            draw(st.integers(0, 65_535)),
            username,
            password,
            will,
            props(kind),
        )
    if kind == at.CONNACK:
        codes = codec._CONNACK_CODES if version == V5 else range(6)
        reason = draw(st.sampled_from(sorted(codes)))
        return ConnAck(not reason and draw(st.booleans()), reason, props(kind))
    if kind == at.PUBLISH:
        level = draw(qos)
        return Publish(
            draw(topic),
            draw(st.binary(max_size=300)),
            level,
            draw(st.booleans()),
            bool(level) and draw(st.booleans()),
            draw(packet_id) if level else 0,
            props(kind),
        )
    if kind in codec._ACK_TYPES:
        release = kind in (at.PUBREL, at.PUBCOMP)
        reason = code(codec._RELEASE_CODES if release else codec._ACK_CODES)
        return codec._ACK_TYPES[kind](draw(packet_id), reason, props(kind))
    if kind == at.SUBSCRIBE:
        wanted = []
        for name in draw(st.lists(topic_filter, min_size=1, max_size=4)):
            v5 = version == V5
            wanted.append(
                Subscription(
                    name,
                    draw(qos),
                    v5 and not name.startswith("$share") and draw(st.booleans()),
                    v5 and draw(st.booleans()),
                    draw(qos) if v5 else 0,
                )
            )
        return Subscribe(draw(packet_id), tuple(wanted), props(kind))
    if kind == at.SUBACK:
        codes = sorted(codec._SUBACK_CODES) if version == V5 else [0, 1, 2, 0x80]
        reasons = draw(st.lists(st.sampled_from(codes), min_size=1, max_size=5))
        return SubAck(draw(packet_id), tuple(reasons), props(kind))
    if kind == at.UNSUBSCRIBE:
        names = draw(st.lists(topic_filter, min_size=1, max_size=4))
        return Unsubscribe(draw(packet_id), tuple(names), props(kind))
    if kind == at.UNSUBACK:
        reasons = []
        if version == V5:
            codes = st.sampled_from(sorted(codec._UNSUBACK_CODES))
            reasons = draw(st.lists(codes, min_size=1, max_size=5))
        return UnsubAck(draw(packet_id), tuple(reasons), props(kind))
    if kind == at.DISCONNECT:
        return Disconnect(code(codec._DISCONNECT_CODES), props(kind))
    if kind == at.AUTH:
        return Auth(code(codec._AUTH_CODES), props(kind))
    return PingReq() if kind == codec.PINGREQ else PingResp()


versioned = st.sampled_from([V311, V5]).flatmap(
    lambda version: st.tuples(st.just(version), st.lists(packets(version), max_size=4))
)


@given(versioned, st.data())
@settings(max_examples=300, deadline=None)
def test_packets_survive_any_split_of_their_bytes(case, data) -> None:
    version, sent = case
    stream = b"".join(encode(packet, version) for packet in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    decoder = Decoder(version=version)
    received = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += decoder.feed(stream[start:end])
    assert received == sent


@given(
    st.sampled_from([None, V311, V5]),
    st.lists(st.binary(max_size=60), max_size=3)
    | st.tuples(st.integers(0, 255), st.binary(max_size=40)).map(
        lambda pair: [bytes((pair[0], len(pair[1]))) + pair[1]]
    ),
)
@settings(max_examples=500, deadline=None)
def test_bytes_at_random_give_packets_or_malformed(version, chunks) -> None:
    decoder = Decoder(max_packet_size=200, version=version)
    for chunk in chunks:
        received, error = attempt(decoder, chunk)
        for packet in received:
            assert decode(encode(packet, decoder.version), decoder.version) == packet
        if error is not None:
            assert error.reason_code >= 0x80
            assert error.section
            assert attempt(decoder, b"")[1] is error


@given(versioned, st.integers(0, 10_000), st.integers(1, 255))
@settings(max_examples=300, deadline=None)
def test_one_flipped_byte_gives_packets_or_malformed(case, position, flip) -> None:
    version, sent = case
    stream = bytearray(b"".join(encode(packet, version) for packet in sent))
    if stream:
        stream[position % len(stream)] ^= flip
    received, error = attempt(Decoder(version=version), bytes(stream))
    assert len(received) <= len(stream) // 2
    assert error is None or error.reason_code >= 0x80


def attempt(decoder: Decoder, data: bytes) -> tuple[list, MalformedPacket | None]:
    try:
        return decoder.feed(data), None
    except MalformedPacket as error:
        return list(error.packets), error


def test_good_packets_before_a_bad_one_are_handed_over() -> None:
    decoder = Decoder(version=V311)
    with pytest.raises(MalformedPacket) as caught:
        decoder.feed(encode(PingReq(), V311) + b"\x00\x00")
    assert caught.value.packets == (PingReq(),)


def test_oversized_packet_is_refused_from_its_header() -> None:
    decoder = Decoder(max_packet_size=1000, version=V5)
    assert decoder.feed(b"\x30") == []
    with pytest.raises(MalformedPacket) as caught:
        decoder.feed(b"\xff\xff\x7f")
    assert caught.value.reason_code == ReasonCode.PACKET_TOO_LARGE


def test_a_packet_of_exactly_the_maximum_is_taken() -> None:
    packet = Publish("t", b"x" * 95)
    data = encode(packet, V311)
    assert Decoder(max_packet_size=len(data), version=V311).feed(data) == [packet]
    with pytest.raises(MalformedPacket):
        Decoder(max_packet_size=len(data) - 1, version=V311).feed(data)


def test_the_version_is_learned_from_connect() -> None:
    decoder = Decoder()
    sent = [Connect("d", V5), Publish("t", b"p", properties=Properties(content_type="x"))]
    assert decoder.feed(b"".join(encode(packet, V5) for packet in sent)) == sent
    assert decoder.version == V5


def string(value: str) -> bytes:
    return len(value).to_bytes(2, "big") + value.encode()


MALFORMED = {
    "type 0": (V311, b"\x00\x00", 0x81),
    "auth in 3.1.1": (V311, b"\xf0\x00", 0x81),
    "flags of subscribe [MQTT-3.8.1-1]": (V5, b"\x80\x07\x00\x01\x00\x00\x01a\x00", 0x81),
    "flags of pingreq": (V5, b"\xc1\x00", 0x81),
    "pingreq with a body": (V5, b"\xc0\x01\x00", 0x81),
    "length of five bytes": (V5, b"\x30\xff\xff\xff\xff\x01", 0x81),
    "length longer than needed [MQTT-1.5.5-1]": (V5, b"\x30\x80\x00", 0x81),
    "QoS 3 [MQTT-3.3.1-4]": (V5, b"\x36\x06\x00\x01a\x00\x01\x00", 0x81),
    "DUP with QoS 0 [MQTT-3.3.1-2]": (V5, b"\x38\x04\x00\x01a\x00", 0x81),
    "wildcard in a topic [MQTT-3.3.2-2]": (V5, b"\x30\x04\x00\x01#\x00", 0x90),
    "no topic and no alias": (V5, b"\x30\x03\x00\x00\x00", 0x82),
    "empty topic in 3.1.1 [MQTT-4.7.3-1]": (V311, b"\x30\x02\x00\x00", 0x82),
    "topic alias 0 [MQTT-3.3.2-8]": (V5, b"\x30\x07\x00\x01a\x03\x23\x00\x00", 0x94),
    "packet id 0 [MQTT-2.2.1-3]": (V5, b"\x32\x06\x00\x01a\x00\x00\x00", 0x82),
    "U+0000 [MQTT-1.5.4-2]": (V5, b"\x30\x04\x00\x01\x00\x00", 0x81),
    "surrogate [MQTT-1.5.4-1]": (V5, b"\x30\x06\x00\x03\xed\xa0\x80\x00", 0x81),
    "string past the end": (V5, b"\x30\x03\x00\x05a", 0x81),
    "property that does not exist": (V5, b"\x30\x05\x00\x01a\x01\x7f", 0x81),
    "property in the wrong packet": (V5, b"\x30\x07\x00\x01a\x03\x21\x00\x01", 0x82),
    "property twice": (V5, b"\x30\x08\x00\x01a\x04\x01\x00\x01\x00", 0x82),
    "property section past the end": (V5, b"\x30\x04\x00\x01a\x09", 0x81),
    "wildcard in a response topic [MQTT-3.3.2-14]": (
        V5,
        b"\x30\x08\x00\x01a\x04\x08\x00\x01#",
        0x90,
    ),
    "subscription identifier 0": (V5, b"\x82\x09\x00\x01\x02\x0b\x00\x00\x01a\x00", 0x82),
    "no topic filter [MQTT-3.8.3-2]": (V5, b"\x82\x03\x00\x01\x00", 0x82),
    "# in the middle [MQTT-4.7.1-1]": (V311, b"\x82\x08\x00\x01\x00\x03#/a\x00", 0x8F),
    "+ in a level [MQTT-4.7.1-2]": (V311, b"\x82\x07\x00\x01\x00\x02a+\x00", 0x8F),
    "subscription QoS 3": (V311, b"\x82\x06\x00\x01\x00\x01a\x03", 0x81),
    "5.0 options in 3.1.1 [MQTT-3-8.3-4]": (V311, b"\x82\x06\x00\x01\x00\x01a\x04", 0x81),
    "reserved options": (V5, b"\x82\x07\x00\x01\x00\x00\x01a\x40", 0x81),
    "retain handling 3": (V5, b"\x82\x07\x00\x01\x00\x00\x01a\x30", 0x82),
    "no local, shared [MQTT-3.8.3-4]": (
        V5,
        b"\x82\x10\x00\x01\x00" + string("$share/g/a") + b"\x04",
        0x82,
    ),
    "share without a filter [MQTT-4.8.2-1]": (
        V5,
        b"\x82\x0e\x00\x01\x00" + string("$share/g") + b"\x00",
        0x8F,
    ),
    "no unsubscribe filter [MQTT-3.10.3-2]": (V311, b"\xa2\x02\x00\x01", 0x82),
    "reason code unknown": (V5, b"\x40\x03\x00\x01\x55", 0x82),
    "3.1.1 acknowledgement too long": (V311, b"\x40\x03\x00\x01\x00", 0x81),
    "3.1.1 disconnect with a body": (V311, b"\xe0\x01\x00", 0x81),
    "connack session present on refusal [MQTT-3.2.2-6]": (V5, b"\x20\x03\x01\x87\x00", 0x81),
    "authentication data alone": (V5, b"\xf0\x06\x18\x04\x16\x00\x01a", 0x82),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str) -> None:
    version, data, reason = MALFORMED[name]
    with pytest.raises(MalformedPacket) as caught:
        Decoder(version=version).feed(data)
    assert caught.value.reason_code == reason, caught.value


def connect(flags: int, rest: bytes = b"\x00\x01d", name: str = "MQTT", level: int = 4) -> bytes:
    body = string(name) + bytes((level, flags)) + b"\x00\x00" + rest
    return bytes((0x10, len(body))) + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(connect(0x03), 0x81, id="reserved flag [MQTT-3.1.2-3]"),
        pytest.param(connect(0x12), 0x81, id="will QoS without will [MQTT-3.1.2-11]"),
        pytest.param(connect(0x22), 0x81, id="will retain without will [MQTT-3.1.2-13]"),
        pytest.param(connect(0x1E), 0x81, id="will QoS 3 [MQTT-3.1.2-12]"),
        pytest.param(connect(0x42), 0x81, id="password alone, 3.1.1 [MQTT-3.1.2-22]"),
        pytest.param(connect(0x82), 0x81, id="user name missing"),
        pytest.param(connect(0x02, b"\x00\x01dx"), 0x81, id="bytes too many"),
        pytest.param(connect(0x02, name="MQIsdp", level=3), 0x84, id="3.1"),
        pytest.param(connect(0x02, level=6), 0x84, id="level 6"),
        pytest.param(connect(0x02, name="HTTP"), 0x84, id="other protocol [MQTT-3.1.2-1]"),
    ],
)
def test_malformed_connect(data: bytes, reason: int) -> None:
    with pytest.raises(MalformedPacket) as caught:
        Decoder().feed(data)
    assert caught.value.reason_code == reason


@pytest.mark.parametrize(
    ("packet", "version"),
    [
        (Publish("t" * 65_536), V5),
        (Publish(""), V5),
        (Publish("a/#"), V5),
        (Publish("t", qos=1), V5),
        (Publish("t", qos=3, packet_id=1), V5),
        (Publish("t", properties=Properties(receive_maximum=1)), V5),
        (Publish("t", properties=Properties(message_expiry_interval=2**32)), V5),
        (Subscribe(1, ()), V5),
        (Subscribe(1, (Subscription("a+"),)), V311),
        (Connect("d", V311, password=b"p"), V311),
        (Connect("d", V5), V311),
        (Connect("d", V5, keepalive=70_000), V5),
        (Auth(), V311),
        (PubAck(0), V5),
        (PubRec(65_536), V5),
        (PubRel(0), V311),
        (PubComp(0), V311),
        (Disconnect(300), V5),
    ],
)
def test_what_has_no_bytes_is_a_value_error(packet, version) -> None:
    with pytest.raises(ValueError):
        encode(packet, version)


def test_known_bytes() -> None:
    """Against vectors worked out by hand from the specification, not from our own encoder."""
    data = bytes.fromhex("100c00044d51545404020 03c0000".replace(" ", ""))
    assert decode(data) == Connect("", V311, True, 60)
    assert encode(Publish("a/b", b"hi", 1, packet_id=10), V311).hex() == "32090003612f62000a6869"
    assert encode(PubAck(10, 0x10), V5).hex() == "4003000a10"
    will = msgspec.structs.replace(Connect("d", V5), will=Will("w", b"x", 1, True))
    assert encode(will, V5).hex() == "101500044d515454052e0000000001640000017700017 8".replace(
        " ", ""
    )
