"""Retained messages, by the numbers of the specifications."""

from __future__ import annotations

import pytest
from gatelet.simulator.mqtt.packets import Publish, Subscription
from mqtt_peer import both, covers, publishes, running


@covers(
    "3.3.1-5 3.3.1-6 3.3.1-7 3.3.1-8 3.3.1-9 3.3.1-12 3.1.2-7",
    "3.3.1-5 3.3.1-8 3.3.1-9 3.3.1-12",
)
@both
async def test_retained_messages(version: int) -> None:
    async with running() as site:
        peer = await site.connect("p", version)
        early = await site.connect("early", version)
        await early.subscribe("r/+")
        await peer.send(Publish("r/a", b"1", 0, True), Publish("r/b", b"1", 2, True, packet_id=1))
        await peer.receive()
        for _ in range(2):
            message = await early.receive()
            assert not message.retain
        await peer.send(
            Publish("r/a", b"2", 1, True, packet_id=1),
            Publish("r/b", b"unretained", 1, packet_id=1),
        )
        await peer.receive_all(2)
        await peer.leave()
        late = await site.connect("late", version)
        await late.subscribe("r/#")
        kept = sorted(publishes(await late.receive_all(2)), key=lambda message: message.topic)
        assert [(m.topic, m.payload, m.qos, m.retain, m.dup) for m in kept] == [
            ("r/a", b"2", 1, True, False),
            ("r/b", b"1", 2, True, False),
        ]
        # A QoS 0 message takes the place of the one before.
        site.broker.publish("r/a", b"3", 0, retain=True)
        latest = await site.connect("latest", version)
        await latest.subscribe("r/a")
        assert (await latest.receive()).payload == b"3"


@covers("3.3.1-10 3.3.1-11", "3.3.1-6 3.3.1-7")
@both
async def test_empty_retained_messages(version: int) -> None:
    async with running() as site:
        watcher = await site.connect("w", version)
        await watcher.subscribe("t")
        peer = await site.connect("p", version)
        await peer.send(Publish("t", b"1", 0, True), Publish("t", b"", 0, True))
        assert [p.payload for p in publishes(await watcher.receive_all(2))] == [b"1", b""]
        late = await site.connect("late", version)
        await late.subscribe("t")
        await late.quiet()
        assert site.broker.retained == {}


@covers("", "3.3.1-12 3.3.1-13")
@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("as_published", [False, True])
async def test_retain_as_published(retain: bool, as_published: bool) -> None:
    async with running() as site:
        watcher = await site.connect("w")
        await watcher.subscribe(Subscription("t", 1, retain_as_published=as_published))
        peer = await site.connect("p")
        await peer.send(Publish("t", b"x", 1, retain, packet_id=1))
        assert (await watcher.receive()).retain == (retain and as_published)
