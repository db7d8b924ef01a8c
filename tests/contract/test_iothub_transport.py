"""The agent's IoT Hub transport, with the real SDK, against a hub that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from gatelet.agent.twin.iothub import IotHubSettings, IotHubTransport
from gatelet.agent.twin.transport import Desired, MethodResult, TransportUnavailable
from gatelet.simulator.connect_proxy import ConnectProxy
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.errors import HubError
from gatelet.simulator.iothub.server import IotHub
from gatelet.simulator.pki import Pki

# See test_iothub_sdk: what the SDK does on its own account.
pytestmark = pytest.mark.filterwarnings(
    "ignore:ssl.PROTOCOL_TLSv1_2:DeprecationWarning", "ignore:unclosed <socket:ResourceWarning"
)

HOST = "hub.gatelet.test"
DEVICE = ClientId("d1")
PATCHES = "$iothub/twin/PATCH/properties/desired/?$version=1"


@dataclass
class Sink:
    """A TwinSink that remembers, and wakes whoever waits for something."""

    documents: list[Desired] = field(default_factory=list)
    connections: list[Mapping[str, Any] | None] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    methods: list[tuple[str, Any]] = field(default_factory=list)
    happened: asyncio.Event = field(default_factory=asyncio.Event)

    async def desired(self, desired: Desired) -> None:
        assert desired.source == "iothub"
        self.documents.append(desired)
        self.happened.set()

    async def connected(self, source: str, reported: Mapping[str, Any] | None) -> None:
        self.connections.append(reported)
        self.happened.set()

    async def disconnected(self, source: str, reason: str) -> None:
        self.reasons.append(reason)
        self.happened.set()

    async def method(self, source: str, name: str, payload: Any) -> MethodResult:
        self.methods.append((name, payload))
        if name == "explode":
            raise RuntimeError("a defect")
        return MethodResult(200, {"echo": payload})

    async def until(self, condition: Callable[[], Any], seconds: float = 30.0) -> None:
        async def wait() -> None:
            while not condition():
                self.happened.clear()
                await self.happened.wait()

        try:
            await asyncio.wait_for(wait(), seconds)
        except asyncio.TimeoutError:
            pytest.fail(f"did not happen: {self}")

    @property
    def newest(self) -> Any:
        return json.loads(self.documents[-1].body) if self.documents else None


class Bench:
    def __init__(self, folder: Path) -> None:
        self.pki = Pki(folder)
        self.hub = IotHub(HOST, self.pki)
        self.proxy = ConnectProxy()
        self.sink = Sink()
        self._runs: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.hub.start()
        self.proxy.add(f"{HOST}:8883", ("127.0.0.1", self.hub.mqtt_port))
        await self.proxy.start()

    async def stop(self) -> None:
        for index in range(len(self._runs)):
            await self.stop_run(index)
        await self.proxy.stop()
        await self.hub.stop()
        gc.collect()

    async def stop_run(self, index: int) -> None:
        self._runs[index].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(self._runs[index], 30)

    def settings(self, module: str | None = None, **changes: Any) -> IotHubSettings:
        settings = IotHubSettings(
            self.hub.connection_string("d1", module),
            ca_file=self.pki.ca_file,
            proxy=f"127.0.0.1:{self.proxy.port}",
            retry_base=0.05,
            retry_cap=0.3,
            connect_timeout=10,
            request_timeout=10,
            resync_interval=60,
        )
        return replace(settings, **changes)

    def run(self, settings: IotHubSettings, sink: Sink | None = None) -> IotHubTransport:
        transport = IotHubTransport(settings, Random(1))
        self._runs.append(asyncio.ensure_future(transport.run(sink or self.sink)))
        return transport

    async def connected(self, **changes: Any) -> IotHubTransport:
        transport = self.run(self.settings(**changes))
        await self.sink.until(lambda: self.sink.connections)
        return transport

    def deploy(self, value: Any, client: ClientId = DEVICE) -> int:
        change = {"properties": {"desired": {"deployment": value}}}
        return self.hub.core.update_twin(client, change).desired.version

    @property
    def reported(self) -> dict[str, Any]:
        return self.hub.core.twin(DEVICE).reported.value


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    await bench.start()
    yield bench
    await bench.stop()


async def test_device_document_patch_report_and_telemetry(bench: Bench) -> None:
    bench.hub.identity("d1")
    bench.deploy({"n": 1})
    bench.hub.core.patch_reported(DEVICE, {"left": "over"})
    transport = await bench.connected()
    sink = bench.sink
    await sink.until(lambda: sink.documents)
    assert sink.connections == [{"left": "over", "$version": 2}]
    assert sink.documents == [Desired("iothub", 2, b'{"n":1}')]

    bench.deploy({"n": None, "m": {"ü": 2}})
    await sink.until(lambda: len(sink.documents) == 2)
    assert sink.documents[1] == Desired("iothub", 3, '{"m":{"ü":2}}'.encode())

    await transport.report({"state": {"a": 1}, "left": None})
    assert bench.reported == {"state": {"a": 1}}
    await transport.send(b'{"t":1}', {"$.ct": "application/json", "kind": "reading +&"})
    (message,) = bench.hub.telemetry.query("d1")
    assert message.body == b'{"t":1}'
    assert message.properties == {"kind": "reading +&"}
    assert message.system == {"content-type": "application/json"}
    with pytest.raises(ValueError, match="takes up to 262144"):
        await transport.send(b"x" * (256 * 1024 + 1), {})


async def test_module_document_is_the_whole_section(bench: Bench) -> None:
    agent = ClientId("d1", "$edgeAgent")
    bench.run(bench.settings(module="$edgeAgent"))
    sink = bench.sink
    await sink.until(lambda: sink.connections)
    assert sink.documents == []  # nothing desired yet
    content = {"$edgeAgent": {"properties.desired": {"schemaVersion": "1.1", "modules": {"a": {}}}}}
    bench.hub.core.apply_configuration("d1", {"modulesContent": content})
    await sink.until(lambda: sink.documents)
    assert sink.newest == {"schemaVersion": "1.1", "modules": {"a": {}}}
    content["$edgeAgent"]["properties.desired"] = {"schemaVersion": "1.1", "modules": {"b": {}}}
    bench.hub.core.apply_configuration("d1", {"modulesContent": content})
    await sink.until(lambda: len(sink.documents) == 2)
    assert sink.newest == {"schemaVersion": "1.1", "modules": {"b": {}}}
    assert sink.documents[-1].version == bench.hub.core.twin(agent).desired.version
    assert ClientId("d1", "b") in bench.hub.core.state.registry


async def test_methods(bench: Bench) -> None:
    await bench.connected()
    core = bench.hub.core
    assert await core.invoke_method(DEVICE, "GetLogs", {"n": 1}) == (200, {"echo": {"n": 1}})
    status, payload = await core.invoke_method(DEVICE, "explode", None)
    assert status == 500
    assert "a defect" in payload["message"]
    answers = await asyncio.gather(*(core.invoke_method(DEVICE, "m", i) for i in range(10)))
    assert answers == [(200, {"echo": i}) for i in range(10)]


async def test_a_repeated_method_call_runs_once(bench: Bench) -> None:
    await bench.connected()
    link = bench.hub.core.link(DEVICE)
    for _ in range(2):
        link.deliver("$iothub/methods/POST/ping/?$rid=same", b"{}")
    assert await bench.hub.core.invoke_method(DEVICE, "after", None) == (200, {"echo": None})
    assert [name for name, _ in bench.sink.methods] == ["ping", "after"]


async def test_dropped_connections_and_changes_meanwhile(bench: Bench) -> None:
    transport = await bench.connected()
    sink = bench.sink
    for round_number in range(1, 4):
        bench.hub.drop_connections()
        bench.deploy({"round": round_number})
        await sink.until(lambda n=round_number: sink.newest == {"round": n})
    assert len(sink.connections) == 4
    assert sink.reasons[0] == "the connection to the IoT Hub was lost"
    await transport.report({"fine": True})
    assert bench.reported == {"fine": True}


async def test_a_hub_that_is_away(bench: Bench) -> None:
    transport = await bench.connected()
    sink = bench.sink
    await bench.hub.pause()
    await sink.until(lambda: len(sink.reasons) >= 3)
    with pytest.raises(TransportUnavailable, match="not connected"):
        await transport.report({"a": 1})
    with pytest.raises(TransportUnavailable):
        await transport.send(b"x", {})
    assert "proxy" in sink.reasons[-1].lower()
    bench.deploy({"v": 1})
    bench.deploy({"v": 2})
    await bench.hub.resume()
    await sink.until(lambda: sink.documents)
    assert [json.loads(d.body) for d in sink.documents] == [{"v": 2}]


async def test_throttled_reads_are_repeated_with_patience(bench: Bench) -> None:
    bench.hub.identity("d1")
    bench.deploy({"v": 1})
    bench.hub.faults.throttle_twin_requests = 4
    transport = await bench.connected()
    await bench.sink.until(lambda: bench.sink.newest == {"v": 1})
    assert bench.sink.reasons == []  # on the same connection
    bench.hub.faults.throttle_twin_requests = 1
    with pytest.raises(TransportUnavailable, match="429"):
        await transport.report({"a": 1})
    await transport.report({"a": 2})
    assert bench.reported == {"a": 2}


async def test_endless_throttling_is_no_storm(bench: Bench) -> None:
    bench.hub.faults.throttle_twin_requests = 10**6
    bench.run(bench.settings())
    await bench.sink.until(lambda: bench.sink.reasons)
    assert "429" in bench.sink.reasons[0]
    assert 10**6 - bench.hub.faults.throttle_twin_requests <= 8


async def test_a_second_client_with_our_identity(bench: Bench) -> None:
    settings = bench.settings(retry_base=0.4, retry_cap=0.4)
    bench.run(settings)
    sink, other = bench.sink, Sink()
    await sink.until(lambda: sink.connections)
    bench.run(settings, other)
    await sink.until(lambda: any("another client" in reason for reason in sink.reasons))
    await bench.stop_run(1)
    bench.deploy({"after": "the quarrel"})
    await sink.until(lambda: sink.newest == {"after": "the quarrel"})


async def test_a_lost_patch_is_found_by_the_next(bench: Bench) -> None:
    await bench.connected()
    bench.hub.faults.lose_desired_patches = 1
    bench.deploy({"lost": 1})
    bench.deploy({"kept": 2})
    await bench.sink.until(lambda: bench.sink.newest == {"lost": 1, "kept": 2})
    assert bench.sink.reasons == []


async def test_a_lost_patch_is_found_by_the_watchdog(bench: Bench) -> None:
    await bench.connected(resync_interval=0.2)
    bench.hub.faults.lose_desired_patches = 1
    bench.deploy({"lost": 1})
    await bench.sink.until(lambda: bench.sink.newest == {"lost": 1})
    assert bench.sink.reasons == []


async def test_a_lost_answer_ends_the_connection(bench: Bench) -> None:
    transport = await bench.connected(request_timeout=2.0)
    bench.hub.faults.lose_twin_answers = 1
    with pytest.raises(TransportUnavailable, match="no answer"):
        await transport.report({"a": 1})
    await bench.sink.until(lambda: len(bench.sink.connections) == 2)
    assert bench.sink.connections[1] == {"a": 1, "$version": 2}
    await transport.report({"a": 2})


@pytest.mark.parametrize("fault", ["drop_before_ack", "drop_after_ack"])
async def test_drops_around_the_acknowledgement(bench: Bench, fault: str) -> None:
    transport = await bench.connected()
    setattr(bench.hub.faults, fault, 1)
    with contextlib.suppress(TransportUnavailable):
        await transport.send(b"x", {})
    await bench.sink.until(lambda: len(bench.sink.connections) == 2)
    await transport.send(b"y", {})
    assert [m.body for m in bench.hub.telemetry.query("d1")] == [b"x", b"y"]


async def test_a_forgotten_session_is_subscribed_again(bench: Bench) -> None:
    await bench.connected()
    bench.hub.faults.forget_sessions = 1
    bench.hub.drop_connections()
    await bench.sink.until(lambda: len(bench.sink.connections) == 2)
    assert bench.hub.core.link(DEVICE).subscribed(PATCHES)
    bench.deploy({"v": 1})
    await bench.sink.until(lambda: bench.sink.newest == {"v": 1})


async def test_refused_credentials_are_tried_again(bench: Bench) -> None:
    bench.hub.identity("d1")
    bench.hub.core.put_identity(DEVICE, {"status": "disabled"}, if_match="*")
    bench.run(bench.settings())
    await bench.sink.until(lambda: len(bench.sink.reasons) >= 2)
    assert "Credentials invalid" in bench.sink.reasons[0]
    bench.hub.core.put_identity(DEVICE, {"status": "enabled"}, if_match="*")
    await bench.sink.until(lambda: bench.sink.connections)


async def test_a_renewed_token_is_a_new_connection(bench: Bench) -> None:
    transport = await bench.connected(token_lifetime=121)  # renewed 120 s before its end
    await bench.sink.until(lambda: len(bench.sink.connections) == 2)
    await transport.report({"a": 1})
    bench.deploy({"v": 1})
    await bench.sink.until(lambda: bench.sink.newest == {"v": 1})


async def test_a_missing_ca_file_is_named(bench: Bench, tmp_path: Path) -> None:
    bench.run(bench.settings(ca_file=tmp_path / "absent.pem"))
    await bench.sink.until(lambda: bench.sink.reasons)
    assert "absent.pem" in bench.sink.reasons[0]


async def test_refused_reports_say_why(bench: Bench) -> None:
    transport = await bench.connected()
    with pytest.raises(TransportUnavailable, match="413"):
        await transport.report({str(i): "x" * 4000 for i in range(9)})
    with pytest.raises(HubError):
        await bench.hub.core.invoke_method(ClientId("other"), "m", None)
