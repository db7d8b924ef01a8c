"""What a client cannot make the broker do: wait for ever, grow without end, lose what it keeps."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from gatelet.simulator.mqtt.broker import Broker
from gatelet.simulator.mqtt.codec import Decoder, encode
from gatelet.simulator.mqtt.connection import Limits
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
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    ReasonCode,
    SubAck,
    Subscribe,
    Subscription,
    Unsubscribe,
    Will,
)
from gatelet.simulator.mqtt.retained import RetainedMessages
from gatelet.simulator.mqtt.session import Session
from gatelet.simulator.mqtt.store import FILE_NAME, StoreUnreadable
from msgspec.structs import replace


@asynccontextmanager
async def running(**arguments) -> AsyncIterator[Broker]:
    broker = Broker(**arguments)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.stop()


class Client:
    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, version: int = V5
    ) -> None:
        self.reader, self.writer, self.version = reader, writer, version
        self.decoder, self.waiting = Decoder(version=version), list[Packet]()

    def send(self, *packets: Packet) -> None:
        for packet in packets:
            version = packet.version if isinstance(packet, Connect) else self.version
            self.writer.write(encode(packet, version))

    async def receive(self) -> Packet:
        while not self.waiting:
            data = await asyncio.wait_for(self.reader.read(65_536), 20)
            if not data:
                raise EOFError
            self.waiting += self.decoder.feed(data)
        return self.waiting.pop(0)


@asynccontextmanager
async def client(broker: Broker, version: int = V5) -> AsyncIterator[Client]:
    one = Client(*await asyncio.open_connection("127.0.0.1", broker.port), version)
    try:
        yield one
    finally:
        one.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await one.writer.wait_closed()


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_time_to_connect_is_not_prolonged_by_dribbling() -> None:
    packet = encode(Connect("c" * 1000, V5), V5)
    async with running(limits=Limits(connect_timeout=0.3)) as broker, client(broker) as one:
        started = time.monotonic()
        for position in range(len(packet)):
            one.writer.write(packet[position : position + 1])
            try:
                assert not await asyncio.wait_for(one.reader.read(1), 0.05)
                break
            except ConnectionResetError:
                break  # a byte met the end of the connection
            except asyncio.TimeoutError:
                assert time.monotonic() - started < 20, "a byte now and then is no CONNECT"


async def test_a_second_connect_does_not_change_the_version() -> None:
    async with running() as broker, client(broker) as one:
        one.send(Connect("c", V5), Connect("c", V311))
        assert isinstance(await one.receive(), ConnAck)
        farewell = await one.receive()
        assert isinstance(farewell, Disconnect)
        assert farewell.reason_code == ReasonCode.PROTOCOL_ERROR


@pytest.mark.parametrize("qos", [0, 1])
async def test_every_retained_message_reaches_a_new_subscriber(qos: int) -> None:
    async with running(queue_limit=100) as broker, client(broker) as one:
        for number in range(1500):
            broker.publish(f"t/{number}", b"x", 1, retain=True)
        one.send(Connect("c", V5), Subscribe(1, (Subscription("t/#", qos),)))
        found: set[str] = set()
        while len(found) < 1500:
            packet = await one.receive()
            if isinstance(packet, Publish):
                found.add(packet.topic)
                if packet.qos:
                    one.send(PubAck(packet.packet_id))


def test_a_session_counts_all_of_a_message() -> None:
    large = Properties(user_properties=(("name", "x" * 60_000),) * 10)
    session = Session("c", queue_bytes=1_000_000)
    assert session.enqueue(Publish("t", b"", 1, properties=large), 0)
    assert not session.enqueue(Publish("t", b"", 1, properties=large), 0), "1.2 MB of properties"
    small = Session("c", queue_limit=10**9, queue_bytes=100_000)
    count = 0
    while small.enqueue(Publish("t", b"", 1), 0):
        count += 1
    assert count < 2000, "an empty message takes memory too"
    small.resume()
    while (packet := small.next_packet(0, 100)) is not None:
        small.acknowledge(PubAck(packet.packet_id))
    assert sum(small.enqueue(Publish("t", b"", 1), 0) for _ in range(count)) == count


def test_expired_messages_make_room() -> None:
    session = Session("c", queue_limit=2)
    soon = Properties(message_expiry_interval=5)
    assert session.enqueue(Publish("t", b"lasting", 1), 0)
    assert session.enqueue(Publish("t", b"soon", 1, properties=soon), 0)
    assert not session.enqueue(Publish("t", b"none", 1), 4)
    assert session.enqueue(Publish("t", b"new", 1), 6)
    session.resume()
    assert [session.next_packet(6, 10).payload for _ in range(2)] == [b"lasting", b"new"]


async def test_a_filter_of_thousands_of_levels_is_refused() -> None:
    async with running() as broker, client(broker) as one:
        deep = Subscription("/" * 60_000, 0)
        one.send(Connect("c", V5), Subscribe(1, (deep, Subscription("a/b", 0))))
        await one.receive()
        assert await one.receive() == SubAck(1, (ReasonCode.QUOTA_EXCEEDED, 0))


@pytest.mark.parametrize("version", [V311, V5])
async def test_subscriptions_of_one_client_are_bounded(version: int) -> None:
    refused = 0x80 if version == V311 else ReasonCode.QUOTA_EXCEEDED
    async with running(subscription_limit=3) as broker, client(broker, version) as one:
        one.send(Connect("c", version))
        await one.receive()
        wanted = [Subscription(name) for name in "abacd"]
        one.send(Subscribe(1, tuple(wanted)))
        assert (await one.receive()).reason_codes == (0, 0, 0, 0, refused)
        one.send(Subscribe(2, (Subscription("a", 1), Subscription("d"))))
        assert (await one.receive()).reason_codes == (1, refused), "a replaced one is no new one"
        one.send(Unsubscribe(3, ("a",)), Subscribe(4, (Subscription("d"),)))
        await one.receive()
        assert (await one.receive()).reason_codes == (0,)


async def test_filters_of_one_client_are_bounded_in_bytes() -> None:
    async with running() as broker, client(broker) as one:
        one.send(Connect("c", V5))
        await one.receive()
        codes: list[int] = []
        while ReasonCode.QUOTA_EXCEEDED not in codes:
            assert len(codes) < 100, "60 kB each"
            one.send(Subscribe(1, (Subscription(f"{len(codes)}" + "x" * 60_000),)))
            codes += (await one.receive()).reason_codes
        one.send(Subscribe(1, (Subscription("small"),)))
        assert (await one.receive()).reason_codes == (0,)


@pytest.mark.parametrize("version", [V311, V5])
@pytest.mark.parametrize("qos", [1, 2])
async def test_retained_messages_are_bounded(version: int, qos: int) -> None:
    """MQTT 5 says so; 3.1.1 has no words for it and acknowledges what it drops."""
    async with running(retained_limit=2) as broker, client(broker, version) as one:

        async def retain(topic: str, payload: bytes, number: int) -> int:
            one.send(Publish(topic, payload, qos, True, packet_id=number))
            answer = await one.receive()
            if isinstance(answer, PubRec) and answer.reason_code < 0x80:
                one.send(PubRel(number))
                assert isinstance(await one.receive(), PubComp)
            return answer.reason_code

        one.send(Connect("c", version))
        await one.receive()
        for number, topic in enumerate("aba", 1):
            assert await retain(topic, b"%d" % number, number) in (0, 0x10)
        refused = 0 if version == V311 else ReasonCode.QUOTA_EXCEEDED
        assert await retain("c", b"4", 4) == refused
        assert broker.retained == {"a": b"3", "b": b"2"}
        assert await retain("a", b"", 5) in (0, 0x10)
        assert await retain("c", b"6", 6) in (0, 0x10)
        assert broker.retained == {"b": b"2", "c": b"6"}
        broker.publish("own", b"7", retain=True)
        assert len(broker.retained) == 3, "whoever has the broker may do as they like"


def test_retained_messages_are_bounded_in_bytes() -> None:
    kept = RetainedMessages(100, 10_000)
    soon = Properties(message_expiry_interval=5)
    large, brief = Publish("a", bytes(6_000), 0, True), Publish("b", bytes(6_000), 0, True)
    brief = replace(brief, properties=soon)
    assert kept.has_room(brief, 0.0)
    kept.keep(brief, 0.0)
    assert not kept.has_room(large, 4.0)
    assert kept.has_room(replace(large, topic="b"), 4.0), "it takes the place of the other"
    assert kept.has_room(large, 6.0), "the other has expired"
    kept.keep(large, 6.0)
    assert not kept.has_room(replace(large, topic="b"), 6.0)
    kept.keep(replace(large, payload=b""), 6.0)
    assert kept.has_room(brief, 6.0)
    assert kept._bytes == 0


@pytest.mark.parametrize("qos", [0, 1])
async def test_a_will_beyond_the_limit_is_sent_but_not_kept(qos: int) -> None:
    will = Will("will", b"gone", qos, True)
    async with running(retained_limit=1) as broker, client(broker) as one, client(broker) as two:
        broker.publish("other", b"x", retain=True)
        one.send(Connect("one", V5), Subscribe(1, (Subscription("will", 1),)))
        assert isinstance(await one.receive(), ConnAck)
        assert isinstance(await one.receive(), SubAck)
        two.send(Connect("two", V5, will=will))
        await two.receive()
        two.writer.transport.abort()
        assert (await one.receive()).payload == b"gone"
        assert broker.retained == {"other": b"x"}


@pytest.mark.parametrize("version", [V311, V5])
async def test_topics_of_many_levels_are_refused(version: int) -> None:
    deep, most = "/" * 200, "/" * 199
    async with running() as broker, client(broker, version) as one:
        one.send(Connect("c", version), Subscribe(1, (Subscription("#", 0),)))
        assert isinstance(await one.receive(), ConnAck)
        assert isinstance(await one.receive(), SubAck)
        one.send(Publish(deep, b"x", 1, packet_id=1), Publish(most, b"y", 1, packet_id=2))
        refused = 0 if version == V311 else ReasonCode.TOPIC_NAME_INVALID
        assert await one.receive() == PubAck(1, refused)
        assert (await one.receive()).payload == b"y"
        assert await one.receive() == PubAck(2)
        async with client(broker, version) as other:
            other.send(Connect("other", version, will=Will(deep, b"x")))
            if version == V5:
                assert await other.receive() == ConnAck(
                    False,
                    ReasonCode.TOPIC_NAME_INVALID,
                    Properties(reason_string="the will's topic has too many levels"),
                )
            with pytest.raises(EOFError):
                await other.receive()


async def test_sessions_expire_after_a_pause_of_the_server_too() -> None:
    broker = Broker()
    await broker.start()
    lasting = Connect("c", V5, False, properties=Properties(session_expiry_interval=1))
    async with client(broker) as one:
        one.send(lasting)
        assert isinstance(await one.receive(), ConnAck)
    await until(lambda: not broker.client_ids)
    await broker.stop()
    await broker.start()
    try:
        await until(lambda: not broker._sessions)
    finally:
        await broker.stop()


@asynccontextmanager
async def deaf(broker: Broker, keepalive: int) -> AsyncIterator[Client]:
    """A client that listens to everything and reads nothing, with megabytes on their way."""
    bare = socket.socket()
    bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    bare.setblocking(False)
    await asyncio.get_running_loop().sock_connect(bare, ("127.0.0.1", broker.port))
    async with AsyncClientOnSocket(bare) as one:
        one.send(Connect("deaf", V5, keepalive=keepalive), Subscribe(1, (Subscription("#", 0),)))
        assert isinstance(await one.receive(), ConnAck)
        assert isinstance(await one.receive(), SubAck)
        one.writer.transport.pause_reading()
        for _ in range(60):
            broker.publish("t", bytes(200_000))
        yield one


class AsyncClientOnSocket:
    def __init__(self, bare: socket.socket) -> None:
        self._bare = bare

    async def __aenter__(self) -> Client:
        self._one = Client(*await asyncio.open_connection(sock=self._bare, limit=1024))
        return self._one

    async def __aexit__(self, *_: object) -> None:
        self._one.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self._one.writer.wait_closed()


async def test_a_client_that_leaves_without_reading_is_let_go() -> None:
    async with running() as broker, deaf(broker, 0) as one:
        one.writer.write_eof()
        await until(lambda: not broker.client_ids)


async def test_a_client_that_neither_reads_nor_speaks_is_silent() -> None:
    async with running() as broker, deaf(broker, 1) as one:
        one.writer.write(encode(Publish("x", bytes(900)), V5) * 400)
        await until(lambda: not broker.client_ids)


async def test_thousands_of_packets_do_not_keep_the_others_waiting() -> None:
    async with running() as broker, client(broker) as one:
        one.send(Connect("c", V5))
        assert isinstance(await one.receive(), ConnAck)
        connection = broker._live["c"]
        connection.data_received(encode(PingReq(), V5) * 5000)
        turns = 0
        while connection._inbox:
            await asyncio.sleep(0)
            turns += 1
        assert turns >= 5000 // 200 - 1
        assert [await one.receive() for _ in range(5000)] == [PingResp()] * 5000


async def test_few_bytes_in_are_not_kept_as_many_bytes_out() -> None:
    """A topic alias of three bytes stands for a topic of 60,000, for someone who does not read."""
    async with running() as broker, client(broker) as one, client(broker) as reader:
        reader.send(Connect("reader", V5), Subscribe(1, (Subscription("#", 0),)))
        assert isinstance(await reader.receive(), ConnAck)
        assert isinstance(await reader.receive(), SubAck)
        reader.writer.transport.pause_reading()
        one.send(Connect("c", V5))
        assert isinstance(await one.receive(), ConnAck)
        alias = Properties(topic_alias=1)
        one.send(Publish("x" * 60_000, b"", 1, packet_id=1, properties=alias))
        assert isinstance(await one.receive(), PubAck)
        one.writer.write(encode(Publish("", b"", 0, properties=alias), V5) * 1000)
        one.send(Publish("last", b"", 1, packet_id=2))
        assert isinstance(await one.receive(), PubAck)
        # 16 MiB wait in the session, some in the sockets; all would be 60 MB.
        assert broker._sessions["reader"].dropped > 300


async def test_what_was_kept_and_cannot_be_read_is_said(tmp_path: Path) -> None:
    async with running(folder=tmp_path) as broker:
        broker.publish("t", b"x", 1, retain=True)
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as db, db:
        db.execute("UPDATE retained SET packet = x'00ff'")
    broker = Broker(folder=tmp_path)
    for _ in range(2):
        with pytest.raises(StoreUnreadable, match="move the file away"):
            await broker.start()
    await broker.stop()
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as db:
        assert db.execute("SELECT count(*) FROM retained").fetchone() == (1,), "nothing is deleted"


async def test_what_expired_is_not_shown_as_retained() -> None:
    async with running() as broker, client(broker) as one:
        brief = Properties(message_expiry_interval=3)
        one.send(Connect("c", V5), Publish("t", b"x", 0, True, properties=brief))
        await until(lambda: broker.retained == {"t": b"x"})
        await until(lambda: broker.retained == {})


async def test_a_late_comer_is_told_that_the_broker_goes() -> None:
    async with running() as broker, client(broker) as one:
        broker._stopping = True  # as it is while others are still saying good-bye
        one.send(Connect("c", V5))
        answer = await one.receive()
        assert isinstance(answer, ConnAck)
        assert answer.reason_code == ReasonCode.SERVER_UNAVAILABLE
        assert not broker.client_ids
