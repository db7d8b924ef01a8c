"""Modules of a simulated IoT Edge device: the SDK's edge environment, and the identity calls."""

from __future__ import annotations

import asyncio
import base64
import gc
import hmac
import ssl
from collections.abc import AsyncIterator
from datetime import datetime, timezone
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
        trusted, issuer = self.pki.ca_file.read_text(), self.pki.intermediate("edge CA d1")
        self.device = EdgeDevice(self.hub.core, "d1", trusted, folder / "run", issuer)
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
        await asyncio.wait_for(client.connect(), 30)
        twin = await asyncio.wait_for(client.get_twin(), 30)
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


async def test_sealed_for_one_module_and_one_generation(edge: Edge) -> None:
    async def module(name: str) -> str:
        return f"/modules/{name}/genid/{edge.hub.identity('d1', name).generation}"

    vector = {"initializationVector": base64.b64encode(b"any length").decode()}
    plain = base64.b64encode("geheim é".encode()).decode()
    path = await module("m1")
    sealed = await edge.call("POST", f"{path}/encrypt", {**vector, "plaintext": plain})
    assert base64.b64decode(plain) not in base64.b64decode(sealed["ciphertext"])
    call = {**vector, **sealed}
    assert await edge.call("POST", f"{path}/decrypt", call) == {"plaintext": plain}
    other = {**call, "initializationVector": base64.b64encode(b"another").decode()}
    for wrong in (other, {**call, "ciphertext": "AAAA"}, {**call, "ciphertext": 5}, vector, {}):
        await edge.call("POST", f"{path}/decrypt", wrong, expect=400)
    await edge.call("POST", f"{await module('m2')}/decrypt", call, expect=400)
    await edge.call("POST", "/modules/m1/genid/old/decrypt", call, expect=404)
    edge.hub.core.delete_identity(ClientId("d1", "m1"))
    edge.hub.identity("d1", "m1")
    await edge.call("POST", f"{await module('m1')}/decrypt", call, expect=400)
    await edge.call("POST", f"{await module('m1')}/encrypt", {"plaintext": plain}, expect=400)


async def test_certificates_for_modules(edge: Edge, tmp_path: Path) -> None:
    generation = edge.hub.identity("d1", "m1").generation
    path = f"/modules/m1/genid/{generation}/certificate/server"
    made = {
        "server": await edge.call("POST", path, {"commonName": "127.0.0.1"}, expect=201),
        "client": await edge.call("POST", "/modules/m1/certificate/identity", expect=201),
    }
    contexts = {
        "server": ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        "client": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    }
    trusted = (await edge.call("GET", "/trust-bundle"))["certificate"]
    for name, answer in made.items():
        assert answer["privateKey"]["type"] == "key"
        expiry = datetime.fromisoformat(answer["expiration"])
        assert expiry > datetime.now(timezone.utc)
        (tmp_path / "chain.pem").write_text(answer["certificate"])
        (tmp_path / "key.pem").write_text(answer["privateKey"]["bytes"])
        contexts[name].load_cert_chain(tmp_path / "chain.pem", tmp_path / "key.pem")
        contexts[name].load_verify_locations(cadata=trusted)
    contexts["server"].verify_mode = ssl.CERT_REQUIRED
    seen: list[Any] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(writer.get_extra_info("peercert"))
        writer.write(b"hello")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=contexts["server"])
    port = server.sockets[0].getsockname()[1]
    try:
        for name in ("127.0.0.1", "m1"):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=contexts["client"], server_hostname=name
            )
            assert await asyncio.wait_for(reader.read(), 30) == b"hello"
            writer.close()
    finally:
        server.close()
        await server.wait_closed()
    assert (("commonName", "m1"),) in seen[0]["subject"]
    assert seen[0]["subjectAltName"] == (("URI", f"azureiot://{HOST}/devices/d1/modules/m1"),)
    for wrong in ({}, {"commonName": 5}, {"commonName": "x" * 65}, {"commonName": "hüb.test"}):
        await edge.call("POST", path, wrong, expect=400)
    await edge.call("POST", "/modules/m2/certificate/identity", expect=404)
    assert await edge.call("GET", "/manifest-trust-bundle") == {"certificate": ""}


async def test_no_certificates_without_an_authority(edge: Edge, tmp_path: Path) -> None:
    edge.hub.identity("d1", "m1")
    bare = EdgeDevice(edge.hub.core, "d1", "", tmp_path / "bare")
    await bare.start()
    try:
        edge.socket, before = tmp_path / "bare" / "mgmt.sock", edge.socket
        await edge.call("POST", "/modules/m1/certificate/identity", expect=501)
    finally:
        edge.socket = before
        await bare.stop()


async def test_a_path_too_long_for_a_socket_is_said(tmp_path: Path) -> None:
    hub = IotHub(HOST, Pki(tmp_path / "pki"))
    device = EdgeDevice(hub.core, "d1", "", tmp_path / ("x" * 100))
    with pytest.raises(OSError, match="too long"):
        await device.start()
