"""Modules of a simulated IoT Edge device: the SDK's edge environment, and the identity calls."""

from __future__ import annotations

import asyncio
import base64
import gc
import hmac
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from azure.iot.device import ProxyOptions
from azure.iot.device.aio import IoTHubModuleClient
from gatelet.simulator.connect_proxy import ConnectProxy
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.server import IotHub
from gatelet.simulator.iothub.workload import EdgeDevice
from gatelet.simulator.pki import Pki

pytestmark = pytest.mark.filterwarnings(
    "ignore:ssl.PROTOCOL_TLSv1_2:DeprecationWarning", "ignore:unclosed <socket:ResourceWarning"
)

HOST = "hub.gatelet.test"


class Edge:
    def __init__(self, folder: Path) -> None:
        self.pki = Pki(folder / "pki")
        self.hub = IotHub(HOST, self.pki)
        self.device = EdgeDevice(self.hub.core, "d1", self.pki.ca_file.read_text(), folder / "run")
        self.hub.identity("d1")
        self.socket = folder / "run" / "mgmt.sock"

    async def call(self, method: str, path: str, body: Any = None, expect: int = 200) -> Any:
        connector = aiohttp.UnixConnector(str(self.socket))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.request(method, f"http://edge{path}", json=body) as response,
        ):
            text = await response.text()
            assert response.status == expect, text
            return await response.json() if text else None


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[Edge]:
    edge = Edge(tmp_path)
    await edge.device.start()
    yield edge
    await edge.device.stop()
    assert not edge.socket.exists()


async def test_the_sdk_from_the_edge_environment(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = ConnectProxy()
    await proxy.start()
    await edge.hub.start()
    proxy.add(f"{HOST}:8883", ("127.0.0.1", edge.hub.mqtt_port))
    for name, value in edge.device.environment("scoring").items():
        monkeypatch.setenv(name, value)
    client = await asyncio.to_thread(
        IoTHubModuleClient.create_from_edge_environment,
        proxy_options=ProxyOptions("HTTP", "127.0.0.1", proxy.port),
        connection_retry=False,
    )
    try:
        await asyncio.wait_for(client.connect(), 10)
        twin = await asyncio.wait_for(client.get_twin(), 10)
        assert twin["desired"] == {"$version": 1}
        assert edge.hub.core.connected(ClientId("d1", "scoring"))
    finally:
        await client.shutdown()
        await proxy.stop()
        await edge.hub.stop()
        gc.collect()


async def test_identities_as_the_management_api_manages_them(edge: Edge) -> None:
    version = "?api-version=2018-06-28"
    made = await edge.call("POST", f"/identities/{version}", {"moduleId": "m1"})
    registered = edge.hub.identity("d1", "m1")
    assert made == {
        "moduleId": "m1",
        "managedBy": "iotedge",
        "generationId": registered.generation,
        "authType": "sas",
    }
    assert await edge.call("POST", f"/identities{version}", {"moduleId": "m1"}) == made
    body = {"moduleId": "m1", "generationId": made["generationId"], "managedBy": "me"}
    assert (await edge.call("PUT", f"/identities/m1{version}", body))["managedBy"] == "me"
    listed = await edge.call("GET", f"/identities/{version}")
    assert [identity["moduleId"] for identity in listed["identities"]] == ["m1"]
    await edge.call("DELETE", f"/identities/m1{version}", expect=204)
    error = await edge.call("DELETE", f"/identities/m1{version}", expect=404)
    assert "d1/m1" in error["message"]
    await edge.call("POST", "/identities", {"moduleId": "a/b"}, expect=400)
    await edge.call("POST", "/identities", {}, expect=400)


async def test_identities_as_the_identity_service_manages_them(edge: Edge) -> None:
    made = await edge.call("POST", "/identities/modules", {"type": "aziot", "moduleId": "$edgeHub"})
    assert made["spec"]["deviceId"] == "d1"
    assert made["spec"]["moduleId"] == "$edgeHub"
    assert await edge.call("GET", "/identities/modules/$edgeHub?type=aziot") == made
    assert (await edge.call("GET", "/identities/modules"))["identities"] == [made]
    own = await edge.call("GET", "/identities/identity")
    assert "moduleId" not in own["spec"]
    call = {
        "keyHandle": made["spec"]["auth"]["keyHandle"],
        "algorithm": "HMAC-SHA256",
        "parameters": {"message": base64.b64encode(b"text").decode()},
    }
    key = base64.b64decode(edge.hub.identity("d1", "$edgeHub").primary_key)
    signature = (await edge.call("POST", "/sign", call))["signature"]
    assert base64.b64decode(signature) == hmac.digest(key, b"text", "sha256")
    await edge.call("POST", "/sign", {**call, "keyHandle": "d2/x"}, expect=404)
    await edge.call("DELETE", "/identities/modules/$edgeHub", expect=204)
    await edge.call("GET", "/identities/modules/$edgeHub", expect=404)


async def test_signatures_of_a_module(edge: Edge) -> None:
    identity = edge.hub.identity("d1", "m1")
    path = f"/modules/m1/genid/{identity.generation}/sign"
    call = {"keyId": "primary", "algo": "HMACSHA256", "data": base64.b64encode(b"x").decode()}
    for which, key in zip(("primary", "secondary"), identity.keys, strict=True):
        answer = await edge.call("POST", path, {**call, "keyId": which})
        expected = hmac.digest(base64.b64decode(key), b"x", "sha256")
        assert base64.b64decode(answer["digest"]) == expected
    await edge.call("POST", "/modules/m1/genid/other/sign", call, expect=404)
    await edge.call("POST", path.replace("m1", "m2", 1), call, expect=404)
    for bad in ({"algo": "MD5"}, {"keyId": "third"}, {"data": "%"}, {"data": None}):
        await edge.call("POST", path, {**call, **bad}, expect=400)


async def test_a_path_too_long_for_a_socket_is_said(tmp_path: Path) -> None:
    hub = IotHub(HOST, Pki(tmp_path / "pki"))
    device = EdgeDevice(hub.core, "d1", "", tmp_path / ("x" * 100))
    with pytest.raises(OSError, match="too long"):
        await device.start()
