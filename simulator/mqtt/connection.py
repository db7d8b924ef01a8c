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
from collections import deque
from dataclasses import replace
from typing import Any

from .answers import connack_properties, refusal, without_explanations
from .codec import Decoder, MalformedPacket, encode
from .handler import Accepted, Handler, Limits, Refused
from .packets import (
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

_UNHANDLED_BYTES = 256 * 1024
_CHUNK = 64 * 1024
_CLOSE_SECONDS = 2.0


class _Refusal(Exception):
    def __init__(self, reason_code: int, reason: str) -> None:
        super().__init__(reason)
        self.reason_code = reason_code


class Connection(asyncio.Protocol):
    """One client. Attributes are valid from `Handler.on_connect` on.

    `connect`: the client's CONNECT; `version`: V311 or V5; `session`: what `Accepted` named
    (None before); `tag`: free for the handler.
    """

    def __init__(
        self,
        handler: Handler,
        limits: Limits | None = None,
        open_connections: set[Connection] | None = None,
    ) -> None:
        """`open_connections`: a set this connection is in while its socket is open."""
        self.connect: Connect = Connect("")
        self.session: Session | None = None
        self.tag: Any = None
        self._handler = handler
        self._limits = limits or Limits()
        self._decoder = Decoder(self._limits.max_packet_size)
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[Packet | MalformedPacket | None] = deque()
        self._arrived = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._closed = asyncio.Event()
        self._open_connections = open_connections
        self._out: list[bytes] = []
        self._write_scheduled = False
        self._corked = False
        self._reading_paused = False
        self._unhandled = 0
        self._lost = False
        self._end_reason: str | None = None
        self._disconnect: Disconnect | None = None
        self._aliases: dict[int, str] = {}
        self._keepalive = 0.0
        self._last_received = 0.0
        self._timer: asyncio.TimerHandle | None = None

    # What servers use

    @property
    def version(self) -> int:
        return self._decoder.version

    @property
    def client_id(self) -> str:
        return self.session.client_id if self.session else self.connect.client_id

    @property
    def peername(self) -> Any:
        return self._transport.get_extra_info("peername")

    @property
    def peer_certificate(self) -> dict[str, Any] | None:
        """The client's certificate as `ssl.SSLSocket.getpeercert()` gives it, None without."""
        certificate: dict[str, Any] | None = self._transport.get_extra_info("peercert")
        return certificate or None

    @property
    def peer_certificate_der(self) -> bytes | None:
        ssl_object = self._transport.get_extra_info("ssl_object")
        return ssl_object.getpeercert(binary_form=True) if ssl_object is not None else None

    @property
    def is_open(self) -> bool:
        return self._end_reason is None and not self._lost

    def publish(self, publish: Publish, done: Done | None = None) -> bool:
        """Send a message (packet_id is ours to choose) through the session's queue and window.

        `done` learns the client's reason code when the handshake of the QoS ends, or None when
        the message is dropped. Returns False when the connection is closed or the queue is full.
        Raises ValueError for an invalid topic.
        """
        if problem := topic_problem(publish.topic):
            raise ValueError(f"cannot publish to {publish.topic!r}: {problem}")
        session = self.session
        if session is None or not self.is_open:
            return False
        if (
            publish.qos == 0
            and self._writable.is_set()
            and not (self._corked or session.waits_to_write)
        ):
            self._send(publish)
            if done is not None:
                done(0)
            return True
        taken = session.enqueue(publish, self._loop.time(), done)
        self.flush()
        return taken

    def flush(self) -> None:
        """Write what the session holds, as far as window and socket allow."""
        session = self.session
        if session is None:
            return
        window = self.connect.properties.receive_maximum or (
            65_535 if self.version == V5 else self._limits.in_flight
        )
        window = min(window, self._limits.in_flight)
        size = 0
        while self.is_open and not self._corked and self._writable.is_set():
            packet = session.next_packet(self._loop.time(), window)
            if packet is None:
                return
            size += self._send(packet)
            if size > _CHUNK:
                self._write_out()
                size = 0

    def close(self, reason_code: int = ReasonCode.SUCCESS, reason: str = "") -> None:
        """End the connection cleanly; a connected MQTT 5 client gets DISCONNECT with the code."""
        if self._end_reason is not None:
            return
        reason = reason or ReasonCode(reason_code).name.lower().replace("_", " ")
        if self.version == V5 and self.session is not None:
            self._send(Disconnect(reason_code, Properties(reason_string=reason)))
        self._finish(reason)

    def abort(self, reason: str = "dropped by the server") -> None:
        """Cut the connection without a word, as a broken network does."""
        self._end_reason = self._end_reason or reason
        self._out.clear()
        self._transport.abort()

    async def wait_closed(self) -> None:
        """Until the socket is closed and `on_disconnect` has returned."""
        await self._closed.wait()

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert hasattr(transport, "write")
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        if self._open_connections is not None:
            self._open_connections.add(self)
        self._last_received = self._loop.time()
        self._keepalive = self._limits.connect_timeout
        self._arm_timer()
        self._task = self._loop.create_task(self._serve())
        self._task.add_done_callback(self._served)

    def data_received(self, data: bytes) -> None:
        if self._end_reason is not None:
            return
        self._last_received = self._loop.time()
        try:
            self._inbox.extend(self._decoder.feed(data))
        except MalformedPacket as error:
            self._inbox.extend(error.packets)
            self._inbox.append(error)
        self._unhandled = self._unhandled + len(data) if self._inbox else 0
        if self._unhandled > _UNHANDLED_BYTES and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()
        self._arrived.set()

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        if self._timer is not None:
            self._timer.cancel()
        self._inbox.append(None)
        self._arrived.set()
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()
        self.flush()

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
            while not self._lost:
                self._arrived.clear()
                await self._arrived.wait()
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

    async def _next(self) -> Packet | MalformedPacket | None:
        """The next packet; None when the connection is over."""
        while True:
            if self._end_reason is not None:
                return None
            # A client that does not read its answers is not read either.
            if not self._writable.is_set():
                await self._writable.wait()
                continue
            if self._inbox:
                packet = self._inbox.popleft()
                if self._reading_paused and not self._inbox and not self._lost:
                    self._reading_paused = False
                    self._unhandled = 0
                    self._transport.resume_reading()
                return packet
            self._arrived.clear()
            await self._arrived.wait()

    async def _on_connect(self, packet: Packet) -> None:
        if not isinstance(packet, Connect):
            raise _Refusal(ReasonCode.PROTOCOL_ERROR, "the first packet is not CONNECT")
        self.connect = packet
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
        self._keepalive = 1.5 * (packet.keepalive if keepalive is None else keepalive)
        self._arm_timer()
        if packet.version == V5:
            properties = connack_properties(self._limits, properties)
        self._send(ConnAck(decision.session_present, 0, properties))
        self.session = decision.session
        self.session.resume()
        self.flush()

    async def _on_packet(self, packet: Packet, session: Session) -> None:
        if isinstance(packet, Publish):
            await self._on_publish(packet, session)
        elif isinstance(packet, PubAck | PubRec | PubComp):
            answer = session.acknowledge(packet)
            if answer is not None:
                self._send(answer)
            self.flush()
        elif isinstance(packet, PubRel):
            self._send(session.release(packet))
        elif isinstance(packet, PingReq):
            self._send(PingResp())
        elif isinstance(packet, Subscribe):
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

    async def _on_publish(self, publish: Publish, session: Session) -> None:
        self._check_qos_and_retain(publish.qos, publish.retain)
        if publish.properties.subscription_identifiers:
            # [MQTT-3.3.4-6]
            raise _Refusal(ReasonCode.PROTOCOL_ERROR, "a client sent a subscription identifier")
        if publish.properties.topic_alias is not None:
            publish = self._resolve_alias(publish, publish.properties.topic_alias)
        identifier = publish.packet_id
        if publish.qos == 2:
            if identifier in session.received:
                self._send(PubRec(identifier))
                return
            if len(session.received) >= self._limits.receive_maximum:
                raise _Refusal(ReasonCode.RECEIVE_MAXIMUM_EXCEEDED, "too many unreleased messages")
        code = await self._handler.on_publish(self, publish)
        if publish.qos == 0 or code is None:
            return
        if publish.qos == 1:
            self._send(PubAck(identifier, code))
            return
        # 3.1.1 cannot say no, so its handshake goes on to PUBREL in any case.
        if code < 0x80 or self.version == V311:
            session.received.add(identifier)
        self._send(PubRec(identifier, code))

    def _check_qos_and_retain(self, qos: int, retain: bool) -> None:
        if qos > self._limits.maximum_qos:
            raise _Refusal(ReasonCode.QOS_NOT_SUPPORTED, f"QoS {qos} is not served")
        if retain and not self._limits.retain_available:
            raise _Refusal(ReasonCode.RETAIN_NOT_SUPPORTED, "retained messages are not served")

    def _resolve_alias(self, publish: Publish, alias: int) -> Publish:
        if alias > self._limits.topic_alias_maximum:
            raise _Refusal(
                ReasonCode.TOPIC_ALIAS_INVALID, f"alias {alias} is above the topic alias maximum"
            )
        if publish.topic:
            self._aliases[alias] = publish.topic
        elif alias not in self._aliases:
            raise _Refusal(ReasonCode.TOPIC_ALIAS_INVALID, f"alias {alias} was never set")
        properties = replace(publish.properties, topic_alias=None)
        return replace(publish, topic=self._aliases[alias], properties=properties)

    def _refuse(self, reason_code: int, reason: str) -> None:
        """Answer a broken rule as the version and the state of the connection allow."""
        if self.session is not None:
            self.close(reason_code, reason)
            return
        answer = refusal(reason_code, reason, self.version)
        if answer is not None:
            self._write(encode(*answer))
        self._finish(reason)

    def _finish(self, reason: str) -> None:
        """Flush and close; nothing the client still sends is looked at."""
        if self._end_reason is None:
            self._end_reason = reason
        self._inbox.clear()
        self._arrived.set()
        if self._lost:
            return
        self._write_out()
        if not self._transport.is_closing():
            self._transport.close()
            # A client that does not read would keep a closing socket open for ever.
            self._cancel_timer()
            self._timer = self._loop.call_later(_CLOSE_SECONDS, self._transport.abort)

    def _send(self, packet: Packet) -> int:
        """Queue a packet for writing; its size in bytes, 0 when the client cannot take it."""
        data = encode(packet, self.version)
        most = self.connect.properties.maximum_packet_size
        if most is not None and len(data) > most:
            # [MQTT-3.1.2-25]: such a message counts as delivered.
            if isinstance(packet, Publish):
                if packet.qos and self.session is not None:
                    self.session.give_up(packet.packet_id)
                return 0
            shorter = without_explanations(packet)
            return 0 if shorter == packet else self._send(shorter)
        self._write(data)
        return len(data)

    def _write(self, data: bytes) -> None:
        self._out.append(data)
        # One system call for all answers of one turn of the event loop.
        if not self._write_scheduled:
            self._write_scheduled = True
            self._loop.call_soon(self._write_out)

    def _write_out(self) -> None:
        self._write_scheduled = False
        if self._out and not self._lost and not self._transport.is_closing():
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def _arm_timer(self) -> None:
        self._cancel_timer()
        if self._keepalive:
            due = self._last_received + self._keepalive
            self._timer = self._loop.call_at(due, self._on_timer)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        if self.session is None:
            self.close(ReasonCode.MAXIMUM_CONNECT_TIME, "no CONNECT in time")
            return
        if self._reading_paused:
            # Our own slowness, not the client's silence.
            self._last_received = self._loop.time()
        if self._loop.time() - self._last_received < self._keepalive:
            self._arm_timer()
            return
        self.close(ReasonCode.KEEP_ALIVE_TIMEOUT, "nothing heard for 1.5 keep alive intervals")
