"""Provisioning: the SDK's ProvisioningDeviceClient, policies, and the service side."""

from __future__ import annotations

import asyncio
import base64
import gc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from azure.iot.device import X509, ProvisioningDeviceClient, ProxyOptions
from azure.iot.device.aio import IoTHubDeviceClient
from azure.iot.device.aio import ProvisioningDeviceClient as AioProvisioningDeviceClient
from azure.iot.device.exceptions import ClientError, CredentialError, ServiceError
from gatelet.agent.clock import SystemClock
from gatelet.simulator.connect_proxy import ConnectProxy
from gatelet.simulator.iothub import sas
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.dps import Allocation, Applicant
from gatelet.simulator.iothub.dps_enrollments import derive_key
from gatelet.simulator.iothub.dps_server import Provisioning
from gatelet.simulator.iothub.errors import HubError
from gatelet.simulator.iothub.server import IotHub
from gatelet.simulator.iothub.state import StateUnreadable
from gatelet.simulator.pki import CertificateFiles, Pki

pytestmark = pytest.mark.filterwarnings(
    "ignore:ssl.PROTOCOL_TLSv1_2:DeprecationWarning", "ignore:unclosed <socket:ResourceWarning"
)

DPS = "dps.gatelet.test"
SCOPE = "0ne00000001"
HUBS = ("hub-a.gatelet.test", "hub-b.gatelet.test")
KEY = base64.b64encode(b"the key of the group or device").decode()
BY_KEY = {"attestation": {"type": "symmetricKey", "symmetricKey": {"primaryKey": KEY}}}


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pki = Pki(folder / "pki")
        self.hubs = [IotHub(name, self.pki) for name in HUBS]
        self.proxy = ConnectProxy()
        self.dps = self.service()

    def service(self) -> Provisioning:
        state = self.folder / "dps"
        return Provisioning(DPS, SCOPE, self.pki, self.hubs, state_dir=state, retry_after=0)

    async def start(self) -> None:
        await self.proxy.start()
        await self.dps.start()
        self.proxy.add(f"{DPS}:8883", ("127.0.0.1", self.dps.mqtt_port))
        self.proxy.add(f"{DPS}:443", ("127.0.0.1", self.dps.https_port))
        for hub in self.hubs:
            await hub.start()
            self.proxy.add(f"{hub.host_name}:8883", ("127.0.0.1", hub.mqtt_port))

    async def stop(self) -> None:
        await self.proxy.stop()
        await self.dps.stop()
        for hub in self.hubs:
            await hub.stop()
        gc.collect()

    def options(self) -> dict[str, Any]:
        return {
            "server_verification_cert": self.pki.ca_file.read_text(),
            "proxy_options": ProxyOptions("HTTP", "127.0.0.1", self.proxy.port),
        }

    async def register(
        self, registration: str, key: str = KEY, payload: Any = None, **options: Any
    ) -> Any:
        client = AioProvisioningDeviceClient.create_from_symmetric_key(
            DPS, registration, SCOPE, key, **self.options(), **options
        )
        return await self._run(client, payload)

    async def register_x509(self, registration: str, files: CertificateFiles) -> Any:
        client = AioProvisioningDeviceClient.create_from_x509_certificate(
            DPS, registration, SCOPE, x509(files), **self.options()
        )
        return await self._run(client, None)

    @staticmethod
    async def _run(client: Any, payload: Any) -> Any:
        client.provisioning_payload = payload
        return await asyncio.wait_for(client.register(), 15)

    def twin(self, hub: str, device: str) -> dict[str, Any]:
        (found,) = [one for one in self.hubs if one.host_name == hub]
        view = found.core.twin(ClientId(device))
        return {"tags": view.tags, **view.device_view()}


def x509(files: CertificateFiles) -> X509:
    return X509(str(files.certificate), str(files.key), files.passphrase)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    await bench.start()
    yield bench
    await bench.stop()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK waits two seconds before it first asks, whatever the service said."""
    constants = "azure.iot.device.provisioning.pipeline.constant"
    monkeypatch.setattr(f"{constants}.DEFAULT_POLLING_INTERVAL", 0.05)


def individual(**changes: Any) -> dict[str, Any]:
    twin = {"tags": {"site": "lab"}, "properties": {"desired": {"rate": 5}}}
    return {**BY_KEY, "initialTwin": twin, **changes}


def pem(files: CertificateFiles) -> str:
    return files.certificate.read_text()


async def test_an_individual_key_and_then_the_hub(bench: Bench) -> None:
    bench.dps.enroll("d1", individual(deviceId="edge-7", capabilities={"iotEdge": True}))
    bench.dps.faults.stay_assigning = 1
    result = await bench.register("d1")
    state = result.registration_state
    assert (result.status, state.device_id) == ("assigned", "edge-7")
    assert state.assigned_hub in HUBS
    assert state.sub_status == "initialAssignment"
    twin = bench.twin(state.assigned_hub, "edge-7")
    assert twin["tags"] == {"site": "lab"}
    assert twin["desired"]["rate"] == 5
    client = IoTHubDeviceClient.create_from_symmetric_key(
        KEY, state.assigned_hub, "edge-7", **bench.options(), connection_retry=False
    )
    await client.connect()
    assert (await client.get_twin())["desired"]["rate"] == 5
    await client.shutdown()
    (hub,) = [hub for hub in bench.hubs if hub.host_name == state.assigned_hub]
    assert ClientId("edge-7", "$edgeAgent") in hub.core.state.registry


async def test_the_synchronous_client_and_a_group_key(bench: Bench) -> None:
    bench.dps.enroll_group("fleet", individual())
    client = ProvisioningDeviceClient.create_from_symmetric_key(
        DPS, "d-9", SCOPE, derive_key(KEY, "d-9"), **bench.options()
    )
    result = await asyncio.wait_for(asyncio.to_thread(client.register), 15)
    assert result.registration_state.device_id == "d-9"
    (hub,) = [h for h in bench.hubs if h.host_name == result.registration_state.assigned_hub]
    assert hub.core.state.registry.get(ClientId("d-9")).primary_key == derive_key(KEY, "d-9")
    with pytest.raises(CredentialError):
        await bench.register("d-8", derive_key(KEY, "d-9"))


async def test_certificates_of_a_device_and_of_a_group(bench: Bench) -> None:
    own = bench.pki.device("d1", self_signed=True)
    attestation = {"clientCertificates": {"primary": {"certificate": pem(own)}}}
    bench.dps.enroll("d1", {"attestation": {"type": "x509", "x509": attestation}})
    factory = bench.pki.intermediate("factory")
    signing = {"signingCertificates": {"primary": {"certificate": pem(factory)}}}
    bench.dps.enroll_group("fleet", {"attestation": {"type": "x509", "x509": signing}})
    for registration, files in (("d1", own), ("d2", bench.pki.device("d2", issuer=factory))):
        state = (await bench.register_x509(registration, files)).registration_state
        client = IoTHubDeviceClient.create_from_x509_certificate(
            x509(files), state.assigned_hub, state.device_id, **bench.options()
        )
        await client.connect()
        await client.shutdown()
    for registration, files in (
        ("d1", bench.pki.device("d1", self_signed=True, version=2)),
        ("d3", bench.pki.device("d3")),
        ("d4", bench.pki.device("d2", issuer=factory)),
    ):
        with pytest.raises(CredentialError):
            await bench.register_x509(registration, files)


async def test_websockets_through_the_proxy(bench: Bench) -> None:
    bench.dps.enroll("d1", individual())
    assert (await bench.register("d1", websockets=True)).status == "assigned"


async def refusal(bench: Bench, registration: str) -> str:
    with pytest.raises(ClientError) as caught:
        await bench.register(registration)
    assert isinstance(caught.value.__cause__, ServiceError)
    return str(caught.value.__cause__)


async def test_disabled_failed_and_throttled(bench: Bench) -> None:
    bench.dps.enroll("d1", individual(provisioningStatus="disabled"))
    assert "disabled" in await refusal(bench, "d1")
    bench.dps.enroll("d1", individual())
    bench.dps.faults.fail_registrations = 1
    assert "failed" in await refusal(bench, "d1")
    bench.dps.faults.throttle_requests = 2
    assert (await bench.register("d1")).status == "assigned"
    bench.dps.enroll("d2", individual(iotHubs=["elsewhere.gatelet.test"]))
    assert "failed" in await refusal(bench, "d2")
    assert "elsewhere" in bench.dps.core.registrations["d2"].error[1]
    with pytest.raises(CredentialError):
        await bench.register("stranger")


def again(bench: Bench, **changes: Any) -> Any:
    """Register `d1` once more after its enrolment was changed; without a network."""
    enrollment = bench.dps.enroll("d1", individual(**changes))
    return bench.dps.core.register(Applicant("d1", enrollment))


@pytest.fixture
def moved(bench: Bench) -> Bench:
    """d1 is on hub A, with data of its own and of a module."""
    first = again(bench, iotHubs=[HUBS[0]])
    assert (first.hub, first.substatus) == (HUBS[0], "initialAssignment")
    core = bench.hubs[0].core
    core.update_twin(ClientId("d1"), {"properties": {"desired": {"rate": 9}}})
    core.patch_reported(ClientId("d1"), {"seen": True})
    core.put_identity(ClientId("d1", "m"), {})
    core.update_twin(ClientId("d1", "m"), {"properties": {"desired": {"m": 1}}})
    return bench


def policy(update: bool, migrate: bool) -> dict[str, Any]:
    return {"reprovisionPolicy": {"updateHubAssignment": update, "migrateDeviceData": migrate}}


async def test_again_and_migrate(moved: Bench) -> None:
    key = moved.hubs[0].core.state.registry.get(ClientId("d1", "m")).primary_key
    second = again(moved, iotHubs=[HUBS[1]], **policy(True, True))
    assert (second.hub, second.substatus) == (HUBS[1], "deviceDataMigrated")
    twin = moved.twin(HUBS[1], "d1")
    assert (twin["desired"]["rate"], twin["reported"]["seen"]) == (9, True)
    assert ClientId("d1") not in moved.hubs[0].core.state.registry
    module = ClientId("d1", "m")
    assert moved.hubs[1].core.twin(module).desired.value == {"m": 1}
    assert moved.hubs[1].core.state.registry.get(module).primary_key == key
    third = again(moved, iotHubs=[HUBS[1]], **policy(True, True))
    assert (third.hub, moved.twin(HUBS[1], "d1")["desired"]["rate"]) == (HUBS[1], 9)


async def test_again_and_reset(moved: Bench) -> None:
    second = again(moved, iotHubs=[HUBS[1]], **policy(True, False))
    assert (second.hub, second.substatus) == (HUBS[1], "deviceDataReset")
    twin = moved.twin(HUBS[1], "d1")
    assert (twin["desired"]["rate"], "seen" in twin["reported"]) == (5, False)
    assert ClientId("d1") not in moved.hubs[0].core.state.registry


async def test_again_and_never_move(moved: Bench) -> None:
    second = again(moved, iotHubs=[HUBS[1]], **policy(False, False))
    assert second.hub == HUBS[0]
    assert moved.twin(HUBS[0], "d1")["desired"]["rate"] == 9
    assert ClientId("d1") not in moved.hubs[1].core.state.registry


async def test_custom_allocation_and_payloads(bench: Bench) -> None:
    bench.dps.core.allocate = lambda old, enrollment, payload, hubs: Allocation(
        hubs[-1], {"tags": {"asked": payload}}, {"answer": 42}
    )
    bench.dps.enroll("d1", individual(allocationPolicy="custom"))
    state = (await bench.register("d1", payload={"want": "b"})).registration_state
    assert state.assigned_hub == HUBS[1]
    assert state.response_payload == '{"answer": 42}'
    assert bench.twin(HUBS[1], "d1")["tags"] == {"asked": {"want": "b"}}


def test_hashed_allocation_spreads_and_stays(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    group = bench.dps.enroll_group("fleet", individual())
    ids = [f"d{n}" for n in range(20)]
    first = [bench.dps.core.register(Applicant(one, group)).hub for one in ids]
    assert set(first) == set(HUBS)
    assert [bench.dps.core.register(Applicant(one, group)).hub for one in ids] == first


async def test_the_service_side(bench: Bench) -> None:
    fields = dict(p.split("=", 1) for p in bench.dps.service_connection_string.split(";"))
    expiry = int(SystemClock().now().timestamp()) + 600

    async def call(
        method: str, path: str, body: Any = None, expect: int = 200, host: str = "", **headers: str
    ) -> Any:
        key, name = fields["SharedAccessKey"], fields["SharedAccessKeyName"]
        token = sas.make(host or fields["HostName"], key, expiry, name)
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                method,
                bench.dps.url + path,
                json=body,
                headers={"Authorization": token, **headers},
                ssl=bench.pki.client_context(),
            ) as response,
        ):
            text = await response.text()
            assert response.status == expect, text
            return await response.json() if text else None

    made = await call("PUT", "/enrollments/d1?api-version=2021-10-01", individual())
    assert made["attestation"]["symmetricKey"]["primaryKey"] == KEY
    assert base64.b64decode(made["attestation"]["symmetricKey"]["secondaryKey"])
    await call("PUT", "/enrollments/d1", individual(), expect=409)
    await call("PUT", "/enrollments/d1", individual(), expect=412, **{"If-Match": '"x"'})
    await call("PUT", "/enrollments/d1", made, **{"If-Match": made["etag"]})
    assert (await call("POST", "/enrollments/d1/attestationmechanism"))["type"] == "symmetricKey"
    assert [one["registrationId"] for one in await call("POST", "/enrollments/query", {})] == ["d1"]
    await call("PUT", "/enrollmentGroups/fleet", individual(), host=DPS)
    await bench.register("d-2", derive_key(KEY, "d-2"))
    (state,) = await call("POST", "/registrations/fleet/query", {})
    assert (state["registrationId"], state["status"]) == ("d-2", "assigned")
    assert await call("GET", "/registrations/d-2") == state
    await call("DELETE", "/registrations/d-2", expect=204)
    await call("GET", "/registrations/d-2", expect=404)
    await call("DELETE", "/enrollmentGroups/fleet", expect=204)
    await call("GET", "/enrollmentGroups/fleet", expect=404)
    await call("GET", "/enrollments/d1", expect=401, host="other")
    await call("PUT", "/enrollments/d2", [], expect=400)

    restarted = bench.service()
    assert list(restarted.core.enrollments) == ["d1"]
    assert restarted.core.enrollments["d1"].etag == bench.dps.core.enrollments["d1"].etag
    (bench.folder / "dps" / "dps.json").write_text("{}")
    with pytest.raises(StateUnreadable, match="move it away"):
        bench.service()


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"attestation": {"type": "tpm"}},
        {"attestation": {"type": "symmetricKey", "symmetricKey": {"primaryKey": "!"}}},
        {"attestation": {"type": "symmetricKey", "symmetricKey": {"primaryKey": "QQ=="}}},
        {"attestation": {"type": "x509"}},
        {
            "attestation": {
                "type": "x509",
                "x509": {"clientCertificates": {"primary": {"certificate": "AA"}}},
            }
        },
        individual(provisioningStatus="off"),
        individual(allocationPolicy="random"),
        individual(iotHubs="one"),
        individual(initialTwin=[]),
        individual(registrationId="other"),
    ],
)
def test_refused_enrolments(body: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(HubError) as caught:
        Bench(tmp_path).dps.enroll("d1", body)
    assert caught.value.status == 400
