"""2,000 devices over TLS on one simulated hub process: connect rate, memory, twin latency.

Run: .venv/bin/python tests/bench/bench_hub_connections.py [devices]

The hub runs in a process of its own; the devices are raw MQTT clients on the simulator's codec in
this one, because the SDK needs two threads per client. Everything stays on the loopback interface.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import resource
import ssl
import sys
import tempfile
import time
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gatelet.simulator.iothub import sas
from gatelet.simulator.iothub.rates import RateLimits
from gatelet.simulator.iothub.server import IotHub
from gatelet.simulator.mqtt.codec import Decoder, encode
from gatelet.simulator.mqtt.packets import (
    V311,
    ConnAck,
    Connect,
    Packet,
    PubAck,
    Publish,
    SubAck,
    Subscribe,
    Subscription,
)
from gatelet.simulator.pki import Pki

HOST = "bench.gatelet.test"
AT_ONCE = 64
SECONDS = 55.0


def serve(folder: str, devices: int, pipe: Connection) -> None:
    """The hub's process: starts, tells its port and keys, then answers "rss" until told to stop."""
    asyncio.run(_serve(Path(folder), devices, pipe))


async def _serve(folder: Path, devices: int, pipe: Connection) -> None:
    hub = IotHub(HOST, Pki(folder))
    hub.core.throttle.limits = RateLimits(None, None)
    await hub.start()
    keys = [hub.identity(f"d{number}").primary_key for number in range(devices)]
    pipe.send((hub.mqtt_port, keys))
    while await asyncio.to_thread(pipe.recv) == "rss":
        pipe.send(rss_kib())
    await hub.stop()


def rss_kib() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize() // 1024


class Device(asyncio.Protocol):
    """One connected client; every request waits for its own answer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._decoder = Decoder(version=V311)
        self._waiting: dict[Any, asyncio.Future[Packet]] = {}
        self._packet_id = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for packet in self._decoder.feed(data):
            if isinstance(packet, ConnAck):
                self._answer("connect", packet)
            elif isinstance(packet, (SubAck, PubAck)):
                self._answer(packet.packet_id, packet)
            elif isinstance(packet, Publish) and packet.topic.startswith("$iothub/twin/res/"):
                self._answer(packet.topic.partition("$rid=")[2].partition("&")[0], packet)

    def connection_lost(self, error: Exception | None) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionError(f"{self.name}: {error or 'closed'}"))

    def _answer(self, key: Any, packet: Packet) -> None:
        future = self._waiting.pop(key, None)
        if future is not None and not future.done():
            future.set_result(packet)

    async def request(self, key: Any, packet: Packet) -> Packet:
        assert self._transport is not None
        future: asyncio.Future[Packet] = asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        self._transport.write(encode(packet, V311))
        return await future

    def next_id(self) -> int:
        self._packet_id = self._packet_id % 65535 + 1
        return self._packet_id

    async def open(self, key: str) -> None:
        expiry = int(datetime.now(timezone.utc).timestamp()) + 3600
        token = sas.make(f"{HOST}/devices/{self.name}", key, expiry)
        answer = await self.request(
            "connect",
            Connect(
                self.name,
                clean_start=False,
                keepalive=600,
                username=f"{HOST}/{self.name}/?api-version=2019-10-01",
                password=token.encode(),
            ),
        )
        assert isinstance(answer, ConnAck)
        assert answer.reason_code == 0, answer
        number = self.next_id()
        wanted = ("$iothub/twin/res/#", "$iothub/twin/PATCH/properties/desired/#")
        await self.request(number, Subscribe(number, tuple(Subscription(t, 1) for t in wanted)))

    async def twin(self, what: str, body: bytes) -> None:
        number = self.next_id()
        rid = f"r{number}"
        publish = Publish(f"$iothub/twin/{what}/?$rid={rid}", body, qos=1, packet_id=number)
        answer = await self.request(rid, publish)
        assert isinstance(answer, Publish)
        assert answer.topic.startswith("$iothub/twin/res/20"), answer.topic

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def bench(port: int, keys: list[str], ca_file: Path, pipe: Connection) -> None:
    loop = asyncio.get_running_loop()
    context = ssl.create_default_context(cafile=str(ca_file))
    gate = asyncio.Semaphore(AT_ONCE)
    devices: list[Device] = []

    async def connect(number: int, key: str) -> None:
        async with gate:
            device = Device(f"d{number}")
            await loop.create_connection(
                lambda: device, "127.0.0.1", port, ssl=context, server_hostname=HOST
            )
            await device.open(key)
            devices.append(device)

    async def timed(device: Device, what: str, body: bytes, took: list[float]) -> None:
        async with gate:
            began = time.perf_counter()
            await device.twin(what, body)
            took.append(time.perf_counter() - began)

    before = await ask_rss(pipe)
    began = time.perf_counter()
    await asyncio.gather(*(connect(number, key) for number, key in enumerate(keys)))
    seconds = time.perf_counter() - began
    after = await ask_rss(pipe)
    count = len(devices)
    print(f"{'devices connected (TLS, subscribed)':44}{count:>12}")
    print(f"{'connects per second':44}{count / seconds:>12.0f}")
    print(f"{'hub memory per connection (RSS)':44}{(after - before) / count:>8.1f} KiB")
    print(f"{'hub memory in all (RSS)':44}{after / 1024:>8.1f} MiB")
    for name, what, at_once in (
        ("twin GET, one at a time", "GET", 1),
        ("reported PATCH, one at a time", "PATCH/properties/reported", 1),
        (f"twin GET, {AT_ONCE} at once", "GET", AT_ONCE),
        (f"reported PATCH, {AT_ONCE} at once", "PATCH/properties/reported", AT_ONCE),
    ):
        gate = asyncio.Semaphore(at_once)
        took: list[float] = []
        chosen = devices if at_once > 1 else devices[:: max(1, count // 300)]
        body = b" " if what == "GET" else json.dumps({"n": name}).encode()
        began = time.perf_counter()
        await asyncio.gather(*(timed(device, what, body, took) for device in chosen))
        rate = len(took) / (time.perf_counter() - began)
        took.sort()
        p50, p99 = took[len(took) // 2] * 1000, took[int(len(took) * 0.99)] * 1000
        print(f"{name:44}{p50:>8.2f} ms p50{p99:>9.2f} ms p99{rate:>8.0f}/s")
    for device in devices:
        device.close()
    await asyncio.sleep(0)


async def ask_rss(pipe: Connection) -> int:
    pipe.send("rss")
    return int(await asyncio.to_thread(pipe.recv))


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 200
    if hard != resource.RLIM_INFINITY and hard < needed:
        print(f"the limit of open files is {hard}; {needed} are needed: fewer devices")
        count = hard - 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard) if hard > 0 else needed, hard))
    ours, theirs = multiprocessing.Pipe()
    print(
        f"hub connections, {datetime.now(timezone.utc):%Y-%m-%d}, Python {sys.version.split()[0]}"
    )
    with tempfile.TemporaryDirectory() as folder:
        Pki(Path(folder))
        process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(folder, count, theirs), daemon=True
        )
        process.start()
        theirs.close()
        try:
            port, keys = ours.recv()
            work = bench(port, keys, Pki(Path(folder)).ca_file, ours)
            asyncio.run(asyncio.wait_for(work, SECONDS))
            ours.send("stop")
            process.join(10)
        except asyncio.TimeoutError:
            print(f"not done within {SECONDS:g} s")
            return 1
        finally:
            process.kill()
            process.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
