"""A broker with a folder: what it acknowledged is there after it was killed."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from gatelet.simulator.mqtt.access import Grant
from gatelet.simulator.mqtt.broker import Broker
from gatelet.simulator.mqtt.codec import Decoder, encode
from gatelet.simulator.mqtt.packets import (
    V5,
    ConnAck,
    Connect,
    Disconnect,
    Packet,
    PingReq,
    PingResp,
    Properties,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    SubAck,
    Subscribe,
    Subscription,
)
from gatelet.simulator.mqtt.store import FILE_NAME, StoreUnreadable

LASTING = Properties(session_expiry_interval=600)
PROGRAM = """
import asyncio, sys
from pathlib import Path
from gatelet.simulator.mqtt.broker import Broker

async def main():
    broker = Broker(folder=Path(sys.argv[1]))
    await broker.start()
    print(broker.port, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def killed_in_the_end(folder: Path) -> AsyncIterator[int]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, str(folder), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield int(await asyncio.wait_for(process.stdout.readline(), 20))
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()


class Client:
    def __init__(self, reader, writer) -> None:
        self.reader, self.writer = reader, writer
        self.decoder = Decoder(version=V5)
        self.waiting: list[Packet] = []
        self.present = False

    async def send(self, *packets: Packet) -> None:
        self.writer.write(b"".join(encode(packet, V5) for packet in packets))
        await self.writer.drain()

    async def receive(self) -> Packet:
        while not self.waiting:
            data = await asyncio.wait_for(self.reader.read(65_536), 20)
            assert data, "the broker closed"
            self.waiting += self.decoder.feed(data)
        return self.waiting.pop(0)

    async def until_ping(self) -> list[Packet]:
        await self.send(PingReq())
        packets = []
        while not isinstance(packet := await self.receive(), PingResp):
            packets.append(packet)
        return packets

    async def close(self) -> None:
        """Without DISCONNECT; the broker knows when this returns."""
        try:
            if self.writer.can_write_eof():
                self.writer.write_eof()
            while await asyncio.wait_for(self.reader.read(65_536), 20):
                pass
            self.writer.close()
            await self.writer.wait_closed()
        except ConnectionError:
            pass


@asynccontextmanager
async def client(port: int, name: str, properties: Properties = LASTING) -> AsyncIterator[Client]:
    one = Client(*await asyncio.open_connection("127.0.0.1", port))
    try:
        await one.send(Connect(name, V5, False, properties=properties))
        answer = await one.receive()
        assert isinstance(answer, ConnAck)
        assert answer.reason_code == 0
        one.present = answer.session_present
        yield one
    finally:
        await one.close()


async def test_a_killed_broker_has_lost_nothing_it_acknowledged(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    async with killed_in_the_end(folder) as port, client(port, "reader") as reader:
        wanted = Subscription("t/#", 2, False, True, 1)
        await reader.send(
            Subscribe(1, (wanted,), Properties(subscription_identifiers=(42,))),
            Subscribe(2, (Subscription("$share/g/s", 1),)),
        )
        assert [type(await reader.receive()) for _ in range(2)] == [SubAck, SubAck]
        async with client(port, "writer") as writer:
            for number in range(4):
                await writer.send(Publish("t/a", b"%d" % number, 2, packet_id=1 + number))
                assert await writer.receive() == PubRec(1 + number)
            first = [await reader.receive() for _ in range(4)]
            ids = [message.packet_id for message in first]
            await reader.send(PubRec(ids[1]), PubRec(ids[0]), PubComp(ids[0]))
            assert [await reader.receive() for _ in range(2)] == [
                PubRel(ids[1]),
                PubRel(ids[0]),
            ]
            await reader.until_ping()
            await reader.close()
            kept = Properties(user_properties=(("k", "v"),), message_expiry_interval=500)
            await writer.send(
                PubRel(1),
                Publish("t/kept", b"retained", 1, True, packet_id=9, properties=kept),
                Publish("t/kept2", b"x", 1, True, packet_id=10),
                Publish("t/kept2", b"", 1, True, packet_id=11),
                Publish("s", b"shared", 1, packet_id=12),
            )
            answers = [await writer.receive() for _ in range(5)]
            assert answers == [PubComp(1), PubAck(9), PubAck(10), PubAck(11), PubAck(12)]
    async with killed_in_the_end(folder) as port:
        async with client(port, "reader") as reader:
            assert reader.present
            packets = await reader.until_ping()
            assert PubRel(ids[1]) in packets
            messages = [packet for packet in packets if isinstance(packet, Publish)]
            found = [(m.topic, m.payload, m.dup) for m in messages]
            assert found == [
                ("t/a", b"2", True),
                ("t/a", b"3", True),
                ("t/kept", b"retained", False),
                ("t/kept2", b"x", False),
                ("t/kept2", b"", False),
                ("s", b"shared", False),
            ]
            assert [m.packet_id for m in messages[:2]] == ids[2:]
            assert messages[2].properties.user_properties == (("k", "v"),)
            assert messages[2].properties.subscription_identifiers == (42,)
            assert messages[2].retain  # retain as published
            assert 480 < messages[2].properties.message_expiry_interval <= 500
            assert len({m.packet_id for m in messages}) == 6
        async with client(port, "writer") as writer:
            # 1 was released, 2 was not.
            await writer.send(
                Publish("t/a", b"again", 2, False, True, 2), Publish("t/a", b"new", 2, packet_id=1)
            )
            assert [await writer.receive() for _ in range(2)] == [PubRec(2), PubRec(1)]
        async with client(port, "reader") as reader:
            payloads = [p.payload for p in await reader.until_ping() if isinstance(p, Publish)]
            assert b"new" in payloads
            assert b"again" not in payloads
        async with client(port, "late") as late:
            await late.send(Subscribe(1, (Subscription("#"),)))
            await late.receive()
            assert [p.payload for p in await late.until_ping()] == [b"retained"]


async def test_what_is_over_is_forgotten(tmp_path: Path) -> None:
    broker = Broker(folder=tmp_path)
    await broker.start()
    async with client(broker.port, "short", Properties(session_expiry_interval=0)) as one:
        await one.send(Subscribe(1, (Subscription("t", 1),)))
        await one.receive()
    async with client(broker.port, "ended") as one:
        await one.send(Subscribe(1, (Subscription("t", 1),)))
        await one.receive()
        broker.publish("t", b"x", 1)
        await one.receive()
        await one.send(Disconnect(0, Properties(session_expiry_interval=0)))
        assert await one.reader.read() == b""
    async with client(broker.port, "kept") as one:
        await one.send(Subscribe(1, (Subscription("t", 1),)))
        await one.receive()
    await broker.stop()
    with sqlite3.connect(tmp_path / FILE_NAME) as db:
        for table in ("sessions", "subscriptions", "messages"):
            rows = db.execute(f"SELECT client_id FROM {table}").fetchall()
            assert rows == ([] if table == "messages" else [("kept",)])
    db.close()
    # The same object can be started again, and reads what it wrote.
    await broker.start()
    broker.publish("t", b"y", 1)
    async with client(broker.port, "kept") as one:
        assert one.present
        assert (await one.receive()).payload == b"y"
    await broker.stop()


async def test_subscriptions_that_are_not_granted_any_more_end(tmp_path: Path) -> None:
    for grants, arriving in ((None, ["a", "b"]), ([Grant("a")], ["a"]), (None, ["a"])):
        broker = Broker(folder=tmp_path, grants=grants)
        await broker.start()
        async with client(broker.port, "c") as one:
            if not one.present:
                await one.send(Subscribe(1, (Subscription("a"), Subscription("b"))))
                await one.receive()
            for topic in ("a", "b"):
                broker.publish(topic, b"")
            assert [p.topic for p in await one.until_ping()] == arriving
        await broker.stop()


class WallClock:
    def __init__(self) -> None:
        from gatelet.agent.clock import SystemClock

        self.real, self.ahead = SystemClock(), 0.0

    def monotonic(self) -> float:
        return self.real.monotonic()

    def now(self):
        from datetime import timedelta

        return self.real.now() + timedelta(seconds=self.ahead)


async def test_time_goes_on_while_the_broker_is_down(tmp_path: Path) -> None:
    clock = WallClock()
    broker = Broker(folder=tmp_path, clock=clock)
    await broker.start()
    for name, seconds in (("short", 50), ("long", 500)):
        async with client(broker.port, name, Properties(session_expiry_interval=seconds)) as one:
            await one.send(Subscribe(1, (Subscription("t", 1),)))
            await one.receive()
            await one.send(Disconnect())
            assert await one.reader.read() == b""
    async with client(broker.port, "writer") as one:
        for seconds in (50, 500):
            expiry = Properties(message_expiry_interval=seconds)
            message = Publish(
                "t", b"%d" % seconds, 1, seconds == 50, packet_id=1, properties=expiry
            )
            await one.send(message)
            await one.receive()
    await broker.stop()
    clock.ahead = 100
    await broker.start()
    assert broker.retained == {}
    async with client(broker.port, "short") as one:
        assert not one.present
    async with client(broker.port, "long") as one:
        assert one.present
        message = await one.receive()
        assert message.payload == b"500"
        assert 390 <= message.properties.message_expiry_interval <= 400
    await broker.stop()


async def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    first, second = Broker(folder=tmp_path), Broker(folder=tmp_path)
    await first.start()
    with pytest.raises(StoreUnreadable, match="stop the other broker"):
        await second.start()
    await first.stop()
    await second.start()
    await second.stop()
    (tmp_path / FILE_NAME).write_bytes(b"no database, but worth keeping" * 100)
    with pytest.raises(StoreUnreadable, match="move the file away"):
        await first.start()
    assert (tmp_path / FILE_NAME).read_bytes().startswith(b"no database, but")
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnreadable, match="cannot open"):
        await Broker(folder=tmp_path / "file").start()
