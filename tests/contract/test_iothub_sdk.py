"""The unmodified azure-iot-device against the hub stand-in: TLS, CONNECT proxy, SAS."""

from __future__ import annotations

import asyncio
import base64
import gc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from azure.iot.device import Message, MethodResponse, ProxyOptions
from azure.iot.device.aio import IoTHubDeviceClient, IoTHubModuleClient
from azure.iot.device.exceptions import ClientError, CredentialError
from gatelet.agent.clock import SystemClock
from gatelet.simulator.connect_proxy import ConnectProxy
from gatelet.simulator.iothub import sas
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.server import IotHub
from gatelet.simulator.pki import Pki

# The SDK asks for exactly TLS 1.2 with a constant that Python has deprecated.
# After a broken connection it also forgets the socket pair that woke its thread.
pytestmark = pytest.mark.filterwarnings(
    "ignore:ssl.PROTOCOL_TLSv1_2:DeprecationWarning", "ignore:unclosed <socket:ResourceWarning"
)

HOST = "hub.gatelet.test"
DEVICE = ClientId("d1")


class Bench:
    """A hub, the proxy that leads to it, and SDK clients that end with the test."""

    def __init__(self, folder: Path) -> None:
        self.pki = Pki(folder / "pki")
        self.state_dir = folder / "hub"
        self.hub = IotHub(HOST, self.pki, state_dir=self.state_dir)
        self.proxy = ConnectProxy()
        self._clients: list[Any] = []

    async def start(self) -> None:
        await self.proxy.start()
        await self.hub.start()
        self.proxy.add(f"{HOST}:8883", ("127.0.0.1", self.hub.mqtt_port))

    async def restart_hub(self) -> None:
        await self.hub.stop()
        self.hub = IotHub(HOST, self.pki, state_dir=self.state_dir)
        await self.hub.start()
        self.proxy.add(f"{HOST}:8883", ("127.0.0.1", self.hub.mqtt_port))

    async def stop(self) -> None:
        for client in self._clients:
            try:
                await client.shutdown()
            except ClientError:
                await client.shutdown()
        self._clients.clear()
        await self.proxy.stop()
        await self.hub.stop()
        gc.collect()  # what the SDK leaked must not trouble the next test

    def client(self, connection_string: str, **options: Any) -> Any:
        kind = IoTHubModuleClient if "ModuleId=" in connection_string else IoTHubDeviceClient
        client = kind.create_from_connection_string(
            connection_string,
            server_verification_cert=self.pki.ca_file.read_text(),
            proxy_options=ProxyOptions("HTTP", "127.0.0.1", self.proxy.port),
            **{"connection_retry": False, "ensure_desired_properties": False, **options},
        )
        self._clients.append(client)
        return client

    async def rest(
        self, method: str, path: str, body: Any = None, expect: int = 200, **headers: str
    ) -> Any:
        fields = dict(p.split("=", 1) for p in self.hub.service_connection_string.split(";"))
        expiry = int(SystemClock().now().timestamp()) + 600
        token = sas.make(
            fields["HostName"], fields["SharedAccessKey"], expiry, fields["SharedAccessKeyName"]
        )
        headers = {"Authorization": token, **headers}
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                method,
                self.hub.rest_url + path,
                json=body,
                headers=headers,
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


async def listen(client: Any, **handlers: Any) -> None:
    """The SDK's setters subscribe and block: on the hub's own event loop that never ends."""
    for name, handler in handlers.items():
        await asyncio.wait_for(asyncio.to_thread(setattr, client, name, handler), 30)


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    async def poll() -> Any:
        while True:
            if value := condition():
                return value
            await asyncio.sleep(0.005)

    return await asyncio.wait_for(poll(), seconds)


async def test_twin_patch_report_method_and_telemetry(bench: Bench) -> None:
    client = bench.client(bench.hub.connection_string("d1"))
    patches: list[Any] = []

    async def on_patch(patch: Any) -> None:
        patches.append(patch)

    async def on_method(request: Any) -> None:
        response = MethodResponse.create_from_method_request(
            request, 201, {"name": request.name, "got": request.payload}
        )
        await client.send_method_response(response)

    await client.connect()
    await listen(client, on_twin_desired_properties_patch_received=on_patch)
    await listen(client, on_method_request_received=on_method)
    assert await client.get_twin() == {"desired": {"$version": 1}, "reported": {"$version": 1}}

    twin = await bench.rest(
        "PATCH", "/twins/d1", {"properties": {"desired": {"a": {"b": 1}, "gone": None}}}
    )
    assert twin["properties"]["desired"]["$version"] == 2
    await until(lambda: patches)
    assert patches == [{"a": {"b": 1}, "gone": None, "$version": 2}]

    await client.patch_twin_reported_properties({"x": [1, {"y": None}], "ü": "ß"})
    twin = await bench.rest("GET", "/twins/d1")
    assert twin["properties"]["reported"]["x"] == [1, {"y": None}]
    assert twin["properties"]["reported"]["ü"] == "ß"
    assert twin["connectionState"] == "Connected"

    answer = await bench.rest(
        "POST", "/twins/d1/methods", {"methodName": "Ping me", "payload": {"n": 1}}
    )
    assert answer == {"status": 201, "payload": {"name": "Ping me", "got": {"n": 1}}}

    message = Message(b'{"t": 20.5}', content_encoding="utf-8", content_type="application/json")
    message.message_id = "m 1"
    message.custom_properties["key&=/?"] = "a+b %ü"
    await client.send_message(message)
    await client.send_message(Message(b"\xff\x00"))
    first, second = await bench.rest("GET", "/telemetry?device=d1")
    assert first["body"] == {"t": 20.5}
    assert first["properties"] == {"key&=/?": "a+b %ü"}
    assert first["systemProperties"] == {
        "message-id": "m 1",
        "content-type": "application/json",
        "content-encoding": "utf-8",
    }
    assert base64.b64decode(second["bodyBase64"]) == b"\xff\x00"
    assert await bench.rest("GET", f"/telemetry?device=d1&after={second['sequenceNumber']}") == []


async def test_messages_reach_only_their_client(bench: Bench) -> None:
    device = bench.client(bench.hub.connection_string("d1"))
    module = bench.client(bench.hub.connection_string("d1", "$edgeAgent"))
    got: dict[str, list[Any]] = {"device": [], "module": []}

    async def on_device(patch: Any) -> None:
        got["device"].append(patch)

    async def on_module(patch: Any) -> None:
        got["module"].append(patch)

    await device.connect()
    await module.connect()
    await listen(device, on_twin_desired_properties_patch_received=on_device)
    await listen(module, on_twin_desired_properties_patch_received=on_module)
    await bench.rest("PATCH", "/twins/d1/modules/$edgeAgent", {"properties": {"desired": {"m": 1}}})
    await bench.rest("PATCH", "/twins/d1", {"properties": {"desired": {"d": 1}}})
    await until(lambda: got["device"] and got["module"])
    assert got == {"device": [{"d": 1, "$version": 2}], "module": [{"m": 1, "$version": 2}]}
    await module.send_message_to_output(Message("x"), "out 1")
    (message,) = await bench.rest("GET", "/telemetry?device=d1&module=$edgeAgent")
    assert message["systemProperties"] == {"output-name": "out 1"}


async def test_wrong_credentials_are_refused(bench: Bench) -> None:
    right = bench.hub.connection_string("d1")
    key = base64.b64encode(b"not the right key").decode()
    wrong_key = right.partition("SharedAccessKey=")[0] + f"SharedAccessKey={key}"
    for wrong in (wrong_key, right.replace("DeviceId=d1", "DeviceId=d2")):
        with pytest.raises(CredentialError):
            await bench.client(wrong).connect()
    await bench.rest("GET", "/devices/d1")
    bench.hub.core.put_identity(DEVICE, {"status": "disabled"}, if_match="*")
    with pytest.raises(CredentialError):
        await bench.client(right).connect()


async def test_twin_errors_carry_the_status(bench: Bench) -> None:
    client = bench.client(bench.hub.connection_string("d1"))
    await client.connect()
    for patch, status in (({"a.b": 1}, "400"), ({str(i): "x" * 4000 for i in range(9)}, "413")):
        with pytest.raises(ClientError) as caught:
            await client.patch_twin_reported_properties(patch)
        assert status in str(caught.value.__cause__)
    bench.hub.faults.throttle_twin_requests = 1
    with pytest.raises(ClientError) as caught:
        await client.get_twin()
    assert "429" in str(caught.value.__cause__)
    assert (await client.get_twin())["desired"] == {"$version": 1}


async def test_a_second_connection_kicks_the_first(bench: Bench) -> None:
    first = bench.client(bench.hub.connection_string("d1"))
    second = bench.client(bench.hub.connection_string("d1"))
    await first.connect()
    await second.connect()
    await until(lambda: not first.connected)
    assert second.connected
    assert (await second.get_twin())["reported"] == {"$version": 1}


async def test_a_lost_ack_is_a_resend_on_the_sdks_own_reconnect(bench: Bench) -> None:
    client = bench.client(
        bench.hub.connection_string("d1"), connection_retry=True, connection_retry_interval=1
    )
    await client.connect()
    bench.hub.faults.drop_before_ack = 1
    await asyncio.wait_for(client.send_message("once or twice"), 20)
    assert [m.body for m in bench.hub.telemetry.query("d1")] == [b"once or twice"] * 2


async def test_subscriptions_outlive_connection_and_hub(bench: Bench) -> None:
    first = bench.client(bench.hub.connection_string("d1"))
    await first.connect()
    await listen(first, on_twin_desired_properties_patch_received=lambda patch: None)
    await first.disconnect()
    await bench.rest("PATCH", "/twins/d1", {"properties": {"desired": {"while": "away"}}})
    await bench.restart_hub()
    second = bench.client(bench.hub.connection_string("d1"))
    await second.connect()
    assert (await second.get_twin())["desired"] == {"while": "away", "$version": 2}
    assert bench.hub.core.link(DEVICE).subscribed("$iothub/twin/PATCH/properties/desired/?$v=1")


async def test_pause_refuses_and_resume_serves_on_the_same_port(bench: Bench) -> None:
    client = bench.client(bench.hub.connection_string("d1"))
    await client.connect()
    port = bench.hub.mqtt_port
    await bench.hub.pause()
    await until(lambda: not client.connected)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    with pytest.raises(ClientError):
        await client.connect()
    await bench.hub.resume()
    assert bench.hub.mqtt_port == port
    await client.connect()
    assert await client.get_twin()
