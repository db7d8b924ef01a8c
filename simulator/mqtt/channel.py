"""The transport's side of a server connection: bytes to packets, back pressure, silence, closing.

Nothing here knows what a packet means, except that its bytes come from one client.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from .codec import Decoder, MalformedPacket
from .handler import Limits
from .packets import Packet

_UNHANDLED_BYTES = 256 * 1024
_CLOSE_SECONDS = 2.0


class Channel(asyncio.Protocol):
    """Base of `Connection`, which reads with `_next`, writes with `_write`, ends with `_finish`.

    `before_write` is called before any byte leaves, so that what an answer promises can be made
    durable once for all answers of a turn of the event loop.
    """

    def __init__(self, limits: Limits, before_write: Callable[[], None] | None) -> None:
        self._limits = limits
        self._before_write = before_write
        self._decoder = Decoder(limits.max_packet_size)
        self.version = self._decoder.version
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[Packet | MalformedPacket | None] = deque()
        self._arrived = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._out: list[bytes] = []
        self._write_scheduled = False
        self._reading_paused = False
        self._unhandled = 0
        self._lost = False
        self._end_reason: str | None = None
        self._keepalive = 0.0
        self._is_connected = False
        self._last_received = 0.0
        self._timer: asyncio.TimerHandle | None = None

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

    def abort(self, reason: str = "dropped by the server") -> None:
        """Cut the connection without a word, as a broken network does."""
        self._end_reason = self._end_reason or reason
        self._out.clear()
        self._transport.abort()

    def flush(self) -> None:
        """The socket takes bytes again."""

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert hasattr(transport, "write")
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._last_received = self._loop.time()
        self._keepalive = self._limits.connect_timeout
        self._arm_timer()

    def data_received(self, data: bytes) -> None:
        if self._end_reason is not None:
            return
        if self._is_connected:
            # Until then the time to CONNECT runs, whatever dribbles in.
            self._last_received = self._loop.time()
        try:
            self._inbox.extend(self._decoder.feed(data))
        except MalformedPacket as error:
            self._inbox.extend(error.packets)
            self._inbox.append(error)
        self.version = self._decoder.version
        self._unhandled = self._unhandled + len(data) if self._inbox else 0
        if self._unhandled > _UNHANDLED_BYTES and not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()
        self._arrived.set()

    def eof_received(self) -> None:
        # The transport closes now, once its buffer is empty: never, if the client does not read.
        self._abort_later()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._cancel_timer()
        self._inbox.append(None)
        self._arrived.set()
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()
        self.flush()

    # What the connection calls

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

    async def _until_lost(self) -> None:
        while not self._lost:
            self._arrived.clear()
            await self._arrived.wait()

    def _write(self, data: bytes) -> None:
        self._out.append(data)
        # One system call for all answers of one turn of the event loop.
        if not self._write_scheduled:
            self._write_scheduled = True
            self._loop.call_soon(self._write_out)

    def _write_out(self) -> None:
        self._write_scheduled = False
        if self._out and not self._lost and not self._transport.is_closing():
            if self._before_write is not None:
                self._before_write()
            self._transport.write(b"".join(self._out))
        self._out.clear()

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
        self._abort_later()

    def _silent(self) -> None:
        """Nothing arrived for `_keepalive` seconds."""

    def _connected(self, keepalive: float) -> None:
        """From now on something must arrive every `keepalive` seconds, 0 for never."""
        self._is_connected = True
        self._keepalive = keepalive
        self._last_received = self._loop.time()
        self._arm_timer()

    def _abort_later(self) -> None:
        """A client that does not read would keep a closing socket open for ever."""
        self._cancel_timer()
        self._timer = self._loop.call_later(_CLOSE_SECONDS, self._transport.abort)

    def _arm_timer(self) -> None:
        if self._transport.is_closing():
            return
        self._cancel_timer()
        if self._keepalive:
            due = self._last_received + self._keepalive
            self._timer = self._loop.call_at(due, self._on_timer)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timer(self) -> None:
        if self._reading_paused and self._writable.is_set():
            # Our own slowness, not the client's silence.
            self._last_received = self._loop.time()
        if self._loop.time() - self._last_received < self._keepalive:
            self._arm_timer()
        else:
            self._silent()
