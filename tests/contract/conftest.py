"""A hub behind a proxy, transports of the agent that run against it, and pynq."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from gatelet.agent.identity.sources import IdentitySource
from gatelet.agent.twin.iothub import IotHubSettings, IotHubTransport
from gatelet.agent.twin.transport import Desired, MethodResult
from gatelet.simulator.connect_proxy import ConnectProxy
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.server import IotHub
from gatelet.simulator.pki import Pki

# What the contract tests share are modules next to them.
sys.path.insert(0, str(Path(__file__).parent))
# An assertion that fails there says with what values, too.
pytest.register_assert_rewrite("engine_benches", "mqtt_agent", "paho_peer", "small_models")

HOST = "hub.gatelet.test"


@dataclass
class RecordingSink:
    """A TwinSink that remembers, and wakes whoever waits for something."""

    documents: list[Desired] = field(default_factory=list)
    connections: list[Mapping[str, Any] | None] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    methods: list[tuple[str, Any]] = field(default_factory=list)

    async def desired(self, desired: Desired) -> None:
        self.documents.append(desired)

    async def connected(self, source: str, reported: Mapping[str, Any] | None) -> None:
        self.connections.append(reported)

    async def disconnected(self, source: str, reason: str) -> None:
        self.reasons.append(reason)

    async def method(self, source: str, name: str, payload: Any) -> MethodResult:
        self.methods.append((name, payload))
        return MethodResult(200, {"echo": payload})

    @property
    def newest(self) -> Any:
        return json.loads(self.documents[-1].body) if self.documents else None


class HubBench:
    """One hub, one proxy, and any number of agent transports with the real SDK."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pki = Pki(folder / "pki")
        self.hub = IotHub(HOST, self.pki)
        self.proxy = ConnectProxy()
        self.sink = RecordingSink()
        self._runs: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.hub.start()
        for name, target in self.hub.routes.items():
            self.proxy.add(name, target)
        await self.proxy.start()

    async def stop(self) -> None:
        await self.stop_runs()
        await self.proxy.stop()
        await self.hub.stop()
        gc.collect()

    async def stop_runs(self) -> None:
        runs, self._runs = self._runs, []
        for run in runs:
            run.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await run

    def run(
        self,
        source: IdentitySource | str,
        sink: RecordingSink | None = None,
        pause: Callable[[float], Any] = asyncio.sleep,
        **changes: Any,
    ) -> IotHubTransport:
        settings = IotHubSettings(
            source,
            ca_file=self.pki.ca_file,
            proxy=f"127.0.0.1:{self.proxy.port}",
            state_dir=self.folder / "state",
            retry_base=0.05,
            retry_cap=0.3,
            connect_timeout=10,
            request_timeout=10,
            resync_interval=60,
            watch_interval=0.05,
        )
        transport = IotHubTransport(replace(settings, **changes), Random(1), pause=pause)
        self._runs.append(asyncio.ensure_future(transport.run(sink or self.sink)))
        return transport

    async def until(self, condition: Callable[[], Any], seconds: float = 20.0) -> None:
        """Wait for a condition; the test fails with what the sink saw."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not condition():
            if asyncio.get_running_loop().time() > deadline:
                pytest.fail(f"did not happen: {self.sink}")
            await asyncio.sleep(0.02)

    async def connected(self, source: IdentitySource | str, **changes: Any) -> IotHubTransport:
        transport = self.run(source, **changes)
        await self.until(lambda: self.sink.connections)
        return transport

    def deploy(self, value: Any, client: str = "d1") -> None:
        change = {"properties": {"desired": {"deployment": value}}}
        self.hub.core.update_twin(ClientId.parse(client), change)

    def reported(self, client: str = "d1") -> dict[str, Any]:
        return dict(self.hub.core.twin(ClientId.parse(client)).reported.value)


@pytest.fixture
async def hub_bench(tmp_path: Path) -> AsyncIterator[HubBench]:
    bench = HubBench(tmp_path)
    await bench.start()
    yield bench
    await bench.stop()


@pytest.fixture(scope="module")
def pynq() -> Any:
    """The package, with its drivers, before a simulated board is made its device."""
    with warnings.catch_warnings():
        # It warns about x86 and about pkg_resources when it is imported, and its overlay class
        # imports all drivers when first used.
        warnings.simplefilter("ignore")
        import pynq
        import pynq.lib

    return pynq
