"""The agent's MQTT transport on a broker, and the sink it tells."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from random import Random
from typing import Any

import paho.mqtt.client as mqtt
from gatelet.agent.twin.mqtt import MqttSettings, MqttTransport
from gatelet.agent.twin.transport import Desired, MethodResult
from paho_peer import until

P = "gatelet/v1/edge-1"


class Sink:
    def __init__(self) -> None:
        self.documents: asyncio.Queue[Desired] = asyncio.Queue()
        self.links: list[tuple[str, Any]] = []
        self.release = asyncio.Event()

    async def desired(self, desired: Desired) -> None:
        self.documents.put_nowait(desired)

    async def connected(self, source: str, reported: Mapping[str, Any] | None) -> None:
        self.links.append(("up", reported))

    async def disconnected(self, source: str, reason: str) -> None:
        self.links.append(("down", reason))

    async def method(self, source: str, name: str, payload: Any) -> MethodResult:
        if name == "hang":
            await self.release.wait()
        return MethodResult(404 if name == "missing" else 200, {"echo": payload})

    async def next(self) -> Desired:
        return await asyncio.wait_for(self.documents.get(), 20)

    def ups(self) -> list[Any]:
        return [value for kind, value in self.links if kind == "up"]


@contextlib.asynccontextmanager
async def agent(
    port: int, version: int = mqtt.MQTTv5, settings: dict | None = None, **options: Any
) -> AsyncIterator[tuple[MqttTransport, Sink]]:
    wanted = MqttSettings("127.0.0.1", port, "edge-1", **settings or {})
    transport = MqttTransport(
        wanted, random=Random(1), **{"base_delay": 0.02, "max_delay": 0.05, **options}
    )
    transport._version = version
    sink = Sink()
    running = asyncio.create_task(transport.run(sink))
    try:
        yield transport, sink
        assert not running.done(), running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def is_up(transport: MqttTransport) -> bool:
    return transport._ready is not None and not transport._ready.lost.done()


async def connected(sink: Sink, times: int = 1) -> None:
    await until(lambda: len(sink.ups()) >= times, f"connected {times} times; {sink.links}")
