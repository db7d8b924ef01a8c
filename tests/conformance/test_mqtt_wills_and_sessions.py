"""Wills, sessions, keep alive and DISCONNECT, by the numbers of the specifications."""

from __future__ import annotations

import asyncio

import pytest
from gatelet.simulator.mqtt.connection import Limits
from gatelet.simulator.mqtt.packets import (
    V5,
    Connect,
    Disconnect,
    Properties,
    PubAck,
    Publish,
    ReasonCode,
    Will,
)
from mqtt_peer import both, covers, properties, raw_connect, running, string, until


@covers("3.1.3-10", "3.1.3-11")
@both
@pytest.mark.parametrize("topic", [b"\xff", b"a\0", b"a/#", b""])
async def test_malformed_will_topics(version: int, topic: bytes) -> None:
    async with running() as site:
        peer = await site.open(version)
        will = properties(version) + string(topic) + string(b"gone")
        await peer.raw(raw_connect(version, 6, string(b"c") + will))
        packets = await peer.rest()
        assert all(packet.reason_code >= 0x80 for packet in packets)
        assert len(packets) == (version == V5)


@covers("3.2.2-6", "3.2.2-12 3.2.2-13")
@both
@pytest.mark.parametrize(
    ("will", "code"),
    [(Will("t", b"", 2), ReasonCode.QOS_NOT_SUPPORTED),
     (Will("t", b"", 0, True), ReasonCode.RETAIN_NOT_SUPPORTED)],
)  # fmt: skip
async def test_wills_beyond_the_server(version: int, will: Will, code: int) -> None:
    async with running(limits=Limits(maximum_qos=1, retain_available=False)) as site:
        peer = await site.open(version)
        await peer.send(Connect("c", version, will=will))
        packets = await peer.rest()
        # No return code of 3.1.1 says that.
        assert [packet.reason_code for packet in packets] == ([code] if version == V5 else [])


@covers("3.1.2-8 3.1.2-10 3.1.2-12 3.1.2-16 3.1.2-17", "3.1.2-7 3.1.2-10 3.1.2-14 3.1.2-15")
@both
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_wills_are_sent_once(version: int, qos: int) -> None:
    async with running() as site:
        watcher = await site.connect("w", version)
        await watcher.subscribe("will/#")
        kept = await site.lasting("a", version, will=Will("will/kept", b"gone", qos, True))
        await kept.vanish(site)
        message = await watcher.receive()
        assert (message.topic, message.payload, message.qos) == ("will/kept", b"gone", qos)
        loose = await site.connect("b", version, will=Will("will/loose", b"gone", qos))
        await loose.vanish(site)
        assert (await watcher.receive()).topic == "will/loose"
        without = await site.connect("d", version)
        await without.vanish(site)
        assert site.broker.retained == {"will/kept": b"gone"}
        # The will left the session's state with the first connection.
        again = await site.lasting("a", version)
        await again.vanish(site)
        await watcher.quiet()


@covers("3.1.2-8 3.1.2-10 3.14.4-3", "3.1.2-8 3.1.2-10 3.14.4-3")
@both
async def test_disconnect_discards_the_will(version: int) -> None:
    async with running() as site:
        watcher = await site.connect("w", version)
        await watcher.subscribe("will")
        peer = await site.connect("c", version, will=Will("will", b"gone"))
        await peer.leave()
        await site.gone("c")
        await watcher.quiet()
        if version == V5:
            peer = await site.connect("c", version, will=Will("will", b"gone"))
            await peer.send(Disconnect(ReasonCode.DISCONNECT_WITH_WILL))
            assert (await watcher.receive()).payload == b"gone"


@covers("3.14.1-1 2.2.2-2", "3.14.1-1 2.1.3-1")
@both
async def test_a_disconnect_with_flags_is_none(version: int) -> None:
    async with running() as site:
        watcher = await site.connect("w", version)
        await watcher.subscribe("will")
        peer = await site.connect("c", version, will=Will("will", b"gone"))
        await peer.raw(b"\xe1\x00")
        await peer.refused(ReasonCode.MALFORMED_PACKET)
        assert (await watcher.receive()).payload == b"gone"


@covers("", "3.1.2-7 3.1.2-8 3.1.3-9 3.1.3-10")
async def test_delayed_wills() -> None:
    pairs = (("b", "1"), ("a", "2"), ("b", "1"))
    wills = Properties(will_delay_interval=600, user_properties=pairs, content_type="text")
    async with running() as site:
        watcher = await site.connect("w")
        await watcher.subscribe("will")
        peer = await site.connect("c", expiry=600, will=Will("will", b"gone", 1, properties=wills))
        await peer.vanish(site)
        await watcher.quiet()
        back = await site.lasting("c", will=Will("will", b"later", 1, properties=wills))
        await watcher.quiet()
        await back.vanish(site)
        # The session ends before the delay: that is when the will is due.
        await site.connect("c", clean=True)
        message = await watcher.receive()
        assert message.payload == b"later"
        assert message.properties.user_properties == pairs
        assert message.properties.content_type == "text"
        assert message.properties.will_delay_interval is None


@covers("3.1.4-2", "3.1.4-3 3.14.2-1 3.14.4-2 4.13.2-1")
@both
async def test_a_second_connection_with_the_id(version: int) -> None:
    async with running() as site:
        older = await site.connect("same", version)
        newer = await site.connect("same", version)
        await older.refused(ReasonCode.SESSION_TAKEN_OVER)
        await newer.quiet()


@covers(
    "3.1.2-4 3.1.2-5 3.1.3-2 3.1.4-3 3.2.2-2 3.2.2-3 4.1.0-1",
    "3.1.2-5 3.1.2-6 3.1.2-23 3.1.3-2 3.1.4-4 3.2.2-3",
)
@both
async def test_sessions_are_resumed(version: int) -> None:
    async with running() as site:
        first = await site.lasting("c", version)
        assert not first.connack.session_present
        await first.subscribe("t")
        await first.vanish(site)
        for qos in (1, 2):
            site.broker.publish("t", b"%d" % qos, qos)
        other = await site.lasting("other", version)
        assert not other.connack.session_present
        await other.quiet()
        again = await site.lasting("c", version)
        assert again.connack.session_present
        assert [packet.payload for packet in await again.receive_all(2)] == [b"1", b"2"]
        site.broker.publish("t", b"the subscription lives")
        assert (await again.receive()).payload == b"the subscription lives"


@covers("3.1.2-6 3.1.2-7 3.1.4-3 3.2.2-1", "3.1.2-4 3.1.4-4 3.2.2-2")
@both
async def test_clean_starts_drop_the_session(version: int) -> None:
    async with running() as site:
        first = await site.lasting("c", version)
        await first.subscribe("t")
        await first.send(Publish("kept", b"1", 1, True, packet_id=1))
        await first.receive()
        await first.leave()
        await site.gone("c")
        site.broker.publish("t", b"queued", 1)
        second = await site.connect("c", version, clean=True)
        assert not second.connack.session_present
        site.broker.publish("t", b"live", 1)
        await second.quiet()
        await second.leave()
        await site.gone("c")
        third = await site.connect("c", version, clean=False)
        assert not third.connack.session_present
        # Retained messages are no part of any session.
        await third.subscribe("kept")
        assert (await third.receive()).payload == b"1"


@covers("", "4.1.0-2 3.1.2-23")
async def test_sessions_end_with_their_expiry() -> None:
    async with running() as site:
        peer = await site.connect("c", expiry=600)
        await peer.send(Disconnect(0, Properties(session_expiry_interval=3)))
        await site.gone("c")
        assert "c" in site.broker._sessions
        await until(lambda: "c" not in site.broker._sessions)
        again = await site.connect("c", clean=False, expiry=600)
        assert not again.connack.session_present


@covers("4.1.0-2", "4.1.0-1")
@both
async def test_a_session_lasts_as_long_as_its_connection(version: int) -> None:
    async with running() as site:
        peer = await site.connect("c", version)  # an expiry of 0, a clean session
        await peer.subscribe("t")
        for number in range(3):
            site.broker.publish("t", b"%d" % number, 1)
            message = await peer.receive()
            await peer.send(PubAck(message.packet_id))
        await peer.quiet()


@covers("3.1.2-24", "3.1.2-22 3.2.2-22")
@both
async def test_silence_ends_the_connection(version: int) -> None:
    async with running() as site:
        watcher = await site.connect("w", version)
        await watcher.subscribe("will")
        loop = asyncio.get_running_loop()
        started = loop.time()
        peer = await site.connect("c", version, keepalive=1, will=Will("will", b"gone"))
        if version == V5:
            assert peer.connack.properties.server_keep_alive is None
        await peer.refused(ReasonCode.KEEP_ALIVE_TIMEOUT)
        assert 1.4 <= loop.time() - started < 10
        # As if the network had failed.
        assert (await watcher.receive()).payload == b"gone"
