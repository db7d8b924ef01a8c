"""Devices and modules that log in with certificates, with the real SDK and without."""

from __future__ import annotations

import asyncio
import gc
import ssl
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from azure.iot.device import X509, ProxyOptions
from azure.iot.device.aio import IoTHubDeviceClient, IoTHubModuleClient
from azure.iot.device.exceptions import CredentialError
from cryptography.hazmat.primitives import hashes
from gatelet.simulator.connect_proxy import ConnectProxy
from gatelet.simulator.iothub.devices import ClientId, Identity
from gatelet.simulator.iothub.errors import HubError
from gatelet.simulator.iothub.server import IotHub
from gatelet.simulator.mqtt.codec import Decoder, encode
from gatelet.simulator.mqtt.packets import ConnAck, Connect
from gatelet.simulator.pki import CertificateFiles, Pki

pytestmark = pytest.mark.filterwarnings(
    "ignore:ssl.PROTOCOL_TLSv1_2:DeprecationWarning", "ignore:unclosed <socket:ResourceWarning"
)

HOST = "hub.gatelet.test"
BY_AUTHORITY = {"authentication": {"type": "certificateAuthority"}}


class Bench:
    def __init__(self, folder: Path) -> None:
        self.pki = Pki(folder / "pki")
        self.other = Pki(folder / "other")
        self.hub = IotHub(HOST, self.pki)
        self.proxy = ConnectProxy()
        self._clients: list[Any] = []

    async def start(self) -> None:
        await self.proxy.start()
        await self.hub.start()
        self.proxy.add(f"{HOST}:8883", ("127.0.0.1", self.hub.mqtt_port))

    async def stop(self) -> None:
        for client in self._clients:
            await client.shutdown()
        await self.proxy.stop()
        await self.hub.stop()
        gc.collect()

    def register(self, client: str, description: dict[str, Any]) -> None:
        self.hub.core.put_identity(ClientId.parse(client), description)

    def client(self, files: CertificateFiles, device: str = "d1", module: str = "") -> Any:
        kind = IoTHubModuleClient if module else IoTHubDeviceClient
        client = kind.create_from_x509_certificate(
            x509=X509(str(files.certificate), str(files.key), files.passphrase),
            hostname=HOST,
            device_id=device,
            **({"module_id": module} if module else {}),
            server_verification_cert=self.pki.ca_file.read_text(),
            proxy_options=ProxyOptions("HTTP", "127.0.0.1", self.proxy.port),
            connection_retry=False,
        )
        self._clients.append(client)
        return client

    async def return_code(
        self, files: CertificateFiles | None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
    ) -> int:
        """What CONNACK says to d1 without a password; -1: TLS itself refused."""
        context = self.pki.client_context(files)
        context.minimum_version = context.maximum_version = version
        try:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", self.hub.mqtt_port, ssl=context, server_hostname=HOST
            )
            connect = Connect("d1", username=f"{HOST}/d1/?api-version=2019-10-01")
            writer.write(encode(connect, connect.version))
            data = await asyncio.wait_for(reader.read(100), 30)
            writer.close()
        except (ConnectionError, ssl.SSLError):
            return -1
        if not data:
            return -1
        (answer,) = Decoder(version=4).feed(data)
        assert isinstance(answer, ConnAck)
        return answer.reason_code


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    await bench.start()
    yield bench
    await bench.stop()


def thumbprints(primary: str, secondary: str | None = None) -> dict[str, Any]:
    given = {"primaryThumbprint": primary, "secondaryThumbprint": secondary}
    return {"authentication": {"type": "selfSigned", "x509Thumbprint": given}}


async def test_self_signed_with_a_passphrase(bench: Bench) -> None:
    files = bench.pki.device("d1", self_signed=True, passphrase="open sesame")
    assert "ENCRYPTED" in files.key.read_text()
    bench.register("d1", thumbprints(files.thumbprint))
    client = bench.client(files)
    await client.connect()
    await client.patch_twin_reported_properties({"x": 1})
    view = bench.hub.core.twin_view(ClientId("d1"))
    assert view["authenticationType"] == "selfSigned"
    assert view["x509Thumbprint"]["primaryThumbprint"] == files.thumbprint
    stranger = bench.client(bench.pki.device("d1", self_signed=True, version=2))
    with pytest.raises(CredentialError):
        await stranger.connect()
    # The one that failed did not kick the one that is in.
    assert client.connected


async def test_by_authority_and_through_an_intermediate_one(bench: Bench) -> None:
    bench.register("d1", BY_AUTHORITY)
    bench.register("d1/m1", BY_AUTHORITY)
    await bench.client(bench.pki.device("d1")).connect()
    intermediate = bench.pki.intermediate("factory")
    module = bench.client(bench.pki.device("d1/m1", issuer=intermediate), module="m1")
    await module.connect()
    assert (await module.get_twin())["reported"] == {"$version": 1}
    for wrong in (bench.pki.device("d2"), bench.other.device("d1")):
        with pytest.raises(CredentialError):
            await bench.client(wrong).connect()


async def test_an_authority_of_another_site_when_it_is_registered(bench: Bench) -> None:
    bench.register("d1", BY_AUTHORITY)
    files = bench.other.device("d1", issuer=bench.other.intermediate("factory"))
    assert await bench.return_code(files) == 5
    bench.hub.core.authorities["other"] = bench.other.ca_file.read_text()
    assert await bench.return_code(files) == 0


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_who_is_refused(bench: Bench, version: ssl.TLSVersion) -> None:
    files = bench.pki.device("d1", self_signed=True)
    bench.register("d1", {})
    assert await bench.return_code(files, version) == 5, "registered with keys"
    sha1 = files.leaf.fingerprint(hashes.SHA1()).hex()
    bench.hub.core.put_identity(ClientId("d1"), thumbprints("0" * 64, sha1), "*")
    assert await bench.return_code(files, version) == 0, "secondary, SHA-1, lower case"
    assert await bench.return_code(None, version) == 5, "no certificate"
    bench.hub.faults.clock_skew_seconds = timedelta(days=91).total_seconds()
    assert await bench.return_code(files, version) == 5, "no longer valid"
    bench.hub.faults.clock_skew_seconds = -timedelta(days=2).total_seconds()
    assert await bench.return_code(files, version) == 5, "not yet valid"
    bench.hub.faults.clear()
    bench.hub.core.put_identity(ClientId("d1"), {**BY_AUTHORITY}, "*")
    assert await bench.return_code(files, version) == 5, "signed by itself only"
    forged = bench.pki.device("leaf-as-issuer")
    child = bench.pki.device("d1", issuer=forged)
    assert await bench.return_code(child, version) in (5, -1), "the issuer is no authority"


def test_the_state_file_keeps_thumbprints_and_older_ones_still_load() -> None:
    identity = Identity(
        ClientId("d1"), "a", "b", authentication="selfSigned", thumbprints=("A", "")
    )
    assert Identity.from_json(identity.as_json()) == identity
    old = {
        k: v for k, v in identity.as_json().items() if k not in ("authentication", "thumbprints")
    }
    assert Identity.from_json(old).authentication == "sas"


@pytest.mark.parametrize(
    "authentication",
    [
        {"type": "selfSigned"},
        {"type": "selfSigned", "x509Thumbprint": {"primaryThumbprint": "12"}},
        {"type": "selfSigned", "x509Thumbprint": {"primaryThumbprint": "g" * 64}},
        {"type": "tpm"},
    ],
)
async def test_what_the_registry_refuses(bench: Bench, authentication: dict[str, Any]) -> None:
    with pytest.raises(HubError) as caught:
        bench.register("d1", {"authentication": authentication})
    assert caught.value.status == 400
