"""SUBSCRIBE, UNSUBSCRIBE, matching and websockets, by the numbers of the specifications."""

from __future__ import annotations

import aiohttp
import pytest
from gatelet.simulator.mqtt.access import Grant
from gatelet.simulator.mqtt.codec import Decoder, encode
from gatelet.simulator.mqtt.packets import (
    V5,
    V311,
    ConnAck,
    Connect,
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
)
from mqtt_peer import both, covers, frame, properties, publishes, running, string

BAD_FILTERS = {
    "not UTF-8": (b"\xff", "3.8.3-1 1.5.3-1", "3.8.3-1 1.5.4-1"),
    "a surrogate": (b"\xed\xa0\x80", "3.8.3-1 1.5.3-1", "3.8.3-1 1.5.4-1"),
    "U+0000": (b"a\0", "4.7.3-2 1.5.3-2", "4.7.3-2 1.5.4-2"),
    "empty": (b"", "4.7.3-1", "4.7.3-1"),
    "# not last": (b"a/#/b", "4.7.1-2", "4.7.1-1"),
    "# not alone": (b"a#", "4.7.1-2", "4.7.1-1"),
    "# before something": (b"#a", "4.7.1-2", "4.7.1-1"),
    "+ after something": (b"a+", "4.7.1-3", "4.7.1-2"),
    "+ before something": (b"a/+b/c", "4.7.1-3", "4.7.1-2"),
    "two +": (b"++", "4.7.1-3", "4.7.1-2"),
    "no share name": (b"$share//t", "4.8.0-1", "4.8.2-1"),
    "no filter to share": (b"$share/g", "4.8.0-1", "4.8.2-2"),
    "an empty filter to share": (b"$share/g/", "4.8.0-1", "4.8.2-2"),
    "+ in the share name": (b"$share/a+/t", "4.8.0-1", "4.8.2-2"),
    "# in the share name": (b"$share/#/t", "4.8.0-1", "4.8.2-2"),
}


@pytest.mark.parametrize(
    "topic_filter",
    [
        pytest.param(raw, id=name, marks=covers(f"{v311} 4.8.0-1", f"{v5} 4.13.1-1"))
        for name, (raw, v311, v5) in BAD_FILTERS.items()
    ],
)
@both
async def test_malformed_filters(version: int, topic_filter: bytes) -> None:
    async with running() as site:
        peer = await site.connect(version=version)
        head = b"\0\1" + properties(version)
        await peer.raw(frame(0x82, head, string(topic_filter), b"\0"))
        await peer.refused()


@covers("3.10.3-1", "3.10.3-1")
@both
@pytest.mark.parametrize("topic_filter", [b"\xff", b"a\0", b"\xed\xa0\x80"])
async def test_malformed_filters_to_unsubscribe(version: int, topic_filter: bytes) -> None:
    async with running() as site:
        peer = await site.connect(version=version)
        await peer.raw(frame(0xA2, b"\0\1", properties(version), string(topic_filter)))
        await peer.refused()


REQUESTS = {
    "SUBSCRIBE without filter": (0x82, b"", "3.8.3-3", "3.8.3-2"),
    "UNSUBSCRIBE without filter": (0xA2, b"", "3.10.3-2", "3.10.3-2"),
    "QoS 3": (0x82, string(b"t") + b"\3", "3.8.3-4", "3.8.3-5"),
    "highest reserved bits": (0x82, string(b"t") + b"\xc0", "3.8.3-4", "3.8.3-5"),
    "one reserved bit": (0x82, string(b"t") + b"\x40", "3.8.3-4", "3.8.3-5"),
    "retain handling 3": (0x82, string(b"t") + b"\x30", "3.8.3-4", "4.13.1-1"),
    "no options": (0x82, string(b"t"), "4.8.0-1", "3.8.3-2"),
    "no local, shared": (0x82, string(b"$share/g/t") + b"\4", "3.8.3-4", "3.8.3-4"),
    "cut short": (0x82, b"\0\5t", "4.8.0-1", "4.13.1-1"),
}


@pytest.mark.parametrize(
    ("first", "payload"),
    [
        pytest.param(first, payload, id=name, marks=covers(v311, v5))
        for name, (first, payload, v311, v5) in REQUESTS.items()
    ],
)
@both
async def test_malformed_requests(version: int, first: int, payload: bytes) -> None:
    async with running() as site:
        peer = await site.connect(version=version)
        await peer.raw(frame(first, b"\0\1", properties(version), payload))
        await peer.refused()


@covers("3.8.3-4")
@pytest.mark.parametrize("option", [4, 8, 0x10, 0x20])
async def test_options_of_5_are_reserved_in_311(option: int) -> None:
    async with running() as site:
        peer = await site.connect(version=V311)
        await peer.raw(frame(0x82, b"\0\1", string(b"t"), bytes((option,))))
        assert await peer.rest() == []


@both
@pytest.mark.parametrize("flags", [0, 1, 3, 10, 15])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(0x80, marks=covers("3.8.1-1 2.2.2-2", "3.8.1-1 2.1.3-1")),
        pytest.param(0xA0, marks=covers("3.10.1-1 2.2.2-2", "3.10.1-1 2.1.3-1")),
    ],
)
async def test_request_flags(version: int, kind: int, flags: int) -> None:
    async with running() as site:
        peer = await site.connect(version=version)
        await peer.raw(frame(kind | flags, b"\0\1", properties(version), string(b"t"), b"\0"))
        await peer.refused(ReasonCode.MALFORMED_PACKET)


@covers("2.3.1-1", "4.13.1-1")
@both
@pytest.mark.parametrize("first", [0x82, 0xA2])
async def test_identifier_0_of_requests(version: int, first: int) -> None:
    options = b"\0" if first == 0x82 else b""
    async with running() as site:
        peer = await site.connect(version=version)
        await peer.raw(frame(first, b"\0\0", properties(version), string(b"t"), options))
        await peer.refused()


@covers(
    "2.3.1-7 3.8.4-1 3.8.4-2 3.8.4-4 3.8.4-5 3.9.3-1 3.9.3-2 2.2.2-1",
    "2.2.1-6 3.8.4-1 3.8.4-2 3.8.4-5 3.8.4-6 3.8.4-7 3.9.3-1 3.9.3-2",
)
@both
async def test_answers_to_subscribe(version: int) -> None:
    async with running(grants=[Grant("t/#")]) as site:
        peer = await site.connect(version=version)
        await peer.receive_all(0)
        peer.seen = b""
        wanted = ["t/0", "no", "t/2", "t/1", "no/#", "t/0/#"]
        qos = [0, 0, 2, 1, 2, 0]
        request = tuple(Subscription(f, q) for f, q in zip(wanted, qos, strict=True))
        await peer.send(Subscribe(0xABCD, request))
        answer = await peer.receive()
        refused = 0x80 if version == V311 else ReasonCode.NOT_AUTHORIZED
        assert answer == SubAck(0xABCD, (0, refused, 2, 1, refused, 0))
        assert peer.seen[:1] == b"\x90"
        assert b"\xab\xcd" in peer.seen
        for topic in ("t/0", "t/1", "t/2", "no", "no/x"):
            site.broker.publish(topic, topic.encode(), 0)
        assert [p.topic for p in publishes(await peer.until_ping())] == ["t/0", "t/1", "t/2"]


@covers("3.8.4-3 3.3.1-6 3.3.1-8", "3.8.4-3 3.8.4-4 3.3.1-9")
@both
async def test_the_same_filter_replaces_the_subscription(version: int) -> None:
    async with running() as site:
        site.broker.publish("t", b"kept", 1, retain=True)
        peer = await site.connect(version=version)
        for qos in (1, 0, 2):
            assert await peer.subscribe(Subscription("t", qos)) == (qos,)
            kept = await peer.receive()
            assert (kept.payload, kept.retain, kept.qos) == (b"kept", True, min(qos, 1))
            site.broker.publish("t", b"live", 2)
            live = publishes(await peer.until_ping())
            assert [(message.payload, message.qos) for message in live] == [(b"live", qos)]
        # Messages that wait for an acknowledgement or for the window are not lost by it.
        assert site.broker._sessions["c"].pending == 4


@covers("3.3.5-1", "3.3.4-2 3.3.4-3 3.3.4-4")
@both
async def test_overlapping_filters(version: int) -> None:
    async with running() as site:
        peer = await site.connect(version=version)
        for identifier, (topic_filter, qos) in enumerate((("a/#", 0), ("a/+", 2), ("+/b", 1)), 5):
            more = {"subscription_identifiers": (identifier,)} if version == V5 else {}
            await peer.subscribe(Subscription(topic_filter, qos), **more)
        await peer.subscribe(Subscription("a/b", 0))
        site.broker.publish("a/b", b"x", 2)
        (message,) = publishes(await peer.until_ping())
        assert message.qos == 2
        wanted = [5, 6, 7] if version == V5 else []
        assert sorted(message.properties.subscription_identifiers) == wanted


@covers("", "3.3.1-9 3.3.1-10 3.3.1-11")
@pytest.mark.parametrize("handling", [0, 1, 2])
async def test_retain_handling(handling: int) -> None:
    async with running() as site:
        site.broker.publish("t", b"kept", retain=True)
        peer = await site.connect()
        arrived = []
        for _ in range(2):
            await peer.subscribe(Subscription("t", 0, retain_handling=handling))
            arrived.append(len(publishes(await peer.until_ping())))
        assert arrived == {0: [1, 1], 1: [1, 0], 2: [0, 0]}[handling]


@covers("", "3.8.3-3")
@pytest.mark.parametrize("no_local", [False, True])
async def test_no_local(no_local: bool) -> None:
    async with running() as site:
        peer, other = await site.connect("c"), await site.connect("other")
        for one in (peer, other):
            await one.subscribe(Subscription("t", 0, no_local=no_local))
        await peer.send(Publish("t", b"x"))
        assert len(publishes(await peer.until_ping())) == (not no_local)
        assert (await other.receive()).payload == b"x"


@covers(
    "3.10.4-1 3.10.4-2 3.10.4-4 3.10.4-5 3.10.4-6 2.3.1-7",
    "3.10.4-1 3.10.4-2 3.10.4-4 3.10.4-5 3.10.4-6 3.11.3-1 3.11.3-2 2.2.1-6",
)
@both
async def test_answers_to_unsubscribe(version: int) -> None:
    async with running() as site:
        peer = await site.connect(version=version)
        await peer.subscribe("a/+", "a/#", "b", "é")
        await peer.send(
            Unsubscribe(0xABCD, ("a/b", "a/+", "B", "e\u0301", "b", "b", "$share/g/a/#"))
        )
        codes = (0x11, 0, 0x11, 0x11, 0, 0x11, 0x11) if version == V5 else ()
        assert await peer.receive() == UnsubAck(0xABCD, codes)
        for topic in ("a/x", "b", "é"):
            site.broker.publish(topic, b"")
        assert [p.topic for p in publishes(await peer.until_ping())] == ["a/x", "é"]
        await peer.send(Unsubscribe(7, ("nothing",)))
        assert await peer.receive() == UnsubAck(7, codes[:1])
        if version == V311:
            assert peer.seen.endswith(b"\xb0\x02\x00\x07")


@covers("3.10.4-2 3.10.4-3", "3.10.4-2 3.10.4-3")
@both
async def test_what_was_begun_is_completed_after_unsubscribe(version: int) -> None:
    async with running() as site:
        peer = await site.lasting("c", version)
        await peer.subscribe("t")
        site.broker.publish("t", b"1", 1)
        site.broker.publish("t", b"2", 2)
        one, two = await peer.receive_all(2)
        await peer.send(Unsubscribe(1, ("t",)))
        await peer.receive()
        site.broker.publish("t", b"3", 2)
        await peer.quiet()
        await peer.vanish(site)
        peer = await site.lasting("c", version)
        again = await peer.receive_all(2)
        assert [(m.payload, m.packet_id, m.dup) for m in again] == [
            (b"1", one.packet_id, True),
            (b"2", two.packet_id, True),
        ]
        await peer.send(PubAck(one.packet_id), PubRec(two.packet_id))
        assert await peer.receive() == PubRel(two.packet_id)
        await peer.send(PubComp(two.packet_id))
        await peer.quiet()
        assert site.broker._sessions["c"].pending == 0


# Matching

MATCHES = [
    ("a/b", "a/b", True), ("a/b", "a/B", False), ("a/b", "/a/b", False), ("a/b", "a/b/", False),
    ("a/#", "a", True), ("a/#", "a/b/c", True), ("a/#", "ab", False), ("#", "a/b", True),
    ("#", "/", True), ("+", "a", True), ("+", "a/b", False), ("+", "/a", False),
    ("+/+", "/a", True), ("/+", "/a", True), ("a/+", "a/", True), ("a/+", "a", False),
    ("a/+/c", "a//c", True), ("a/+/#", "a/b", True), ("a/+/#", "a", False),
]  # fmt: skip
DOLLAR = [
    ("#", "$SYS/a", False), ("+/a", "$SYS/a", False), ("+/#", "$SYS/a", False),
    ("$SYS/#", "$SYS/a", True), ("$SYS/+", "$SYS/a", True), ("a/+", "a/$b", True),
    ("#", "a/$b", True), ("$share/g/#", "$SYS/a", False), ("$share/g/$SYS/a", "$SYS/a", True),
]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        *(
            pytest.param(case, marks=covers("3.3.2-3 4.7.3-4", "3.3.2-3 4.7.3-4"))
            for case in MATCHES
        ),
        *(pytest.param(case, marks=covers("4.7.2-1", "4.7.2-1")) for case in DOLLAR),
    ],
    ids=lambda case: f"{case[0]}~{case[1]}",
)
@both
async def test_matching(version: int, case: tuple[str, str, bool]) -> None:
    topic_filter, topic, expected = case
    async with running() as site:
        peer = await site.connect(version=version)
        await peer.subscribe(Subscription(topic_filter))
        await peer.send(Publish(topic, b"x"))
        assert publishes(await peer.until_ping()) == [Publish(topic, b"x")] * expected
        # Retained messages are matched by other code.
        late = await site.connect("late", version)
        await late.send(Publish(topic, b"x", 0, True))
        await late.subscribe(Subscription(topic_filter))
        shared = topic_filter.startswith("$share")
        assert len(publishes(await late.until_ping())) == (expected and not shared)


# Shared subscriptions


@covers("", "4.8.2-1 4.8.2-2 4.8.2-3")
@both
async def test_shared_deliveries(version: int) -> None:
    async with running() as site:
        members = {}
        for qos in range(3):
            members[qos] = await site.connect(f"m{qos}", version)
            assert await members[qos].subscribe(Subscription("$share/g/a/+", qos)) == (qos,)
        for number in range(9):
            site.broker.publish("a/b", b"%d" % number, 2)
        taken = []
        for qos, member in members.items():
            messages = publishes(await member.until_ping())
            assert {message.qos for message in messages} == {qos}
            taken += [message.payload for message in messages]
        assert sorted(taken) == [b"%d" % number for number in range(9)]


@covers("", "4.8.2-4 4.8.2-5")
async def test_a_begun_shared_delivery_stays_with_its_client() -> None:
    async with running() as site:
        chosen, other = await site.lasting("chosen"), await site.connect("other")
        await chosen.subscribe("$share/g/t")
        site.broker.publish("t", b"1", 2)
        site.broker.publish("t", b"2", 2)
        first, second = await chosen.receive_all(2)
        await chosen.send(PubRec(first.packet_id))
        await chosen.receive()
        await other.subscribe("$share/g/t")
        await chosen.vanish(site)
        await other.quiet()
        chosen = await site.lasting("chosen")
        again = await chosen.receive_all(2)
        assert PubRel(first.packet_id) in again
        assert publishes(again) == [Publish("t", b"2", 2, False, True, second.packet_id)]
        await chosen.vanish(site)
        await site.connect("chosen", clean=True)  # its session ends
        await other.quiet()


@covers("", "4.8.2-6")
@pytest.mark.parametrize("qos", [1, 2])
async def test_a_refused_shared_delivery_goes_to_nobody_else(qos: int) -> None:
    async with running() as site:
        peers = [await site.connect(name) for name in "ab"]
        for peer in peers:
            await peer.subscribe(Subscription("$share/g/t", qos))
        site.broker.publish("t", b"x", qos)
        found = [publishes(await peer.until_ping()) for peer in peers]
        assert sorted(map(len, found)) == [0, 1]
        for peer, messages in zip(peers, found, strict=True):
            for message in messages:
                answer = PubAck if qos == 1 else PubRec
                await peer.send(answer(message.packet_id, ReasonCode.PAYLOAD_FORMAT_INVALID))
        for peer in peers:
            await peer.quiet()


# Websockets


class Socket:
    def __init__(self, socket: aiohttp.ClientWebSocketResponse, version: int) -> None:
        self.socket, self.version = socket, version
        self.decoder = Decoder(version=version)

    async def send(self, *packets) -> None:
        await self.socket.send_bytes(b"".join(encode(p, self.version) for p in packets))

    async def packets(self, count: int) -> list:
        found: list = []
        while len(found) < count:
            message = await self.socket.receive(timeout=20)
            assert message.type is aiohttp.WSMsgType.BINARY, message
            found += self.decoder.feed(message.data)
        return found


@covers("6.0.0-4 7.1.1-1 7.1.1-2 6.0.0-1", "6.0.0-4 4.2-1 6.0.0-1")
@both
@pytest.mark.parametrize("offered", [("mqtt",), ("other", "mqtt"), ("mqttv3.1", "mqtt")])
async def test_the_websocket_subprotocol(version: int, offered: tuple[str, ...]) -> None:
    async with running(websockets=True) as site, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{site.broker.websocket_port}/mqtt"
        async with session.ws_connect(url, protocols=offered) as socket:
            assert socket.protocol == "mqtt"
            peer = Socket(socket, version)
            await peer.send(Connect("c", version), PingReq())
            assert [type(p) for p in await peer.packets(2)] == [ConnAck, PingResp]
        for wrong in ((), ("other",)):
            with pytest.raises(aiohttp.WSServerHandshakeError) as error:
                await session.ws_connect(url, protocols=wrong)
            assert error.value.status == 400


@covers("6.0.0-1", "6.0.0-1")
@both
async def test_a_text_frame_ends_the_connection(version: int) -> None:
    async with running(websockets=True) as site, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{site.broker.websocket_port}/mqtt"
        async with session.ws_connect(url, protocols=["mqtt"]) as socket:
            peer = Socket(socket, version)
            await peer.send(Connect("c", version))
            await peer.packets(1)
            await socket.send_str("text")
            message = await socket.receive(timeout=20)
            assert message.type is aiohttp.WSMsgType.CLOSE
            await site.gone("c")


@covers("6.0.0-2", "6.0.0-2")
@both
async def test_frames_and_packets_need_not_align(version: int) -> None:
    async with running(websockets=True) as site, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{site.broker.websocket_port}/mqtt"
        async with session.ws_connect(url, protocols=["mqtt"]) as socket:
            peer = Socket(socket, version)
            wanted = Subscribe(1, (Subscription("t", 1),), Properties())
            data = b"".join(
                encode(packet, version)
                for packet in (
                    Connect("c", version),
                    wanted,
                    Publish("t", bytes(300), 1, packet_id=1),
                )
            )
            for position in range(0, len(data), 7):
                await socket.send_bytes(data[position : position + 7])
            packets = await peer.packets(4)
            assert {type(p) for p in packets} == {ConnAck, SubAck, PubAck, Publish}
            (message,) = publishes(packets)
            # More than any one frame, in both directions.
            await peer.send(PubAck(message.packet_id), Publish("t", bytes(500_000)))
            (large,) = await peer.packets(1)
            assert large.payload == bytes(500_000)
