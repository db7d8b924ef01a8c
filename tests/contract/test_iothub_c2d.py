"""From the cloud to a device and back: queued messages, inputs of modules, uploads, websockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from azure.iot.device import X509, ProxyOptions
from azure.iot.device.aio import IoTHubDeviceClient, IoTHubModuleClient
from azure.iot.device.exceptions import ClientError, CredentialError
from gatelet.agent.clock import SystemClock
from gatelet.simulator.connect_proxy import ConnectProxy
from gatelet.simulator.iothub import sas
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.errors import HubError
from gatelet.simulator.iothub.server import IotHub
from gatelet.simulator.iothub.uploads import BLOB_LIMIT
from gatelet.simulator.pki import Pki

pytestmark = pytest.mark.filterwarnings(
    "ignore:ssl.PROTOCOL_TLSv1_2:DeprecationWarning",
    "ignore:unclosed <socket:ResourceWarning",
    "ignore:unclosed <ssl.SSLSocket:ResourceWarning",
)

HOST = "hub.gatelet.test"
DEVICE = ClientId("d1")
MODULE = ClientId("d1", "m1")


class Bench:
    def __init__(self, folder: Path) -> None:
        self.pki = Pki(folder / "pki")
        self.folder = folder
        self.hub = IotHub(HOST, self.pki, state_dir=folder / "hub")
        self.proxy = ConnectProxy()
        self._clients: list[Any] = []

    async def start(self) -> None:
        await self.proxy.start()
        await self.hub.start()
        for name, target in self.hub.routes.items():
            self.proxy.add(name, target)

    async def stop(self) -> None:
        for client in self._clients:
            with contextlib.suppress(ClientError):
                await client.shutdown()
        await self.proxy.stop()
        await self.hub.stop()
        gc.collect()

    def options(self, **options: Any) -> dict[str, Any]:
        return {
            "server_verification_cert": self.pki.ca_file.read_text(),
            "proxy_options": ProxyOptions("HTTP", "127.0.0.1", self.proxy.port),
            "connection_retry": False,
            "ensure_desired_properties": False,
            **options,
        }

    def client(self, module: str | None = None, **options: Any) -> Any:
        kind = IoTHubModuleClient if module else IoTHubDeviceClient
        text = self.hub.connection_string("d1", module)
        client = kind.create_from_connection_string(text, **self.options(**options))
        self._clients.append(client)
        return client

    async def rest(self, method: str, path: str, body: Any = None, expect: int = 200) -> Any:
        fields = dict(p.split("=", 1) for p in self.hub.service_connection_string.split(";"))
        expiry = int(SystemClock().now().timestamp()) + 600
        token = sas.make(
            fields["HostName"], fields["SharedAccessKey"], expiry, fields["SharedAccessKeyName"]
        )
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                method,
                self.hub.rest_url + path,
                json=body,
                headers={"Authorization": token},
                ssl=self.pki.client_context(),
            ) as response,
        ):
            text = await response.text()
            assert response.status == expect, text
            return await response.json() if text else None


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    await bench.start()
    yield bench
    await bench.stop()


async def listen(client: Any) -> list[Any]:
    """The messages that come; the SDK's setter blocks, so not on the hub's own event loop."""
    got: list[Any] = []

    async def on_message(message: Any) -> None:
        got.append(message)

    await asyncio.wait_for(
        asyncio.to_thread(setattr, client, "on_message_received", on_message), 10
    )
    return got


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = asyncio.get_running_loop().time() + seconds
    while not (value := condition()):
        assert asyncio.get_running_loop().time() < deadline, "not in time"
        await asyncio.sleep(0.005)
    return value


async def test_a_message_with_properties_and_feedback(bench: Bench) -> None:
    client = bench.client()
    await client.connect()
    got = await listen(client)
    sent = await bench.rest(
        "POST",
        "/devices/d1/messages/devicebound",
        {
            "body": "hello ü",
            "properties": {"key&=/": "a b+%"},
            "systemProperties": {"messageId": "m 1", "contentType": "text/plain"},
            "ack": "full",
        },
        expect=201,
    )
    assert sent == {"messageId": "m 1"}
    await until(lambda: got)
    (message,) = got
    assert message.data == "hello ü".encode()
    assert message.custom_properties == {"key&=/": "a b+%"}
    assert (message.message_id, message.content_type, message.ack) == ("m 1", "text/plain", "full")
    await until(lambda: bench.hub.core.c2d.count(DEVICE) == 0)
    (record,) = await bench.rest("GET", "/messages/feedback")
    assert (record["originalMessageId"], record["statusCode"]) == ("m 1", "Success")
    assert await bench.rest("GET", "/messages/feedback?after=1") == []


async def test_inputs_of_a_module(bench: Bench) -> None:
    client = bench.client("m1")
    await client.connect()
    got = await listen(client)
    path = "/devices/d1/modules/m1/inputs/in%201"
    await bench.rest("POST", path, {"body": {"n": 1}, "properties": {"p": "q"}}, expect=201)
    await until(lambda: got)
    assert (got[0].input_name, got[0].data) == ("in 1", b'{"n": 1}')
    assert got[0].custom_properties == {"p": "q"}
    with pytest.raises(HubError):
        bench.hub.core.c2d.send(DEVICE, b"", input="x")


async def test_messages_wait_for_the_device_and_outlive_the_hub(bench: Bench) -> None:
    bench.hub.identity("d1")
    for number in range(3):
        bench.hub.core.c2d.send(DEVICE, str(number).encode())
    await bench.hub.stop()
    bench.hub = IotHub(HOST, bench.pki, state_dir=bench.folder / "hub")
    await bench.hub.start()
    for name, target in bench.hub.routes.items():
        bench.proxy.add(name, target)
    assert (await bench.rest("GET", "/devices/d1"))["cloudToDeviceMessageCount"] == 3
    client = bench.client()
    got = await listen(client)  # connects by itself
    await until(lambda: len(got) == 3)
    assert [message.data for message in got] == [b"0", b"1", b"2"]
    await until(lambda: bench.hub.core.c2d.count(DEVICE) == 0)


async def test_an_unacknowledged_message_comes_again(bench: Bench) -> None:
    client = bench.client()
    await client.connect()
    got = await listen(client)
    bench.hub.faults.lose_c2d_acks = 2
    bench.hub.core.c2d.send(DEVICE, b"x")
    # The SDK acknowledges before it hands the message on.
    await until(lambda: bench.hub.core.c2d.count(DEVICE) == 0 and len(got) >= 3)
    assert [message.data for message in got] == [b"x"] * 3


async def test_a_lasting_session_gets_them_at_once_after_connecting(bench: Bench) -> None:
    client = bench.client()
    await client.connect()
    got = await listen(client)
    await client.disconnect()
    bench.hub.core.c2d.send(DEVICE, b"while away")
    await client.connect()
    await until(lambda: got)


class Recorder:
    """A link that never acknowledges."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def subscribed(self, topic: str) -> bool:
        return True

    def deliver(self, topic: str, payload: bytes) -> None:
        raise AssertionError(topic)

    def deliver_settled(self, topic: str, payload: bytes, done: Any) -> None:
        self.sent.append((payload, done))

    def drop(self, reason: str) -> None:
        pass

    async def wait_closed(self) -> None:
        pass


def test_too_often_delivered_expired_purged_and_full(tmp_path: Path) -> None:
    hub = IotHub(HOST, Pki(tmp_path / "pki"))
    hub.identity("d1")
    queues, link = hub.core.c2d, Recorder()
    queues.send(DEVICE, b"a", ack="negative")
    hub.core.attach(DEVICE, link)
    for _ in range(queues.max_deliveries):
        queues.pump(DEVICE)
        queues.pump(DEVICE)  # one copy is on its way: nothing is sent twice
        link.sent[-1][1](None)
    assert len(link.sent) == queues.max_deliveries
    queues.pump(DEVICE)
    assert [one.body for one in queues.dead_letters] == [b"a"]
    hub.core.detach(DEVICE, link)

    queues.send(DEVICE, b"b", seconds=5, ack="full")
    hub.faults.clock_skew_seconds = 6
    assert queues.count(DEVICE) == 0
    hub.faults.clear()
    queues.send(DEVICE, b"c", ack="positive")
    assert queues.purge(DEVICE) == 1
    outcomes = [record["statusCode"] for record in queues.feedback()]
    assert outcomes == ["DeliveryCountExceeded", "Expired"]

    for _ in range(50):
        queues.send(DEVICE, b"d")
    for arguments, status in (
        ({"body": b"x"}, 403),
        ({"body": b"x" * 70_000}, 413),
        ({"body": b"x", "ack": "maybe"}, 400),
        ({"body": b"x", "seconds": 0}, 400),
        ({"body": b"x", "system": {"nonsense": "1"}}, 400),
    ):
        with pytest.raises(HubError) as caught:
            queues.send(DEVICE, **arguments)
        assert caught.value.status == status
    with pytest.raises(HubError):
        queues.send(ClientId("d2"), b"x")
    hub.core.delete_identity(DEVICE)
    hub.identity("d1")
    assert queues.count(DEVICE) == 0


@pytest.mark.parametrize("by", ["token", "certificate"])
async def test_file_upload(bench: Bench, by: str) -> None:
    if by == "token":
        client = bench.client()
    else:
        files = bench.pki.device("d1")
        authentication = {"authentication": {"type": "certificateAuthority"}}
        bench.hub.core.put_identity(DEVICE, authentication)
        client = IoTHubDeviceClient.create_from_x509_certificate(
            X509(str(files.certificate), str(files.key)), HOST, "d1", **bench.options()
        )
        bench._clients.append(client)
    info = await asyncio.wait_for(client.get_storage_info_for_blob("logs/day 1.txt"), 15)
    url = f"https://{info['hostName']}/{info['containerName']}/{info['blobName']}{info['sasToken']}"
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=bench.pki.client_context())
    ) as http:
        to_storage = {"proxy": f"http://127.0.0.1:{bench.proxy.port}"}
        kind = {"x-ms-blob-type": "BlockBlob", "Content-Type": "text/plain"}
        async with http.put(url, data=b"text", headers=kind, **to_storage) as answer:
            assert answer.status == 201
        async with http.get(url, **to_storage) as answer:
            assert (await answer.read(), answer.content_type) == (b"text", "text/plain")
        forged = url.replace("sp=rw", "sp=rwd")
        async with http.put(forged, data=b"text", headers=kind, **to_storage) as answer:
            assert answer.status == 403
        for block, data in (("QQ==", b"1"), ("Qg==", b"2")):
            extra = f"&comp=block&blockid={block}"
            async with http.put(url + extra, data=data, **to_storage) as answer:
                assert answer.status == 201
        xml = "<BlockList><Latest>QQ==</Latest><Latest>Qg==</Latest></BlockList>"
        async with http.put(url + "&comp=blocklist", data=xml, **to_storage) as answer:
            assert answer.status == 201
        xml = f"<BlockList>{'<Latest>QUE=</Latest>' * 100}</BlockList>"
        block = b"x" * (BLOB_LIMIT // 99)
        async with http.put(url + "&comp=block&blockid=QUE%3D", data=block, **to_storage) as answer:
            assert answer.status == 201
        async with http.put(url + "&comp=blocklist", data=xml, **to_storage) as answer:
            assert answer.status == 413
        whole = bench.hub.uploads_url + "&restype=container&comp=list"
        async with http.get(whole, **to_storage) as answer:
            assert answer.status == 200
            assert "<Name>d1/logs/day 1.txt</Name>" in await answer.text()
        no_list = url.replace("/d1/logs/day%201.txt", "") + "&comp=list"
        async with http.get(no_list, **to_storage) as answer:
            assert answer.status == 403
    assert bench.hub.core.uploads.get("d1/logs/day 1.txt").body == b"12"
    await asyncio.wait_for(
        client.notify_blob_upload_status(info["correlationId"], True, 200, "done"), 15
    )
    (notification,) = await bench.rest("GET", "/uploads/notifications")
    assert (notification["blobName"], notification["blobSizeInBytes"]) == ("d1/logs/day 1.txt", 2)
    with pytest.raises(ClientError):
        await client.notify_blob_upload_status(info["correlationId"], True, 200, "twice")
    bench.hub.faults.fail_uploads = 1
    with pytest.raises(ClientError):
        await client.get_storage_info_for_blob("x")
    with pytest.raises(ClientError):
        await client.get_storage_info_for_blob("../x")


async def test_a_module_calls_a_method_of_its_device(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from azure.iot.device import MethodResponse

    monkeypatch.setenv(
        "EdgeHubConnectionString",
        bench.hub.connection_string("d1", "m1") + f";GatewayHostName={HOST}",
    )
    monkeypatch.setenv("EdgeModuleCACertificateFile", str(bench.pki.ca_file))
    module = IoTHubModuleClient.create_from_edge_environment(
        proxy_options=ProxyOptions("HTTP", "127.0.0.1", bench.proxy.port), connection_retry=False
    )
    bench._clients.append(module)
    device = bench.client()

    async def on_method(request: Any) -> None:
        answer = MethodResponse.create_from_method_request(request, 200, {"got": request.payload})
        await device.send_method_response(answer)

    await asyncio.to_thread(setattr, device, "on_method_request_received", on_method)
    call = {"methodName": "ping", "payload": 1, "responseTimeoutInSeconds": 10}
    answer = await asyncio.wait_for(module.invoke_method(call, "d1"), 15)
    assert answer == {"status": 200, "payload": {"got": 1}}


async def test_a_paused_hub_refuses_websockets(bench: Bench) -> None:
    client = bench.client(websockets=True)
    await client.connect()
    await bench.hub.pause()
    await until(lambda: not client.connected)
    with pytest.raises(ClientError):
        await client.connect()
    await bench.hub.resume()
    await client.connect()
    assert await client.get_twin()
    bench.hub.core.put_identity(DEVICE, {"status": "disabled"}, "*")
    await until(lambda: not client.connected)
    with pytest.raises(CredentialError):
        await client.connect()
