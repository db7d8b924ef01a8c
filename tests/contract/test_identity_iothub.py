"""Every way to an identity, with the real SDK against the hub's stand-in."""

from __future__ import annotations

import shutil
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from gatelet.agent.identity.sources import (
    CertificateFiles,
    EdgeEnvironment,
    IdentityService,
    KeyFile,
    ModuleOf,
    Registered,
    SignCommand,
    parse_connection_string,
)
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.workload import EdgeDevice

# See test_iothub_sdk: what the SDK does on its own account.
pytestmark = pytest.mark.filterwarnings(
    "ignore:ssl.PROTOCOL_TLSv1_2:DeprecationWarning", "ignore:unclosed <socket:ResourceWarning"
)

HOST = "hub.gatelet.test"
BY_AUTHORITY = {"authentication": {"type": "certificateAuthority"}}


class Certificate:
    """The files of a device's certificate, which can be replaced."""

    def __init__(self, bench: Any, client: str = "d1", **options: Any) -> None:
        self.bench, self.client = bench, client
        self.folder = bench.folder / "certificate"
        self.folder.mkdir(exist_ok=True)
        self.files = CertificateFiles(self.folder / "c.pem", self.folder / "k.pem")
        self.install(**options)

    def install(self, only_certificate: bool = False, **options: Any) -> None:
        made = self.bench.pki.device(self.client, **options)
        pairs = [(made.certificate, self.files.certificate), (made.key, self.files.key)]
        for new, old in pairs[:1] if only_certificate else pairs:
            shutil.copy(new, self.folder / "new")
            (self.folder / "new").replace(old)


async def serves(bench: Any, transport: Any, client: str = "d1") -> None:
    """Both directions work under this identity, and no other."""
    await transport.report({"seen": client})
    assert bench.reported(client) == {"seen": client}
    if "/" not in client:
        bench.deploy({"for": client}, client)
        await bench.until(lambda: bench.sink.newest == {"for": client})


async def test_device_by_certificate(hub_bench: Any) -> None:
    hub_bench.hub.core.put_identity(ClientId("d1"), BY_AUTHORITY)
    certificate = Certificate(hub_bench)
    transport = await hub_bench.connected(Registered(HOST, "d1", certificate.files))
    await serves(hub_bench, transport)
    assert transport.warnings() == ()


async def test_encrypted_key_of_a_self_signed_certificate(hub_bench: Any) -> None:
    made = hub_bench.pki.device("d1", self_signed=True, passphrase="open sesame")
    thumbprint = {"primaryThumbprint": made.thumbprint}
    authentication = {"type": "selfSigned", "x509Thumbprint": thumbprint}
    hub_bench.hub.core.put_identity(ClientId("d1"), {"authentication": authentication})
    word = hub_bench.folder / "word"
    word.write_text("open sesame\n")
    files = CertificateFiles(made.certificate, made.key, word)
    await serves(hub_bench, await hub_bench.connected(Registered(HOST, "d1", files)))


async def test_module_by_certificate(hub_bench: Any) -> None:
    hub_bench.hub.identity("d1")
    hub_bench.hub.core.put_identity(ClientId("d1", "m"), BY_AUTHORITY)
    certificate = Certificate(hub_bench, "d1/m")
    source = Registered(HOST, "d1", certificate.files, "m")
    await serves(hub_bench, await hub_bench.connected(source), "d1/m")


async def test_renewed_certificate_without_a_gap(hub_bench: Any) -> None:
    hub_bench.hub.core.put_identity(ClientId("d1"), BY_AUTHORITY)
    certificate = Certificate(hub_bench, lifetime=timedelta(days=3))
    transport = await hub_bench.connected(Registered(HOST, "d1", certificate.files))
    assert "in 2 days" in transport.warnings()[0]
    certificate.install(version=2)
    await hub_bench.until(lambda: len(hub_bench.sink.connections) == 2)
    assert hub_bench.sink.reasons == []
    assert transport.warnings() == ()
    await serves(hub_bench, transport)


async def test_certificate_that_does_not_fit_its_key_waits_for_it(hub_bench: Any) -> None:
    hub_bench.hub.core.put_identity(ClientId("d1"), BY_AUTHORITY)
    certificate = Certificate(hub_bench)
    transport = await hub_bench.connected(Registered(HOST, "d1", certificate.files))
    certificate.install(only_certificate=True, version=2)
    await hub_bench.until(lambda: any("stays on its old" in w for w in transport.warnings()))
    assert "cannot be used" in transport.warnings()[0]
    await serves(hub_bench, transport)
    certificate.install(version=2)
    await hub_bench.until(lambda: len(hub_bench.sink.connections) == 2)
    assert hub_bench.sink.reasons == []
    assert transport.warnings() == ()


async def test_refused_certificate_leaves_the_old_connection(hub_bench: Any) -> None:
    hub_bench.hub.core.put_identity(ClientId("d1"), BY_AUTHORITY)
    certificate = Certificate(hub_bench)
    transport = await hub_bench.connected(Registered(HOST, "d1", certificate.files))
    certificate.install(self_signed=True)
    await hub_bench.until(lambda: any("Credentials invalid" in w for w in transport.warnings()))
    await serves(hub_bench, transport)
    certificate.install(version=3)
    await hub_bench.until(lambda: len(hub_bench.sink.connections) == 2)
    assert hub_bench.sink.reasons == []
    assert transport.warnings() == ()


async def test_signing_program(hub_bench: Any) -> None:
    identity = hub_bench.hub.identity("d1")
    program = (
        "import base64,hashlib,hmac,sys;"
        f"key=base64.b64decode({identity.primary_key!r});"
        "d=hmac.new(key,sys.stdin.buffer.read(),hashlib.sha256).digest();"
        "print(base64.b64encode(d).decode())"
    )
    source = Registered(HOST, "d1", SignCommand((sys.executable, "-c", program)))
    await serves(hub_bench, await hub_bench.connected(source))


async def test_replaced_key_file(hub_bench: Any) -> None:
    identity = hub_bench.hub.identity("d1")
    key_file: Path = hub_bench.folder / "key"
    key_file.write_text(identity.primary_key)
    transport = await hub_bench.connected(Registered(HOST, "d1", KeyFile(key_file)))
    key_file.write_text(identity.secondary_key + "\n")
    await hub_bench.until(lambda: len(hub_bench.sink.connections) == 2)
    assert hub_bench.sink.reasons == []
    await serves(hub_bench, transport)


async def test_missing_key_file_is_named_until_it_is_there(hub_bench: Any) -> None:
    key_file: Path = hub_bench.folder / "key"
    hub_bench.run(Registered(HOST, "d1", KeyFile(key_file)))
    await hub_bench.until(lambda: hub_bench.sink.reasons)
    assert "cannot read the key file" in hub_bench.sink.reasons[0]
    key_file.write_text(hub_bench.hub.identity("d1").primary_key)
    await hub_bench.until(lambda: hub_bench.sink.connections)


async def test_token_renewal_keeps_the_connection_up(hub_bench: Any) -> None:
    source = hub_bench.hub.connection_string("d1")
    transport = await hub_bench.connected(source, token_lifetime=121)  # due after one second
    await hub_bench.until(lambda: len(hub_bench.sink.connections) == 3)
    assert hub_bench.sink.reasons == []
    await serves(hub_bench, transport)


async def test_edge_agent_of_a_devices_connection_string(hub_bench: Any) -> None:
    device = parse_connection_string(hub_bench.hub.connection_string("d1"))
    transport = await hub_bench.connected(ModuleOf(device, "$edgeAgent"))
    await serves(hub_bench, transport, "d1/$edgeAgent")


async def test_module_of_a_device_with_a_certificate(hub_bench: Any) -> None:
    hub_bench.hub.core.put_identity(ClientId("d1"), BY_AUTHORITY)
    device = Registered(HOST, "d1", Certificate(hub_bench).files)
    await serves(hub_bench, await hub_bench.connected(ModuleOf(device, "m")), "d1/m")


async def test_module_key_that_the_hub_keeps_to_itself(
    hub_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = parse_connection_string(hub_bench.hub.connection_string("d1"))
    shown = hub_bench.hub.core.identity_view

    def without_keys(identity: Any) -> dict[str, Any]:
        return {**shown(identity), "authentication": {"type": "sas"}}

    monkeypatch.setattr(hub_bench.hub.core, "identity_view", without_keys)
    await serves(hub_bench, await hub_bench.connected(ModuleOf(device, "m")), "d1/m")
    key = hub_bench.hub.identity("d1", "m").primary_key
    await hub_bench.stop_runs()
    again = hub_bench.run(ModuleOf(device, "m"))
    await hub_bench.until(lambda: len(hub_bench.sink.connections) == 2)
    await serves(hub_bench, again, "d1/m")
    assert hub_bench.hub.identity("d1", "m").primary_key == key


async def test_module_that_a_stranger_asks_for(hub_bench: Any) -> None:
    hub_bench.hub.identity("d1")
    stranger = Registered(
        HOST, "d1", parse_connection_string(hub_bench.hub.connection_string("d2")).proof
    )
    hub_bench.run(ModuleOf(stranger, "m"))
    await hub_bench.until(lambda: hub_bench.sink.reasons)
    assert "does not let the device make its module m" in hub_bench.sink.reasons[0]
    assert ClientId("d1", "m") not in hub_bench.hub.core.state.registry


async def test_iot_edge_module_from_the_environment(hub_bench: Any) -> None:
    edge = EdgeDevice(
        hub_bench.hub.core, "d1", hub_bench.pki.ca_file.read_text(), hub_bench.folder / "edge"
    )
    await edge.start()
    try:
        source = EdgeEnvironment(edge.environment("m"))
        transport = await hub_bench.connected(source, ca_file=None)
        await serves(hub_bench, transport, "d1/m")
    finally:
        await edge.stop()


async def test_development_environment_of_iot_edge(hub_bench: Any) -> None:
    text = hub_bench.hub.connection_string("d1", "m") + f";GatewayHostName={HOST}"
    variables = {
        "EdgeHubConnectionString": text,
        "EdgeModuleCACertificateFile": str(hub_bench.pki.ca_file),
    }
    transport = await hub_bench.connected(EdgeEnvironment(variables), ca_file=None)
    await serves(hub_bench, transport, "d1/m")


async def test_not_the_environment_of_iot_edge(hub_bench: Any) -> None:
    hub_bench.run(EdgeEnvironment({"IOTEDGE_DEVICEID": "d1"}))
    await hub_bench.until(lambda: hub_bench.sink.reasons)
    assert "IOTEDGE_IOTHUBHOSTNAME" in hub_bench.sink.reasons[0]


async def test_identity_service_makes_edge_agent(hub_bench: Any) -> None:
    hub_bench.hub.core.put_identity(ClientId("d1"), {"capabilities": {"iotEdge": True}})
    edge = EdgeDevice(hub_bench.hub.core, "d1", "", hub_bench.folder / "edge")
    source = IdentityService(
        identity_socket=hub_bench.folder / "edge" / "mgmt.sock",
        key_socket=hub_bench.folder / "edge" / "workload.sock",
    )
    hub_bench.run(source)
    await hub_bench.until(lambda: hub_bench.sink.reasons)
    assert "mgmt.sock cannot be asked" in hub_bench.sink.reasons[0]
    await edge.start()
    try:
        await hub_bench.until(lambda: hub_bench.sink.connections)
        assert hub_bench.hub.core.connected(ClientId("d1", "$edgeAgent"))
    finally:
        await edge.stop()


async def test_identity_service_makes_a_new_module(hub_bench: Any) -> None:
    hub_bench.hub.identity("d1")
    edge = EdgeDevice(hub_bench.hub.core, "d1", "", hub_bench.folder / "edge")
    socket = hub_bench.folder / "edge" / "mgmt.sock"
    await edge.start()
    try:
        transport = await hub_bench.connected(IdentityService("fresh", socket, socket))
        await serves(hub_bench, transport, "d1/fresh")
    finally:
        await edge.stop()


@pytest.mark.parametrize("by_certificate", [False, True])
async def test_websockets_through_the_proxy(hub_bench: Any, by_certificate: bool) -> None:
    source: Any = hub_bench.hub.connection_string("d2")
    if by_certificate:
        hub_bench.hub.core.put_identity(ClientId("d1"), BY_AUTHORITY)
        source = Registered(HOST, "d1", Certificate(hub_bench).files)
    # Nothing but port 443 is open.
    del hub_bench.proxy.routes[f"{HOST}:8883"]
    transport = await hub_bench.connected(source, websockets=True)
    await serves(hub_bench, transport, "d1" if by_certificate else "d2")
    hub_bench.hub.drop_connections()
    await hub_bench.until(lambda: len(hub_bench.sink.connections) == 2)


async def test_proxy_that_refuses_is_told(hub_bench: Any) -> None:
    source = hub_bench.hub.connection_string("d1")
    del hub_bench.proxy.routes[f"{HOST}:8883"]
    hub_bench.run(source)
    await hub_bench.until(lambda: hub_bench.sink.reasons)
    assert "403" in hub_bench.sink.reasons[0]
    hub_bench.proxy.add(f"{HOST}:8883", ("127.0.0.1", hub_bench.hub.mqtt_port))
    await hub_bench.until(lambda: hub_bench.sink.connections)
