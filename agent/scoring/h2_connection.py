"""One gRPC connection over HTTP/2 on asyncio: calls of its streams, answers, back-pressure."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from time import monotonic

from .h2_call import CHUNK, Call, Calls, Host
from .h2_context import Inbox
from .h2_core import Core, CoreLimits
from .h2_frames import ConnectionRefused, ErrorCode, NotHttp2
from .h2_grpc import (
    CANCELLED,
    EXHAUSTED,
    HEAD,
    INTERNAL,
    OK_TRAILERS,
    UNAVAILABLE,
    Failed,
    Head,
    framed,
    read_head,
    trailers,
    unpack,
)
from .h2_headers import HeaderReader, literals
from .h2_incoming import ManyMessages, OneMessage, hold, whole
from .h2_sending import Stream
from .h2_timeouts import Patience
from .http_wire import common_name

# Headers that are read, if only to say that they are too large: times what is allowed.
_HARD_HEADERS = 4
# What reading and refusing those costs, in control frames.
_OVERSIZED_COST = 10.0
_WRITE_AHEAD = 256 * 1024
_HTTP1 = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 54\r\n"
    b"Connection: close\r\n\r\nThis port speaks gRPC over HTTP/2; REST has another.\r\n"
)


class GrpcConnection(asyncio.Protocol):
    """Everything happens on the server's loop, but for `cancel`."""

    protocol = "grpc"

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
        self._patience = Patience(self, host.limits, self._limits)

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(_WRITE_AHEAD)
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
            self.refuse(ErrorCode.ENHANCE_YOUR_CALM, "too many connections are open; try again")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._host.left(self)
        self._drop_streams()

    def data_received(self, data: bytes) -> None:
        if self._patience.lingering:
            return
        self._patience.heard = now = monotonic()
        try:
            self._core.receive(data, now)
        except ConnectionRefused as refused:
            self.refuse(refused.code, refused.text)
        except NotHttp2:
            self._core.out = [_HTTP1]
            self.linger()
        else:
            self.flush()

    def eof_received(self) -> bool:
        # No client of gRPC closes its half while it waits for answers.
        return False

    def pause_writing(self) -> None:
        self._core.corked = True
        # Whoever takes no answers need not ask.
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._core.corked = False
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.resume_reading()
            self._patience.read_again(monotonic())
            self._core.pump()
            self.flush()

    def flush(self) -> None:
        self.dirty = False
        core, transport = self._core, self._transport
        if transport is None:
            return
        if core.more:
            core.pump()
        if core.out:
            data = core.take()
            self._patience.written += len(data)
            transport.write(data)
        if core.more and not core.corked:
            self._calls.changed(self)
        elif (core.leaving or core.peer_leaves) and not core.streams:
            self.linger()

    # --- the core's calls

    def on_headers(self, stream: Stream, head: Head, ended: bool) -> None:
        method = head.method
        if head.oversized:
            self._core.charge(_OVERSIZED_COST)
        if head.malformed:
            self._core.charge()
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
                self._open(call)
            if ended:
                self.on_data(stream, b"", True)

    def _open(self, call: Call) -> None:
        """A call whose requests come one after another."""
        most = self._limits.max_message_bytes
        post = self._host.post
        inbox = Inbox(
            call.method.parse,
            lambda message, reserve: unpack(message, most, reserve),
            self._host,
            lambda: post(partial(self._advance, call)),
            lambda failed: post(partial(self.fail, call, failed, working=True)),
        )
        call.incoming = ManyMessages(call, inbox, self._host, most)
        call.working = True
        self._calls.open(call, inbox)

    def on_data(self, stream: Stream, data: bytes, ended: bool) -> None:
        call: Call | None = stream.call
        if call is None or not call.open:
            return
        try:
            incoming = call.incoming
            if incoming is None:
                if ended:
                    whole(call, self._calls, data)
                    return
                incoming = call.incoming = OneMessage(call, self._host, self._calls)
            credit = incoming.feed(data, ended, self._patience.heard)
        except Failed as failed:
            self.fail(call, failed, working=call.working)
        else:
            if credit and not ended:
                self._core.consumed(stream, credit)

    def _advance(self, call: Call) -> None:
        """Its handler has taken what had waited."""
        if call.open and isinstance(call.incoming, ManyMessages):
            try:
                credit = call.incoming.advance(monotonic())
            except Failed as failed:
                self.fail(call, failed, working=call.working)
            else:
                if credit:
                    self._core.consumed(call.stream, credit)
                self._calls.changed(self)

    def on_reset(self, stream: Stream) -> None:
        call: Call | None = stream.call
        if call is not None:
            self._shut(call)

    def on_sent(self, stream: Stream) -> None:
        call: Call | None = stream.call
        if call is not None:
            if call.context is not None:
                call.context.writable.set()
            self._finish(call)

    # --- answers

    def answer(self, call: Call, data: bytes, more: Mapping[str, str] | None = None) -> None:
        """The one answer of a call, framed; nobody works on it any more."""
        call.working = False
        if call.open:
            size = len(data)
            try:
                if call.held or size > CHUNK:
                    # The request is no longer needed.
                    hold(call, self._host, 0)
                    hold(call, self._host, size if size > CHUNK else 0)
            except Failed:
                text = "too many answers wait to be taken; try again"
                self.fail(call, Failed(UNAVAILABLE, text))
                return
            call.open = False
            self._core.answer(
                call.stream, HEAD, data, trailers(0, "", more) if more else OK_TRAILERS
            )
        self._finish(call)

    def send(self, call: Call, message: bytes) -> None:
        """One of many answers."""
        if call.open:
            if not call.begun:
                call.begun = True
                self._core.head(call.stream, HEAD)
            self._core.data(call.stream, framed(message))
            if call.stream.queue is not None and call.context is not None:
                call.context.writable.clear()
            self._calls.changed(self)

    def fail(self, call: Call, failed: Failed, *, working: bool = False) -> None:
        """The end of a call, with status 0 a good one; `working`: somebody still works on it."""
        call.working = working
        if call.open:
            if call.begun:
                text = trailers(failed.status, failed.text, failed.trailers)
                self._core.end(call.stream, text)
            else:
                self._tell(call.stream, failed)
        self._shut(call)

    def _tell(self, stream: Stream, failed: Failed) -> None:
        block = HEAD + trailers(failed.status, failed.text, failed.trailers)
        self._core.head(stream, block, last=True)

    def _shut(self, call: Call) -> None:
        """Nobody waits for another answer: not yet begun, the work need not begin."""
        call.open = False
        if call.context is not None:
            call.context.end()
        pending, call.pending = call.pending, None
        if pending is not None and call.working:
            pending[0].withdraw(pending[1])
        self._finish(call)

    def _finish(self, call: Call) -> None:
        """Count the call no longer, if it is over."""
        if call.open or call.working or call.over or call.stream.queue is not None:
            return
        call.over = True
        if call.held:
            self._host.release(call.held)
            call.held = 0
        if call.context is not None:
            call.context.end()
        self._calls.end()
        self._patience.since = monotonic()
        self._calls.changed(self)

    def cancel(self, call: Call) -> None:
        """From whatever thread."""
        failed = Failed(CANCELLED, "the server ended the call")
        self._host.post(lambda: self.fail(call, failed, working=call.working))

    # --- the end

    def refuse(self, code: ErrorCode, text: str) -> None:
        """End the connection and all of its calls."""
        self._core.leave(code, text)
        self._drop_streams()
        self.linger()

    def _drop_streams(self) -> None:
        streams = tuple(self._core.streams.values())
        self._core.streams.clear()
        for stream in streams:
            self._core.drop(stream)
            self.on_reset(stream)

    def linger(self) -> None:
        """Closing while a client still sends would reset the connection before it reads."""
        transport, patience = self._transport, self._patience
        if transport is None or patience.lingering:
            return
        patience.lingering = True
        patience.since = monotonic()
        self.flush()
        if transport.can_write_eof():
            transport.write_eof()
        else:
            transport.close()

    @property
    def since(self) -> float:
        return self._patience.since

    @property
    def idle(self) -> bool:
        """Whether nobody would miss it."""
        return not self._core.streams and not self.unsent()

    def unsent(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    @property
    def core(self) -> Core[Head]:
        return self._core

    @property
    def closing(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def end(self) -> None:
        """Take no more calls, and close after the ones under way."""
        if self._core.settled:
            self._core.retire()
        else:
            self._core.leave()
        self.flush()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def sweep(self, now: float) -> None:
        """End what takes too long; called every half a second or so."""
        self._patience.sweep(now)
