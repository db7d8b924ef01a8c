"""One gRPC connection over HTTP/2 on asyncio: limits, time-outs, messages from data."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Protocol

from .grpc_server import GrpcLimits
from .h2_context import CallContext, Inbox
from .h2_core import Core, CoreLimits, Stream
from .h2_frames import ConnectionRefused, ErrorCode, NotHttp2
from .h2_grpc import (
    CANCELLED,
    DEADLINE,
    EXHAUSTED,
    HEAD,
    INTERNAL,
    OK_TRAILERS,
    UNAVAILABLE,
    Failed,
    Head,
    Method,
    check_size,
    framed,
    read_head,
    trailers,
    unpack,
)
from .h2_headers import HeaderReader, literals
from .http_types import HttpLimits
from .http_wire import common_name

_CHUNK = 64 * 1024
_HARD_HEADERS = 4
_AHEAD_BYTES = 64 * 1024
_HTTP1 = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 54\r\n"
    b"Connection: close\r\n\r\nThis port speaks gRPC over HTTP/2; REST has another.\r\n"
)


class Host(Protocol):
    """What a connection needs of its server."""

    limits: HttpLimits
    stopping: bool

    def joined(self, connection: Any) -> bool: ...
    def left(self, connection: Any) -> None: ...
    def reserve(self, size: int) -> bool: ...
    def release(self, size: int) -> None: ...
    def post(self, work: Callable[[], None]) -> None: ...


class Calls(Protocol):
    """Where calls go."""

    limits: GrpcLimits

    @property
    def methods(self) -> Mapping[str, Method]: ...
    def begin(self) -> bool:
        """Whether one more call may be under way, until `end`."""

    def end(self) -> None: ...
    def serve(self, call: Call, message: bytes) -> None:
        """Answer a call of one request."""

    def open(self, call: Call) -> None:
        """Answer a call of many requests, which come through its inbox."""

    def unpack_beside(self, call: Call, message: bytes) -> None:
        """`serve` what is compressed, not on the loop."""

    def changed(self, connection: GrpcConnection) -> None:
        """It has something to send."""


class Call:
    """One call; on the loop only, but for `connection.post`."""

    __slots__ = (
        "connection",
        "context",
        "deadline",
        "head",
        "held",
        "inbox",
        "message",
        "method",
        "open",
        "started",
        "stream",
    )

    def __init__(
        self, connection: GrpcConnection, stream: Stream, head: Head, method: Method
    ) -> None:
        self.connection = connection
        self.stream = stream
        self.head = head
        self.method = method
        self.started = monotonic()
        self.deadline = None if head.timeout is None else self.started + head.timeout
        self.message: bytearray | None = None
        self.held = 0
        self.open = True
        self.context: CallContext | None = None
        self.inbox: Inbox | None = None


class GrpcConnection(asyncio.Protocol):
    """Everything happens on the server's loop."""

    def __init__(self, host: Host, calls: Calls) -> None:
        self._host = host
        self._calls = calls
        self._limits = calls.limits
        most = self._limits.max_metadata_bytes

        def interpret(pairs: list[tuple[bytes, bytes]]) -> Head:
            return read_head(pairs, calls.methods, most)

        reader: HeaderReader[Head] = HeaderReader(interpret, most * _HARD_HEADERS)
        limits = CoreLimits(
            streams=self._limits.max_concurrent_streams,
            header_bytes=most * _HARD_HEADERS,
            header_list=most,
        )
        self._core: Core[Head] = Core(self, reader, limits)
        self._transport: asyncio.Transport | None = None
        self.client = self.certificate = self.peer = ""
        self.dirty = False
        self._lingering = False
        self._unsent = 0
        self.since = self.heard = self.progress = monotonic()
        self._pinged = 0.0

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.client = str(peer[0])
            form = "ipv6:[{}]:{}" if ":" in self.client else "ipv4:{}:{}"
            self.peer = form.format(self.client, peer[1])
        else:
            self.client, self.peer = "unix", "unix:"
        certificate = transport.get_extra_info("peercert")
        self.certificate = common_name(certificate) if certificate else ""
        if not self._host.joined(self):
            self._refuse(ErrorCode.ENHANCE_YOUR_CALM, "too many connections are open; try again")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._host.left(self)
        for stream in tuple(self._core.streams.values()):
            self.on_reset(stream)
        self._core.streams.clear()

    def data_received(self, data: bytes) -> None:
        if self._lingering:
            return
        self.heard = now = monotonic()
        try:
            self._core.receive(data, now)
        except ConnectionRefused as refused:
            self._refuse(refused.code, refused.text)
        except NotHttp2:
            self._core.out = [_HTTP1]
            self._linger()
        else:
            if self._core.out:
                self.flush()
            if self._core.leaving and not self._core.streams:
                self._linger()

    def eof_received(self) -> bool:
        # No client of gRPC closes its half while it waits for answers.
        return False

    def pause_writing(self) -> None:
        self.progress = monotonic()
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def flush(self) -> None:
        self.dirty = False
        out, transport = self._core.out, self._transport
        if out and transport is not None:
            self._core.out = []
            transport.write(out[0] if len(out) == 1 else b"".join(out))

    # --- the core's calls

    def on_headers(self, stream: Stream, head: Head, ended: bool) -> None:
        method = head.method
        if head.malformed:
            self._core.reset(stream, ErrorCode.PROTOCOL_ERROR)
        elif head.http_status != 200:
            status = str(head.http_status).encode()
            self._core.head(stream, literals([(b":status", status)]), last=True)
        elif head.failed is not None or method is None:
            self._tell(stream, head.failed or Failed(INTERNAL, "no method"))
        elif not self._calls.begin():
            most = self._limits.max_concurrent_rpcs
            self._tell(stream, Failed(EXHAUSTED, f"{most} calls are under way already; try again"))
        else:
            call = stream.call = Call(self, stream, head, method)
            if method.requests:
                call.inbox = Inbox(method.parse, self._consumer(stream))
                call.message = bytearray()
                self._calls.open(call)
            if ended:
                self.on_data(stream, b"", True)

    def on_data(self, stream: Stream, data: bytes, ended: bool) -> None:
        call: Call | None = stream.call
        if call is None or not call.open:
            return
        try:
            if call.inbox is not None:
                self._feed(call, call.inbox, data, ended)
                return
            if ended and call.message is None:
                self._whole(call, data)
                return
            self._collect(call, data, ended)
        except Failed as failed:
            self.fail(call, failed)

    def _collect(self, call: Call, data: bytes, ended: bool) -> None:
        """A part of a unary call's request."""
        if call.message is None:
            call.message = bytearray()
        call.message += data
        size = len(call.message)
        if size >= 5:
            length = int.from_bytes(call.message[1:5], "big")
            check_size(length, self._limits.max_message_bytes)
            if size > length + 5:
                raise Failed(INTERNAL, "the call takes one message; send no more")
        if size - call.held > _CHUNK:
            if not self._host.reserve(size - call.held):
                raise Failed(UNAVAILABLE, "too much is being received already; try again")
            call.held = size
        if ended:
            whole, call.message = bytes(call.message), None
            self._whole(call, whole)
        else:
            self._core.consumed(call.stream, len(data))

    def _whole(self, call: Call, data: bytes) -> None:
        size = len(data) - 5
        length = int.from_bytes(data[1:5], "big")
        check_size(length, self._limits.max_message_bytes)
        if length != size:
            raise Failed(INTERNAL, "the call takes one whole message")
        if data[0] == 0:
            self._calls.serve(call, data[5:])
        else:
            self._check_compressed(call, data[0])
            self._calls.unpack_beside(call, data[5:])

    def _check_compressed(self, call: Call, flag: int) -> None:
        if flag != 1 or not call.head.gzip:
            raise Failed(INTERNAL, "the message is compressed, but no grpc-encoding says how")

    def _feed(self, call: Call, inbox: Inbox, data: bytes, ended: bool) -> None:
        buffer = call.message
        assert buffer is not None
        buffer += data
        while len(buffer) >= 5:
            length = int.from_bytes(buffer[1:5], "big")
            check_size(length, self._limits.max_message_bytes)
            if len(buffer) < 5 + length:
                break
            flag, message = buffer[0], bytes(buffer[5 : 5 + length])
            del buffer[: 5 + length]
            if flag:
                self._check_compressed(call, flag)
                message = unpack(message, self._limits.max_message_bytes)
            # The frame of a message is given back now, its contents once it is taken.
            self._core.consumed(call.stream, 5 if length <= _AHEAD_BYTES else 5 + length)
            inbox.put(message)
        if len(buffer) > call.held + _CHUNK or (call.held and not buffer):
            self._hold(call, len(buffer))
        if ended:
            if buffer:
                raise Failed(INTERNAL, "the last message is not whole")
            inbox.end()

    def _hold(self, call: Call, size: int) -> None:
        if size > call.held and not self._host.reserve(size - call.held):
            raise Failed(UNAVAILABLE, "too much is being received already; try again")
        if size < call.held:
            self._host.release(call.held - size)
        call.held = size

    def _consumer(self, stream: Stream) -> Callable[[int], None]:
        def taken(size: int) -> None:
            if size <= _AHEAD_BYTES:
                self._host.post(lambda: give(size))

        def give(size: int) -> None:
            if stream.id in self._core.streams:
                self._core.consumed(stream, size)
                self._calls.changed(self)

        return taken

    def on_reset(self, stream: Stream) -> None:
        if stream.call is not None:
            self._close(stream.call)

    def on_sent(self, stream: Stream) -> None:
        call: Call | None = stream.call
        if call is not None and call.context is not None:
            call.context.writable.set()

    # --- answers

    def answer(self, call: Call, data: bytes, more: Mapping[str, str] | None = None) -> None:
        """The one answer of a call, framed."""
        if call.open:
            self._core.answer(
                call.stream, HEAD, data, trailers(0, "", more) if more else OK_TRAILERS
            )
            self._close(call)

    def send(self, call: Call, message: bytes, *, first: bool) -> None:
        """One of many answers."""
        if call.open:
            if first:
                self._core.head(call.stream, HEAD)
            self._core.data(call.stream, framed(message))
            if call.stream.queued and call.context is not None:
                call.context.writable.clear()
            self._calls.changed(self)

    def fail(self, call: Call, failed: Failed, *, begun: bool = False) -> None:
        """`begun`: after some answers. Status 0 ends a stream well."""
        if call.open:
            if begun:
                text = trailers(failed.status, failed.text, failed.trailers)
                self._core.end(call.stream, text)
            else:
                self._tell(call.stream, failed)
            self._close(call)

    def _tell(self, stream: Stream, failed: Failed) -> None:
        block = HEAD + trailers(failed.status, failed.text, failed.trailers)
        self._core.head(stream, block, last=True)

    def _close(self, call: Call) -> None:
        if not call.open:
            return
        call.open = False
        call.message = None
        if call.held:
            self._host.release(call.held)
            call.held = 0
        if call.context is not None:
            call.context.end()
        if call.inbox is not None:
            call.inbox.end(broken=True)
        self._calls.end()
        self.since = monotonic()
        self._calls.changed(self)

    # --- the end, and time-outs

    def _refuse(self, code: ErrorCode, text: str) -> None:
        self._core.leave(code, text)
        for stream in tuple(self._core.streams.values()):
            self.on_reset(stream)
        self._core.streams.clear()
        self._linger()

    def _linger(self) -> None:
        """Closing while a client still sends would reset the connection before it reads."""
        transport = self._transport
        self.flush()
        if transport is None or self._lingering:
            return
        self._lingering = True
        self.since = monotonic()
        if transport.can_write_eof():
            transport.write_eof()
        else:
            transport.close()

    @property
    def idle(self) -> bool:
        """Whether nobody would miss it."""
        return not self._core.streams and not self._pending()

    def _pending(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def end(self) -> None:
        """Take no more calls, and close after the ones under way."""
        self._core.leave()
        self.flush()
        if not self._core.streams:
            self._linger()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def sweep(self, now: float) -> None:
        """End what takes too long; called every half a second or so."""
        pending = self._pending()
        if pending:
            if pending != self._unsent:
                self._unsent, self.progress = pending, now
            elif now - self.progress > self._host.limits.stalled:
                self.abort()
            return
        self._unsent, self.progress = 0, now
        limits, core = self._limits, self._core
        if self._lingering or (self._transport and self._transport.is_closing()):
            if now - self.since > self._host.limits.linger:
                self.abort()
        elif not core.settled:
            if now - self.since > limits.handshake_timeout_ms / 1000:
                self._refuse(ErrorCode.SETTINGS_TIMEOUT, "nothing was said in time")
        elif not core.streams:
            if core.leaving or now - self.since > limits.max_connection_idle_ms / 1000:
                self.end()
        elif core.partial and now - self.heard > self._host.limits.headers:
            self._refuse(ErrorCode.ENHANCE_YOUR_CALM, "a frame was not sent to its end")
        elif core.pinging and now - self._pinged > limits.keepalive_timeout_ms / 1000:
            if self.heard < self._pinged:
                self.abort()
            core.pinging = False
        else:
            self._sweep_streams(now)
            if not core.pinging and now - self.heard > limits.keepalive_time_ms / 1000:
                self._pinged = now
                core.ping()
            self.flush()

    def _sweep_streams(self, now: float) -> None:
        http = self._host.limits
        for stream in tuple(self._core.streams.values()):
            call: Call | None = stream.call
            if stream.queue is not None:
                if now - stream.progress > http.stalled:
                    self._core.reset(stream, ErrorCode.CANCEL, told=True)
            elif call is None or not call.open:
                continue
            elif call.deadline is not None and now > call.deadline:
                self.fail(call, Failed(DEADLINE, "the deadline passed"))
            elif call.inbox is None and not stream.remote_ended:
                size = len(call.message or b"")
                if now - call.started > http.body_grace + size / http.body_rate:
                    text = f"the request comes with less than {http.body_rate} bytes a second"
                    self.fail(call, Failed(DEADLINE, f"{text}; send faster"))

    def cancel(self, call: Call) -> None:
        """From whatever thread."""
        self._host.post(lambda: self.fail(call, Failed(CANCELLED, "the server ended the call")))
