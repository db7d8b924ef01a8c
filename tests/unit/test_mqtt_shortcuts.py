"""The broker's shortcuts for frequent messages do what the long way does, for any input."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from gatelet.simulator.mqtt import channel, codec, encoding, frequent
from gatelet.simulator.mqtt.broker import Broker
from gatelet.simulator.mqtt.codec import Decoder, MalformedPacket, encode
from gatelet.simulator.mqtt.connection import Connection
from gatelet.simulator.mqtt.frequent import read_frequent
from gatelet.simulator.mqtt.packets import (
    V5,
    V311,
    Connect,
    Disconnect,
    Packet,
    PingReq,
    Properties,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    Subscribe,
    Subscription,
    Unsubscribe,
)
from gatelet.simulator.mqtt.session import Session
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# A busy machine is no finding.
relaxed = partial(settings, deadline=None, suppress_health_check=[HealthCheck.too_slow])

identifiers = st.integers(1, 4)
topics = st.sampled_from(["t", "u/v", "ü", "$x"])
some_properties = st.sampled_from(
    [Properties(), Properties(topic_alias=1), Properties(user_properties=(("k", "v"),))]
)


@st.composite
def publishes(draw: st.DrawFn) -> Publish:
    qos = draw(st.integers(0, 2))
    return Publish(
        draw(topics),
        draw(st.binary(max_size=3) | st.sampled_from([bytes(121), bytes(122), bytes(300)])),
        qos,
        draw(st.booleans()),
        qos > 0 and draw(st.booleans()),
        draw(identifiers) if qos else 0,
        draw(some_properties),
    )


answers = st.one_of(*(st.builds(kind, identifiers) for kind in (PubAck, PubRec, PubRel, PubComp)))
refusals = st.builds(PubAck, identifiers, st.sampled_from([0x10, 0x80, 0x97]))
subscribes = st.builds(
    lambda number, topic, qos: Subscribe(number, (Subscription(topic, qos, topic == "u/+"),)),
    identifiers,
    st.sampled_from(["t", "u/+", "#", "$share/g/t"]),
    st.integers(0, 2),
)
unsubscribes = st.builds(lambda number: Unsubscribe(number, ("t", "u/+")), identifiers)
common = st.one_of(publishes(), publishes(), answers)
rare = st.one_of(refusals, subscribes, unsubscribes, st.just(PingReq()))
versions = st.sampled_from([V311, V5])


# Nearly frequent: lengths longer than needed, QoS 3, DUP with QoS 0, identifier 0, bad topics.
ODD = [
    b"\x30\x84\x00\x00\x01t\x00",
    b"\x32\x86\x00\x00\x01t\x00\x01\x00",
    b"\x30\x81\x80\x00",
    b"\x30\xff\xff\xff\xff",
    b"\x36\x06\x00\x01t\x00\x01\x00",
    b"\x38\x04\x00\x01t\x00",
    b"\x32\x06\x00\x01t\x00\x00\x00",
    b"\x30\x04\x00\x01+\x00",
    b"\x30\x04\x00\x01\x00\x00",
    b"\x30\x04\x00\x01\xff\x00",
    b"\x30\x03\x00\x00\x00",
    b"\x30\x03\x00\x09t",
    b"\x32\x04\x00\x01t\x00",
    b"\x40\x02\x00\x00",
    b"\x40\x03\x00\x01\x10",
    b"\x62\x02\x00\x00",
    b"\x60\x02\x00\x01",
]
odd = st.sampled_from(ODD)


def parts(data: st.DataObject, stream: bytes) -> list[bytes]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5), label="cuts"))
    return [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


def decoded(decoder: Decoder, chunks: list[bytes]) -> list[object]:
    """Everything that can be told from outside, chunk by chunk."""
    seen: list[object] = []
    for chunk in chunks:
        try:
            seen.append((decoder.feed(chunk), bytes(decoder._buffer)))
        except MalformedPacket as error:
            seen.append((error.reason_code, str(error), error.packets, bytes(decoder._buffer)))
    return seen


@given(
    versions,
    st.lists(common | common | rare | odd, max_size=8),
    st.sampled_from([3, 4, 10, 130, 10_000]),
    st.data(),
)
@relaxed(max_examples=500)
def test_the_decoder_reads_the_same_packets_and_errors(version, packets, most, data) -> None:
    pieces = (one if isinstance(one, bytes) else encode(one, version) for one in packets)
    stream = bytearray(b"".join(pieces))
    for _ in range(data.draw(st.integers(0, 2), label="mistakes") if stream else 0):
        place = data.draw(st.integers(0, len(stream) - 1), label="place")
        stream[place] = data.draw(st.integers(0, 255), label="byte")
    chunks = parts(data, bytes(stream))
    check_decoders(most, version, chunks)


@pytest.mark.parametrize("piece", ODD, ids=bytes.hex)
@pytest.mark.parametrize("version", [V311, V5])
def test_what_is_nearly_frequent_is_read_the_same(version: int, piece: bytes) -> None:
    good = encode(Publish("t", b"x", 1, packet_id=1), version)
    stream = good + piece + good
    for cut in range(len(stream)):
        check_decoders(1000, version, [stream[:cut], stream[cut:]])


def check_decoders(most: int, version: int, chunks: list[bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "read_frequent", lambda data, position, *_: position)
        expected = decoded(Decoder(most, version), chunks)
    assert decoded(Decoder(most, version), chunks) == expected


@given(versions, st.lists(common, min_size=1, max_size=8))
@relaxed(max_examples=100)
def test_frequent_packets_take_the_shortcut(version, packets) -> None:
    bare = [p for p in packets if not isinstance(p, Publish) or p.properties == Properties()]
    stream = b"".join(encode(packet, version) for packet in bare)
    found: list[Packet] = []
    assert read_frequent(stream, 0, version == V5, 10_000, found) == len(stream)
    assert found == bare


def test_valid_topics_are_not_remembered_without_end() -> None:
    for number in range(5_000):
        assert len(Decoder(version=V311).feed(encode(Publish(f"t/{number}"), V311))) == 1
    assert Decoder(version=V311).feed(encode(Publish("x" * 60_000), V311))
    assert len(frequent._topics) <= 1024
    assert max(map(len, frequent._topics)) <= 256


@given(versions, publishes())
@relaxed(max_examples=200)
def test_a_remembered_head_is_a_written_one(version, publish) -> None:
    first, again = encode(publish, version), encode(publish, version)
    encoding._known_publish_head.cache_clear()
    assert first == again == encode(publish, version)


STEPS = st.tuples(
    st.sampled_from(["publish", "publish", "publish", "answer", "reconnect"]),
    st.integers(1, 2),
    st.booleans(),
)


@given(st.lists(STEPS, max_size=40), st.integers(1, 4), st.integers(1, 4))
@relaxed(max_examples=300)
def test_passing_on_is_queueing_and_sending(steps, window, queue_limit) -> None:
    quick, slow = (Session("c", queue_limit, queue_bytes=3_000) for _ in range(2))
    ends: dict[Session, list[int | None]] = {quick: [], slow: []}
    sent: dict[Session, list[tuple[str, bytes, int, int]]] = {quick: [], slow: []}

    def flush(session: Session, window: int) -> None:
        while (packet := session.next_packet(0.0, window)) is not None:
            assert not isinstance(packet, PubRel)
            sent[session].append((packet.topic, packet.payload, packet.qos, packet.packet_id))

    for number, (step, qos, is_writable) in enumerate(steps):
        if step == "publish":
            publish = Publish("t", b"%d" % number, qos, packet_id=77)
            if identifier := quick.pass_on(publish, window, ends[quick].append):
                sent[quick].append(("t", publish.payload, publish.qos, identifier))
            else:
                quick.enqueue(publish, 0.0, ends[quick].append)
            slow.enqueue(publish, 0.0, ends[slow].append)
        elif step == "answer" and sent[slow]:
            *_, qos, identifier = sent[slow].pop(0)
            sent[quick].pop(0)
            for session in (quick, slow):
                session.acknowledge((PubAck if qos == 1 else PubComp)(identifier))
        elif step == "reconnect":
            for session in (quick, slow):
                session.suspend()
                session.resume()
                sent[session].clear()
        for session in (quick, slow):
            if is_writable or step == "publish":
                flush(session, window)
        assert sent[quick] == sent[slow]
        assert ends[quick] == ends[slow]
        for name in ("dropped", "pending", "_bytes_left", "_counted", "_last_id"):
            assert getattr(quick, name) == getattr(slow, name), name


class Wire(asyncio.Transport):
    """What a connection needs of a transport; keeps what is written."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection
        self.written = b""
        self.closing = False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self.connection.connection_lost, None)

    abort = close

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


class ByTask(Connection):
    """All packets take the way over the connection's task."""

    _is_idle = property(lambda self: False, lambda self, value: None)  # type: ignore[assignment]


async def conversation(
    kind: type[Connection], version: int, chunks: list[bytes], turns: list[int]
) -> tuple[bytes, bytes, str | None]:
    """What a client and a listener got, and why it ended; `turns` of the loop after each chunk."""
    broker = Broker()
    await broker.start()
    wires = []
    for name in ("client", "listener"):
        wire = Wire(kind(broker, broker._limits, broker._connections))
        wire.connection.connection_made(wire)
        connect = Connect(name, version, properties=Properties(receive_maximum=3))
        wire.connection.data_received(encode(connect, version))
        await settled(4)
        wires.append(wire)
    client, listener = wires
    wanted = Subscribe(9, (Subscription("#", 2),))
    listener.connection.data_received(encode(wanted, version))
    await settled(4)
    for chunk, count in zip(chunks, turns, strict=True):
        client.connection.data_received(chunk)
        await settled(count)
    await settled(30)
    ended = client.connection._end_reason
    await broker.stop()
    return client.written, listener.written, ended


async def settled(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


@given(versions, st.lists(common | common | rare, max_size=10), st.booleans(), st.data())
@relaxed(max_examples=150)
def test_handling_at_once_is_handling_by_the_task(version, packets, farewell, data) -> None:
    if farewell:
        packets = [*packets, Disconnect()]
    stream = b"".join(encode(packet, version) for packet in packets)
    if stream and data.draw(st.integers(0, 3), label="mistake?") == 0:
        place = data.draw(st.integers(0, len(stream) - 1), label="place")
        byte = data.draw(st.binary(min_size=1, max_size=1), label="byte")
        stream = stream[:place] + byte + stream[place + 1 :]
    chunks = parts(data, stream)
    turns = data.draw(st.lists(st.integers(0, 3), min_size=len(chunks), max_size=len(chunks)))
    expected = asyncio.run(conversation(ByTask, version, chunks, turns))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel, "_TURN", data.draw(st.sampled_from([1, 3, 200]), label="turn"))
        assert asyncio.run(conversation(Connection, version, chunks, turns)) == expected
