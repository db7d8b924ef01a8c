"""A broker and clients that can say anything, also what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
from gatelet.simulator.mqtt.broker import Broker
from gatelet.simulator.mqtt.codec import Decoder, encode
from gatelet.simulator.mqtt.packets import (
    V5,
    V311,
    ConnAck,
    Connect,
    Disconnect,
    Packet,
    PingReq,
    PingResp,
    Properties,
    Publish,
    SubAck,
    Subscribe,
    Subscription,
)
from msgspec.structs import replace

# What conftest found: test names by number and version, and the files they are in.
COLLECTED = pytest.StashKey[dict[str, dict[str, list[str]]]]()
FILES = pytest.StashKey[set[str]]()

both = pytest.mark.parametrize("version", [V311, V5], ids=["3.1.1", "5.0"])


def covers(v311: str = "", v5: str = "") -> pytest.MarkDecorator:
    """The numbers (separated by spaces) that a test proves, of 3.1.1 and of 5.0."""
    return pytest.mark.covers(v311=tuple(v311.split()), v5=tuple(v5.split()))


def frame(first: int, *parts: bytes) -> bytes:
    """A packet from its first byte and its body; bodies up to 2 MiB."""
    body = b"".join(parts)
    length, size = len(body), b""
    while length > 127:
        size += bytes((length & 127 | 128,))
        length >>= 7
    return bytes((first,)) + size + bytes((length,)) + body


def string(value: bytes) -> bytes:
    return len(value).to_bytes(2, "big") + value


def properties(version: int, content: bytes = b"") -> bytes:
    return bytes((len(content),)) + content if version == V5 else b""


def raw_connect(
    version: int,
    flags: int = 2,
    payload: bytes = string(b"c"),
    name: bytes = b"MQTT",
    level: int | None = None,
    content: bytes = b"",
) -> bytes:
    head = string(name) + bytes((level or version, flags, 0, 0))
    return frame(0x10, head, properties(version, content), payload)


class Peer:
    """One client connection. `seen` are all bytes received, `connack` the server's answer."""

    connack: ConnAck

    def __init__(self, reader, writer, version: int) -> None:
        self.reader, self.writer, self.version = reader, writer, version
        self.decoder = Decoder(version=version)
        self.waiting: list[Packet] = []
        self.seen = b""

    async def send(self, *packets: Packet) -> None:
        await self.raw(b"".join(encode(packet, self.version) for packet in packets))

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def receive(self) -> Packet:
        """Raises EOFError when the server closed."""
        while not self.waiting:
            try:
                data = await asyncio.wait_for(self.reader.read(65_536), 20)
            except ConnectionResetError:
                data = b""
            if not data:
                raise EOFError
            self.seen += data
            self.waiting += self.decoder.feed(data)
        return self.waiting.pop(0)

    async def receive_all(self, count: int) -> list[Packet]:
        return [await self.receive() for _ in range(count)]

    async def rest(self) -> list[Packet]:
        """Everything until the server closes."""
        packets = []
        with contextlib.suppress(EOFError):
            while True:
                packets.append(await self.receive())
        return packets

    async def until_ping(self) -> list[Packet]:
        """Everything that arrives before the answer to a ping."""
        await self.send(PingReq())
        packets = []
        while not isinstance(packet := await self.receive(), PingResp):
            packets.append(packet)
        return packets

    async def quiet(self) -> None:
        assert await self.until_ping() == []

    async def refused(self, *codes: int) -> None:
        """The server ends the connection; in 5.0 it says one of `codes` (any error if none)."""
        packets = await self.rest()
        if self.version == V311:
            assert packets == []
            return
        assert len(packets) == 1
        assert isinstance(packets[0], Disconnect)
        assert packets[0].reason_code in (codes or range(0x80, 0x100))

    async def subscribe(self, *wanted: Subscription | str, **more) -> tuple[int, ...]:
        """The codes of SUBACK; filters that are mere strings get QoS 2."""
        subscriptions = [Subscription(w, 2) if isinstance(w, str) else w for w in wanted]
        await self.send(Subscribe(77, tuple(subscriptions), Properties(**more)))
        answer = await self.receive()
        assert isinstance(answer, SubAck)
        assert answer.packet_id == 77
        return answer.reason_codes

    async def leave(self) -> None:
        """Say goodbye and wait for the end."""
        await self.send(Disconnect())
        assert await self.rest() == []

    async def vanish(self, site: Site) -> None:
        """Lose the network, and wait until the broker noticed."""
        before = len(site.broker.client_ids)
        self.writer.transport.abort()
        await until(lambda: len(site.broker.client_ids) < before)


class Site:
    def __init__(self, **arguments) -> None:
        self.broker = Broker(**arguments)
        self.peers: list[Peer] = []

    async def open(self, version: int = V5) -> Peer:
        peer = Peer(*await asyncio.open_connection("127.0.0.1", self.broker.port), version)
        self.peers.append(peer)
        return peer

    async def connect(
        self, client_id: str = "c", version: int = V5, clean: bool = True, expiry: int = 0, **more
    ) -> Peer:
        """`expiry` is left out of 3.1.1, where `clean` decides; `more` is for Connect."""
        if version == V5 and expiry:
            given = more.get("properties", Properties())
            more["properties"] = replace(given, session_expiry_interval=expiry)
        peer = await self.open(version)
        await peer.send(Connect(client_id, version, clean, **more))
        answer = await peer.receive()
        assert isinstance(answer, ConnAck)
        peer.connack = answer
        return peer

    async def lasting(self, client_id: str = "c", version: int = V5, **more) -> Peer:
        """A client whose session survives its connection."""
        return await self.connect(client_id, version, clean=False, expiry=600, **more)

    async def gone(self, client_id: str) -> None:
        await until(lambda: client_id not in self.broker.client_ids)


@contextlib.asynccontextmanager
async def running(**arguments) -> AsyncIterator[Site]:
    site = Site(**arguments)
    await site.broker.start()
    try:
        yield site
    finally:
        await site.broker.stop()
        for peer in site.peers:
            peer.writer.close()
            with contextlib.suppress(ConnectionError):
                await peer.writer.wait_closed()


async def until(condition: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.002)

    await asyncio.wait_for(poll(), 20)


def publishes(packets: list[Packet]) -> list[Publish]:
    return [packet for packet in packets if isinstance(packet, Publish)]
