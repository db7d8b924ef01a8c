"""The server's end of one MQTT connection: bytes in and out, handshakes, limits, time-outs.

A server implements `Handler` and gives every connection to it:

    server = await loop.create_server(lambda: Connection(handler, Limits()), host, port, ssl=...)

The connection is an asyncio.Protocol; its transport may be anything with the transport methods
write, close, abort, is_closing, pause_reading, resume_reading and get_extra_info, so a websocket
can carry it: feed `data_received`, `eof_received` and `connection_lost`.

Handlers run one at a time per connection, in the order of the packets; while one runs the client
is not read further than a small buffer. `publish` may be called at any time from the event loop.
(asyncio sets TCP_NODELAY on its sockets itself.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from .aliases import InboundAliases, OutboundAliases, UnknownAlias
from .answers import connack_properties, refusal, without_explanations
from .channel import Channel
from .codec import MalformedPacket, encode
from .encoding import publish_bytes
from .handler import Accepted, Handler, Limits, Refused
from .packets import (
    NO_PROPERTIES,
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
    UnsubAck,
    Unsubscribe,
)
from .session import Done, Session
from .topics import topic_problem

__all__ = ["Accepted", "Connection", "Handler", "Limits", "Refused"]

_MOST_OUTBOUND_ALIASES = 256
_ANSWERS = (PubAck, PubRec, PubComp)


class _Refusal(Exception):
    def __init__(self, reason_code: int, reason: str) -> None:
        super().__init__(reason)
        self.reason_code = reason_code


class Connection(Channel):
    """One client. Attributes are valid from `Handler.on_connect` on.

    `connect`: the client's CONNECT; `version`: V311 or V5; `session`: what `Accepted` named
    (None before); `tag`: free for the handler.
    """

    def __init__(
        self,
        handler: Handler,
        limits: Limits | None = None,
        open_connections: set[Connection] | None = None,
        before_write: Callable[[], None] | None = None,
    ) -> None:
        """`open_connections`: a set this connection is in while its socket is open.

        `before_write`: called before bytes leave, to make durable what they promise.
        """
        super().__init__(limits or Limits(), before_write)
        self.connect: Connect = Connect("")
        self.session: Session | None = None
        self.tag: Any = None
        self._handler = handler
        self._closed = asyncio.Event()
        self._open_connections = open_connections
        self._corked = False
        self._window = self._limits.in_flight
        self._disconnect: Disconnect | None = None
        self._inbound = InboundAliases(self._limits.topic_alias_maximum)
        self._outbound: OutboundAliases | None = None

    # What servers use

    @property
    def client_id(self) -> str:
        return self.session.client_id if self.session else self.connect.client_id

    def publish(self, publish: Publish, done: Done | None = None, *, limited: bool = True) -> bool:
        """Send a message (packet_id is ours to choose) through the session's queue and window.

        `limited`: see Session.enqueue. `done` learns the client's reason code when the handshake of
        the QoS ends, or None when the message is dropped. Returns False when the connection is
        closed or the queue is full. Raises ValueError for an invalid topic.
        """
        if problem := topic_problem(publish.topic):
            raise ValueError(f"cannot publish to {publish.topic!r}: {problem}")
        return self.deliver(publish, done, limited=limited)

    def deliver(self, publish: Publish, done: Done | None = None, *, limited: bool = True) -> bool:
        """As `publish`, for a topic that is known to be valid."""
        session = self.session
        if session is None or self._end_reason is not None or self._lost:
            return False
        if self._may_write and not self._corked:
            if publish.qos:
                identifier = session.pass_on(publish, self._window, done)
                if identifier:
                    self._send_publish(publish, identifier)
                    return True
            elif not session.waits_to_write:
                self._send_publish(publish, 0)
                if done is not None:
                    done(0)
                return True
        taken = session.enqueue(publish, self._loop.time(), done, limited=limited)
        self.flush()
        return taken

    def flush(self) -> None:
        """Write what the session holds, as far as window and socket allow."""
        session = self.session
        if session is None:
            return
        while self.is_open and not self._corked and self._may_write:
            packet = session.next_packet(self._loop.time(), self._window)
            if packet is None:
                return
            self._send(packet)

    def close(self, reason_code: int = ReasonCode.SUCCESS, reason: str = "") -> None:
        """End the connection cleanly; a connected MQTT 5 client gets DISCONNECT with the code."""
        if self._end_reason is not None:
            return
        reason = reason or ReasonCode(reason_code).name.lower().replace("_", " ")
        if self.version == V5 and self.session is not None:
            self._send(Disconnect(reason_code, Properties(reason_string=reason)))
        self._finish(reason)

    async def wait_closed(self) -> None:
        """Until the socket is closed and `on_disconnect` has returned."""
        await self._closed.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self._open_connections is not None:
            self._open_connections.add(self)
        self._task = self._loop.create_task(self._serve())
        self._task.add_done_callback(self._served)

    # Inside

    async def _serve(self) -> None:
        try:
            while (packet := await self._next()) is not None:
                if isinstance(packet, MalformedPacket):
                    raise _Refusal(packet.reason_code, str(packet))
                if self.session is None:
                    await self._on_connect(packet)
                else:
                    await self._on_packet(packet, self.session)
        except _Refusal as refusal:
            self._refuse(refusal.reason_code, str(refusal))
        finally:
            self._finish("connection lost")
            await self._until_lost()
            if self.session is not None:
                self.session.suspend()
                reason = self._end_reason or "connection lost"
                await self._handler.on_disconnect(self, self._disconnect, reason)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._closed.set()
        if self._open_connections is not None:
            self._open_connections.discard(self)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._transport.abort()
            self._loop.call_exception_handler(
                {
                    "message": f"MQTT server failed to handle client {self.client_id!r}",
                    "exception": error,
                    "protocol": self,
                }
            )

    async def _on_connect(self, packet: Packet) -> None:
        if not isinstance(packet, Connect):
            raise _Refusal(ReasonCode.PROTOCOL_ERROR, "the first packet is not CONNECT")
        self.connect = packet
        self._window = min(packet.properties.receive_maximum or 65_535, self._limits.in_flight)
        if packet.version not in self._limits.versions:
            raise _Refusal(ReasonCode.UNSUPPORTED_PROTOCOL_VERSION, "this version is not served")
        if packet.version == V311 and not packet.client_id and not packet.clean_start:
            raise _Refusal(
                ReasonCode.CLIENT_IDENTIFIER_NOT_VALID, "a lasting session needs a client id"
            )
        if packet.properties.authentication_method is not None:
            raise _Refusal(ReasonCode.BAD_AUTHENTICATION_METHOD, "no such authentication method")
        if packet.will is not None:
            self._check_qos_and_retain(packet.will.qos, packet.will.retain)
        decision = await self._handler.on_connect(self, packet)
        if isinstance(decision, Refused):
            raise _Refusal(decision.reason_code, decision.reason)
        properties = decision.properties
        keepalive = properties.server_keep_alive
        self._connected(1.5 * (packet.keepalive if keepalive is None else keepalive))
        if packet.version == V5:
            properties = connack_properties(self._limits, properties)
            aliases = min(packet.properties.topic_alias_maximum or 0, _MOST_OUTBOUND_ALIASES)
            self._outbound = OutboundAliases(aliases) if aliases else None
        self.session = decision.session
        self.session.resume()
        if not self._send(ConnAck(decision.session_present, 0, properties)):
            self._finish("the client takes no packet as large as our CONNACK")
            return
        self.flush()

    def _handle_now(self, packets: Sequence[Packet]) -> int:
        session = self.session
        if session is None:
            return 0
        count = 0
        for packet in packets:
            # A client that does not read its answers is not read either.
            if self._end_reason is not None or not self._may_write:
                break
            if not self._handle(packet, session):
                break
            count += 1
        return count

    def _handle(self, packet: Packet, session: Session) -> bool:
        """Handle what nothing has to be waited for; whether it was that."""
        if isinstance(packet, Publish):
            self._on_publish(packet, session)
        elif isinstance(packet, _ANSWERS):
            answer = session.acknowledge(packet)
            if answer is not None:
                self._send(answer)
            if session.has_queue:
                self.flush()
        elif isinstance(packet, PubRel):
            self._send(session.release(packet))
        elif isinstance(packet, PingReq):
            self._send(PingResp())
        else:
            return False
        return True

    async def _on_packet(self, packet: Packet, session: Session) -> None:
        if self._handle(packet, session):
            return
        if isinstance(packet, Subscribe):
            self._corked = True
            try:
                codes = await self._handler.on_subscribe(self, packet)
            finally:
                self._corked = False
            self._send(SubAck(packet.packet_id, tuple(codes)))
            self.flush()
        elif isinstance(packet, Unsubscribe):
            codes = await self._handler.on_unsubscribe(self, packet)
            self._send(UnsubAck(packet.packet_id, tuple(codes)))
        elif isinstance(packet, Disconnect):
            later = packet.properties.session_expiry_interval
            if later and not self.connect.properties.session_expiry_interval:
                raise _Refusal(
                    ReasonCode.PROTOCOL_ERROR, "a session that was to end cannot be kept any more"
                )
            self._disconnect = packet
            self._finish("the client disconnected")
        else:
            raise _Refusal(
                ReasonCode.PROTOCOL_ERROR,
                f"{type(packet).__name__} is not what a connected client sends",
            )

    def _on_publish(self, publish: Publish, session: Session) -> None:
        qos = publish.qos
        if qos > self._limits.maximum_qos or publish.retain:
            self._check_qos_and_retain(qos, publish.retain)
        if publish.properties is not NO_PROPERTIES:
            publish = self._resolve(publish)
        identifier = publish.packet_id
        if qos == 2:
            if identifier in session.received:
                self._send(PubRec(identifier))
                return
            if len(session.received) >= self._limits.receive_maximum:
                raise _Refusal(ReasonCode.RECEIVE_MAXIMUM_EXCEEDED, "too many unreleased messages")
        code = self._handler.on_publish(self, publish)
        if qos == 0 or code is None:
            return
        if qos == 1:
            self._send(PubAck(identifier, code))
            return
        # 3.1.1 cannot say no, so its handshake goes on to PUBREL in any case.
        if code < 0x80 or self.version == V311:
            session.arrive(identifier)
        self._send(PubRec(identifier, code))

    def _resolve(self, publish: Publish) -> Publish:
        """Without its topic alias."""
        if publish.properties.subscription_identifiers:
            # [MQTT-3.3.4-6]
            raise _Refusal(ReasonCode.PROTOCOL_ERROR, "a client sent a subscription identifier")
        try:
            return self._inbound.resolve(publish)
        except UnknownAlias as error:
            raise _Refusal(error.reason_code, str(error)) from None

    def _check_qos_and_retain(self, qos: int, retain: bool) -> None:
        if qos > self._limits.maximum_qos:
            raise _Refusal(ReasonCode.QOS_NOT_SUPPORTED, f"QoS {qos} is not served")
        if retain and not self._limits.retain_available:
            raise _Refusal(ReasonCode.RETAIN_NOT_SUPPORTED, "retained messages are not served")

    def _refuse(self, reason_code: int, reason: str) -> None:
        """Answer a broken rule as the version and the state of the connection allow."""
        if self.session is not None:
            self.close(reason_code, reason)
            return
        answer = refusal(reason_code, reason, self.version)
        if answer is not None:
            self._send(*answer)
        self._finish(reason)

    def _send(self, packet: Packet, version: int | None = None) -> int:
        """Queue a packet for writing; its size in bytes, 0 when the client cannot take it."""
        if isinstance(packet, Publish):
            return self._send_publish(packet, packet.packet_id)
        version = self.version if version is None else version
        data = encode(packet, version)
        most = self.connect.properties.maximum_packet_size
        if most is not None and len(data) > most:
            shorter = without_explanations(packet)
            return 0 if shorter == packet else self._send(shorter, version)
        self._write(data)
        return len(data)

    def _send_publish(self, publish: Publish, identifier: int) -> int:
        most = self.connect.properties.maximum_packet_size
        data = None
        if self._outbound is not None:
            shortened = self._outbound.shorten(publish)
            data = publish_bytes(shortened, identifier, self.version)
            if most is not None and len(data) > most:
                self._outbound.forget(shortened)
                data = None
        if data is None:
            data = publish_bytes(publish, identifier, self.version)
        if most is not None and len(data) > most:
            # [MQTT-3.1.2-25]: such a message counts as delivered.
            if publish.qos and self.session is not None:
                self.session.give_up(identifier)
            return 0
        self._write(data)
        return len(data)

    def _silent(self) -> None:
        if self.session is None:
            self.close(ReasonCode.MAXIMUM_CONNECT_TIME, "no CONNECT in time")
        else:
            self.close(ReasonCode.KEEP_ALIVE_TIMEOUT, "nothing heard for 1.5 keep alive intervals")
