"""Requests that nobody should send: each is answered with why, none breaks the hub."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gatelet.agent.clock import SystemClock
from gatelet.simulator.iothub import sas
from gatelet.simulator.iothub.c2d import CloudQueues
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.dps_server import Provisioning
from gatelet.simulator.iothub.errors import HubError
from gatelet.simulator.iothub.faults import Faults
from gatelet.simulator.iothub.json_text import json_bytes, parse_json
from gatelet.simulator.iothub.server import IotHub
from gatelet.simulator.iothub.state import StateUnreadable
from gatelet.simulator.iothub.telemetry import TelemetryStore
from gatelet.simulator.mqtt.codec import Decoder, encode
from gatelet.simulator.mqtt.packets import (
    ConnAck,
    Connect,
    Packet,
    Publish,
    Subscribe,
    Subscription,
)
from gatelet.simulator.pki import Pki
from gatelet.simulator.site import Site
from gatelet.simulator.site_config import SiteSettings
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

HOST = "sim-hub.gatelet.test"
DEVICE = ClientId("d1")
DIGITS = "9" * 5000


class Doors:
    """Every HTTP application of a site, and how to get in."""

    def __init__(self, folder: Path) -> None:
        self.site = Site(SiteSettings(folder, "d1", edge_modules=("m",)))

    async def start(self) -> None:
        await self.site.start()
        trust = ssl.create_default_context(cafile=str(self.site.ca_file))
        trust.check_hostname = False
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust))
        socket = self.site.edge.workload_uri.removeprefix("unix://")
        self._edge = aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket))

    async def stop(self) -> None:
        await self._http.close()
        await self._edge.close()
        await self.site.stop()

    async def __call__(
        self, door: str, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, str]:
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        base, authorization = self._way(door)
        session = self._edge if door == "edge" else self._http
        headers.setdefault("Authorization", authorization)
        url = URL(base + path, encoded=True)
        async with session.request(method, url, data=data, headers=headers) as answer:
            return answer.status, await answer.text()

    def _way(self, door: str) -> tuple[str, str]:
        site, soon = self.site, int(SystemClock().now().timestamp()) + 600
        if door == "service":
            policy, key = next(iter(site.hub.core.state.policies.items()))
            return site.hub.rest_url, sas.make(HOST, key, soon, policy)
        if door == "device":
            key = site.hub.core.state.registry.get(DEVICE).primary_key
            token = sas.make(f"{HOST}/devices/d1", key, soon)
            return f"https://127.0.0.1:{site.hub.https_port}", token
        if door == "control":
            return site.control.url, f"Bearer {site.control.token}"
        return "http://edge", ""


@pytest.fixture
async def doors(tmp_path: Path) -> AsyncIterator[Doors]:
    doors = Doors(tmp_path)
    await doors.start()
    yield doors
    await doors.stop()


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


async def test_each_is_answered_with_why(doors: Doors) -> None:
    generation = doors.site.hub.identity("d1", "m").generation
    sign = f"/modules/m/genid/{generation}/sign"
    conditions = {"query": f"SELECT * FROM devices WHERE tags.a = {DIGITS}"}
    layers = {"deviceContent": {"properties.desired." + ".".join("a" * 3000): 1}}
    for door, method, path, body, headers in (
        ("service", "GET", "/devices?top=²", None, {}),
        ("service", "GET", f"/devices?top={DIGITS}", None, {}),
        ("service", "GET", "/messages/feedback?after=²", None, {}),
        ("service", "GET", f"/uploads/notifications?after={DIGITS}", None, {}),
        ("service", "POST", "/devices/query", conditions, {}),
        ("service", "POST", "/devices/query", {"query": f"SELECT TOP {DIGITS} * FROM devices"}, {}),
        ("service", "POST", "/devices/query", {"query": "SELECT TOP ² * FROM devices"}, {}),
        ("service", "POST", "/configurations/testQueries", {"customMetricQueries": ["x"]}, {}),
        ("service", "PUT", "/configurations/c", {"content": layers}, {}),
        ("service", "PUT", "/configurations/c", {"content": layers, "labels": [1]}, {}),
        ("service", "POST", "/devices/d1/applyConfigurationContent", layers, {}),
        ("service", "POST", "/twins/d1/methods", b'{"methodName": "\\ud800"}', {}),
        ("service", "POST", "/twins/d1/methods", b'{"methodName": "m", "payload": NaN}', {}),
        ("service", "POST", "/twins/d1/methods", b'{"methodName": "m", "payload": 1e999}', {}),
        ("service", "POST", "/twins/d1/methods", b'{"methodName": "\xed\xa0\x80"}', {}),
        ("service", "PATCH", "/twins/d1", {"tags": {"a": nested(500)}}, {}),
        ("service", "GET", "/devices", None, {"Authorization": "Bearer \udcff"}),
        ("device", "GET", "/uploads/d1/x?sig=%C3%A9&se=x", None, {}),
        ("device", "GET", f"/devices/d1/modules/m?x={DIGITS[:100]}", None, {"Authorization": ""}),
        ("control", "POST", "/broker/publish", {"topic": "a/#"}, {}),
        ("control", "POST", "/broker/publish", {"topic": "a", "payload": {"x": 1}}, {}),
        ("control", "PATCH", "/faults", {"clock_skew_seconds": 1e300}, {}),
        ("control", "PATCH", "/faults", b'{"lose_acks": Infinity}', {}),
        ("control", "GET", "/faults", None, {"Authorization": "Bearer \udcff"}),
        ("edge", "POST", sign, {"keyId": [], "algo": "HMACSHA256", "data": "eA=="}, {}),
        ("edge", "POST", "/sign", {"algorithm": "HMAC-SHA256", "keyHandle": []}, {}),
    ):
        status, text = await doors(door, method, path, body, **headers)
        assert 400 <= status < 500, (door, method, path, body, status, text)
        assert "traceback" not in text.lower()


async def test_one_of_many_that_is_wrong_is_named(doors: Doors) -> None:
    items = [
        {"id": "n1", "importMode": "create"},
        {"id": "d1", "importMode": "updateIfMatchETag", "eTag": 5},
        {"id": "d1", "importMode": "updateTwinIfMatchETag", "twinETag": ["x"], "tags": {"a": 1}},
        {"id": "d1", "importMode": ["x"]},
        {"id": "n2", "importMode": "create", "tags": {"a.b": 1}},
    ]
    status, text = await doors("service", "POST", "/devices", items)
    assert status == 400
    assert [one["deviceId"] for one in json.loads(text)["errors"]] == ["d1", "d1", "d1", "n2"]
    registry = doors.site.hub.core.state.registry
    assert ClientId("n1") in registry
    assert ClientId("n2") not in registry, "what is named as an error was not done"


async def test_a_blob_of_any_type_comes_back(doors: Doors) -> None:
    status, text = await doors("device", "POST", "/devices/d1/files", {"blobName": "x"})
    assert status == 200
    path = f"/uploads/d1/x{json.loads(text)['sasToken']}"
    kind = {"x-ms-blob-type": "BlockBlob", "x-ms-blob-content-type": "text/html; charset=utf-8"}
    assert (await doors("device", "PUT", path, b"<p>", **kind))[0] == 201
    assert await doors("device", "GET", path) == (200, "<p>")


async def test_a_device_begins_ten_uploads_at_once(doors: Doors) -> None:
    for _ in range(10):
        assert (await doors("device", "POST", "/devices/d1/files", {"blobName": "x"}))[0] == 200
    status, text = await doors("device", "POST", "/devices/d1/files", {"blobName": "x"})
    assert status == 403
    assert "10" in text
    doors.site.hub.faults.clock_skew_seconds = 3 * 3600
    doors.site.hub.core.uploads.begin("d1", "x")  # those before are too old by now


async def test_telemetry_that_is_nearly_json(doors: Doors) -> None:
    bodies = (b'{"t": NaN}', b"[" * 900 + b"]" * 900, b'"\\ud800"', b"1e999", b"\xff", b'{"t": 1}')
    for body in bodies:
        doors.site.hub.core.accept_telemetry(DEVICE, body, "")
    status, text = await doors("service", "GET", "/telemetry")
    assert status == 200

    def refused(name: str) -> None:
        raise AssertionError(f"{name} is no JSON: the page could not read it")

    found = json.loads(text, parse_constant=refused)
    assert [one["body"] for one in found[-2:]] == [None, {"t": 1}]
    assert found[0]["body"] == '{"t": NaN}'


def test_telemetry_is_bounded_by_its_bytes() -> None:
    store = TelemetryStore(capacity=1000, capacity_bytes=1_000_000)
    for _ in range(30):
        store.add(DEVICE, bytes(100_000), "", "")
    kept = store.query()
    assert len(kept) < 11
    assert kept[-1].sequence == 30
    store.add(DEVICE, bytes(2_000_000), "", "")
    assert [one.sequence for one in store.query()] == [31], "the newest is always there"


def test_records_of_messages_are_bounded(tmp_path: Path) -> None:
    hub = IotHub(HOST, Pki(tmp_path / "pki")).core
    hub.put_identity(DEVICE, {})
    queues = CloudQueues(hub, records=5)
    for _ in range(8):
        queues.send(DEVICE, b"x", ack="full")
        queues.purge(DEVICE)
    assert [one["sequenceNumber"] for one in queues.feedback()] == [4, 5, 6, 7, 8]
    assert [one["sequenceNumber"] for one in queues.feedback(after=6)] == [7, 8]
    assert len(queues.dead_letters) == 5


class Deaf:
    """A link without acknowledgements: whatever is sent counts as delivered at once."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def subscribed(self, topic: str) -> bool:
        return True

    def deliver(self, topic: str, payload: bytes) -> None: ...

    def deliver_settled(self, topic: str, payload: bytes, done: Any) -> None:
        self.sent.append(payload)
        done(0)

    def drop(self, reason: str) -> None: ...

    async def wait_closed(self) -> None: ...


def test_lost_acknowledgements_of_several_messages_at_qos_0(tmp_path: Path) -> None:
    hub = IotHub(HOST, Pki(tmp_path / "pki")).core
    hub.put_identity(DEVICE, {})
    for body in (b"a", b"b", b"c"):
        hub.c2d.send(DEVICE, body)
    hub.faults.lose_c2d_acks = 1
    link = Deaf()
    hub.attach(DEVICE, link)
    hub.c2d.pump(DEVICE)
    assert sorted(link.sent) == [b"a", b"a", b"b", b"c"]
    assert hub.c2d.count(DEVICE) == 0


class Wire:
    """A device's TLS connection, step by step."""

    def __init__(self, hub: IotHub, pki: Pki) -> None:
        self._hub, self._pki = hub, pki
        self._decoder, self.packets = Decoder(version=4), list[Packet]()

    async def open(self, client: ClientId = DEVICE) -> None:
        self.reader, self.writer = await asyncio.open_connection(
            "127.0.0.1", self._hub.mqtt_port, ssl=self._pki.client_context(), server_hostname=HOST
        )

    def connect(self, expiry: str = "", clean: bool = False) -> None:
        key = self._hub.identity(DEVICE.device).primary_key
        when = expiry or str(int(SystemClock().now().timestamp()) + 600)
        token = sas.make(f"{HOST}/{DEVICE.path}", key, when)  # type: ignore[arg-type]
        self.send(
            Connect(
                str(DEVICE),
                clean_start=clean,
                keepalive=60,
                username=f"{HOST}/{DEVICE}/?api-version=2019-10-01",
                password=token.encode(),
            )
        )

    def send(self, *packets: Packet) -> None:
        self.writer.write(b"".join(encode(packet, 4) for packet in packets))

    async def receive(self) -> Packet | None:
        while not self.packets:
            try:
                data = await asyncio.wait_for(self.reader.read(65_536), 30)
            except ConnectionError:
                return None
            if not data:
                return None
            self.packets += self._decoder.feed(data)
        return self.packets.pop(0)

    async def close(self) -> None:
        self.writer.transport.abort()
        try:
            await self.writer.wait_closed()
        except (ConnectionError, ssl.SSLError):
            pass


@pytest.fixture
async def wire(tmp_path: Path) -> AsyncIterator[Wire]:
    pki = Pki(tmp_path / "pki")
    hub = IotHub(HOST, pki)
    hub.identity("d1")
    await hub.start()
    wire = Wire(hub, pki)
    await wire.open()
    yield wire
    await wire.close()
    await hub.stop()


async def test_a_token_until_the_end_of_all_numbers(wire: Wire) -> None:
    wire.connect(DIGITS[:400])
    assert await wire.receive() == ConnAck(False, 5)


async def test_a_new_device_of_the_same_name_has_no_session(wire: Wire) -> None:
    hub = wire._hub
    wire.connect()
    wire.send(Subscribe(1, (Subscription("$iothub/methods/POST/#", 0),)))
    assert await wire.receive() == ConnAck(False, 0)
    await wire.receive()
    hub.core.delete_identity(DEVICE)
    assert await wire.receive() is None
    hub.identity("d1")
    await wire.close()
    await wire.open()
    wire.connect()
    assert await wire.receive() == ConnAck(False, 0), "no session present"
    assert not hub.core.link(DEVICE).subscribed("$iothub/methods/POST/x/?$rid=1")


async def test_a_paused_hub_lets_nobody_in_who_was_nearly_there(wire: Wire) -> None:
    await wire._hub.pause()
    wire.connect()
    started = time.monotonic()
    assert await wire.receive() is None
    assert time.monotonic() - started < 15
    await wire._hub.resume()


async def test_who_shakes_hands_while_the_hub_pauses_stays_out(wire: Wire) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = wire._pki.client_context().wrap_bio(incoming, outgoing, server_hostname=HOST)
    reader, writer = await asyncio.open_connection("127.0.0.1", wire._hub.mqtt_port)
    try:
        for _ in range(2):
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                incoming.write(await asyncio.wait_for(reader.read(65_536), 30))
        await wire._hub.pause()
        tls.do_handshake()
        wire.writer.transport.abort()
        spare, wire.writer = wire.writer, _Into(tls)
        wire.connect()
        wire.writer = spare
        writer.write(outgoing.read())
        answer = b""
        try:
            while data := await asyncio.wait_for(reader.read(65_536), 30):
                incoming.write(data)
                try:
                    answer += tls.read(65_536)
                except ssl.SSLWantReadError:
                    continue
        except (ConnectionError, ssl.SSLError):
            pass
        assert answer == b""
        assert not wire._hub.core.connected(DEVICE)
    finally:
        writer.transport.abort()
        try:
            await writer.wait_closed()
        except ConnectionError:
            pass


class _Into:
    def __init__(self, tls: ssl.SSLObject) -> None:
        self.write = tls.write


async def test_a_message_with_a_topic_as_long_as_topics_get(wire: Wire) -> None:
    hub = wire._hub.core
    wire.connect()
    wire.send(Subscribe(1, (Subscription("devices/d1/messages/devicebound/#", 1),)))
    assert isinstance(await wire.receive(), ConnAck)
    await wire.receive()
    taken = []
    for size in range(65_300, 65_540, 13):
        try:
            taken.append(hub.c2d.send(DEVICE, b"", properties={"x": "y" * size}))
        except HubError:
            continue
        assert isinstance(await wire.receive(), Publish)
    assert len(taken) in range(5, 18)


@pytest.mark.parametrize(
    "damage",
    [
        {"identities": [{"client": "a b"}]},
        {"twins": {"a b": {}}},
        {"twins": []},
        {"policies": 5},
        {"messages": [{"target": "a b", "bodyBase64": ""}]},
    ],
)
def test_a_state_that_is_not_ours_is_said(tmp_path: Path, damage: dict[str, Any]) -> None:
    good = {"format": 1, "identities": [], "twins": {}, "subscriptions": {}, "policies": {}}
    (tmp_path / "hub.json").write_text(json.dumps({**good, **damage}))
    with pytest.raises(StateUnreadable, match="move it away"):
        IotHub(HOST, Pki(tmp_path / "pki"), state_dir=tmp_path)


def test_enrolments_that_are_not_ours_are_said(tmp_path: Path) -> None:
    state = {
        "format": 1,
        "policies": {"a": "b"},
        "enrollments": [{"registrationId": "NOT OURS"}],
        "groups": [],
        "registrations": [],
    }
    (tmp_path / "dps.json").write_text(json.dumps(state))
    with pytest.raises(StateUnreadable, match="move it away"):
        Provisioning("dps.test", "0ne", Pki(tmp_path / "pki"), [], state_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lose_acks", float("inf")),
        ("lose_acks", float("nan")),
        ("clock_skew_seconds", 1e300),
        ("clock_skew_seconds", float("nan")),
        ("delay_seconds", float("nan")),
    ],
)
def test_faults_have_sensible_values(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Faults().set(name, value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_what_is_json_passes_through(value: Any) -> None:
    text = json.dumps(value).encode()
    try:
        taken = parse_json(text)
    except HubError:
        assert "Infinity" in text.decode() or "\\ud" in text.decode()
        return
    assert taken == value
    assert parse_json(json_bytes(taken)) == value
