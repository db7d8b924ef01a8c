"""What a server remembers about a client between connections (section 4.1), without I/O.

Outgoing messages wait in a bounded queue, get a packet identifier when the client's receive
maximum lets them go, and stay until the handshake of their QoS ends; a new connection sends the
unfinished ones again in their order. Incoming QoS 2 identifiers are kept until they are released.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

from msgspec.structs import replace

from .packets import (
    NO_PROPERTIES,
    V5,
    Connect,
    PubAck,
    PubComp,
    Publish,
    PubRec,
    PubRel,
    ReasonCode,
    Subscription,
)

NEVER: Final = math.inf
_MESSAGE_BYTES: Final = 256
_PAIR_BYTES: Final = 128

Done: TypeAlias = Callable[["int | None"], None]
"""Told how a message ended: the client's reason code, or None when it was dropped undelivered."""


def expiry_seconds(interval: int) -> float:
    """MQTT 5's session expiry interval, whose highest value means for ever (3.1.2.11.2)."""
    return NEVER if interval == 0xFFFFFFFF else interval


def session_expiry(connect: Connect) -> float:
    """Seconds the session outlives its connection."""
    if connect.version != V5:
        return 0 if connect.clean_start else NEVER
    return expiry_seconds(connect.properties.session_expiry_interval or 0)


class Journal(Protocol):
    """Where a session that outlives the process writes its changes down."""

    def queued(self, client_id: str, publish: Publish, expires_at: float) -> int:
        """A QoS 1 or 2 message waits; its key."""

    def sent(self, key: int, packet_id: int) -> None: ...

    def released(self, key: int) -> None:
        """The client answered PUBREC."""

    def finished(self, key: int) -> None: ...

    def arrived(self, client_id: str, packet_id: int) -> None:
        """An incoming QoS 2 message was taken."""

    def completed(self, client_id: str, packet_id: int) -> None:
        """The client released it."""


@dataclass(slots=True)
class _Outgoing:
    publish: Publish  # its packet_id says nothing: the identifier is the key in `_in_flight`
    size: int
    expires_at: float = NEVER
    done: Done | None = None
    key: int = 0  # the journal's
    counted: bool = False  # occupies a place in the client's receive maximum
    received: bool = False  # the client answered PUBREC; only PUBREL may follow

    def end(self, reason_code: int | None) -> None:
        if self.done is not None:
            self.done(reason_code)


class Session:
    """One client's state. Not bound to a connection: the server decides which one has it.

    `subscriptions` is the server's to fill (by topic filter), `owner` its user;
    `expiry_interval` is in seconds from the end of the connection, 0 (it ends with it) to NEVER.
    `now` is monotonic seconds everywhere.
    """

    def __init__(
        self,
        client_id: str,
        queue_limit: int = 1000,
        queue_bytes: int = 16 * 1024 * 1024,
        journal: Journal | None = None,
    ) -> None:
        self.client_id = client_id
        self.owner: str | None = None
        self.expiry_interval: float = 0
        self.subscriptions: dict[str, Subscription] = {}
        self.received: set[int] = set()
        self.dropped = 0
        self._journal = journal
        self._queue_limit = queue_limit
        self._bytes_left = queue_bytes
        self._earliest_expiry = NEVER  # of what waits; may be that of one that left
        self._queue: deque[_Outgoing] = deque()
        self._qos0: deque[_Outgoing] = deque()
        self._again: deque[int] = deque()
        self._in_flight: dict[int, _Outgoing] = {}
        self._counted = 0
        self._last_id = 0

    @property
    def pending(self) -> int:
        """Messages queued or in flight."""
        return len(self._queue) + len(self._qos0) + len(self._in_flight)

    @property
    def has_queue(self) -> bool:
        """Whether `next_packet` may have something to write."""
        return bool(self._queue or self._again or self._qos0)

    @property
    def waits_to_write(self) -> bool:
        """Whether QoS 0 messages wait for the socket, so that a new one must wait behind them."""
        return bool(self._qos0)

    def enqueue(
        self, publish: Publish, now: float, done: Done | None = None, *, limited: bool = True
    ) -> bool:
        """Queue a message; False (and counted in `dropped`) when the queue is full.

        Not `limited`: only the bytes count, not how many messages wait.
        """
        size = message_size(publish)
        queue = self._queue if publish.qos else self._qos0
        limit = self._queue_limit if limited else math.inf
        if (len(queue) >= limit or size > self._bytes_left) and self._earliest_expiry <= now:
            self._drop_expired(now)
            queue = self._queue if publish.qos else self._qos0
        if len(queue) >= limit or size > self._bytes_left:
            self.dropped += 1
            return False
        expiry = publish.properties.message_expiry_interval
        expires_at = NEVER if expiry is None else now + expiry
        self._bytes_left -= size
        self._earliest_expiry = min(self._earliest_expiry, expires_at)
        outgoing = _Outgoing(publish, size, expires_at, done)
        if self._journal is not None and publish.qos:
            outgoing.key = self._journal.queued(self.client_id, publish, expires_at)
        queue.append(outgoing)
        return True

    def pass_on(self, publish: Publish, receive_maximum: int, done: Done | None = None) -> int:
        """The packet identifier under which a QoS 1 or 2 message may be written at once.

        What `enqueue` and then `next_packet` would do when nothing waits, the window is open and
        nothing about the message is to be written down or ages: nearly always. 0 otherwise.
        """
        if (
            self._counted >= receive_maximum
            or self._queue
            or self._qos0
            or self._again
            or self._journal is not None
            or len(self._in_flight) >= 65_535
        ):
            return 0
        properties = publish.properties
        if properties is not NO_PROPERTIES and properties.message_expiry_interval is not None:
            return 0
        size = message_size(publish)
        if size > self._bytes_left or self._queue_limit < 1:
            return 0
        identifier = self._free_id()
        self._bytes_left -= size
        self._counted += 1
        self._in_flight[identifier] = _Outgoing(publish, size, NEVER, done, 0, True)
        return identifier

    def restore(self, publish: Publish, expires_at: float, key: int, received: bool) -> None:
        """Take a message from the journal; those that were sent (with packet_id) come first."""
        outgoing = _Outgoing(
            publish, message_size(publish), expires_at, None, key, received=received
        )
        self._bytes_left -= outgoing.size
        if publish.packet_id:
            self._in_flight[publish.packet_id] = outgoing
            self._last_id = publish.packet_id
        else:
            self._queue.append(outgoing)
            self._earliest_expiry = min(self._earliest_expiry, expires_at)

    def resume(self) -> None:
        """A new connection took the session: everything unfinished is to be sent again."""
        self._again = deque(self._in_flight)
        self._counted = 0
        for outgoing in self._in_flight.values():
            outgoing.counted = False

    def suspend(self) -> None:
        """The connection ended; QoS 0 messages do not wait for the next one."""
        while self._qos0:
            self._drop(self._qos0.popleft())

    def end(self) -> None:
        """Forget everything; whoever waits for a message learns that it was dropped."""
        # The server's store forgets the session as a whole.
        self._journal = None
        waiting = [*self._in_flight.values(), *self._queue, *self._qos0]
        self._queue.clear()
        self._qos0.clear()
        self._again.clear()
        self._in_flight.clear()
        self.subscriptions.clear()
        for outgoing in waiting:
            self._drop(outgoing)

    def next_packet(self, now: float, receive_maximum: int) -> Publish | PubRel | None:
        """The next packet to write, None when nothing is left or the window is full."""
        while self._again:
            identifier = self._again[0]
            outgoing = self._in_flight.get(identifier)
            if outgoing is None:
                self._again.popleft()
            elif outgoing.received:
                return PubRel(self._again.popleft())
            elif self._counted >= receive_maximum:
                return None
            else:
                self._again.popleft()
                self._count(outgoing)
                return _numbered(outgoing, identifier, True, now)
        if (outgoing := self._head(self._qos0, now)) is not None:
            self._qos0.popleft()
            self._free(outgoing)
            outgoing.end(0)
            return _ageing(outgoing.publish, outgoing.expires_at, now)
        if self._counted >= receive_maximum or len(self._in_flight) >= 65_535:
            return None
        if (outgoing := self._head(self._queue, now)) is None:
            return None
        self._queue.popleft()
        identifier = self._free_id()
        self._in_flight[identifier] = outgoing
        if self._journal is not None:
            self._journal.sent(outgoing.key, identifier)
        self._count(outgoing)
        return _numbered(outgoing, identifier, False, now)

    def _head(self, queue: deque[_Outgoing], now: float) -> _Outgoing | None:
        while queue and queue[0].expires_at <= now:
            self._drop(queue.popleft())
        return queue[0] if queue else None

    def _drop_expired(self, now: float) -> None:
        waiting = [*self._queue, *self._qos0]
        self._queue = deque(one for one in self._queue if one.expires_at > now)
        self._qos0 = deque(one for one in self._qos0 if one.expires_at > now)
        left = (one.expires_at for one in waiting if one.expires_at > now)
        self._earliest_expiry = min(left, default=NEVER)
        for outgoing in waiting:
            if outgoing.expires_at <= now:
                self._drop(outgoing)

    def acknowledge(self, packet: PubAck | PubRec | PubComp) -> PubRel | None:
        """Take the client's answer; PUBREC is answered in turn, also an unknown one."""
        outgoing = self._in_flight.get(packet.packet_id)
        kind = type(packet)
        if kind is PubRec:
            if outgoing is None or outgoing.publish.qos != 2:
                return PubRel(packet.packet_id, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND)
            if packet.reason_code < 0x80:
                outgoing.received = True
                if self._journal is not None:
                    self._journal.released(outgoing.key)
                return PubRel(packet.packet_id)
        elif outgoing is None or (outgoing.publish.qos == 2) != (kind is PubComp):
            return None
        self._finish(packet.packet_id, packet.reason_code)
        return None

    def give_up(self, packet_id: int) -> None:
        """A message that cannot go to this client (too large for it) counts as finished."""
        self._finish(packet_id, None)

    def arrive(self, packet_id: int) -> None:
        """A QoS 2 message was taken; `received` knows it until it is released."""
        self.received.add(packet_id)
        if self._journal is not None:
            self._journal.arrived(self.client_id, packet_id)

    def withdraw(self, wanted: Callable[[Publish], bool]) -> None:
        """Drop the unfinished QoS 1 and 2 messages that `wanted` picks; another client, or a later
        connection, may get them instead.
        """
        for packet_id, outgoing in list(self._in_flight.items()):
            if wanted(outgoing.publish):
                self._finish(packet_id, None)
        kept = deque(one for one in self._queue if not wanted(one.publish))
        gone = [one for one in self._queue if wanted(one.publish)]
        self._queue = kept
        for outgoing in gone:
            self._drop(outgoing)

    def release(self, packet: PubRel) -> PubComp:
        """The client will not send this QoS 2 message again."""
        if packet.packet_id in self.received:
            self.received.remove(packet.packet_id)
            if self._journal is not None:
                self._journal.completed(self.client_id, packet.packet_id)
            return PubComp(packet.packet_id)
        return PubComp(packet.packet_id, ReasonCode.PACKET_IDENTIFIER_NOT_FOUND)

    def _finish(self, packet_id: int, reason_code: int | None) -> None:
        outgoing = self._in_flight.pop(packet_id, None)
        if outgoing is None:
            return
        if outgoing.counted:
            self._counted -= 1
        self._free(outgoing)
        outgoing.end(reason_code)

    def _count(self, outgoing: _Outgoing) -> None:
        outgoing.counted = True
        self._counted += 1

    def _drop(self, outgoing: _Outgoing) -> None:
        self.dropped += 1
        self._free(outgoing)
        outgoing.end(None)

    def _free(self, outgoing: _Outgoing) -> None:
        if self._journal is not None and outgoing.publish.qos:
            self._journal.finished(outgoing.key)
        self._bytes_left += outgoing.size

    def _free_id(self) -> int:
        while True:
            self._last_id = self._last_id % 65_535 + 1
            if self._last_id not in self._in_flight:
                return self._last_id


def message_size(publish: Publish) -> int:
    """Bytes of memory that a message takes, roughly."""
    size = _MESSAGE_BYTES + len(publish.payload) + len(publish.topic)
    properties = publish.properties
    if properties is not NO_PROPERTIES:
        pairs = sum(
            _PAIR_BYTES + len(name) + len(value) for name, value in properties.user_properties
        )
        texts = (properties.content_type, properties.response_topic, properties.correlation_data)
        size += pairs + sum(len(text) for text in texts if text)
    return size


def _numbered(outgoing: _Outgoing, identifier: int, dup: bool, now: float) -> Publish:
    waiting = outgoing.publish
    # Not `replace`, which takes several times as long.
    publish = Publish(
        waiting.topic,
        waiting.payload,
        waiting.qos,
        waiting.retain,
        dup,
        identifier,
        waiting.properties,
    )
    return _ageing(publish, outgoing.expires_at, now)


def _ageing(publish: Publish, expires_at: float, now: float) -> Publish:
    """With the expiry interval that is left [MQTT-3.3.2-6]."""
    if expires_at == NEVER:
        return publish
    left = max(1, math.ceil(expires_at - now))
    return replace(publish, properties=replace(publish.properties, message_expiry_interval=left))
