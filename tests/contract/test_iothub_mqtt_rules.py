"""What IoT Hub makes of MQTT's wills, retained messages and keep alive, with paho as the device."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from gatelet.agent.clock import SystemClock
from gatelet.simulator.iothub import sas
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.server import IotHub
from gatelet.simulator.pki import Pki

HOST = "hub.gatelet.test"
EVENTS = "devices/d1/messages/events"


class Bench:
    def __init__(self, folder: Path) -> None:
        self.pki = Pki(folder)
        self.hub = IotHub(HOST, self.pki)
        self.clients: list[mqtt.Client] = []

    async def connect(
        self,
        name: str = "d1",
        will: tuple[str, bytes, int, bool] | None = None,
        keepalive: int = 60,
    ) -> mqtt.Client:
        client_id = ClientId.parse(name)
        options: dict[str, Any] = {"protocol": mqtt.MQTTv311}
        if hasattr(mqtt, "CallbackAPIVersion"):
            options["callback_api_version"] = mqtt.CallbackAPIVersion.VERSION2
        client = mqtt.Client(client_id=name, clean_session=False, **options)
        client.tls_set_context(ssl.create_default_context(cafile=str(self.pki.ca_file)))
        key = self.hub.identity(client_id.device, client_id.module or None).primary_key
        expiry = int(SystemClock().now().timestamp()) + 600
        token = sas.make(f"{HOST}/{client_id.path}", key, expiry)
        client.username_pw_set(f"{HOST}/{name}/?api-version=2021-04-12", token)
        if will is not None:
            client.will_set(*will)
        self.clients.append(client)
        await asyncio.to_thread(client.connect, "127.0.0.1", self.hub.mqtt_port, keepalive)
        client.loop_start()
        await self.until(lambda: self.hub.core.connected(client_id))
        return client

    async def until(self, condition: Callable[[], Any]) -> None:
        deadline = asyncio.get_running_loop().time() + 10
        while not condition():
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        for client in self.clients:
            client.disconnect()
            await asyncio.to_thread(client.loop_stop)
        await self.hub.stop()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    await bench.hub.start()
    yield bench
    await bench.stop()


@pytest.mark.parametrize("name", ["d1", "d1/m1"])
async def test_a_will_becomes_telemetry(bench: Bench, name: str) -> None:
    client = ClientId.parse(name)
    topic = f"{client.path}/messages/events/level=high&$.ct=text%2Fplain"
    await bench.connect(name, (topic, b"gone", 1, True))
    bench.hub.drop_connections()
    await bench.until(lambda: bench.hub.telemetry.query(client.device, client.module))
    (message, *_) = bench.hub.telemetry.query()
    assert message.body == b"gone"
    assert message.properties == {
        "level": "high",
        "iothub-MessageType": "Will",
        "mqtt-retain": "true",
    }
    assert message.system == {"content-type": "text/plain"}


async def test_who_says_good_bye_leaves_no_will(bench: Bench) -> None:
    client = await bench.connect(will=(f"{EVENTS}/", b"gone", 0, False))
    client.disconnect()
    await bench.until(lambda: not bench.hub.core.connected(ClientId("d1")))
    assert bench.hub.telemetry.query() == []


@pytest.mark.parametrize("topic", ["other", "devices/d2/messages/events/", f"{EVENTS}x", "$iothub"])
async def test_a_will_for_others_is_nothing(bench: Bench, topic: str) -> None:
    bench.hub.identity("d2")
    client = await bench.connect(will=(topic, b"gone", 0, False))
    client.loop_stop()
    bench.hub.drop_connections()
    await bench.until(lambda: not bench.hub.core.connected(ClientId("d1")))
    assert bench.hub.telemetry.query() == []


async def test_retained_telemetry_is_marked_and_not_retained(bench: Bench) -> None:
    client = await bench.connect()
    for retain in (True, False):
        client.publish(f"{EVENTS}/a=b", b"x", 1, retain)
    await bench.until(lambda: len(bench.hub.telemetry.query()) == 2)
    assert [one.properties for one in bench.hub.telemetry.query()] == [
        {"a": "b", "mqtt-retain": "true"},
        {"a": "b"},
    ]


@pytest.mark.parametrize(("asked", "seconds"), [(60, 90), (3600, 1767)])
async def test_the_longest_time_out_is_half_an_hour(
    bench: Bench, asked: int, seconds: float
) -> None:
    await bench.connect(keepalive=asked)
    (connection,) = bench.hub._devices._open
    assert connection._keepalive == seconds
