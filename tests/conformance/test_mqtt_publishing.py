"""PUBLISH in both directions and its acknowledgements, by the numbers of the specifications."""

from __future__ import annotations

import pytest
from gatelet.simulator.mqtt.access import Grant
from gatelet.simulator.mqtt.codec import encode
from gatelet.simulator.mqtt.packets import (
    V5,
    V311,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    ReasonCode,
    Subscription,
)
from mqtt_peer import both, covers, frame, properties, publishes, running, string


def publish(first: int, topic: bytes, version: int, content: bytes = b"", identifier=b"") -> bytes:
    return frame(first, string(topic), identifier, properties(version, content), b"payload")


MALFORMED = {
    "QoS 3": (0x36, b"t", b"\0\1", "3.3.1-4", "3.3.1-4"),
    "DUP with QoS 0": (0x38, b"t", b"", "3.3.1-2", "3.3.1-2"),
    "identifier 0, QoS 1": (0x32, b"t", b"\0\0", "2.3.1-1", ""),
    "identifier 0, QoS 2": (0x34, b"t", b"\0\0", "2.3.1-1", ""),
    "topic not UTF-8": (0x30, b"\xff", b"", "3.3.2-1 1.5.3-1", "3.3.2-1 1.5.4-1"),
    "topic with a surrogate": (0x30, b"\xed\xbf\xbf", b"", "3.3.2-1 1.5.3-1", "3.3.2-1 1.5.4-1"),
    "topic with U+0000": (0x30, b"a\0b", b"", "1.5.3-2 4.7.3-2", "1.5.4-2 4.7.3-2"),
    "topic with #": (0x30, b"a/#", b"", "3.3.2-2 4.7.1-1", "3.3.2-2 4.7.0-1"),
    "topic with +": (0x30, b"+/a", b"", "3.3.2-2 4.7.1-1", "3.3.2-2 4.7.0-1"),
    "empty topic": (0x30, b"", b"", "4.7.3-1", "4.7.3-1"),
}


@pytest.mark.parametrize(
    ("first", "topic", "identifier"),
    [
        pytest.param(*case, id=name, marks=covers(f"{v311} 4.8.0-1", f"{v5} 4.13.1-1"))
        for name, (*case, v311, v5) in MALFORMED.items()
    ],
)
@both
async def test_malformed_publishes(version: int, first: int, topic: bytes, identifier) -> None:
    async with running() as site:
        watcher = await site.connect("w", version)
        await watcher.subscribe("#")
        peer = await site.connect("c", version)
        await peer.raw(publish(first, topic, version, identifier=identifier))
        await peer.refused()
        await watcher.quiet()


@covers("3.3.2-1", "3.3.2-1")
@both
async def test_publishes_cut_short(version: int) -> None:
    async with running() as site:
        for body in (b"", b"\0", b"\0\5abc", b"\0\1t\0" if version == V311 else b"\0\1t\0\1"):
            peer = await site.connect("c", version)
            await peer.raw(frame(0x32, body))
            await peer.refused(ReasonCode.MALFORMED_PACKET)


PROPERTIES = {
    "response topic not UTF-8": (b"\x08" + string(b"\xff"), "3.3.2-13 1.5.4-1"),
    "response topic with wildcards": (b"\x08" + string(b"a/#"), "3.3.2-14"),
    "content type not UTF-8": (b"\x03" + string(b"\xc3"), "3.3.2-19 1.5.4-1"),
    "user property key not UTF-8": (b"\x26" + string(b"\xff") + string(b"v"), "1.5.7-1"),
    "user property value not UTF-8": (b"\x26" + string(b"k") + string(b"\xff"), "1.5.7-1"),
    "user property with U+0000": (b"\x26" + string(b"k") + string(b"\0"), "1.5.7-1 1.5.4-2"),
    "topic alias 0": (b"\x23\0\0", "3.3.2-8"),
    "topic alias above ours": (b"\x23\x00\x11", "3.3.2-12"),
    "subscription identifier": (b"\x0b\x01", "3.3.4-6"),
    "alias twice": (b"\x23\0\1\x23\0\1", "4.13.1-1"),
    "a property of another packet": (b"\x21\0\1", "4.13.1-1"),
    "no such property": (b"\x7f\0", "4.13.1-1"),
    "cut short": (b"\x02\0\0", "4.13.1-1"),
}


@pytest.mark.parametrize(
    "content", [pytest.param(c, id=n, marks=covers("", v5)) for n, (c, v5) in PROPERTIES.items()]
)
async def test_malformed_publish_properties(content: bytes) -> None:
    async with running() as site:
        peer = await site.connect()
        await peer.raw(publish(0x30, b"t", V5, content))
        await peer.refused()


@covers("2.2.2-2", "2.1.3-1 4.13.1-1")
@both
@pytest.mark.parametrize(
    "first", [0x00, 0x41, 0x52, 0x64, 0x6A, 0x78, 0x90, 0xB0, 0xC1, 0xD0, 0x20]
)
async def test_wrong_types_and_flags(version: int, first: int) -> None:
    async with running() as site:
        peer = await site.connect(version=version)
        await peer.raw(bytes((first, 2, 0, 1)))
        await peer.refused()


@covers("3.6.1-1", "3.6.1-1")
@both
@pytest.mark.parametrize("flags", [0, 1, 3, 4, 8, 10, 15])
async def test_pubrel_flags(version: int, flags: int) -> None:
    async with running() as site:
        peer = await site.connect(version=version)
        await peer.send(Publish("t", b"", 2, packet_id=1))
        assert await peer.receive() == PubRec(1, 0x10 if version == V5 else 0)
        await peer.raw(bytes((0x60 | flags, 2, 0, 1)))
        await peer.refused(ReasonCode.MALFORMED_PACKET)


@covers(
    "1.5.3-3 3.3.2-3 4.7.3-3 4.7.3-4 7.0.0-2 2.2.2-1",
    "1.5.4-3 3.3.2-3 4.7.3-3 4.7.3-4 2.1.3-1",
)
@both
@pytest.mark.parametrize(
    "topic",
    ["\ufefftopic", "a\ufeffb", "é", "e\u0301", "Ä/ä", "/", "//", " ", "a b/c", "x" * 65_535,
     "\U0001f680", "\U000f0000", "a//b", "%2F/%41"],
)  # fmt: skip
async def test_topics_arrive_as_they_are(version: int, topic: str) -> None:
    async with running() as site:
        peer = await site.connect(version=version)
        # Others that a normalization would make equal.
        near = [t for t in ("topic", "ab", "é", "e\u0301", "ä/ä", "", "/a") if t and t != topic]
        await peer.subscribe(*near)
        await peer.send(Publish(topic, b"x"))
        await peer.quiet()
        await peer.subscribe(topic)
        peer.seen = b""
        await peer.send(Publish(topic, b"x"))
        assert await peer.receive() == Publish(topic, b"x")
        assert peer.seen == encode(Publish(topic, b"x"), version)


@covers(
    "3.3.4-1 2.3.1-5 2.3.1-6 4.3.2-2 4.3.3-2",
    "3.3.4-1 2.2.1-2 2.2.1-5 4.3.2-4 4.3.3-8 4.3.3-11 3.4.2-1 3.5.2-1 3.7.2-1",
)
@both
@pytest.mark.parametrize("identifier", [1, 2, 256, 65_535])
async def test_answers_to_publishes(version: int, identifier: int) -> None:
    none = ReasonCode.NO_MATCHING_SUBSCRIBERS if version == V5 else 0
    async with running() as site:
        peer = await site.connect(version=version)
        await peer.send(Publish("t", b"x"))
        await peer.quiet()
        await peer.send(Publish("t", b"x", 1, packet_id=identifier))
        assert await peer.receive() == PubAck(identifier, none)
        await peer.send(Publish("t", b"x", 2, packet_id=identifier))
        assert await peer.receive() == PubRec(identifier, none)
        await peer.send(PubRel(identifier))
        assert await peer.receive() == PubComp(identifier)
        await peer.send(PubRel(identifier))
        unknown = ReasonCode.PACKET_IDENTIFIER_NOT_FOUND if version == V5 else 0
        assert await peer.receive() == PubComp(identifier, unknown)
        await peer.send(PubRec(identifier))
        assert await peer.receive() == PubRel(identifier, unknown)
        # One identifier, no QoS: payloads start right after the topic (and the property length).
        peer.seen = b""
        await peer.subscribe(Subscription("t", 0))
        await peer.send(Publish("t", b"x"))
        await peer.receive()
        assert peer.seen.endswith(
            b"\x30" + (b"\x05\x00\x01t\x00x" if version == V5 else b"\x04\x00\x01tx")
        )


@covers("4.3.2-2", "4.3.2-5")
@both
@pytest.mark.parametrize("dup", [False, True])
async def test_a_qos_1_identifier_is_new_after_puback(version: int, dup: bool) -> None:
    async with running() as site:
        watcher = await site.connect("w", version)
        await watcher.subscribe("t")
        peer = await site.connect("c", version)
        await peer.send(Publish("t", b"1", 1, packet_id=5), Publish("t", b"2", 1, False, dup, 5))
        assert await peer.receive_all(2) == [PubAck(5), PubAck(5)]
        assert [p.payload for p in await watcher.receive_all(2)] == [b"1", b"2"]


@covers("4.3.3-2 2.3.1-6", "4.3.3-8 4.3.3-10 4.3.3-11 4.3.3-12")
@both
async def test_qos_2_is_delivered_once_per_identifier(version: int) -> None:
    async with running() as site:
        watcher = await site.connect("w", version)
        await watcher.subscribe(Subscription("t", 0))
        peer = await site.lasting("c", version)
        await peer.send(Publish("t", b"1", 2, packet_id=5))
        await peer.receive()
        await peer.send(Publish("t", b"1", 2, False, True, 5), Publish("t", b"1", 2, packet_id=5))
        assert await peer.receive_all(2) == [PubRec(5), PubRec(5)]
        # The identifier is part of the session, not of the connection.
        await peer.vanish(site)
        peer = await site.lasting("c", version)
        await peer.send(Publish("t", b"1", 2, False, True, 5), PubRel(5))
        assert await peer.receive_all(2) == [PubRec(5), PubComp(5)]
        await peer.send(Publish("t", b"2", 2, packet_id=5))
        assert await peer.receive() == PubRec(5)
        assert [p.payload for p in await watcher.until_ping()] == [b"1", b"2"]


@covers("", "4.3.3-9")
async def test_a_refused_qos_2_identifier_is_new() -> None:
    async with running(grants=[Grant("open")]) as site:
        peer = await site.connect()
        await peer.subscribe("open")
        await peer.send(Publish("shut", b"", 2, packet_id=5))
        assert await peer.receive() == PubRec(5, ReasonCode.NOT_AUTHORIZED)
        await peer.send(Publish("open", b"new", 2, packet_id=5))
        answers = await peer.receive_all(2)
        assert PubRec(5) in answers
        assert [p.payload for p in publishes(answers)] == [b"new"]


@covers("3.3.5-2", "3.4.2-1 3.5.2-1")
@both
async def test_publishing_without_permission(version: int) -> None:
    refusal = ReasonCode.NOT_AUTHORIZED if version == V5 else 0
    async with running(grants=[Grant("#", publish=False)]) as site:
        peer = await site.connect(version=version)
        await peer.subscribe("t")
        await peer.send(
            Publish("t", b"", 0, True),
            Publish("t", b"", 1, True, packet_id=1),
            Publish("t", b"", 2, True, packet_id=2),
        )
        assert await peer.receive_all(2) == [PubAck(1, refusal), PubRec(2, refusal)]
        if version == V311:
            await peer.send(PubRel(2))
            assert await peer.receive() == PubComp(2)
        await peer.quiet()
        assert site.broker.retained == {}


@covers("3.3.1-3 3.8.4-6 4.3.1-1 3.3.1-2", "3.3.1-3 3.8.4-8 4.3.1-1 3.3.1-2")
@both
@pytest.mark.parametrize("granted", [0, 1, 2])
@pytest.mark.parametrize("sent", [0, 1, 2])
async def test_deliveries_have_the_lower_qos(version: int, sent: int, granted: int) -> None:
    async with running() as site:
        watcher = await site.connect("w", version)
        assert await watcher.subscribe(Subscription("t", granted)) == (granted,)
        peer = await site.connect("c", version)
        await peer.send(Publish("t", b"x", sent, False, sent > 0, 9 if sent else 0))
        message = await watcher.receive()
        assert (message.qos, message.dup, message.payload) == (min(sent, granted), False, b"x")
        assert bool(message.packet_id) == (message.qos > 0)


@covers("2.3.1-1 2.3.1-4 4.3.2-1 4.3.3-1", "2.2.1-4 4.3.2-1 4.3.2-2 4.3.3-1 4.3.3-2")
@both
async def test_the_servers_identifiers_are_free(version: int) -> None:
    async with running(queue_limit=70_000) as site:
        peer = await site.connect(version=version)
        await peer.subscribe("t")
        held = []
        for number in range(40):
            site.broker.publish("t", b"%d" % number, 1 + number % 2)
            held.append(await peer.receive())
        assert len({message.packet_id for message in held}) == 40
        assert all(message.packet_id > 0 and not message.dup for message in held)
        # All the way round, while one identifier stays in use.
        for message in held[1:]:
            if message.qos == 1:
                await peer.send(PubAck(message.packet_id))
            else:
                await peer.send(PubRec(message.packet_id), PubComp(message.packet_id))
                await peer.receive()
        session = site.broker._sessions["c"]
        await peer.quiet()
        session._last_id = 65_533
        used = []
        for _ in range(4):
            site.broker.publish("t", b"", 1)
            used.append((await peer.receive()).packet_id)
        assert held[0].packet_id == 1
        assert used == [65_534, 65_535, 2, 3]


@covers(
    "3.1.2-5 3.3.1-1 2.3.1-4 4.3.2-1 4.3.3-1 4.4.0-1 4.6.0-1",
    "3.3.1-1 4.3.2-3 4.3.3-3 4.3.3-4 4.3.3-5 4.3.3-6 4.4.0-1 2.2.1-5 3.6.2-1",
)
@both
async def test_unacknowledged_packets_come_again_in_order(version: int) -> None:
    async with running() as site:
        peer = await site.lasting("c", version)
        await peer.subscribe("t")
        for number in range(6):
            site.broker.publish("t", b"%d" % number, 1 + number % 2)
        first = await peer.receive_all(6)
        ids = [message.packet_id for message in first]
        assert not any(message.dup for message in first)
        await peer.send(PubAck(ids[2]), PubRec(ids[3]), PubRec(ids[1]), PubComp(ids[1]))
        assert await peer.receive_all(2) == [PubRel(ids[3]), PubRel(ids[1])]
        # Nothing is repeated while the connection lasts.
        await peer.quiet()
        for _ in range(2):
            await peer.vanish(site)
            peer = await site.lasting("c", version)
            again = await peer.receive_all(4)
            assert publishes(again) == [
                Publish("t", first[i].payload, first[i].qos, False, True, ids[i]) for i in (0, 4, 5)
            ]
            assert PubRel(ids[3]) in again
            await peer.quiet()
        await peer.send(PubComp(ids[3]), PubAck(ids[0]), PubAck(ids[4]), PubRec(ids[5]))
        assert await peer.receive() == PubRel(ids[5])
        await peer.vanish(site)
        peer = await site.lasting("c", version)
        assert await peer.until_ping() == [PubRel(ids[5])]


@covers("", "4.4.0-2 4.3.3-4")
async def test_refused_deliveries_are_over() -> None:
    async with running() as site:
        peer = await site.lasting("c")
        await peer.subscribe("t")
        site.broker.publish("t", b"1", 1)
        site.broker.publish("t", b"2", 2)
        one, two = await peer.receive_all(2)
        await peer.send(PubAck(one.packet_id, 0x83), PubRec(two.packet_id, 0x97))
        await peer.quiet()
        await peer.vanish(site)
        peer = await site.lasting("c")
        await peer.quiet()


@covers("4.5.0-1 3.1.2-5 4.6.0-5 4.6.0-6", "4.5.0-1 4.6.0-5 4.6.0-6")
@both
async def test_every_subscriber_gets_messages_in_order(version: int) -> None:
    async with running() as site:
        here = await site.connect("here", version)
        away = await site.lasting("away", version)
        for watcher in (here, away):
            await watcher.subscribe("a/#", Subscription("+/b", 1))
        await away.leave()
        await site.gone("away")
        peer = await site.connect("c", version)
        wanted = []
        for number in range(60):
            qos = 1 + number % 2
            wanted.append((qos, b"%d" % number))
            await peer.send(
                Publish(f"a/{'bc'[number % 3 == 0]}", wanted[-1][1], qos, packet_id=1 + number)
            )
        await peer.receive_all(60)
        got = publishes(await here.until_ping())
        assert [(message.qos, message.payload) for message in got] == wanted
        away = await site.lasting("away", version)
        got = publishes(await away.until_ping())
        assert [(message.qos, message.payload) for message in got] == wanted
