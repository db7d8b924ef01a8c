"""The hub stand-in from the service side (REST), and on the wire where the SDK never goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gatelet.agent.clock import SystemClock
from gatelet.simulator.iothub import sas
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.server import IotHub
from gatelet.simulator.iothub.state import StateUnreadable
from gatelet.simulator.mqtt.codec import Decoder, encode
from gatelet.simulator.mqtt.packets import (
    V5,
    ConnAck,
    Connect,
    Packet,
    PingReq,
    PingResp,
    PubAck,
    Publish,
    SubAck,
    Subscribe,
    Subscription,
    UnsubAck,
    Unsubscribe,
)
from gatelet.simulator.pki import Pki

HOST = "hub.gatelet.test"
DEVICE = ClientId("d1")
MANIFEST = {
    "modulesContent": {
        "$edgeAgent": {
            "properties.desired": {
                "schemaVersion": "1.1",
                "systemModules": {"edgeAgent": {}, "edgeHub": {}},
                "modules": {"digits": {"status": "running"}},
            },
            "properties.desired.modules.extra": {"status": "stopped"},
        },
        "digits": {"properties.desired": {"threshold": 1}},
    }
}


class SkewedClock(SystemClock):
    """The machine's clock, set wrong."""

    offset = timedelta()

    def now(self) -> datetime:
        return super().now() + self.offset


class Service:
    """The service side's view of one hub."""

    def __init__(self, folder: Path) -> None:
        self.pki = Pki(folder / "pki")
        self.clock = SkewedClock()
        self.hub = IotHub(HOST, self.pki, self.clock, state_dir=folder / "hub")
        self.http = aiohttp.ClientSession()
        self.writers: list[asyncio.StreamWriter] = []

    async def call(
        self, method: str, path: str, body: Any = None, *, token: str | None = None, **headers: str
    ) -> tuple[int, Any]:
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        async with self.http.request(
            method,
            self.hub.rest_url + path,
            data=data,
            headers={"Authorization": token or self.token(), **headers},
            ssl=self.pki.client_context(),
        ) as response:
            text = await response.text()
            return response.status, json.loads(text) if text else None

    def token(self, seconds: int = 600, **changes: str) -> str:
        fields = dict(part.split("=", 1) for part in self.hub.service_connection_string.split(";"))
        fields.update(changes)
        expiry = int(datetime.now(timezone.utc).timestamp()) + seconds
        policy = fields["SharedAccessKeyName"]
        return sas.make(fields["HostName"], fields["SharedAccessKey"], expiry, policy)

    async def device(self, connect: Connect | None = None) -> RawClient:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.hub.mqtt_port, ssl=self.pki.client_context(), server_hostname=HOST
        )
        self.writers.append(writer)
        client = RawClient(reader, writer)
        await client.send(connect or self.connect())
        return client

    def connect(self, **changes: Any) -> Connect:
        identity = self.hub.identity("d1")
        expiry = int(datetime.now(timezone.utc).timestamp()) + 600
        token = sas.make(f"{HOST}/devices/d1", identity.primary_key, expiry)
        fields = {
            "client_id": "d1",
            "clean_start": False,
            "keepalive": 60,
            "username": f"{HOST}/d1/?api-version=2019-10-01",
            "password": token.encode(),
        }
        return Connect(**{**fields, **changes})


class RawClient:
    """MQTT packets without an opinion."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._decoder = Decoder(version=4)
        self._packets: list[Packet] = []

    async def send(self, packet: Packet | bytes, version: int = 4) -> None:
        if isinstance(packet, Connect):
            version = packet.version
        self._writer.write(packet if isinstance(packet, bytes) else encode(packet, version))
        await self._writer.drain()

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

    async def ask(self, packet: Packet) -> Packet | None:
        await self.send(packet)
        return await self.receive()


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    service = Service(tmp_path)
    await service.hub.start()
    yield service
    await service.http.close()
    for writer in service.writers:
        writer.close()
        try:
            await writer.wait_closed()
        except OSError:
            continue
    await service.hub.stop()


async def test_identities_over_rest(service: Service) -> None:
    status, device = await service.call("PUT", "/devices/d1", {"capabilities": {"iotEdge": True}})
    assert (status, device["status"], device["connectionState"]) == (200, "enabled", "Disconnected")
    assert device["capabilities"] == {"iotEdge": True}
    assert (await service.call("PUT", "/devices/d1", {}))[0] == 409
    assert (await service.call("PUT", "/devices/d1", {}, **{"If-Match": '"x"'}))[0] == 412
    status, module = await service.call("PUT", "/devices/d1/modules/m1", {"managedBy": "me"})
    assert (status, module["managedBy"]) == (200, "me")
    status, modules = await service.call("GET", "/devices/d1/modules?api-version=2021-04-12")
    assert [m["moduleId"] for m in modules] == ["$edgeAgent", "$edgeHub", "m1"]
    assert (await service.call("GET", "/devices/d1/modules/%24edgeAgent"))[0] == 200
    assert [d["deviceId"] for d in (await service.call("GET", "/devices"))[1]] == ["d1"]
    assert (await service.call("DELETE", "/devices/d1"))[0] == 204
    for path in ("/devices/d1", "/devices/d1/modules/m1", "/twins/d1", "/devices/d1/modules"):
        status, error = await service.call("GET", path)
        assert status == 404
        assert "NotFound" in error["Message"]


async def test_twin_concurrency_by_etag(service: Service) -> None:
    service.hub.identity("d1")
    _, twin = await service.call("GET", "/twins/d1")
    match = {"If-Match": f'"{twin["etag"]}"'}
    change = {"tags": {"site": "a"}, "properties": {"desired": {"x": 1}}}
    status, after = await service.call("PATCH", "/twins/d1", change, **match)
    assert (status, after["tags"], after["properties"]["desired"]["x"]) == (200, {"site": "a"}, 1)
    status, error = await service.call("PATCH", "/twins/d1", change, **match)
    assert status == 412
    assert after["etag"] in error["Message"]
    status, replaced = await service.call("PUT", "/twins/d1", {"tags": {}}, **{"If-Match": "*"})
    assert (status, replaced["tags"]) == (200, {})
    assert "x" not in replaced["properties"]["desired"]


async def test_set_modules(service: Service) -> None:
    service.hub.identity("d1")
    assert await service.call("POST", "/devices/d1/applyConfigurationContent", MANIFEST) == (
        204,
        None,
    )
    _, modules = await service.call("GET", "/devices/d1/modules")
    assert [m["moduleId"] for m in modules] == [
        "$edgeAgent",
        "$edgeHub",
        "digits",
        "extra",
    ]
    _, twin = await service.call("GET", "/twins/d1/modules/$edgeAgent")
    desired = twin["properties"]["desired"]
    assert desired["modules"] == {"digits": {"status": "running"}, "extra": {"status": "stopped"}}
    _, twin = await service.call("GET", "/twins/d1/modules/digits")
    assert twin["properties"]["desired"]["threshold"] == 1


@pytest.mark.parametrize(
    ("content", "status"),
    [
        ({}, 400),
        ({"modulesContent": []}, 400),
        ({"modulesContent": {"m": {"desired": {}}}}, 400),
        ({"modulesContent": {"m": {"properties.desired": 1}}}, 400),
        ({"modulesContent": {"a": {"properties.desired": {"x": 1}}, "b/c": {}}}, 400),
        ({"modulesContent": {"a": {"properties.desired": {"$x": 1}}}}, 400),
        (
            {
                "modulesContent": {
                    "a": {"properties.desired": {str(i): "x" * 4000 for i in range(9)}}
                }
            },
            413,
        ),
    ],
)
async def test_bad_content_changes_nothing(
    service: Service, content: dict[str, Any], status: int
) -> None:
    service.hub.identity("d1")
    answer, error = await service.call("POST", "/devices/d1/applyConfigurationContent", content)
    assert answer == status
    assert error["Message"]
    assert (await service.call("GET", "/devices/d1/modules"))[1] == []


@pytest.mark.parametrize("body", [b"", b"[", b"[]", b"null", b"\xff", b"[" * 100_000])
async def test_bodies_that_are_no_objects(service: Service, body: bytes) -> None:
    service.hub.identity("d1")
    for method, path in (
        ("PUT", "/devices/d2"),
        ("PATCH", "/twins/d1"),
        ("POST", "/twins/d1/methods"),
    ):
        assert (await service.call(method, path, body))[0] == 400


async def test_service_credentials(service: Service) -> None:
    for token in (
        "nonsense",
        service.token(seconds=-1),
        service.token(SharedAccessKeyName="nobody"),
        service.token(SharedAccessKey="AAAA"),
        service.token(HostName="other.example"),
        service.token().partition("&skn=")[0],
    ):
        status, error = await service.call("GET", "/devices", token=token)
        assert status == 401, error
    assert (await service.call("GET", "/devices", token=service.token(HostName=HOST)))[0] == 200


async def test_methods_without_a_device(service: Service) -> None:
    service.hub.identity("d1")
    status, error = await service.call("POST", "/twins/d1/methods", {"methodName": "m"})
    assert status == 404
    assert "DeviceNotOnline" in error["Message"]
    for call in (
        {},
        {"methodName": ""},
        {"methodName": "m", "responseTimeoutInSeconds": 1},
        {"methodName": "m", "connectTimeoutInSeconds": "soon"},
    ):
        assert (await service.call("POST", "/twins/d1/methods", call))[0] == 400


async def test_a_method_waits_for_its_device_and_for_its_answer(service: Service) -> None:
    service.hub.identity("d1")
    call = asyncio.ensure_future(
        service.hub.core.invoke_method(DEVICE, "a b", [1], 0.2, connect_timeout=10)
    )
    client = await service.device()
    assert await client.receive() == ConnAck(session_present=False)
    subscribe = Subscribe(1, (Subscription("$iothub/methods/POST/#", 1),))
    assert await client.ask(subscribe) == SubAck(1, (1,))
    request = await client.receive()
    assert isinstance(request, Publish)
    assert (request.topic.split("?")[0], request.payload) == ("$iothub/methods/POST/a%20b/", b"[1]")
    with pytest.raises(Exception, match="did not answer a b"):
        await call
    rid = request.topic.partition("$rid=")[2]
    late = Publish(f"$iothub/methods/res/200/?$rid={rid}", b"{}", qos=1, packet_id=7)
    assert await client.ask(late) == PubAck(7)


async def test_a_device_that_goes_away_fails_its_methods(service: Service) -> None:
    client = await service.device()
    await client.receive()
    await client.ask(Subscribe(1, (Subscription("$iothub/methods/POST/#", 1),)))
    call = asyncio.ensure_future(service.hub.core.invoke_method(DEVICE, "m", None, 30))
    assert isinstance(await client.receive(), Publish)
    service.hub.drop_connections()
    with pytest.raises(Exception, match="disconnected"):
        await asyncio.wait_for(call, 25)


@pytest.mark.parametrize(
    "publish",
    [
        Publish("somewhere/else", b"x"),
        Publish("devices/d2/messages/events/", b"x"),
        Publish("devices/d1/messages/eventsx", b"x"),
        Publish("$iothub/twin/GET/?x=1", b" "),
        Publish("$iothub/twin/DELETE/?$rid=1", b" "),
        Publish("$iothub/methods/res/ok/?$rid=1", b"{}"),
        Publish("devices/d1/messages/events/", b"x", qos=2, packet_id=1),
        Publish("devices/d1/messages/events/", b"x" * (256 * 1024 + 1)),
        Publish("devices/d1/messages/events/", b"x" * 400_000),
    ],
    ids=lambda publish: publish.topic + str(publish.qos),
)
async def test_what_closes_the_connection(service: Service, publish: Publish) -> None:
    client = await service.device()
    assert isinstance(await client.receive(), ConnAck)
    await client.send(publish)
    assert await client.receive() is None
    assert service.hub.telemetry.query() == []


async def test_sessions_and_subscriptions(service: Service) -> None:
    client = await service.device()
    assert await client.receive() == ConnAck(session_present=False)
    wanted = ("$iothub/twin/res/#", "#", "devices/d2/messages/devicebound/#")
    subscribe = Subscribe(3, tuple(Subscription(topic, 2) for topic in wanted))
    assert await client.ask(subscribe) == SubAck(3, (1, 0x80, 0x80))
    assert await client.ask(PingReq()) == PingResp()
    again = await service.device()
    assert await again.receive() == ConnAck(session_present=True)
    assert await client.receive() is None
    await again.send(Publish("$iothub/twin/GET/?$rid=a%2Fb", b" "))
    answer = await again.receive()
    assert isinstance(answer, Publish)
    assert answer.topic == "$iothub/twin/res/200/?$rid=a%2Fb"
    assert await again.ask(Unsubscribe(4, ("$iothub/twin/res/#",))) == UnsubAck(4)
    await again.send(Publish("$iothub/twin/GET/?$rid=2", b" "))
    assert await again.ask(PingReq()) == PingResp()  # no answer in between
    clean = await service.device(service.connect(clean_start=True))
    assert await clean.receive() == ConnAck(session_present=False)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"client_id": "d1/x/y"}, 2),
        ({"client_id": "d2"}, 5),
        ({"username": f"{HOST}/d2/?api-version=2019-10-01"}, 5),
        ({"username": f"{HOST}/d1/"}, 5),
        ({"username": "other.example/d1/?api-version=2019-10-01"}, 5),
        ({"username": None, "password": None}, 5),
        ({"password": b"\xff\xfe"}, 5),
        ({"version": V5}, 1),
    ],
)
async def test_refused_connects(service: Service, changes: dict[str, Any], code: int) -> None:
    client = await service.device(service.connect(**changes))
    assert await client.receive() == ConnAck(False, code)
    assert await client.receive() is None


async def test_a_hub_whose_clock_is_ahead_sees_expired_tokens(service: Service) -> None:
    connect = service.connect()
    service.clock.offset = timedelta(hours=1)
    client = await service.device(connect)
    assert await client.receive() == ConnAck(False, 5)


async def test_state_is_written_before_stop_returns(service: Service, tmp_path: Path) -> None:
    before = service.hub.connection_string("d1", "m1")
    policy = service.hub.core.state.policies
    service.hub.core.update_twin(DEVICE, {"tags": {"t": 1}})
    await service.hub.stop()
    again = IotHub(HOST, service.pki, state_dir=tmp_path / "hub")
    assert again.connection_string("d1", "m1") == before
    assert again.core.state.policies == policy
    assert again.core.twin(DEVICE).tags == {"t": 1}


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": 99}', b'{"format": 1}', b"\xff"])
def test_a_strange_state_file_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "hub.json").write_bytes(content)
    with pytest.raises(StateUnreadable, match="move it away"):
        IotHub(HOST, Pki(tmp_path / "pki"), state_dir=tmp_path)
    assert (tmp_path / "hub.json").read_bytes() == content
