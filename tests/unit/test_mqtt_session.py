"""Laws of a session: whatever the network does, QoS 1 arrives, QoS 2 arrives once, in order."""

from __future__ import annotations

from gatelet.simulator.mqtt.packets import (
    Properties,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    ReasonCode,
)
from gatelet.simulator.mqtt.session import Session
from hypothesis import given, settings
from hypothesis import strategies as st

STEPS = ["enqueue", "send", "send", "answer", "answer", "lose", "reconnect"]


class Client:
    """A correct receiver: QoS 2 identifiers are remembered from PUBLISH to PUBREL."""

    def __init__(self) -> None:
        self.got: dict[int, list[bytes]] = {0: [], 1: [], 2: []}
        self.held: set[int] = set()
        self.answers: list[PubAck | PubRec | PubComp] = []

    def take(self, packet: Publish | PubRel) -> None:
        if isinstance(packet, PubRel):
            self.held.discard(packet.packet_id)
            self.answers.append(PubComp(packet.packet_id))
        elif packet.qos == 1:
            self.got[1].append(packet.payload)
            self.answers.append(PubAck(packet.packet_id))
        elif packet.qos == 2:
            if packet.packet_id not in self.held:
                self.held.add(packet.packet_id)
                self.got[2].append(packet.payload)
            self.answers.append(PubRec(packet.packet_id))
        else:
            self.got[0].append(packet.payload)


@given(
    st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 2)), max_size=60),
    st.integers(1, 4),
)
@settings(max_examples=400, deadline=None)
def test_nothing_is_lost_doubled_or_reordered(steps, window) -> None:
    session, client = Session("c"), Client()
    session.resume()
    sent: dict[int, list[bytes]] = {0: [], 1: [], 2: []}
    ended: list[int | None] = []
    unanswered = 0

    def answer() -> None:
        packet = client.answers.pop(0)
        reply = session.acknowledge(packet)
        if reply is not None:
            client.take(reply)

    def send() -> bool:
        packet = session.next_packet(0.0, window)
        if packet is not None:
            client.take(packet)
        return packet is not None

    for step, qos in steps:
        if step == "enqueue":
            payload = b"%d" % len(sent[qos])
            sent[qos].append(payload)
            assert session.enqueue(Publish("t", payload, qos), 0.0, ended.append)
        elif step == "send":
            send()
        elif step == "answer" and client.answers:
            answer()
        elif step == "lose":  # what was written last never arrived
            for _ in range(qos + 1):
                session.next_packet(0.0, window)
            client.answers.clear()
            session.suspend()
            session.resume()
        elif step == "reconnect":
            client.answers.clear()
            session.suspend()
            session.resume()
        assert session._counted <= window
        unanswered = session.pending
    session.resume()
    client.answers.clear()
    while send() or client.answers:
        while client.answers:
            answer()
    assert session.pending == 0, unanswered
    assert client.got[2] == sent[2]
    assert list(dict.fromkeys(client.got[1])) == sent[1]
    assert set(client.got[0]) <= set(sent[0])
    assert len(ended) == sum(map(len, sent.values()))
    assert session._bytes_left == Session("x")._bytes_left


def test_the_queue_is_bounded_by_count_and_bytes() -> None:
    session = Session("c", queue_limit=2, queue_bytes=1000)
    assert session.enqueue(Publish("t", b"1", 1), 0)
    assert not session.enqueue(Publish("t", bytes(900), 1), 0)
    assert session.enqueue(Publish("t", b"2", 1), 0)
    assert not session.enqueue(Publish("t", b"3", 1), 0)
    assert session.dropped == 2


def test_whoever_waits_learns_of_expiry_and_of_the_end() -> None:
    session, ends = Session("c"), []
    expiring = Properties(message_expiry_interval=5)
    session.enqueue(Publish("t", b"old", 1, properties=expiring), 0.0, ends.append)
    session.enqueue(Publish("t", b"new", 1), 0.0, ends.append)
    session.enqueue(Publish("t", b"last", 1), 0.0, ends.append)
    assert session.next_packet(5.0, 10) == Publish("t", b"new", 1, packet_id=1)
    assert ends == [None]
    session.acknowledge(PubAck(1, ReasonCode.QUOTA_EXCEEDED))
    assert ends == [None, ReasonCode.QUOTA_EXCEEDED]
    session.end()
    assert ends == [None, ReasonCode.QUOTA_EXCEEDED, None]


def test_answers_that_fit_nothing_change_nothing() -> None:
    session = Session("c")
    session.enqueue(Publish("t", b"", 1), 0.0)
    session.next_packet(0.0, 10)
    assert session.acknowledge(PubComp(1)) is None
    assert session.acknowledge(PubAck(9)) is None
    assert session.acknowledge(PubRec(1)) == PubRel(1, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND)
    assert session.pending == 1


def test_packet_identifiers_in_use_are_not_given_again() -> None:
    session = Session("c", queue_limit=100_000, queue_bytes=2**30)
    for _ in range(65_535):
        session.enqueue(Publish("t", b"", 1), 0.0)
        assert session.next_packet(0.0, 65_535) is not None
    session.enqueue(Publish("t", b"", 1), 0.0)
    assert session.next_packet(0.0, 70_000) is None
    session.acknowledge(PubAck(77))
    packet = session.next_packet(0.0, 70_000)
    assert isinstance(packet, Publish)
    assert packet.packet_id == 77
