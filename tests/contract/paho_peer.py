"""The real paho client, and brokers for it: ours and the real mosquitto."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from gatelet.simulator.mqtt.broker import Broker
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from required import program

# paho leaves the sockets that wake its thread open when it connects again, and a handshake may be
# under way when a test ends: what is collected later is no finding.
ignores_what_paho_leaves = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """Nothing of this is left for the tests of another file."""
    yield
    gc.collect()


async def until(condition: Callable[[], Any], what: str = "", seconds: float = 20) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"timed out: {what}"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def mosquitto(folder: Path) -> AsyncIterator[int]:
    # Mosquitto cannot choose a port itself, and somebody may take the one that was free.
    for _ in range(5):
        port, process = await start_mosquitto(folder)
        try:
            await until(lambda: process.returncode is not None or listens(port), "mosquitto")  # noqa: B023
            if process.returncode is None:
                yield port
                return
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()
    raise AssertionError("mosquitto ended at once")


async def start_mosquitto(folder: Path) -> tuple[int, asyncio.subprocess.Process]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nlog_dest none\n"
    )
    return port, await asyncio.create_subprocess_exec(program("mosquitto"), "-c", str(config))


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(params=["ours", "mosquitto"])
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[int]:
    """The port of a running broker."""
    if request.param == "mosquitto":
        async with mosquitto(tmp_path) as port:
            yield port
    else:
        ours = Broker()
        await ours.start()
        yield ours.port
        await ours.stop()


@contextlib.asynccontextmanager
async def ours(**arguments: Any) -> AsyncIterator[Broker]:
    broker = Broker(**arguments)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.stop()


class Paho:
    """A paho client on its own network thread, awaited from the test."""

    def __init__(self, client_id: str, version: int = mqtt.MQTTv5, clean: bool = True) -> None:
        self.version, self.clean = version, clean
        self.loop = asyncio.get_running_loop()
        self.messages: asyncio.Queue[mqtt.MQTTMessage] = asyncio.Queue()
        self.events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        arguments: dict[str, Any] = {"client_id": client_id, "protocol": version}
        if version == mqtt.MQTTv311:
            arguments["clean_session"] = clean
        if hasattr(mqtt, "CallbackAPIVersion"):
            arguments["callback_api_version"] = mqtt.CallbackAPIVersion.VERSION2
        self.client = mqtt.Client(**arguments, reconnect_on_failure=False)
        self.client.on_connect = lambda c, u, flags, *more: self.tell("connect", flags)
        self.client.on_subscribe = lambda c, u, mid, *more: self.tell("subscribe", mid)
        self.client.on_publish = lambda c, u, mid, *more: self.tell("publish", mid)
        self.client.on_message = lambda c, u, message: self.loop.call_soon_threadsafe(
            self.messages.put_nowait, message
        )

    def tell(self, what: str, value: Any) -> None:
        self.loop.call_soon_threadsafe(self.events.put_nowait, (what, value))

    async def event(self, what: str) -> Any:
        while True:
            kind, value = await asyncio.wait_for(self.events.get(), 20)
            if kind == what:
                return value

    async def connect(self, port: int, expiry: int = 0) -> bool:
        """Whether the session was present."""
        arguments: dict[str, Any] = {}
        if self.version == mqtt.MQTTv5:
            properties = Properties(PacketTypes.CONNECT)
            properties.SessionExpiryInterval = expiry
            arguments = {"clean_start": self.clean, "properties": properties}
        await asyncio.to_thread(self.client.connect, "127.0.0.1", port, **arguments)
        self.client.loop_start()
        flags = await self.event("connect")
        return bool(flags["session present"] if isinstance(flags, dict) else flags.session_present)

    async def subscribe(self, *arguments: Any, **more: Any) -> None:
        self.client.subscribe(*arguments, **more)
        await self.event("subscribe")

    async def publish(self, *arguments: Any, **more: Any) -> None:
        self.client.publish(*arguments, **more)
        await self.event("publish")

    async def message(self) -> mqtt.MQTTMessage:
        return await asyncio.wait_for(self.messages.get(), 20)

    async def stop(self) -> None:
        self.client.disconnect()
        await asyncio.to_thread(self.client.loop_stop)

    async def break_down(self) -> None:
        """Lose the network without DISCONNECT."""
        self.client.socket().shutdown(socket.SHUT_RDWR)
        await asyncio.to_thread(self.client.loop_stop)


@contextlib.asynccontextmanager
async def paho(
    port: int, client_id: str, version: int = mqtt.MQTTv5, clean: bool = True, expiry: int = 0
) -> AsyncIterator[Paho]:
    client = Paho(client_id, version, clean)
    client.present = await client.connect(port, expiry)
    try:
        yield client
    finally:
        await client.stop()


both = pytest.mark.parametrize("version", [mqtt.MQTTv311, mqtt.MQTTv5])
