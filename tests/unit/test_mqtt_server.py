"""What the server side does with each packet, over a real socket and our codec as the client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
from gatelet.simulator.mqtt.broker import Broker
from gatelet.simulator.mqtt.codec import Decoder, encode
from gatelet.simulator.mqtt.connection import Connection, Limits
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
    UnsubAck,
    Unsubscribe,
    Will,
)


class Peer:
    """A client that sends and receives packets one by one."""

    def __init__(self, reader, writer, version: int) -> None:
        self.reader, self.writer, self.version = reader, writer, version
        self.decoder = Decoder(version=version)
        self.waiting: list[Packet] = []

    async def send(self, *packets: Packet) -> None:
        await self.raw(b"".join(encode(packet, self.version) for packet in packets))

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def receive(self) -> Packet:
        while not self.waiting:
            data = await asyncio.wait_for(self.reader.read(65_536), 20)
            if not data:
                raise EOFError
            self.waiting += self.decoder.feed(data)
        return self.waiting.pop(0)

    async def ended(self) -> bool:
        with contextlib.suppress(ConnectionResetError):
            while await asyncio.wait_for(self.reader.read(65_536), 20):
                pass
        return True

    async def quiet(self) -> None:
        """Nothing more was sent before the answer to a ping."""
        await self.send(PingReq())
        assert await self.receive() == PingResp()


class Site:
    def __init__(self) -> None:
        self.broker = Broker()
        self.peers: list[Peer] = []

    async def open(self, version: int = V5) -> Peer:
        peer = Peer(*await asyncio.open_connection("127.0.0.1", self.broker.port), version)
        self.peers.append(peer)
        return peer

    async def connect(
        self, client_id: str = "c", version: int = V5, clean: bool = True, **more
    ) -> Peer:
        peer = await self.open(version)
        await peer.send(Connect(client_id, version, clean, **more))
        peer.connack = await peer.receive()
        assert isinstance(peer.connack, ConnAck)
        return peer


@contextlib.asynccontextmanager
async def site(**arguments) -> AsyncIterator[Site]:
    opened = Site()
    opened.broker = Broker(**arguments)
    await opened.broker.start()
    try:
        yield opened
    finally:
        await opened.broker.stop()
        for peer in opened.peers:
            peer.writer.close()
            with contextlib.suppress(ConnectionError):
                await peer.writer.wait_closed()


async def until(condition: Callable[[], bool]) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.002)

    await asyncio.wait_for(poll(), 20)


async def test_connack_tells_the_limits() -> None:
    async with site(limits=Limits(maximum_qos=1, retain_available=False)) as s:
        peer = await s.connect("")
        assert peer.connack.reason_code == 0
        properties = peer.connack.properties
        assert properties.assigned_client_identifier
        assert properties.maximum_qos == 1
        assert properties.retain_available == 0
        await peer.send(Publish("t", b"", 2, packet_id=1))
        assert (await peer.receive()).reason_code == ReasonCode.QOS_NOT_SUPPORTED
        assert await peer.ended()


@pytest.mark.parametrize(
    ("connect", "code"),
    [
        (Connect("c", V311), 5),
        (Connect("c", V311, username="u", password=b"x"), 4),
        (Connect("c", V311, username="nobody", password=b""), 4),
        (Connect("c", V5), 0x87),
        (Connect("c", V5, username="u", password=b"x"), 0x86),
        (Connect("c", V5, properties=Properties(authentication_method="GS2")), 0x8C),
        (Connect("", V311, clean_start=False), 2),
        (Connect("c", V5, username="u", password=b"p"), 0),
    ],
)
async def test_refusals(connect: Connect, code: int) -> None:
    async with site(users={"u": "p"}) as s:
        peer = await s.open(connect.version)
        await peer.send(connect)
        assert (await peer.receive()).reason_code == code
        assert code == 0 or await peer.ended()


@pytest.mark.parametrize("level", [3, 6])
async def test_unknown_versions_are_told_in_311(level: int) -> None:
    async with site() as s:
        peer = await s.open(V311)
        await peer.raw(b"\x10\x0d\x00\x04MQTT" + bytes((level,)) + b"\x02\x00\x00\x00\x01c")
        assert await peer.receive() == ConnAck(False, 1)
        assert await peer.ended()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(encode(PingReq(), V311), id="no CONNECT first [MQTT-3.1.0-1]"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="HTTP"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", id="TLS"),
    ],
)
async def test_strangers_are_cut(data: bytes) -> None:
    async with site() as s:
        peer = await s.open(V311)
        await peer.raw(data)
        assert await peer.ended()


async def test_silence_before_connect_is_cut() -> None:
    async with site(limits=Limits(connect_timeout=0.05)) as s:
        assert await (await s.open()).ended()


@pytest.mark.parametrize("version", [V311, V5])
async def test_a_second_connect_ends_the_connection(version: int) -> None:
    """[MQTT-3.1.0-2]"""
    async with site() as s:
        peer = await s.connect(version=version)
        await peer.send(Connect("c", version))
        if version == V5:
            assert (await peer.receive()).reason_code == ReasonCode.PROTOCOL_ERROR
        assert await peer.ended()


async def test_malformed_packets_are_answered_after_the_good_ones() -> None:
    async with site() as s:
        peer = await s.connect()
        await peer.raw(encode(PingReq(), V5) + b"\x36\x03\x00\x01t")
        assert await peer.receive() == PingResp()
        answer = await peer.receive()
        assert isinstance(answer, Disconnect)
        assert answer.reason_code == ReasonCode.MALFORMED_PACKET
        assert "QoS 3" in answer.properties.reason_string


async def test_keepalive_of_one_and_a_half_intervals() -> None:
    """[MQTT-3.1.2-22]"""
    async with site() as s:
        # Before CONNECT: how long CONNACK takes to come is no part of the interval.
        started = asyncio.get_running_loop().time()
        peer = await s.connect(keepalive=1)
        answer = await peer.receive()
        assert answer.reason_code == ReasonCode.KEEP_ALIVE_TIMEOUT
        assert 1.4 <= asyncio.get_running_loop().time() - started < 10


async def test_qos_2_is_delivered_once_when_sent_twice() -> None:
    async with site() as s:
        receiver = await s.connect("r")
        await receiver.send(Subscribe(1, (Subscription("t", 0),)))
        assert await receiver.receive() == SubAck(1, (0,))
        peer = await s.connect("p")
        publish = Publish("t", b"x", 2, packet_id=7)
        await peer.send(publish, Publish("t", b"x", 2, dup=True, packet_id=7))
        assert [await peer.receive(), await peer.receive()] == [PubRec(7), PubRec(7)]
        await peer.send(PubRel(7), PubRel(7))
        assert await peer.receive() == PubComp(7)
        assert await peer.receive() == PubComp(7, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND)
        assert await receiver.receive() == Publish("t", b"x")
        await receiver.quiet()


async def test_unacknowledged_messages_come_again_with_dup_and_in_order() -> None:
    """[MQTT-4.4.0-1] and the order of section 4.6, within the new receive maximum."""
    lasting = Properties(session_expiry_interval=60)
    async with site() as s:
        receiver = await s.connect("r", properties=lasting)
        await receiver.send(Subscribe(1, (Subscription("t", 2),)))
        await receiver.receive()
        for number in range(4):
            s.broker.publish("t", b"%d" % number, 1 + number % 2)
        ids = [(await receiver.receive()).packet_id for _ in range(4)]
        await receiver.send(PubRec(ids[1]))
        assert await receiver.receive() == PubRel(ids[1])
        await receiver.send(PubAck(ids[0]))
        await receiver.quiet()
        receiver.writer.transport.abort()
        await until(lambda: not s.broker.client_ids)
        s.broker.publish("t", b"later", 1)
        again = await s.connect(
            "r",
            clean=False,
            properties=Properties(session_expiry_interval=60, receive_maximum=1),
        )
        assert again.connack.session_present
        assert await again.receive() == PubRel(ids[1])
        assert await again.receive() == Publish("t", b"2", 1, dup=True, packet_id=ids[2])
        await again.quiet()
        await again.send(PubComp(ids[1]), PubAck(ids[2]))
        assert await again.receive() == Publish("t", b"3", 2, dup=True, packet_id=ids[3])
        await again.send(PubRec(ids[3]), PubComp(ids[3]))
        assert await again.receive() == PubRel(ids[3])
        assert (await again.receive()).payload == b"later"


async def test_a_second_connection_takes_over() -> None:
    """[MQTT-3.1.4-3]"""
    async with site() as s:
        older = await s.connect("same")
        newer = await s.connect("same")
        assert (await older.receive()).reason_code == ReasonCode.SESSION_TAKEN_OVER
        assert await older.ended()
        await newer.quiet()
        many = await asyncio.gather(*(s.connect("same") for _ in range(5)))
        endings = [asyncio.create_task(peer.ended()) for peer in many]
        await until(lambda: sum(ending.done() for ending in endings) == 4)
        assert s.broker.client_ids == {"same"}
    await asyncio.gather(*endings)


async def test_wills() -> None:
    async with site() as s:
        watcher = await s.connect("w")
        await watcher.send(Subscribe(1, (Subscription("will/#", 1),)))
        await watcher.receive()

        def will(name: str, **properties) -> Will:
            return Will(f"will/{name}", b"gone", 1, True, Properties(**properties))

        polite = await s.connect("polite", will=will("polite"))
        await polite.send(Disconnect())
        assert await polite.ended()
        wanted = await s.connect("wanted", will=will("wanted", content_type="x"))
        await wanted.send(Disconnect(ReasonCode.DISCONNECT_WITH_WILL))
        message = await watcher.receive()
        assert (message.topic, message.properties.content_type) == ("will/wanted", "x")
        await watcher.send(PubAck(message.packet_id))
        old = await s.connect("old", V311, will=Will("will/old", b"gone", 0, True))
        old.writer.transport.abort()
        assert (await watcher.receive()).topic == "will/old"
        lasting = Properties(session_expiry_interval=60)
        late = await s.connect(
            "late", properties=lasting, will=will("late", will_delay_interval=60)
        )
        late.writer.transport.abort()
        await until(lambda: "late" not in s.broker.client_ids)
        await s.connect("late", clean=False, properties=lasting)
        await watcher.quiet()  # the client came back within the delay
        assert set(s.broker.retained) == {"will/wanted", "will/old"}


async def test_sessions_expire() -> None:
    async with site() as s:
        for interval, present in ((0, False), (60, True), (0xFFFFFFFF, True)):
            peer = await s.connect(
                "e", clean=False, properties=Properties(session_expiry_interval=interval)
            )
            await peer.send(Disconnect())
            assert await peer.ended()
            await until(lambda: not s.broker.client_ids)
            peer = await s.connect("e", clean=False)
            assert peer.connack.session_present is present
            await peer.send(Disconnect())
            await until(lambda: not s.broker.client_ids)
        peer = await s.connect("f", properties=Properties(session_expiry_interval=1))
        await peer.send(Disconnect())
        await until(lambda: "f" not in s.broker._sessions)


async def test_retain_handling_and_retain_as_published() -> None:
    async with site() as s:
        s.broker.publish("r/a", b"kept", 1, retain=True)
        s.broker.publish("r/b", b"kept", 1, retain=True)
        s.broker.publish("r/b", b"", 1, retain=True)  # [MQTT-3.3.1-6]
        peer = await s.connect()
        received = []
        for handling in (2, 1, 1, 0):
            wanted = Subscription("r/#", 0, False, True, handling)
            if handling == 1 and not received:
                await peer.send(Unsubscribe(9, ("r/#", "other")))
                assert (await peer.receive()).reason_codes == (0, 0x11)
            await peer.send(Subscribe(1, (wanted,)), PingReq())
            assert isinstance(await peer.receive(), SubAck)
            while not isinstance(packet := await peer.receive(), PingResp):
                received.append((handling, packet.topic, packet.retain))
        assert received == [(1, "r/a", True), (0, "r/a", True)]
        s.broker.publish("r/c", b"new", 0, retain=True)
        assert (await peer.receive()).retain
        plain = await s.connect("plain")
        await plain.send(Subscribe(1, (Subscription("r/c"),)))
        assert isinstance(await plain.receive(), SubAck)
        assert (await plain.receive()).retain
        s.broker.publish("r/c", b"newer", 0, retain=True)
        assert not (await plain.receive()).retain  # [MQTT-3.3.1-12]


async def test_no_local_overlapping_filters_and_identifiers() -> None:
    async with site() as s:
        peer = await s.connect()
        await peer.send(
            Subscribe(1, (Subscription("own", no_local=True),)),
            Subscribe(2, (Subscription("a/#", 0),), Properties(subscription_identifiers=(7,))),
            Subscribe(3, (Subscription("a/b", 1),), Properties(subscription_identifiers=(8,))),
            Publish("own", b"x"),
            Publish("a/b", b"x", 1, packet_id=5),
        )
        assert [type(await peer.receive()) for _ in range(3)] == [SubAck] * 3
        packets = [await peer.receive(), await peer.receive()]
        message = next(packet for packet in packets if isinstance(packet, Publish))
        assert message.topic == "a/b"
        assert message.qos == 1
        assert sorted(message.properties.subscription_identifiers) == [7, 8]
        await peer.send(PubAck(message.packet_id))
        await peer.quiet()


async def test_request_and_response_properties_and_aliases_pass() -> None:
    async with site() as s:
        receiver = await s.connect("r")
        await receiver.send(Subscribe(1, (Subscription("t"),)))
        await receiver.receive()
        peer = await s.connect("p")
        asked = Properties(
            response_topic="answers",
            correlation_data=b"1",
            user_properties=(("a", "b"), ("a", "c")),
            payload_format_indicator=1,
            topic_alias=3,
        )
        await peer.send(Publish("t", b"1", properties=asked))
        await peer.send(Publish("", b"2", properties=Properties(topic_alias=3)))
        first, second = await receiver.receive(), await receiver.receive()
        assert first.properties.user_properties == asked.user_properties
        assert first.properties.response_topic == "answers"
        assert first.properties.correlation_data == b"1"
        assert first.properties.topic_alias is None
        assert (second.topic, second.payload) == ("t", b"2")
        await peer.send(Publish("", b"3", properties=Properties(topic_alias=4)))
        assert (await peer.receive()).reason_code == ReasonCode.TOPIC_ALIAS_INVALID


async def test_messages_expire_and_age_in_the_queue() -> None:
    lasting = Properties(session_expiry_interval=60)
    async with site() as s:
        receiver = await s.connect("r", properties=lasting)
        await receiver.send(Subscribe(1, (Subscription("t", 1),)))
        await receiver.receive()
        await receiver.send(Disconnect())
        await until(lambda: not s.broker.client_ids)
        peer = await s.connect("p")
        for payload, seconds in ((b"short", 1), (b"long", 100)):
            message = Publish("t", payload, 1, packet_id=1)
            expiry = Properties(message_expiry_interval=seconds)
            await peer.send(Publish(message.topic, payload, 1, packet_id=1, properties=expiry))
            assert await peer.receive() == PubAck(1)
        session = s.broker._sessions["r"]
        now = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() > now + 1.05)
        again = await s.connect("r", clean=False, properties=lasting)
        message = await again.receive()
        assert message.payload == b"long"
        assert 90 < message.properties.message_expiry_interval < 100
        assert session.dropped == 1


async def test_the_offline_queue_is_bounded() -> None:
    lasting = Properties(session_expiry_interval=60)
    async with site(queue_limit=3) as s:
        receiver = await s.connect("r", properties=lasting)
        await receiver.send(Subscribe(1, (Subscription("t", 1),)))
        await receiver.receive()
        await receiver.send(Disconnect())
        await until(lambda: not s.broker.client_ids)
        for number in range(5):
            s.broker.publish("t", b"%d" % number, 1)
        s.broker.publish("t", b"not kept: QoS 0", 0)
        again = await s.connect("r", clean=False, properties=lasting)
        assert [(await again.receive()).payload for _ in range(3)] == [b"0", b"1", b"2"]
        await again.quiet()


async def test_a_reader_that_stalls_costs_bounded_memory_and_nobody_else_waits() -> None:
    async with site(queue_limit=50) as s:
        slow = await s.connect("slow")
        await slow.send(Subscribe(1, (Subscription("t"),)))
        await slow.receive()
        slow.writer.transport.pause_reading()
        session = s.broker._sessions["slow"]
        sent = 0
        while session.dropped == 0:
            s.broker.publish("t", bytes(64 * 1024))
            sent += 1
            assert sent < 2000
            await asyncio.sleep(0)
        assert session.pending <= 50
        other = await s.connect("other")
        await other.quiet()
        slow.writer.transport.resume_reading()
        received = 0
        while received < sent - session.dropped:
            assert isinstance(await slow.receive(), Publish)
            received += 1
        await slow.quiet()


async def test_a_client_gets_nothing_above_its_maximum_packet_size() -> None:
    """[MQTT-3.1.2-24] and [MQTT-3.1.2-25]"""
    async with site() as s:
        peer = await s.connect(properties=Properties(maximum_packet_size=100))
        await peer.send(Subscribe(1, (Subscription("t", 1),)))
        await peer.receive()
        s.broker.publish("t", bytes(200), 1)
        s.broker.publish("t", bytes(20), 1)
        assert len((await peer.receive()).payload) == 20


async def test_packets_above_the_limit_end_the_connection() -> None:
    async with site(limits=Limits(max_packet_size=1000)) as s:
        peer = await s.connect()
        assert peer.connack.properties.maximum_packet_size == 1000
        await peer.send(Publish("t", bytes(2000)))
        assert (await peer.receive()).reason_code == ReasonCode.PACKET_TOO_LARGE


async def test_shared_subscriptions_share() -> None:
    async with site() as s:
        peers = [await s.connect(name) for name in "ab"]
        for peer in peers:
            await peer.send(Subscribe(1, (Subscription("$share/g/t"),)))
            await peer.receive()
        for number in range(4):
            s.broker.publish("t", b"%d" % number)
        for peer in peers:
            assert len({(await peer.receive()).payload for _ in range(2)}) == 2
            await peer.quiet()


async def test_unsubscribed_means_silent() -> None:
    async with site() as s:
        peer = await s.connect(version=V311)
        await peer.send(Subscribe(1, (Subscription("t"),)), Unsubscribe(2, ("t",)))
        assert [await peer.receive(), await peer.receive()] == [SubAck(1, (0,)), UnsubAck(2)]
        s.broker.publish("t", b"x")
        await peer.quiet()


async def test_a_client_must_not_send_subscription_identifiers() -> None:
    """[MQTT-3.3.4-6]"""
    async with site() as s:
        peer = await s.connect()
        await peer.send(Publish("t", properties=Properties(subscription_identifiers=(1,))))
        assert (await peer.receive()).reason_code == ReasonCode.PROTOCOL_ERROR


async def test_session_of_zero_cannot_be_prolonged_at_the_end() -> None:
    """Section 3.14.2.2.2"""
    async with site() as s:
        peer = await s.connect()
        await peer.send(Disconnect(0, Properties(session_expiry_interval=5)))
        assert (await peer.receive()).reason_code == ReasonCode.PROTOCOL_ERROR


async def test_a_failing_handler_ends_its_connection_only_and_is_reported() -> None:
    class Failing(Broker):
        def on_publish(self, connection: Connection, publish: Publish) -> int | None:
            if publish.payload == b"bad":
                raise RuntimeError("broken handler")
            return super().on_publish(connection, publish)

    reported = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context))
    broker = Failing()
    await broker.start()
    s = Site()
    s.broker = broker
    bad, good = await s.connect("bad"), await s.connect("good")
    await bad.send(Publish("t", b"bad"))
    assert await bad.ended()
    await good.quiet()
    await broker.stop()
    assert [str(context["exception"]) for context in reported] == ["broken handler"]
    for peer in s.peers:
        peer.writer.close()


async def test_pause_and_resume_keep_the_port() -> None:
    async with site() as s:
        peer = await s.connect()
        port = s.broker.port
        await s.broker.pause()
        await peer.quiet()
        s.broker.drop_connections()
        assert await peer.ended()
        with pytest.raises(ConnectionRefusedError):
            await s.open()
        await s.broker.resume()
        assert s.broker.port == port
        await (await s.connect()).quiet()
