"""What a hub can be told to do wrong, seen from the wire; tokens that end and limits that bite."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from gatelet.agent.clock import SystemClock
from gatelet.simulator.iothub import sas
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.faults import Faults
from gatelet.simulator.iothub.rates import RateLimits
from gatelet.simulator.iothub.server import IotHub
from gatelet.simulator.mqtt.codec import Decoder, encode
from gatelet.simulator.mqtt.packets import (
    ConnAck,
    Connect,
    Packet,
    PubAck,
    Publish,
    SubAck,
    Subscribe,
    Subscription,
)
from gatelet.simulator.pki import Pki

HOST = "hub.gatelet.test"
DEVICE = ClientId("d1")
PATCHES = "$iothub/twin/PATCH/properties/desired/"
GET = Publish("$iothub/twin/GET/?$rid=1", b" ", qos=1, packet_id=7)
TELEMETRY = Publish("devices/d1/messages/events/", b"{}", qos=1, packet_id=8)


class Device:
    """MQTT packets of d1, without an opinion."""

    def __init__(self, hub: IotHub, pki: Pki) -> None:
        self._hub, self._pki = hub, pki
        self._decoder = Decoder(version=4)
        self._packets: list[Packet] = []

    async def open(self, client: ClientId = DEVICE, seconds: int = 600) -> ConnAck | None:
        identity = self._hub.identity(client.device, client.module or None)
        self._reader, self._writer = await asyncio.open_connection(
            "127.0.0.1", self._hub.mqtt_port, ssl=self._pki.client_context(), server_hostname=HOST
        )
        expiry = int(SystemClock().now().timestamp()) + seconds
        token = sas.make(f"{HOST}/{client.path}", identity.primary_key, expiry)
        connect = Connect(
            str(client),
            clean_start=False,
            keepalive=60,
            username=f"{HOST}/{client}/?api-version=2019-10-01",
            password=token.encode(),
        )
        answer = await self.ask(connect)
        assert answer is None or isinstance(answer, ConnAck)
        return answer

    async def ask(self, packet: Packet) -> Packet | None:
        self.send(packet)
        return await self.receive()

    def send(self, packet: Packet) -> None:
        self._writer.write(encode(packet, 4))

    async def subscribe(self, topic: str) -> Packet | None:
        return await self.ask(Subscribe(1, (Subscription(topic, 1),)))

    async def receive(self) -> Packet | None:
        """The next packet, None when the hub closed the connection."""
        while not self._packets:
            try:
                data = await asyncio.wait_for(self._reader.read(65536), 30)
            except ConnectionError:
                return None
            if not data:
                return None
            self._packets = self._decoder.feed(data)
        return self._packets.pop(0)

    async def patches(self, count: int) -> list[int]:
        """The versions of the next desired patches."""
        found = []
        while len(found) < count:
            packet = await self.receive()
            assert isinstance(packet, Publish)
            assert packet.topic.startswith(PATCHES)
            found.append(json.loads(packet.payload)["$version"])
        return found

    def close(self) -> None:
        self._writer.close()


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[IotHub]:
    hub = IotHub(HOST, Pki(tmp_path / "pki"))
    await hub.start()
    yield hub
    await hub.stop()


@pytest.fixture
async def new_device(hub: IotHub, tmp_path: Path) -> AsyncIterator[Callable[[], Device]]:
    made: list[Device] = []

    def make() -> Device:
        made.append(Device(hub, Pki(tmp_path / "pki")))
        return made[-1]

    yield make
    for device in made:
        device.close()


@pytest.fixture
async def device(new_device: Callable[[], Device]) -> Device:
    device = new_device()
    answer = await device.open()
    assert answer is not None
    assert answer.reason_code == 0
    return device


def desire(hub: IotHub, value: int) -> None:
    hub.core.update_twin(DEVICE, {"properties": {"desired": {"x": value}}})


async def until(condition: Callable[[], Any]) -> None:
    deadline = asyncio.get_running_loop().time() + 10
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "not in time"
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("fault", "handled", "acknowledged", "open_after"),
    [
        ("drop_unhandled", False, False, False),
        ("drop_before_ack", True, False, False),
        ("drop_after_ack", True, True, False),
        ("lose_acks", True, False, True),
    ],
)
async def test_publishes(
    hub: IotHub, device: Device, fault: str, handled: bool, acknowledged: bool, open_after: bool
) -> None:
    hub.faults.set(fault, 1)
    device.send(TELEMETRY)
    if acknowledged:
        assert await device.receive() == PubAck(8)
    if open_after:
        device.send(Publish(TELEMETRY.topic, b"{}", qos=1, packet_id=9))
        assert await device.receive() == PubAck(9), "8 is never acknowledged"
    else:
        assert await device.receive() is None
    assert bool(hub.telemetry.query("d1")) is handled
    assert hub.faults == Faults()


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("refuse_connects", 5),
        ("drop_before_connack", None),
        ("drop_after_connack", 0),
        ("expire_tokens", 0),
    ],
)
async def test_connects(
    hub: IotHub, new_device: Callable[[], Device], fault: str, code: int | None
) -> None:
    hub.faults.set(fault, 1)
    device = new_device()
    answer = await device.open()
    assert (answer and answer.reason_code) == code
    assert await device.receive() is None
    await until(lambda: not hub.core.connected(DEVICE))
    again = await new_device().open()
    assert again is not None
    assert again.reason_code == 0


@pytest.mark.parametrize(
    ("fault", "answered"), [("drop_before_suback", 0), ("drop_after_suback", 1)]
)
async def test_subscribes(hub: IotHub, device: Device, fault: str, answered: int) -> None:
    hub.faults.set(fault, 1)
    answer = await device.subscribe(PATCHES + "#")
    assert isinstance(answer, SubAck) is bool(answered)
    if answered:
        assert await device.receive() is None
    assert hub.core.state.subscriptions[DEVICE] == {PATCHES + "#": 1}


async def test_refused_subscriptions_and_forgotten_sessions(
    hub: IotHub, device: Device, new_device: Callable[[], Device]
) -> None:
    hub.faults.refuse_subscriptions = 1
    assert await device.subscribe(PATCHES + "#") == SubAck(1, (0x80,))
    assert await device.subscribe(PATCHES + "#") == SubAck(1, (1,))
    again = await new_device().open()
    assert again is not None
    assert again.session_present
    hub.faults.forget_sessions = 1
    forgotten = await new_device().open()
    assert forgotten is not None
    assert not forgotten.session_present
    assert DEVICE not in hub.core.state.subscriptions


async def test_lost_repeated_and_reordered_patches(hub: IotHub, device: Device) -> None:
    await device.subscribe(PATCHES + "#")
    hub.faults.lose_desired_patches = 1
    desire(hub, 1)
    desire(hub, 2)
    assert await device.patches(1) == [3]
    hub.faults.repeat_desired_patches = 1
    desire(hub, 3)
    assert await device.patches(2) == [4, 4]
    hub.faults.reorder_desired_patches = 1
    desire(hub, 4)
    desire(hub, 5)
    assert await device.patches(2) == [6, 5]


async def test_twin_answers(hub: IotHub, device: Device) -> None:
    await device.subscribe("$iothub/twin/res/#")

    async def status() -> int:
        device.send(GET)
        answers = [await device.receive(), await device.receive()]
        (answer,) = [one for one in answers if isinstance(one, Publish)]
        return int(answer.topic.split("/")[3])

    hub.faults.throttle_twin_requests = 1
    hub.faults.fail_twin_requests = 1
    assert [await status() for _ in range(3)] == [429, 500, 200]
    hub.faults.lose_twin_answers = 1
    assert await device.ask(GET) == PubAck(7)
    assert await status() == 200


async def test_delayed_answers_keep_their_order(hub: IotHub, device: Device) -> None:
    await device.subscribe(PATCHES + "#")
    loop = asyncio.get_running_loop()
    hub.faults.delay_seconds = 0.2
    began = loop.time()
    desire(hub, 1)
    hub.faults.delay_seconds = 0.0
    desire(hub, 2)
    assert await device.patches(2) == [2, 3]
    assert loop.time() - began >= 0.19


async def test_a_token_that_expires_ends_the_connection(
    hub: IotHub, new_device: Callable[[], Device]
) -> None:
    for seconds in (1, 4, 16):  # a short one may be over before the hub sees it
        device = new_device()
        answer = await device.open(seconds=seconds)
        if answer is not None and answer.reason_code == 0:
            break
    assert answer is not None
    assert answer.reason_code == 0
    assert await device.receive() is None


async def test_a_clock_set_forward_expires_tokens(hub: IotHub, device: Device) -> None:
    hub.faults.clock_skew_seconds = 601
    assert await device.ask(TELEMETRY) is None
    assert hub.telemetry.query("d1") == []
    hub.faults.clock_skew_seconds = 0
    assert hub.core.clock.now() <= SystemClock().now()


async def test_a_disabled_device_goes_with_its_modules(
    hub: IotHub, device: Device, new_device: Callable[[], Device]
) -> None:
    module = new_device()
    await module.open(ClientId("d1", "m1"))
    other = new_device()
    await other.open(ClientId("d2"))
    hub.core.put_identity(DEVICE, {"status": "disabled"}, "*")
    assert await device.receive() is None
    assert await module.receive() is None
    refused = await new_device().open(ClientId("d1", "m1"))
    assert refused is not None
    assert refused.reason_code == 5
    assert hub.core.connected(ClientId("d2"))


class SteppedClock(SystemClock):
    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


async def test_rates_of_a_hub(tmp_path: Path) -> None:
    clock = SteppedClock()
    pki = Pki(tmp_path / "pki")
    hub = IotHub(HOST, pki, clock)
    await hub.start()
    device = Device(hub, pki)
    try:
        await device.open()
        await device.subscribe("$iothub/twin/res/#")

        async def statuses(topic: str, count: int) -> list[int]:
            found = []
            for number in range(count):
                device.send(Publish(f"{topic}?$rid={number}", b"{}", qos=0))
                answer = await device.receive()
                assert isinstance(answer, Publish)
                found.append(int(answer.topic.split("/")[3]))
            return found

        patch = "$iothub/twin/PATCH/properties/reported/"
        assert await statuses("$iothub/twin/GET/", 101) == [200] * 100 + [429]
        assert await statuses(patch, 51) == [204] * 50 + [429]
        clock.seconds += 0.02
        assert await statuses(patch, 2) == [204, 429]
        hub.core.throttle.limits = RateLimits(twin_reads=1, twin_updates=None)
        assert await statuses(patch, 60) == [204] * 60
        clock.seconds += 60
        assert await statuses("$iothub/twin/GET/", 2) == [200, 429], "one second is saved, no more"
    finally:
        device.close()
        await hub.stop()


def test_faults_by_name() -> None:
    faults = Faults()
    faults.set("drop_before_ack", 2.0)
    faults.set("delay_seconds", 1)
    assert faults.as_json()["drop_before_ack"] == 2
    assert isinstance(faults.drop_before_ack, int)
    assert set(faults.as_json()) == {field.name for field in fields(Faults)}
    for name, value in (
        ("nonsense", 1),
        ("drop_before_ack", -1),
        ("drop_before_ack", 1.5),
        ("drop_before_ack", True),
        ("delay_seconds", -1),
        ("take", 1),
    ):
        with pytest.raises(ValueError, match=name):
            faults.set(name, value)
    faults.clear()
    assert faults == Faults()
