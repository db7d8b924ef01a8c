"""The real paho client against our broker and against the real mosquitto.

Every test that asks for `broker` runs against both, so our broker is held to what mosquitto does.
"""

from __future__ import annotations

import asyncio

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions
from paho_peer import Paho, both, ignores_what_paho_leaves, paho
from paho_peer import broker as broker
from paho_peer import collected as collected

pytestmark = ignores_what_paho_leaves


@both
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_qos(broker: int, version: int, qos: int) -> None:
    async with paho(broker, "a", version) as a, paho(broker, "b") as b:
        await a.subscribe("t/+/x", qos)
        for number in range(50):
            b.client.publish("t/1/x", str(number), qos)
        received = [await a.message() for _ in range(50)]
        assert [int(message.payload) for message in received] == list(range(50))
        assert {message.qos for message in received} == {qos}


@both
async def test_retained_and_cleared(broker: int, version: int) -> None:
    async with paho(broker, "a", version) as a:
        await a.publish("kept/1", b"one", 1, True)
        await a.publish("kept/2", b"two", 1, True)
        await a.publish("kept/2", b"", 1, True)
    async with paho(broker, "b", version) as b:
        await b.subscribe("kept/#", 1)
        message = await b.message()
        assert (message.topic, message.payload, message.retain) == ("kept/1", b"one", 1)
        await b.publish("kept/3", b"live", 1, True)
        message = await b.message()
        assert (message.topic, bool(message.retain)) == ("kept/3", False)


@both
async def test_will(broker: int, version: int) -> None:
    async with paho(broker, "watcher") as watcher:
        await watcher.subscribe("will/#", 1)
        dying = Paho("dying", version)
        dying.client.will_set("will/dying", b"bye", 1, True)
        await dying.connect(broker)
        await dying.break_down()
        assert (await watcher.message()).payload == b"bye"


@both
async def test_session_resumes_with_queued_messages(broker: int, version: int) -> None:
    async with paho(broker, "s", version, False, 60) as s:
        assert not s.present
        await s.subscribe([("q/#", 1)])
    async with paho(broker, "other") as other:
        await other.publish("q/1", b"while away", 1)
    async with paho(broker, "s", version, False, 60) as s:
        assert s.present
        assert (await s.message()).payload == b"while away"


async def test_request_and_response_of_mqtt_5(broker: int) -> None:
    async with paho(broker, "a") as a, paho(broker, "b") as b:
        await a.subscribe("ask", options=SubscribeOptions(qos=1))
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic = "answer/b"
        properties.CorrelationData = b"\x00\x01"
        properties.UserProperty = [("k", "v"), ("k", "w")]
        await b.publish("ask", b"?", 1, properties=properties)
        received = (await a.message()).properties
        assert received.ResponseTopic == "answer/b"
        assert received.CorrelationData == b"\x00\x01"
        assert received.UserProperty == [("k", "v"), ("k", "w")]


async def test_a_second_client_with_the_id_takes_over(broker: int) -> None:
    first = Paho("same")
    ended = asyncio.Event()
    first.client.on_disconnect = lambda *_: first.loop.call_soon_threadsafe(ended.set)
    await first.connect(broker)
    async with paho(broker, "same") as second:
        await asyncio.wait_for(ended.wait(), 20)
        await second.subscribe("t")
    await first.stop()
