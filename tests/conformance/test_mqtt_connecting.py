"""CONNECT, CONNACK, PINGREQ and AUTH, by the numbers of the specifications."""

from __future__ import annotations

import asyncio
import string as characters

import pytest
from gatelet.simulator.mqtt.access import Grant
from gatelet.simulator.mqtt.codec import encode
from gatelet.simulator.mqtt.connection import Limits
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
    Publish,
    ReasonCode,
    Subscribe,
    Subscription,
)
from mqtt_peer import both, covers, frame, properties, raw_connect, running, string, until


@covers("3.1.0-1 3.1.4-5 4.8.0-1", "3.1.0-1 3.14.0-1 4.13.1-1")
@both
@pytest.mark.parametrize(
    "packet",
    [PingReq(), Publish("t"), Subscribe(1, (Subscription("t"),)), Disconnect(), ConnAck()],
    ids=lambda packet: type(packet).__name__,
)
async def test_the_first_packet_must_be_connect(version: int, packet) -> None:
    async with running() as site:
        peer = await site.open(version)
        await peer.raw(encode(packet, V311) + raw_connect(version))
        packets = await peer.rest()
        # 5.0 allows a refusal; DISCONNECT would be for clients that were let in.
        refusals = [p for p in packets if isinstance(p, ConnAck) and p.reason_code >= 0x80]
        assert packets == (refusals if version == V5 else [])
        assert site.broker.client_ids == set()


@covers("3.1.0-2 4.8.0-1 4.1.0-2", "3.1.0-2 3.2.0-2 4.13.1-1")
@both
async def test_a_second_connect(version: int) -> None:
    async with running() as site:
        peer = await site.connect(version=version)
        await peer.send(Connect("c", version))
        await peer.refused(ReasonCode.PROTOCOL_ERROR)


@covers("3.1.2-1", "3.1.2-1")
@both
@pytest.mark.parametrize("name", [b"MQTX", b"mqtt", b"", b"MQTTT", b"MQIsdp"])
async def test_wrong_protocol_names(version: int, name: bytes) -> None:
    async with running() as site:
        peer = await site.open(V311)
        await peer.raw(raw_connect(version, name=name) + encode(PingReq(), version))
        assert await peer.rest() in ([], [ConnAck(False, 1)])
        assert site.broker.client_ids == set()


@covers("3.1.2-2", "3.1.2-2")
@pytest.mark.parametrize("level", [1, 3, 6, 0x84, 255])
async def test_unknown_protocol_levels(level: int) -> None:
    async with running() as site:
        peer = await site.open(V311)
        await peer.raw(raw_connect(V311, level=level))
        assert await peer.rest() == [ConnAck(False, 1)]
        assert peer.seen == b"\x20\x02\x00\x01"


WILL = string(b"w") + string(b"gone")
MALFORMED = {
    "reserved flag": (3, string(b"c"), "3.1.2-3", "3.1.2-3"),
    "will flag without will": (6, string(b"c"), "3.1.2-9", "3.1.2-9"),
    "will QoS without will": (2 | 8, string(b"c"), "3.1.2-11 3.1.2-13", "3.1.2-11"),
    "will QoS 2 without will": (2 | 16, string(b"c"), "3.1.2-13", "3.1.2-11"),
    "will retain without will": (2 | 32, string(b"c"), "3.1.2-15", "3.1.2-13"),
    "will without flag": (2, string(b"c") + WILL, "3.1.2-11", "3.1.3-1"),
    "will QoS 3": (6 | 24, string(b"c") + WILL, "3.1.2-14", "3.1.2-12"),
    "user name without flag": (2, string(b"c") + string(b"u"), "3.1.2-18", "3.1.2-16"),
    "user name flag alone": (0x82, string(b"c"), "3.1.2-19", "3.1.2-17"),
    "password without flag": (
        0x82,
        string(b"c") + string(b"u") + string(b"p"),
        "3.1.2-20",
        "3.1.2-18",
    ),
    "password flag alone": (0xC2, string(b"c") + string(b"u"), "3.1.2-21", "3.1.2-19"),
    "no client id": (2, b"", "3.1.3-3", "3.1.3-3"),
    "client id not UTF-8": (2, string(b"\xff\xfe"), "3.1.3-4 1.5.3-1", "3.1.3-4 1.5.4-1"),
    "client id with a surrogate": (2, string(b"\xed\xa0\x80"), "1.5.3-1", "1.5.4-1"),
    "client id with U+0000": (2, string(b"a\0b"), "1.5.3-2", "1.5.4-2"),
    "user name not UTF-8": (0x82, string(b"c") + string(b"\xc0\xaf"), "3.1.3-11", "3.1.3-12"),
}


@pytest.mark.parametrize(
    ("flags", "payload"),
    [
        pytest.param(
            flags, payload, id=name, marks=covers(f"{v311} 3.1.4-1", f"{v5} 3.1.4-1 4.13.1-1")
        )
        for name, (flags, payload, v311, v5) in MALFORMED.items()
    ],
)
@both
async def test_malformed_connects(version: int, flags: int, payload: bytes) -> None:
    if version == V5 and flags & 4:
        payload = payload.replace(WILL, b"\0" + WILL)
    async with running() as site:
        peer = await site.open(version)
        await peer.raw(raw_connect(version, flags, payload) + encode(PingReq(), version))
        packets = await peer.rest()
        if version == V311:
            assert packets == []
        else:
            assert [type(packet) for packet in packets] == [ConnAck]
            assert packets[0].reason_code >= 0x80
        assert site.broker.client_ids == set()


@covers("3.1.2-22")
async def test_a_password_needs_a_user_name_in_311() -> None:
    async with running() as site:
        old, new = await site.open(V311), await site.open(V5)
        payload = string(b"c") + string(b"p")
        await old.raw(raw_connect(V311, 0x42, payload))
        assert await old.rest() == []
        await new.raw(raw_connect(V5, 0x42, payload))
        assert (await new.receive()).reason_code == 0


@covers("3.1.3-1 3.1.2-9 3.1.2-19 3.1.2-21", "3.1.3-1 3.1.2-9 3.1.2-17 3.1.2-19")
@both
async def test_all_fields_in_their_order(version: int) -> None:
    async with running(users={"user": "word"}) as site:
        watcher = await site.connect("w", version, username="user", password=b"word")
        await watcher.subscribe("t")
        peer = await site.open(version)
        will = properties(version) + string(b"t") + string(b"gone")
        payload = string(b"c") + will + string(b"user") + string(b"word")
        await peer.raw(raw_connect(version, 0xC6, payload))
        assert (await peer.receive()).reason_code == 0
        assert "c" in site.broker.client_ids
        await peer.vanish(site)
        assert await watcher.receive() == Publish("t", b"gone")


@covers("3.1.3-5 3.1.4-4 7.0.0-2 7.1.1-1 7.1.1-2", "3.1.3-5 3.1.4-5 4.2-1")
@both
async def test_all_plain_client_ids_are_taken(version: int) -> None:
    alphabet = characters.digits + characters.ascii_letters
    async with running() as site:
        for client_id in [*alphabet, alphabet[:23], alphabet[-23:]]:
            peer = await site.connect(client_id, version)
            assert peer.connack.reason_code == 0
            assert client_id in site.broker.client_ids


@covers("3.1.3-6", "3.1.3-6 3.1.3-7 3.2.2-16")
@both
async def test_empty_client_ids_are_replaced(version: int) -> None:
    async with running() as site:
        first, second = await site.connect("", version), await site.connect("", version)
        assert len(site.broker.client_ids) == 2
        for peer in (first, second):
            assert peer.connack.reason_code == 0
            await peer.subscribe("t")
            await peer.quiet()
        if version == V5:
            names = {p.connack.properties.assigned_client_identifier for p in (first, second)}
            assert names == site.broker.client_ids


@covers("3.1.3-8 3.1.3-9 3.2.2-4 3.2.2-5", "3.1.3-8 3.2.2-6 3.2.2-7 3.2.2-8 4.13.2-1")
@both
async def test_refused_client_ids(version: int) -> None:
    async with running(users={"a": "", "b": ""}) as site:
        if version == V311:
            peer = await site.connect("", V311, clean=False, username="a", password=b"")
            assert peer.connack == ConnAck(False, 2)
            assert await peer.rest() == []
        await site.lasting("mine", version, username="a", password=b"")
        peer = await site.connect("mine", version, False, username="b", password=b"")
        assert not peer.connack.session_present
        assert peer.connack.reason_code == (2 if version == V311 else 0x85)
        assert await peer.rest() == []


@covers(
    "3.1.4-5 3.2.2-4 3.2.2-5", "3.1.4-2 3.1.4-6 3.2.2-6 3.2.2-7 3.2.2-8 4.12.0-4 4.13.2-1 3.14.0-1"
)
@both
async def test_nothing_is_processed_after_a_refusal(version: int) -> None:
    async with running(users={"u": "p"}) as site:
        peer = await site.open(version)
        await peer.send(
            Connect("c", version, username="u", password=b"wrong"),
            Publish("t", b"x", 1, True, packet_id=1),
            PingReq(),
        )
        packets = await peer.rest()
        assert [type(packet) for packet in packets] == [ConnAck]
        assert packets[0].reason_code == (4 if version == V311 else 0x86)
        assert not packets[0].session_present
        assert site.broker.retained == {}


@covers("", "3.2.2-9 3.2.2-10")
@pytest.mark.parametrize("most", [0, 1])
async def test_a_lower_maximum_qos(most: int) -> None:
    async with running(limits=Limits(maximum_qos=most)) as site:
        peer = await site.connect()
        assert peer.connack.properties.maximum_qos == most
        wanted = [Subscription(f"t/{qos}", qos) for qos in range(3)]
        assert await peer.subscribe(*wanted) == tuple(min(qos, most) for qos in range(3))
        site.broker.publish("t/2", b"x", 2)
        assert (await peer.receive()).qos == most


@covers("3.2.0-1", "3.2.0-1 3.2.0-2 3.2.2-1")
@both
async def test_connack_comes_first_and_once(version: int) -> None:
    async with running() as site:
        away = await site.lasting("c", version)
        await away.subscribe("t")
        await away.leave()
        await site.gone("c")
        site.broker.publish("t", b"waiting", 1)
        back = await site.open(version)
        expiry = Properties(session_expiry_interval=9) if version == V5 else Properties()
        # All in one write: the server could answer the ping first.
        await back.send(Connect("c", version, False, properties=expiry), PingReq())
        packets = await back.receive_all(3)
        assert [type(packet) for packet in packets] == [ConnAck, Publish, PingResp]
        assert back.seen[0] == 0x20
        flags = back.seen[2]
        assert flags == 1
        await back.quiet()


@covers("", "3.1.2-28")
async def test_response_information_only_when_asked_for() -> None:
    async with running(response_prefix="responses/") as site:
        for asked, told in ((None, None), (0, None), (1, "responses/c")):
            wish = Properties(request_response_information=asked)
            peer = await site.connect("c", properties=wish)
            assert peer.connack.properties.response_information == told


@covers("", "3.1.2-29")
@pytest.mark.parametrize("wish", [0, 1])
async def test_no_explanations_on_acknowledgements(wish: int) -> None:
    async with running(grants=[Grant("open/#")]) as site:
        asked = Properties(request_problem_information=wish)
        peer = await site.connect("c", properties=asked)
        await peer.send(
            Publish("shut", b"", 1, packet_id=1),
            Publish("shut", b"", 2, packet_id=2),
            Subscribe(3, (Subscription("shut"),)),
        )
        answers = await peer.receive_all(3)
        for answer in answers:
            assert answer.properties == Properties()


@covers(
    "",
    "3.2.2-19 3.2.2-20 3.14.2-1 3.14.2-2 3.14.2-3 3.14.2-4 3.14.4-1 3.14.4-2 3.1.2-24",
)
@pytest.mark.parametrize("most", [23, 24, 30, 200])
async def test_explanations_never_exceed_the_maximum_packet_size(most: int) -> None:
    """Also our longest texts: the refusal of a client and the end of a connection."""
    small = Properties(maximum_packet_size=most)
    async with running(users={"u": "p"}) as site:
        refused = await site.open()
        await refused.send(Connect("c", V5, properties=small))
        answer = await refused.receive()
        assert answer.reason_code == ReasonCode.NOT_AUTHORIZED
        assert len(refused.seen) <= most
        assert bool(answer.properties.reason_string) == (most == 200)
        peer = await site.connect("c", username="u", password=b"p", properties=small)
        assert len(peer.seen) <= most
        peer.seen = b""
        await peer.raw(b"\x00\x00" + encode(PingReq(), V5))
        packets = await peer.rest()
        assert [type(packet) for packet in packets] == [Disconnect]
        assert packets[0].properties.session_expiry_interval is None
        assert len(peer.seen) <= most


@covers("", "3.1.2-24")
async def test_a_client_that_cannot_take_our_connack_is_let_go() -> None:
    async with running() as site:
        peer = await site.open()
        await peer.send(Connect("c", V5, properties=Properties(maximum_packet_size=5)))
        assert await peer.rest() == []
        assert peer.seen == b""
        await until(lambda: not site.broker.client_ids)


@covers("", "4.12.0-1 4.12.0-4 4.13.2-1")
async def test_unknown_authentication_methods() -> None:
    async with running() as site:
        peer = await site.open()
        wish = Properties(authentication_method="SCRAM", authentication_data=b"x")
        await peer.send(Connect("c", V5, properties=wish), Auth(0x18, wish))
        packets = await peer.rest()
        assert [type(packet) for packet in packets] == [ConnAck]
        assert packets[0].reason_code == ReasonCode.BAD_AUTHENTICATION_METHOD


@covers("", "4.12.0-6 3.15.1-1")
@pytest.mark.parametrize(
    "data", [encode(Auth(0x19), V5), encode(Auth(0x18), V5), b"\xf1\x00", b"\xff\x00"]
)
async def test_auth_without_a_method(data: bytes) -> None:
    async with running() as site:
        peer = await site.connect()
        assert peer.connack.properties.authentication_method is None
        await peer.raw(data)
        await peer.refused(ReasonCode.PROTOCOL_ERROR, ReasonCode.MALFORMED_PACKET)
        assert 0xF0 not in peer.seen[:1]


@covers("3.12.4-1", "3.12.4-1")
@both
async def test_pings_are_answered(version: int) -> None:
    async with running() as site:
        peer = await site.connect(version=version)
        peer.seen = b""
        await peer.send(PingReq(), PingReq(), PingReq())
        assert await peer.receive_all(3) == [PingResp()] * 3
        assert peer.seen == b"\xd0\x00" * 3


@covers("4.8.0-2")
@both
async def test_a_failure_inside_ends_the_connection(version: int) -> None:
    reported = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    async with running() as site:

        def broken(*_: object) -> None:
            raise RuntimeError("out of order")

        peer, other = await site.connect("a", version), await site.connect("b", version)
        site.broker.on_publish = broken
        await peer.send(Publish("t", b"x", 1, packet_id=1))
        assert await peer.rest() == []
        await other.quiet()
    assert [str(context["exception"]) for context in reported] == ["out of order"]


@covers("", "2.2.2-1 1.5.5-1")
async def test_property_lengths() -> None:
    async with running() as site:
        peer = await site.connect()
        await peer.raw(frame(0x82, b"\x00\x01", b"\x00", string(b"t"), b"\x00"))
        assert (await peer.receive()).packet_id == 1
        assert peer.seen.endswith(b"\x90\x04\x00\x01\x00\x00")
        # 0x80 0x00 is a zero of two bytes.
        await peer.raw(frame(0x82, b"\x00\x01", b"\x80\x00", string(b"t"), b"\x00"))
        await peer.refused(ReasonCode.MALFORMED_PACKET)
        long_header = await site.connect()
        await long_header.raw(b"\xc0\x80\x00")
        await long_header.refused(ReasonCode.MALFORMED_PACKET)
