"""One HTTP/1.1 connection, on httptools' parser: limits, time-outs, one answer at a time."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

import httptools

from .errors import DEFECT
from .http_types import (
    Handler,
    HttpLimits,
    HttpRequest,
    HttpResponse,
    Refusal,
    error_response,
    retry_after,
)
from .http_wire import Phase, common_name, head_of, header_name

log = logging.getLogger(__name__)

# Requests that a client may send before it has the answers to earlier ones.
_PIPELINED = 16
_CHUNK = 64 * 1024


class Host(Protocol):
    """What a connection needs of its server."""

    limits: HttpLimits
    stopping: bool

    def joined(self, connection: Connection) -> bool: ...
    def left(self, connection: Connection) -> None: ...
    def reserve(self, size: int) -> bool: ...
    def release(self, size: int) -> None: ...
    def post(self, work: Callable[[], None]) -> None: ...


class Connection(asyncio.Protocol):
    """Everything happens on the server's loop, but for `HttpRequest.respond`."""

    protocol = "http"

    def __init__(self, host: Host, handler: Handler) -> None:
        self._host = host
        self._handler = handler
        self._limits = host.limits
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpRequestParser(self)
        self._queue: deque[tuple[HttpRequest, bool, int]] = deque()
        self._answering = self._starting = self._head_only = False
        self._last = False
        self._refusal: Refusal | None = None
        # Bytes of the host's: of the request in work, of those in the queue and of what comes in.
        self._held = self._queued = self._receiving = 0
        self._client = self._certificate = ""
        self._paused_writing = False
        self._unsent = 0
        self._part = Phase.WAITING
        self._clear()
        self.phase = Phase.NEW
        self.since = self.progress = monotonic()

    def _clear(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._head_bytes = 0
        self._parts: list[bytes] = []
        self._body: bytearray | None = None
        self._size = 0
        self._between = 0

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        peer = transport.get_extra_info("peername")
        self._client = str(peer[0]) if isinstance(peer, tuple) else "unix"
        certificate = transport.get_extra_info("peercert")
        self._certificate = common_name(certificate) if certificate else ""
        if not self._host.joined(self):
            self._refuse(Refusal(503, "too many connections are open; try again", retry_after(1)))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._host.left(self)
        self._host.release(self._held + self._queued + self._receiving)
        self._held = self._queued = self._receiving = 0
        self._queue.clear()
        self._clear()

    def data_received(self, data: bytes) -> None:
        if self._last or self._refusal is not None:
            return
        if self.phase in (Phase.NEW, Phase.WAITING):
            self._enter(Phase.HEADERS)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Answered over HTTP/1.1; what follows could be anything.
            self._last = True
        except Refusal as refusal:
            self._refuse(refusal)
        except httptools.HttpParserError as error:
            cause = error.__context__
            if isinstance(cause, Refusal):
                self._refuse(cause)
            else:
                self._refuse(Refusal(400, f"this is no HTTP request: {error}"))
        else:
            self._check_progress(len(data))

    def _check_progress(self, size: int) -> None:
        if self._part is Phase.HEADERS:
            self._head_bytes += size
            if self._head_bytes > self._limits.max_header_bytes + _CHUNK:
                self._refuse(self._headers_too_large())
        elif self._part is Phase.BODY:
            # Sizes of chunks and trailers, between two parts of a body.
            self._between += size
            if self._between > self._limits.max_header_bytes + 4 * _CHUNK:
                self._refuse(Refusal(400, "the body's chunks carry more than data; send data only"))

    def eof_received(self) -> bool:
        # A client may close its half and still read, but TLS knows no halves.
        self._last = True
        transport = self._transport
        if transport is None or transport.get_extra_info("sslcontext") is not None:
            return False
        return self._answering or bool(self._queue)

    def pause_writing(self) -> None:
        self._paused_writing = True
        self.progress = monotonic()
        self._unsent = self._pending()

    def resume_writing(self) -> None:
        self._paused_writing = False
        if not self._answering:
            self._next()

    # --- httptools

    def on_message_begin(self) -> None:
        self._clear()
        self._part = Phase.HEADERS

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._part is Phase.BODY:
            # A trailer: allowed, and nobody asks for it.
            return
        self._count(len(name) + len(value) + 4)
        key = header_name(name)
        text = value.decode("latin-1").strip()
        before = self._headers.get(key)
        if before is not None and key in ("host", "authorization", "content-type"):
            raise Refusal(400, f"header {key!r} is given twice; send it once")
        self._headers[key] = text if before is None else f"{before}, {text}"

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._limits.max_header_bytes:
            raise self._headers_too_large()

    def _headers_too_large(self) -> Refusal:
        most = self._limits.max_header_bytes
        return Refusal(431, f"request line and headers exceed {most} bytes; send less")

    def on_headers_complete(self) -> None:
        self._part = Phase.BODY
        headers = self._headers
        if self._parser.get_http_version() == "1.1" and "host" not in headers:
            raise Refusal(400, "header 'host' is missing")
        encoding = headers.get("transfer-encoding")
        if encoding is not None and encoding.lower() != "chunked":
            raise Refusal(501, f"transfer encoding {encoding[:40]!r} is not served; use chunked")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._limits.max_body_bytes:
            raise self._body_too_large()
        expected = headers.get("expect")
        if expected is not None:
            if expected.lower() != "100-continue":
                raise Refusal(417, f"expectation {expected[:40]!r} is not met; send none")
            if self._transport is not None and not self._answering:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self._answering:
            self._enter(Phase.BODY)

    def on_body(self, body: bytes) -> None:
        self._between = 0
        self._size += len(body)
        if self._size > self._limits.max_body_bytes:
            raise self._body_too_large()
        if self._body is not None:
            self._body += body
        else:
            self._parts.append(body)
            if self._size > _CHUNK:
                self._body = bytearray().join(self._parts)
                self._parts.clear()
        if self._size > _CHUNK:
            new = len(body) if self._receiving else self._size
            if not self._host.reserve(new):
                raise Refusal(503, "too much is being received already; try again", retry_after(1))
            self._receiving += new

    def _body_too_large(self) -> Refusal:
        return Refusal(413, f"the body exceeds {self._limits.max_body_bytes} bytes; send less")

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade() and (
            self._headers.get("content-length", "0") != "0" or "transfer-encoding" in self._headers
        ):
            # The parser takes what follows for another protocol.
            raise Refusal(501, "no other protocol is served; send bodies without Upgrade")
        url = self._url
        mark = url.find(b"?")
        path, query = (url, b"") if mark < 0 else (url[:mark], url[mark + 1 :])
        body: bytes | bytearray
        if self._body is not None:
            body = self._body
        else:
            body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        request = HttpRequest(
            self._parser.get_method().decode("ascii"),
            path.decode("latin-1"),
            query.decode("latin-1"),
            self._headers,
            body,
            self._respond,
            self._client,
            self._certificate,
            monotonic(),
        )
        keep = bool(self._parser.should_keep_alive())
        self._clear()
        self._part = Phase.WAITING
        self._queue.append((request, keep, self._receiving))
        self._queued += self._receiving
        self._receiving = 0
        if len(self._queue) >= _PIPELINED and self._transport is not None:
            self._transport.pause_reading()
        if not self._answering and not self._paused_writing:
            self._next()

    # --- answering

    def _next(self) -> None:
        """Hand over requests, one at a time, while answers come at once."""
        if self._starting:
            return
        self._starting = True
        try:
            while self._start():
                pass
        finally:
            self._starting = False

    def _start(self) -> bool:
        transport = self._transport
        if transport is None or self._answering or self._paused_writing:
            return False
        if not self._queue:
            if self._refusal is not None:
                self._tell(transport, self._refusal)
            elif self._last or (self._host.stopping and self._part is Phase.WAITING):
                transport.close()
            else:
                self._enter(self._part)
            return False
        request, keep, self._held = self._queue.popleft()
        self._queued -= self._held
        if not keep:
            self._last = True
        if len(self._queue) < _PIPELINED and not transport.is_reading():
            transport.resume_reading()
        self._answering = True
        self._head_only = request.method == "HEAD"
        self._enter(Phase.ANSWERING)
        try:
            self._handler(request)
        except Exception:
            # The client gets 500 without our internals, the log the whole traceback.
            log.exception("an HTTP request hit a defect of the server")
            self._answer(error_response(Refusal(500, DEFECT)))
        return True

    def _respond(self, response: HttpResponse) -> None:
        self._host.post(lambda: self._answer(response))

    def _answer(self, response: HttpResponse) -> None:
        transport = self._transport
        if transport is None or not self._answering:
            return
        self._answering = False
        self._host.release(self._held)
        self._held = 0
        self._last = self._last or self._host.stopping
        close = self._last and self._refusal is None
        self._write(transport, response, close, self._head_only)
        if close:
            transport.close()
        else:
            self._next()

    def _write(
        self, transport: asyncio.Transport, response: HttpResponse, close: bool, head_only: bool
    ) -> None:
        head, body = head_of(response, close=close), response.body
        if head_only:
            transport.write(head)
        elif len(body) <= _CHUNK:
            transport.write(head + body)
        else:
            transport.write(head)
            transport.write(body)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what cannot be read on, after what was asked before it, and end."""
        if self._refusal is None and self._transport is not None:
            self._refusal = refusal
            # Others may have what this one will not use.
            self._host.release(self._receiving)
            self._receiving = 0
            self._clear()
            self._next()

    def _tell(self, transport: asyncio.Transport, refusal: Refusal) -> None:
        self._write(transport, error_response(refusal), True, False)
        # Closing while a client still sends would reset the connection before it reads the answer.
        self._enter(Phase.LINGERING)
        if transport.can_write_eof():
            transport.write_eof()
        else:
            transport.close()

    # --- time-outs

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.since = monotonic()

    @property
    def idle(self) -> bool:
        """Whether nobody would miss it."""
        return self.phase in (Phase.NEW, Phase.WAITING) and not self._pending()

    def _pending(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def end(self) -> None:
        """Close it if it does nothing, and otherwise after its present answer."""
        if self.idle and self._transport is not None:
            self._transport.close()
        self._last = self._last or self._answering

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def sweep(self, now: float) -> None:
        """End what takes too long; called every half a second or so."""
        limits, age = self._limits, now - self.since
        pending = self._pending()
        if pending:
            if pending != self._unsent:
                self._unsent, self.progress = pending, now
            elif now - self.progress > limits.stalled:
                self.abort()
            return
        self._unsent, self.progress = 0, now
        if self.phase is Phase.LINGERING or (self._transport and self._transport.is_closing()):
            # TLS waits for the peer's goodbye, which may never come.
            if age > limits.linger:
                self.abort()
        elif self.phase is Phase.NEW:
            if age > limits.first_request and self._transport is not None:
                self._transport.close()
        elif self.phase is Phase.WAITING:
            if age > limits.idle and self._transport is not None:
                self._transport.close()
        elif self.phase is Phase.HEADERS:
            if age > limits.headers:
                self._refuse(Refusal(408, f"the headers took more than {limits.headers:g} s"))
        elif self.phase is Phase.BODY and age > limits.body_grace + self._size / limits.body_rate:
            text = f"the body comes with less than {limits.body_rate} bytes a second; send faster"
            self._refuse(Refusal(408, text))
