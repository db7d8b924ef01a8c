"""The provisioning service on the wire, where the SDK never goes."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gatelet.agent.clock import SystemClock
from gatelet.simulator.iothub import sas
from gatelet.simulator.iothub.dps_server import Provisioning
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

DPS, SCOPE = "dps.gatelet.test", "0ne1"
KEY = base64.b64encode(b"the key of the device").decode()
USER = f"{SCOPE}/registrations/d1/api-version=2019-03-31&ClientVersion=x"
REGISTER = "$dps/registrations/PUT/iotdps-register/?$rid=a%20b"
POLL = "$dps/registrations/GET/iotdps-get-operationstatus/?$rid=2&operationId="
ANSWERS = "$dps/registrations/res/#"


class Wire:
    def __init__(self, folder: Path) -> None:
        self.pki = Pki(folder)
        hub = IotHub("hub.gatelet.test", self.pki)
        self.dps = Provisioning(DPS, SCOPE, self.pki, [hub], retry_after=3)
        key = {"type": "symmetricKey", "symmetricKey": {"primaryKey": KEY}}
        self.dps.enroll("d1", {"attestation": key})
        self._writers: list[asyncio.StreamWriter] = []
        self._sent = 0

    async def open(self, *, user: str = USER, key: str = KEY, seconds: int = 600) -> int | None:
        """What CONNACK says."""
        self._reader, self._writer = await asyncio.open_connection(
            "127.0.0.1", self.dps.mqtt_port, ssl=self.pki.client_context(), server_hostname=DPS
        )
        self._writers.append(self._writer)
        self._decoder, self._packets = Decoder(version=4), list[Packet]()
        expiry = int(SystemClock().now().timestamp()) + seconds
        token = sas.make(f"{SCOPE}/registrations/d1", key, expiry, "registration")
        connect = Connect("d1", username=user, password=token.encode())
        answer = await self.ask(connect)
        assert answer is None or isinstance(answer, ConnAck)
        return None if answer is None else answer.reason_code

    async def ask(self, packet: Packet) -> Packet | None:
        self._writer.write(encode(packet, 4))
        return await self.receive()

    async def receive(self) -> Packet | None:
        while not self._packets:
            try:
                data = await asyncio.wait_for(self._reader.read(65536), 30)
            except ConnectionError:
                return None
            if not data:
                return None
            self._packets = self._decoder.feed(data)
        return self._packets.pop(0)

    async def request(self, topic: str, body: bytes = b"") -> tuple[str, Any]:
        """The answer's topic below `res/` and its body."""
        self._sent += 1
        first = await self.ask(Publish(topic, body, qos=1, packet_id=self._sent))
        answer = first if isinstance(first, Publish) else await self.receive()
        if answer is first:
            assert await self.receive() == PubAck(self._sent)
        assert isinstance(answer, Publish)
        return answer.topic.removeprefix("$dps/registrations/res/"), json.loads(answer.payload)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


@pytest.fixture
async def wire(tmp_path: Path) -> AsyncIterator[Wire]:
    wire = Wire(tmp_path)
    await wire.dps.start()
    yield wire
    wire.close()
    await wire.dps.stop()


async def subscribed(wire: Wire) -> Wire:
    assert await wire.open() == 0
    assert await wire.ask(Subscribe(1, (Subscription(ANSWERS, 1),))) == SubAck(1, (1,))
    return wire


async def test_register_and_poll(wire: Wire) -> None:
    await subscribed(wire)
    topic, body = await wire.request(REGISTER, b'{"registrationId": "d1"}')
    assert topic == "202/?$rid=a%20b&retry-after=3"
    assert body["status"] == "assigning"
    wire.dps.faults.stay_assigning = 1
    topic, again = await wire.request(POLL + body["operationId"])
    assert (topic, again) == ("202/?$rid=2&retry-after=3", body)
    topic, done = await wire.request(POLL + body["operationId"])
    assert (topic, done["status"]) == ("200/?$rid=2", "assigned")
    state = done["registrationState"]
    assert (state["assignedHub"], state["deviceId"]) == ("hub.gatelet.test", "d1")
    topic, error = await wire.request(POLL + "unknown")
    assert (topic, error["errorCode"]) == ("404/?$rid=2", 404000)
    topic, _ = await wire.request(REGISTER, b'{"registrationId": "d2"}')
    assert topic == "400/?$rid=a%20b"
    wire.dps.faults.throttle_requests = 1
    topic, _ = await wire.request(REGISTER)
    assert topic == "429/?$rid=a%20b&retry-after=3"


async def test_answers_lost_and_connections_dropped(wire: Wire) -> None:
    await subscribed(wire)
    wire.dps.faults.lose_answers = 1
    assert await wire.ask(Publish(REGISTER, b"", qos=1, packet_id=9)) == PubAck(9)
    assert wire.dps.core.registrations["d1"].status == "assigned"
    wire.dps.faults.drop_before_ack = 1
    assert await wire.ask(Publish(REGISTER, b"", qos=1, packet_id=9)) is None
    wire.dps.faults.refuse_connects = 1
    assert await wire.open() == 5
    assert await wire.open() == 0


async def test_who_and_what_is_refused(wire: Wire) -> None:
    wrong = base64.b64encode(b"another key, as long").decode()
    assert await wire.open(key=wrong) == 5
    assert await wire.open(seconds=-1) == 5
    assert await wire.open(user=USER.replace("d1", "d2")) == 5
    assert await wire.open(user=USER.replace(SCOPE, "0ne2")) == 5
    assert await wire.open() == 0
    others = Subscribe(1, (Subscription("$dps/#", 1), Subscription("#", 0)))
    assert await wire.ask(others) == SubAck(1, (0x80, 0x80))
    for topic in ("x", "$dps/registrations/PUT/iotdps-register/", REGISTER.partition("$rid")[0]):
        assert await wire.open() == 0
        assert await wire.ask(Publish(topic, b"", qos=1, packet_id=1)) is None
