"""Properties on their way, expiry and topic aliases, by the numbers of the specification."""

from __future__ import annotations

import asyncio

import pytest
from gatelet.simulator.mqtt.packets import (
    Properties,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    ReasonCode,
)
from mqtt_peer import covers, running, until


@covers("", "3.3.2-4 3.3.2-15 3.3.2-16 3.3.2-17 3.3.2-18 3.3.2-20")
@pytest.mark.parametrize("how", ["live", "queued", "retained"])
async def test_properties_are_passed_on(how: str) -> None:
    sent = Properties(
        payload_format_indicator=1,
        content_type="text/plain",
        response_topic="answers/é",
        correlation_data=b"\x00\xff",
        user_properties=(("b", "1"), ("a", "2"), ("b", "1"), ("", "")),
    )
    async with running() as site:
        watcher = await site.lasting("w")
        if how != "retained":
            await watcher.subscribe("t")
        if how == "queued":
            await watcher.leave()
            await site.gone("w")
        peer = await site.connect("p")
        await peer.send(Publish("t", b"x", 1, how == "retained", packet_id=1, properties=sent))
        assert isinstance(await peer.receive(), PubAck)
        if how == "queued":
            watcher = await site.lasting("w")
        if how == "retained":
            await watcher.subscribe("t")
        assert (await watcher.receive()).properties == sent


@covers("", "3.3.2-5 3.3.2-6 4.3.3-7")
async def test_messages_expire_until_they_were_sent() -> None:
    async with running() as site:
        away = await site.lasting("away")
        await away.subscribe("t/+")
        await away.leave()
        slow = await site.lasting("slow", properties=Properties(receive_maximum=1))
        await slow.subscribe("t/+")
        peer = await site.connect("p")

        def message(name: str, seconds: int, retain: bool = False) -> Publish:
            expiry = Properties(message_expiry_interval=seconds)
            return Publish(f"t/{name}", b"x", 2, retain, packet_id=1, properties=expiry)

        for one in (message("begun", 1), message("short", 1, True), message("long", 600, True)):
            await peer.send(one, PubRel(1))
            await peer.receive_all(2)
        begun = await slow.receive()
        assert begun.topic == "t/begun"
        loop = asyncio.get_running_loop()
        started = loop.time()
        await until(lambda: loop.time() > started + 1.1)
        # The window of one stays taken by a message that expired after it was sent.
        await slow.vanish(site)
        slow = await site.lasting("slow", properties=Properties(receive_maximum=1))
        again = await slow.receive()
        assert (again.topic, again.dup) == ("t/begun", True)
        await slow.send(PubRec(begun.packet_id))
        assert await slow.receive() == PubRel(begun.packet_id)
        await slow.send(PubComp(begun.packet_id))
        assert (await slow.receive()).topic == "t/long"
        away = await site.lasting("away")
        fresh = await site.connect("fresh")
        await fresh.subscribe("t/+")
        for watcher in (away, fresh):
            left = await watcher.receive()
            assert left.topic == "t/long"
            assert 590 <= left.properties.message_expiry_interval < 600
            await watcher.quiet()


@covers("", "4.3.3-13")
async def test_the_handshake_of_an_expired_message_goes_on() -> None:
    async with running() as site:
        watcher = await site.lasting("w")
        await watcher.subscribe("t")
        await watcher.leave()
        peer = await site.lasting("p")
        expired = Properties(message_expiry_interval=0)
        await peer.send(Publish("t", b"", 2, packet_id=3, properties=expired))
        assert await peer.receive() == PubRec(3)
        await peer.send(PubRel(3))
        assert await peer.receive() == PubComp(3)
        watcher = await site.lasting("w")
        await watcher.quiet()


@covers("", "3.3.2-12 3.3.2-7")
async def test_aliases_of_clients() -> None:
    async with running() as site:
        watcher = await site.connect("w")
        await watcher.subscribe("t/#")
        peer = await site.connect("p")
        most = peer.connack.properties.topic_alias_maximum
        assert most == 16
        for alias in (1, most):
            name = Properties(topic_alias=alias)
            await peer.send(
                Publish(f"t/{alias}", b"1", properties=name), Publish("", b"2", properties=name)
            )
            first, second = await watcher.receive_all(2)
            assert first.topic == second.topic == f"t/{alias}"
            assert first.properties.topic_alias is None
        await peer.leave()
        peer = await site.connect("p")
        await peer.send(Publish("", b"3", properties=Properties(topic_alias=1)))
        await peer.refused(ReasonCode.TOPIC_ALIAS_INVALID, ReasonCode.PROTOCOL_ERROR)


@covers("", "3.1.2-26 3.1.2-27 3.3.2-7 3.3.2-8 3.3.2-11")
@pytest.mark.parametrize("most", [None, 0, 1, 2, 10])
async def test_aliases_to_clients(most: int | None) -> None:
    topics = ["t/a", "t/b", "t/c", "t/a", "t/b", "t/c"]
    async with running() as site:
        for _ in range(2):  # a new connection begins anew
            peer = await site.lasting("c", properties=Properties(topic_alias_maximum=most))
            await peer.subscribe("t/+")
            names: dict[int, str] = {}
            short = 0
            for topic in topics:
                site.broker.publish(topic, b"x")
                message = await peer.receive()
                alias = message.properties.topic_alias
                if alias is not None:
                    assert 0 < alias <= (most or 0)
                    short += not message.topic
                    names[alias] = message.topic or names[alias]
                assert (message.topic or names[alias]) == topic
            assert short == min(most or 0, 3)
            await peer.vanish(site)
