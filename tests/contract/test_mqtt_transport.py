"""What our MQTT transport says and hears, on our broker and on the real mosquitto."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from gatelet.agent.twin.mqtt import MqttSettings
from gatelet.agent.twin.transport import Desired
from gatelet.simulator.mqtt.broker import Broker
from gatelet.simulator.mqtt.connection import Limits
from mqtt_agent import P, agent, connected
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho_peer import both, ignores_what_paho_leaves, ours, paho
from paho_peer import broker as broker
from paho_peer import collected as collected

pytestmark = ignores_what_paho_leaves


@both
async def test_desired_arrives_raw_retained_and_live(broker: int, version: int) -> None:
    raw = b'{ "$version": 7,\n "deployment": {"n": 1.0} }'
    async with paho(broker, "cloud") as cloud:
        await cloud.publish(f"{P}/desired", raw, 1, True)
        async with agent(broker, version) as (_, sink):
            assert await sink.next() == Desired("mqtt", 7, raw)
            await cloud.publish(f"{P}/desired", b'{"deployment": {}}', 1, True)
            assert await sink.next() == Desired("mqtt", 0, b'{"deployment": {}}')
            await cloud.publish(f"{P}/desired", b"", 1, True)
            await cloud.publish(f"{P}/desired", b"not json", 1, True)
            assert await sink.next() == Desired("mqtt", 0, b"not json")


@both
async def test_reported_is_merged_retained_and_seeded(broker: int, version: int) -> None:
    async with paho(broker, "cloud") as cloud:
        await cloud.subscribe(f"{P}/reported", 1)
        async with agent(broker, version) as (transport, sink):
            await connected(sink)
            assert sink.links == [("up", {})]
            await transport.report({"a": {"b": 1, "c": 2}})
            await transport.report({"a": {"b": None}, "d": "ü"})
            assert json.loads((await cloud.message()).payload) == {"a": {"b": 1, "c": 2}}
            assert json.loads((await cloud.message()).payload) == {"a": {"c": 2}, "d": "ü"}
        async with agent(broker, version) as (transport, sink):
            await connected(sink)
            assert sink.ups() == [{"a": {"c": 2}, "d": "ü"}]
            await transport.report({"e": 1})
            expected = {"a": {"c": 2}, "d": "ü", "e": 1}
            assert json.loads((await cloud.message()).payload) == expected


async def test_methods_with_mqtt_5(broker: int) -> None:
    async with paho(broker, "cloud") as cloud, agent(broker) as (_, sink):
        await connected(sink)
        await cloud.subscribe("cloud/answers", 1)

        async def call(name: str, payload: bytes) -> tuple[str, Any]:
            properties = Properties(PacketTypes.PUBLISH)
            properties.ResponseTopic = "cloud/answers"
            properties.CorrelationData = name.encode()
            await cloud.publish(f"{P}/cmd/{name}", payload, 1, properties=properties)
            answer = await cloud.message()
            assert answer.properties.CorrelationData == name.encode()
            return dict(answer.properties.UserProperty)["status"], json.loads(answer.payload)

        assert await call("ping", b'{"x": 1}') == ("200", {"echo": {"x": 1}})
        assert await call("missing", b"") == ("404", {"echo": None})
        status, body = await call("ping", b"{")
        assert status == "400"
        assert "not JSON" in body["error"]


@both
async def test_methods_with_request_ids_in_topics(broker: int, version: int) -> None:
    async with paho(broker, "cloud", version) as cloud, agent(broker, version) as (_, sink):
        await connected(sink)
        await cloud.subscribe(f"{P}/resp/#", 1)
        await cloud.publish(f"{P}/cmd/ping/r1", b"[1]", 1)
        answer = await cloud.message()
        assert (answer.topic, answer.payload) == (f"{P}/resp/r1/200", b'{"echo":[1]}')
        for number in range(16):
            await cloud.publish(f"{P}/cmd/hang/h{number}", b"", 1)
        await cloud.publish(f"{P}/cmd/ping/late", b"", 1)
        assert (await cloud.message()).topic == f"{P}/resp/late/429"
        sink.release.set()
        assert {(await cloud.message()).topic for _ in range(16)} == {
            f"{P}/resp/h{number}/200" for number in range(16)
        }


async def test_bottomless_documents_of_others_end_nothing() -> None:
    deep = b"[" * 100_000
    nested = b'{"a":' * 900 + b"1" + b"}" * 900
    async with ours() as broker, paho(broker.port, "cloud") as cloud:
        await cloud.subscribe(f"{P}/resp/#", 1)
        for report in (deep, nested):
            await cloud.publish(f"{P}/reported", report, 1, True)
            await cloud.publish(f"{P}/status", report, 1, True)
            async with agent(broker.port) as (transport, sink):
                await connected(sink)
                assert sink.links == [("up", {})]
                await transport.report({"a": {"b": 1}})
                await cloud.publish(f"{P}/cmd/ping/r1", report, 1)
                assert (await cloud.message()).topic == f"{P}/resp/r1/400"
                await cloud.publish(f"{P}/status", report, 1)
                await cloud.publish(f"{P}/cmd/ping/r2", b"", 1)
                assert (await cloud.message()).topic == f"{P}/resp/r2/200"
                assert len(sink.links) == 1


async def test_calls_without_end_are_not_kept_without_end() -> None:
    class Deaf(Broker):
        answers = 0

        def on_publish(self, connection: Any, publish: Any) -> int | None:
            if "/resp/" in publish.topic:
                Deaf.answers += 1
                return None  # never acknowledged
            return super().on_publish(connection, publish)

    broker = Deaf(limits=Limits(receive_maximum=1000))
    await broker.start()
    async with paho(broker.port, "cloud") as cloud, agent(broker.port) as (_, sink):
        await connected(sink)
        before = len(asyncio.all_tasks())
        for number in range(300):
            await cloud.publish(f"{P}/cmd/ping/p{number}", b"", 1)
        await cloud.publish(f"{P}/desired", b"{}", 1)
        await sink.next()  # so all calls before it have arrived
        assert 16 <= len(asyncio.all_tasks()) - before < 100
        assert len(sink.links) == 1
    await broker.stop()


async def test_an_answer_cannot_become_a_document_of_the_device() -> None:
    async with ours() as broker, paho(broker.port, "cloud") as cloud:
        await cloud.subscribe(f"{P}/resp/#", 1)
        async with agent(broker.port) as (_, sink):
            await connected(sink)
            for topic in (f"{P}/desired", f"{P}/resp/mine"):
                properties = Properties(PacketTypes.PUBLISH)
                properties.ResponseTopic = topic
                await cloud.publish(f"{P}/cmd/ping", b"1", 1, properties=properties)
            assert (await cloud.message()).topic == f"{P}/resp/mine"
            await cloud.publish(f"{P}/desired", b"{}", 1)
            assert (await sink.next()).body == b"{}"


async def test_a_retained_method_call_is_not_executed(broker: int) -> None:
    async with paho(broker, "cloud") as cloud:
        await cloud.subscribe(f"{P}/resp/#", 1)
        await cloud.publish(f"{P}/cmd/reboot/old", b"", 1, True)
        async with agent(broker) as (_, sink):
            await connected(sink)
            await cloud.publish(f"{P}/cmd/ping/new", b"", 1)
            assert (await cloud.message()).topic == f"{P}/resp/new/200"
        await cloud.publish(f"{P}/cmd/reboot/old", b"", 1, True)


@both
async def test_birth_farewell_and_will(broker: int, version: int) -> None:
    async with paho(broker, "cloud") as cloud:
        await cloud.subscribe(f"{P}/status", 1)
        async with agent(broker, version) as (_, sink):
            await connected(sink)
            birth = json.loads((await cloud.message()).payload)
            assert birth["status"] == "online"
        farewell = json.loads((await cloud.message()).payload)
        stopped = {"status": "offline", "session": birth["session"], "reason": "stopped"}
        assert farewell == stopped
        async with agent(broker, version) as (transport, sink):
            await connected(sink)
            second = json.loads((await cloud.message()).payload)
            assert second["session"] > birth["session"]
            transport._ready.drop("the network fails")
            lost = {"session": second["session"], "status": "offline", "reason": "connection lost"}
            assert json.loads((await cloud.message()).payload) == lost
            third = json.loads((await cloud.message()).payload)
            assert third["session"] > second["session"]
            assert third["status"] == "online"


async def test_a_late_will_cannot_hide_the_birth(broker: int) -> None:
    async with paho(broker, "cloud") as cloud, agent(broker) as (_, sink):
        await connected(sink)
        await cloud.subscribe(f"{P}/status", 1)
        birth = json.loads((await cloud.message()).payload)
        late = {"status": "offline", "session": birth["session"] - 1}
        await cloud.publish(f"{P}/status", json.dumps(late), 1, True)
        assert json.loads((await cloud.message()).payload) == late
        assert json.loads((await cloud.message()).payload) == birth


@both
async def test_telemetry(broker: int, version: int) -> None:
    async with paho(broker, "cloud") as cloud, agent(broker, version) as (transport, sink):
        await connected(sink)
        await cloud.subscribe(f"{P}/telemetry/#", 1)
        await transport.send(b"\x00body", {"route": "a/b +", "n": "1"})
        message = await cloud.message()
        assert message.payload == b"\x00body"
        if version == mqtt.MQTTv5:
            assert message.topic == f"{P}/telemetry"
            assert dict(message.properties.UserProperty) == {"route": "a/b +", "n": "1"}
        else:
            assert message.topic == f"{P}/telemetry/route=a%2Fb%20%2B&n=1"


def test_settings_refuse_what_cannot_be_a_topic() -> None:
    for device in ("", "a/b", "a+", "#"):
        with pytest.raises(ValueError):
            MqttSettings("h", 1, device)
    for prefix in ("", "/x", "a/#", "+/{device}", "$SYS/x", "x/{name}"):
        with pytest.raises(ValueError):
            MqttSettings("h", 1, "d", prefix)
    assert MqttSettings("h", 1, "d", "x/{device}/").topics == "x/d"
    assert "secret" not in repr(MqttSettings("h", 1, "d", password="secret"))
