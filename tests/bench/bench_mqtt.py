"""QoS 1 messages per second through our broker, mosquitto and amqtt, one after the other.

    python tests/bench/bench_mqtt.py [--seconds 2] [--rounds 3] [--without-amqtt] [--json]

One publisher and one subscriber in this process, which only counts and acknowledges, each broker
in a process of its own. A message counts when the subscriber has it; the publisher keeps a window
of messages unacknowledged, and each broker's better window counts (amqtt slows down with a large
one). The processor time that a broker takes per message is the least of its rounds: it tells more
than the rate on a busy machine. amqtt is installed into a throw-away environment, so it needs the
package index.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

WINDOWS = (10, 50)
PAYLOAD = bytes(64)
TOPIC = b"bench/topic"
# 3.1.1, clean session, no keep alive.
CONNECT = b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x00\x00\x01"
SUBSCRIBE = b"\x82\x10\x00\x01\x00\x0b" + TOPIC + b"\x01"
HEAD = b"\x32" + bytes((2 + len(TOPIC) + 2 + len(PAYLOAD),)) + b"\x00\x0b" + TOPIC
DELIVERY = len(HEAD) + 2 + len(PAYLOAD)

OURS = """
import asyncio, sys
from gatelet.simulator.mqtt.broker import Broker
async def main():
    await Broker(port=int(sys.argv[1])).start()
    await asyncio.Event().wait()
asyncio.run(main())
"""
AMQTT = """
import asyncio, sys
from amqtt.broker import Broker
async def main():
    config = {"listeners": {"default": {"type": "tcp", "bind": "127.0.0.1:" + sys.argv[1]}},
              "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin":
                          {"allow_anonymous": True}}}
    await Broker(config).start()
    await asyncio.Event().wait()
asyncio.run(main())
"""


class Measured(NamedTuple):
    rate: float
    """Messages per second."""
    cost: float
    """Microseconds of the broker's processor time per message."""


class Publisher(asyncio.Protocol):
    """Keeps the window full; every PUBACK is four bytes."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.running = False
        self.identifier = 0
        self.pending = b""

    def connection_made(self, transport) -> None:
        self.transport = transport
        transport.write(CONNECT + b"p")

    def data_received(self, data: bytes) -> None:
        if not self.ready.is_set():
            assert data == b"\x20\x02\x00\x00", data
            self.ready.set()
            return
        data = self.pending + data
        count, left = divmod(len(data), 4)
        self.pending = data[len(data) - left :]
        if self.running:
            self.send(count)

    def send(self, count: int) -> None:
        packets = []
        for _ in range(count):
            self.identifier = self.identifier % 65_535 + 1
            packets += (HEAD, self.identifier.to_bytes(2, "big"), PAYLOAD)
        self.transport.write(b"".join(packets))


class Subscriber(asyncio.Protocol):
    """Acknowledges; all deliveries have the same size."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.count = 0
        self.pending = b""
        self.handshake = b""

    def connection_made(self, transport) -> None:
        self.transport = transport
        transport.write(CONNECT + b"s" + SUBSCRIBE)

    def data_received(self, data: bytes) -> None:
        if not self.ready.is_set():
            self.handshake += data
            if len(self.handshake) >= 9:
                assert self.handshake == b"\x20\x02\x00\x00\x90\x03\x00\x01\x01", self.handshake
                self.ready.set()
            return
        data = self.pending + data
        count = len(data) // DELIVERY
        answers = []
        at = len(HEAD)
        for position in range(at, count * DELIVERY, DELIVERY):
            answers.append(b"\x40\x02" + data[position : position + 2])
        self.transport.write(b"".join(answers))
        self.pending = data[count * DELIVERY :]
        self.count += count


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(port: int, pid: int, seconds: float, window: int) -> Measured:
    loop = asyncio.get_running_loop()
    _, subscriber = await loop.create_connection(Subscriber, "127.0.0.1", port)
    await asyncio.wait_for(subscriber.ready.wait(), 10)
    _, publisher = await loop.create_connection(Publisher, "127.0.0.1", port)
    await asyncio.wait_for(publisher.ready.wait(), 10)
    publisher.running = True
    publisher.send(window)
    await asyncio.sleep(seconds / 4)
    before, used, started = subscriber.count, processor_seconds(pid), time.perf_counter()
    await asyncio.sleep(seconds)
    count = subscriber.count - before
    rate = count / (time.perf_counter() - started)
    cost = (processor_seconds(pid) - used) / max(count, 1) * 1e6
    publisher.running = False
    for one in (publisher, subscriber):
        one.transport.abort()
    return Measured(rate, cost)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def broker(command: list[str], port: int) -> AsyncIterator[int]:
    """Its process id."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[0]} does not listen")
            await asyncio.sleep(0.05)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def install_amqtt(folder: Path) -> str | None:
    """The Python of an environment with amqtt, None when there is no way to it."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "amqtt"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        print(f"without amqtt: {result.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return python


async def run(seconds: float, rounds: int, amqtt: str | None, folder: Path) -> dict[str, Measured]:
    commands = {"ours": lambda port: [sys.executable, "-c", OURS, str(port)]}
    if mosquitto := shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin"):

        def with_config(port: int) -> list[str]:
            config = folder / f"{port}.conf"
            config.write_text(
                f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n"
                "max_inflight_messages 100\nmax_queued_messages 0\nlog_dest none\n"
            )
            return [mosquitto, "-c", str(config)]

        commands["mosquitto"] = with_config
    else:
        print("without mosquitto: not installed", file=sys.stderr)
    if amqtt is not None:
        commands["amqtt"] = lambda port: [amqtt, "-c", AMQTT, str(port)]
    results: dict[str, dict[int, list[Measured]]] = {
        name: {window: [] for window in WINDOWS} for name in commands
    }
    # In turns, so that a busy machine is unfair to all of them alike.
    for _ in range(rounds):
        for name, command in commands.items():
            port = free_port()
            async with broker(command(port), port) as pid:
                for window, found in results[name].items():
                    found.append(await measure(port, pid, seconds, window))
    return {name: better_window(list(found.values())) for name, found in results.items()}


def better_window(by_window: list[list[Measured]]) -> Measured:
    rate, cost = max(
        (median(one.rate for one in rounds), min(one.cost for one in rounds))
        for rounds in by_window
    )
    return Measured(rate, cost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-amqtt", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        amqtt = None if arguments.without_amqtt else install_amqtt(folder / "amqtt")
        found = asyncio.run(run(arguments.seconds, arguments.rounds, amqtt, folder))
    ours = found["ours"].rate
    ratios = {name: ours / one.rate for name, one in found.items() if name != "ours" and one.rate}
    if arguments.json:
        figures = {
            "messages_per_second": {name: one.rate for name, one in found.items()},
            "microseconds_per_message": {name: one.cost for name, one in found.items()},
            "ours_over": ratios,
        }
        print(json.dumps(figures))
        return
    for name, one in found.items():
        print(f"{name:10} {one.rate:8.0f} messages/s QoS 1, {one.cost:5.1f} us of processor each")
    for name, ratio in ratios.items():
        print(f"ours / {name}: {ratio:.2f}")


if __name__ == "__main__":
    main()
