"""Packets as large and as many as a client takes, by the numbers of the specification."""

from __future__ import annotations

import pytest
from gatelet.simulator.mqtt.access import Grant
from gatelet.simulator.mqtt.codec import encode
from gatelet.simulator.mqtt.packets import (
    V5,
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
    Unsubscribe,
)
from mqtt_peer import covers, publishes, running


@covers("", "3.1.2-24 3.1.2-25")
@pytest.mark.parametrize("aliases", [None, 5])
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_messages_too_large_for_the_client(qos: int, aliases: int | None) -> None:
    limits = Properties(maximum_packet_size=60, receive_maximum=1, topic_alias_maximum=aliases)
    async with running() as site:
        peer = await site.lasting("c", properties=limits)
        await peer.subscribe("t")
        peer.seen = b""
        for payload in (bytes(60), b"fits", bytes(53 - 2 * bool(qos)), bytes(70)):
            site.broker.publish("t", payload, qos)
        for length in (4, 53 - 2 * bool(qos)):
            message = await peer.receive()
            assert len(message.payload) == length
            if qos == 1:
                await peer.send(PubAck(message.packet_id))
            if qos == 2:
                await peer.send(PubRec(message.packet_id))
                await peer.receive()
                await peer.send(PubComp(message.packet_id))
        await peer.quiet()
        assert site.broker._sessions["c"].pending == 0
        site.broker.publish("t", b"after", 0)
        assert (await peer.receive()).payload == b"after"


@covers(
    "",
    "3.4.2-2 3.4.2-3 3.5.2-2 3.5.2-3 3.6.2-2 3.6.2-3 3.7.2-2 3.7.2-3 3.9.2-1 3.9.2-2 "
    "3.11.2-1 3.11.2-2 3.2.2-20 3.14.2-4",
)
async def test_acknowledgements_are_as_small_as_can_be() -> None:
    """They carry no reason string and no user properties, so nothing can make them too large."""
    async with running(grants=[Grant("open")]) as site:
        peer = await site.connect(properties=Properties(maximum_packet_size=24))
        await peer.subscribe("open")
        peer.seen = b""
        await peer.send(
            Publish("shut", b"", 1, packet_id=1),
            Publish("shut", b"", 2, packet_id=2),
            PubRel(3),
            PubRec(4),
            Subscribe(5, (Subscription("shut"),)),
            Unsubscribe(6, ("none",)),
        )
        await peer.receive_all(6)
        assert peer.seen == (
            b"\x40\x03\x00\x01\x87" b"\x50\x03\x00\x02\x87" b"\x70\x03\x00\x03\x92"
            b"\x62\x03\x00\x04\x92" b"\x90\x04\x00\x05\x00\x87" b"\xb0\x04\x00\x06\x00\x11"
        )  # fmt: skip


@covers("", "3.3.4-9 3.3.4-10 4.9.0-1 4.9.0-2 4.9.0-3")
@pytest.mark.parametrize("most", [1, 3])
async def test_the_receive_maximum_of_clients(most: int) -> None:
    async with running() as site:
        peer = await site.connect(properties=Properties(receive_maximum=most))
        await peer.subscribe("t")
        for number in range(8):
            site.broker.publish("t", b"%d" % number, 1 + number % 2)
        held = publishes(await peer.until_ping())
        assert len(held) == most
        # Everything else is handled at a quota of 0.
        await peer.send(
            Subscribe(1, (Subscription("u", 0),)),
            Publish("u", b"", 0),
            Publish("u", b"", 1, packet_id=9),
        )
        answers = [*await peer.receive_all(4), *await peer.until_ping()]
        assert {type(answer) for answer in answers} == {SubAck, Publish, PubAck}
        assert {answer.topic for answer in publishes(answers)} == {"u"}
        total = most
        while held:
            message = held.pop(0)
            if message.qos == 1:
                await peer.send(PubAck(message.packet_id))
                total += (more := len(new := publishes(await peer.until_ping())))
            else:
                # PUBREC frees nothing unless it refuses.
                await peer.send(PubRec(message.packet_id))
                assert await peer.until_ping() == [PubRel(message.packet_id)]
                await peer.send(PubComp(message.packet_id))
                total += (more := len(new := publishes(await peer.until_ping())))
            held += new
            assert more <= 1
            assert len(held) <= most
        assert total == 8
        site.broker.publish("t", b"refused", 2)
        message = await peer.receive()
        await peer.send(PubRec(message.packet_id, 0x80))
        site.broker.publish("t", b"next", 1)
        assert (await peer.receive()).payload == b"next"


@covers("", "4.13.2-1")
async def test_our_own_receive_maximum() -> None:
    from gatelet.simulator.mqtt.connection import Limits

    async with running(limits=Limits(receive_maximum=2)) as site:
        peer = await site.connect()
        assert peer.connack.properties.receive_maximum == 2
        await peer.send(*(Publish("t", b"", 2, packet_id=i) for i in (1, 2)))
        await peer.receive_all(2)
        await peer.send(Publish("t", b"", 2, packet_id=3))
        await peer.refused(ReasonCode.RECEIVE_MAXIMUM_EXCEEDED)


@covers("", "3.14.4-1 3.14.4-2")
async def test_nothing_follows_our_disconnect() -> None:
    async with running() as site:
        peer = await site.connect()
        await peer.subscribe("t")
        await peer.raw(encode(Publish("t", b"before"), V5) + b"\xf1\x00" + encode(PingReq(), V5))
        site.broker.publish("t", b"at the same time")
        packets = await peer.rest()
        assert isinstance(packets[-1], Disconnect)
        assert not any(isinstance(packet, PingResp | Disconnect) for packet in packets[:-1])
