"""The agent's transport by way of the device provisioning service."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gatelet.agent.identity.provisioning import (
    Assignment,
    read_assignment,
    write_assignment,
)
from gatelet.agent.identity.sources import CertificateFiles, Dps, KeyFile, KeyText, ModuleOf
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.dps_server import Provisioning
from gatelet.simulator.iothub.server import IotHub

# See test_iothub_sdk: what the SDK does on its own account.
pytestmark = pytest.mark.filterwarnings(
    "ignore:ssl.PROTOCOL_TLSv1_2:DeprecationWarning", "ignore:unclosed <socket:ResourceWarning"
)

DPS_NAME, SCOPE = "dps.gatelet.test", "0ne00000001"
HOST, OTHER = "hub.gatelet.test", "other-hub.gatelet.test"
KEY = base64.b64encode(b"the key of the group or device").decode()
BY_KEY = {"attestation": {"type": "symmetricKey", "symmetricKey": {"primaryKey": KEY}}}
SOURCE = Dps(SCOPE, "d1", KeyText(KEY), host=DPS_NAME)
D1 = ClientId("d1")


class Fleet:
    """The bench's hub and another one, and the service that assigns devices to them."""

    def __init__(self, bench: Any) -> None:
        self.bench = bench
        self.other = IotHub(OTHER, bench.pki)
        self.dps = Provisioning(DPS_NAME, SCOPE, bench.pki, [bench.hub, self.other], retry_after=0)

    async def start(self) -> None:
        await self.other.start()
        self.bench.proxy.add(f"{OTHER}:8883", ("127.0.0.1", self.other.mqtt_port))
        await self.serve()

    async def serve(self) -> None:
        await self.dps.start()
        self.bench.proxy.add(f"{DPS_NAME}:8883", ("127.0.0.1", self.dps.mqtt_port))

    async def stop(self) -> None:
        await self.bench.stop_runs()
        await self.dps.stop()
        await self.other.stop()

    @property
    def remembered(self) -> Any:
        file: Path = self.bench.folder / "state" / "provisioned-hub.json"
        return json.loads(file.read_bytes()) if file.exists() else None


@pytest.fixture
async def fleet(hub_bench: Any) -> AsyncIterator[Fleet]:
    fleet = Fleet(hub_bench)
    await fleet.start()
    yield fleet
    await fleet.stop()


async def test_own_key_and_the_remembered_hub(fleet: Fleet) -> None:
    fleet.dps.enroll("d1", {**BY_KEY, "iotHubs": [HOST], "deviceId": "edge-7"})
    transport = await fleet.bench.connected(SOURCE)
    await transport.report({"a": 1})
    assert fleet.bench.reported("edge-7") == {"a": 1}
    assert (fleet.remembered["hub"], fleet.remembered["device"]) == (HOST, "edge-7")

    await fleet.bench.stop_runs()
    await fleet.dps.stop()
    fleet.bench.run(SOURCE)  # without the service
    await fleet.bench.until(lambda: len(fleet.bench.sink.connections) == 2)
    assert fleet.bench.sink.reasons == []


async def test_key_of_a_group(fleet: Fleet) -> None:
    fleet.dps.enroll_group("fleet", {**BY_KEY, "iotHubs": [HOST]})
    key_file: Path = fleet.bench.folder / "group"
    key_file.write_text(KEY)
    source = Dps(SCOPE, "d9", KeyFile(key_file), group=True, host=DPS_NAME)
    await fleet.bench.connected(source)
    assert fleet.bench.hub.core.connected(ClientId("d9"))


async def test_certificate(fleet: Fleet) -> None:
    made = fleet.bench.pki.device("d1", self_signed=True)
    attestation = {"clientCertificates": {"primary": {"certificate": made.certificate.read_text()}}}
    body = {"attestation": {"type": "x509", "x509": attestation}, "iotHubs": [HOST]}
    fleet.dps.enroll("d1", body)
    files = CertificateFiles(made.certificate, made.key)
    transport = await fleet.bench.connected(Dps(SCOPE, "d1", files, host=DPS_NAME))
    await transport.report({"a": 1})
    assert fleet.bench.reported() == {"a": 1}


async def test_edge_agent_of_a_provisioned_device(fleet: Fleet) -> None:
    edge = {**BY_KEY, "iotHubs": [HOST], "capabilities": {"iotEdge": True}}
    fleet.dps.enroll("d1", edge)
    transport = await fleet.bench.connected(ModuleOf(SOURCE, "$edgeAgent"))
    await transport.report({"a": 1})
    assert fleet.bench.reported("d1/$edgeAgent") == {"a": 1}


async def test_moved_to_another_hub(fleet: Fleet) -> None:
    fleet.dps.enroll("d1", {**BY_KEY, "iotHubs": [HOST]})
    hosts: list[str] = []
    transport = await fleet.bench.connected(
        SOURCE, logged_in=lambda login: hosts.append(f"{login.device} at {login.host}")
    )
    assert hosts == [f"d1 at {HOST}"]
    fleet.dps.enroll("d1", {**BY_KEY, "iotHubs": [OTHER]})
    fleet.bench.hub.core.delete_identity(D1)
    await fleet.bench.until(lambda: fleet.other.core.connected(D1))
    await fleet.bench.until(lambda: len(fleet.bench.sink.connections) == 2)
    await transport.report({"a": 1})
    assert fleet.other.core.twin(D1).reported.value == {"a": 1}
    assert fleet.remembered["hub"] == OTHER
    assert hosts[-1] == f"d1 at {OTHER}"


async def test_hub_that_is_gone_for_good(fleet: Fleet) -> None:
    fleet.dps.enroll("d1", {**BY_KEY, "iotHubs": [HOST]})
    await fleet.bench.connected(SOURCE)
    fleet.dps.enroll("d1", {**BY_KEY, "iotHubs": [OTHER]})
    del fleet.bench.proxy.routes[f"{HOST}:8883"]
    fleet.bench.hub.drop_connections()
    await fleet.bench.until(lambda: fleet.other.core.connected(D1))
    assert len(fleet.bench.sink.reasons) >= 5


def waiting_timers() -> list[threading.Timer]:
    """Threads that would keep the process from ending."""
    timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer) and not t.daemon]
    return [t for t in timers if t.interval > 15]


async def test_service_that_refuses_or_is_silent(fleet: Fleet) -> None:
    fleet.bench.run(SOURCE, connect_timeout=4.0)
    reasons = fleet.bench.sink.reasons
    refused = "did not take registration 'd1' in scope '0ne00000001'"
    await fleet.bench.until(lambda: any(refused in reason for reason in reasons))
    assert all("Credentials invalid" in reason for reason in reasons if refused in reason)
    assert not any(KEY in reason for reason in reasons)
    fleet.dps.faults.lose_answers = 1
    fleet.dps.enroll("d1", {**BY_KEY, "iotHubs": [HOST]})
    await fleet.bench.until(lambda: any("did not answer within 4 s" in r for r in reasons))
    await fleet.bench.until(lambda: fleet.bench.sink.connections)
    # A cancelled timer's thread takes a moment to end; one that was forgotten takes half a minute.
    await fleet.bench.until(lambda: not waiting_timers(), 10)


async def test_stopped_while_provisioning(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    fleet.dps.enroll("d1", {**BY_KEY, "iotHubs": [HOST]})
    fleet.dps.faults.lose_answers = 10
    fleet.bench.run(SOURCE)
    await fleet.bench.until(lambda: fleet.dps.faults.lose_answers < 10)
    await asyncio.wait_for(fleet.bench.stop_runs(), 15)
    await fleet.bench.until(lambda: not waiting_timers(), 10)
    assert "takes long" not in caplog.text


async def test_refusing_hub_while_the_service_is_away(fleet: Fleet) -> None:
    fleet.dps.enroll("d1", {**BY_KEY, "iotHubs": [HOST]})
    await fleet.bench.connected(SOURCE)
    await fleet.dps.stop()
    core = fleet.bench.hub.core
    core.put_identity(D1, {"status": "disabled"}, if_match="*")
    fleet.bench.hub.drop_connections()
    reasons = fleet.bench.sink.reasons
    await fleet.bench.until(lambda: sum("Credentials" in reason for reason in reasons) >= 2)
    core.put_identity(D1, {"status": "enabled"}, if_match="*")
    await fleet.bench.until(lambda: len(fleet.bench.sink.connections) == 2)
    assert fleet.remembered["hub"] == HOST


def test_memory_of_another_registration_or_in_ruins(tmp_path: Path) -> None:
    file = tmp_path / "state" / "provisioned-hub.json"
    assert read_assignment(file, SOURCE) is None
    write_assignment(file, SOURCE, Assignment(HOST, "d1"))
    assert read_assignment(file, SOURCE) == Assignment(HOST, "d1")
    assert read_assignment(file, Dps(SCOPE, "d2", KeyText(KEY), host=DPS_NAME)) is None
    for content in ("[]", "{", "{}", ""):
        file.write_text(content)
        assert read_assignment(file, SOURCE) is None
    write_assignment(file / "not-a-folder.json", SOURCE, Assignment(HOST, "d1"))
