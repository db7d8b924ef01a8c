"""The transport's side of a server connection: bytes to packets, back pressure, silence, closing.

Nothing here knows what a packet means, except that its bytes come from one client.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from .codec import Decoder, MalformedPacket
from .handler import Limits
from .packets import Packet

_UNHANDLED_BYTES = 256 * 1024
_CHUNK = 64 * 1024
_TURN = 200  # packets of one client in one turn of the event loop
_CLOSE_SECONDS = 2.0


class Channel(asyncio.Protocol):
    """Base of `Connection`, which reads with `_next`, writes with `_write`, ends with `_finish`.

    Packets wait in an inbox for the connection's task. While it has nothing to do, `_handle_now`
    may take them first: waking a task up costs as much as several messages.
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
        self._is_idle = False
        self._turn_left = _TURN
        self._failure: Exception | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._may_write = True  # what `_writable` says, for those who ask for every message
        self._out: list[bytes] = []
        self._out_size = 0
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
        if self._end_reason is not None or self._failure is not None:
            return
        if self._is_connected:
            # Until then the time to CONNECT runs, whatever dribbles in.
            self._last_received = self._loop.time()
        waiting = bool(self._inbox)
        broken: MalformedPacket | None = None
        try:
            packets: Sequence[Packet] = self._decoder.feed(data)
        except MalformedPacket as error:
            packets = error.packets
            broken = error
        self.version = self._decoder.version
        if self._is_idle and not waiting:
            try:
                packets = packets[self._handle_now(packets[:_TURN]) :]
            except Exception as error:  # noqa: BLE001 - the connection's task raises it
                self._failure = error
                self._arrived.set()
        if self._end_reason is not None or self._failure is not None:
            return
        self._inbox.extend(packets)
        if broken is not None:
            self._inbox.append(broken)
        if not self._inbox:
            return
        self._unhandled = len(data) + (self._unhandled if waiting else 0)
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
        self._may_write = True
        self._writable.set()

    def pause_writing(self) -> None:
        self._may_write = False
        self._writable.clear()

    def resume_writing(self) -> None:
        self._may_write = True
        self._writable.set()
        self.flush()

    # What the connection does

    def _handle_now(self, packets: Sequence[Packet]) -> int:
        """Handle packets from the first on, as long as nothing has to be waited for; how many."""
        return 0

    async def _next(self) -> Packet | MalformedPacket | None:
        """The next packet; None when the connection is over. Raises what `_handle_now` raised."""
        while True:
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            if self._end_reason is not None:
                return None
            # A client that does not read its answers is not read either.
            if not self._writable.is_set():
                await self._writable.wait()
                continue
            if self._inbox:
                # Nobody waits for longer than this because one client has sent thousands.
                if not self._turn_left:
                    self._turn_left = _TURN
                    await asyncio.sleep(0)
                    continue
                self._turn_left -= 1
                packet = self._inbox.popleft()
                if self._reading_paused and not self._inbox and not self._lost:
                    self._reading_paused = False
                    self._unhandled = 0
                    self._transport.resume_reading()
                return packet
            self._arrived.clear()
            self._is_idle = True
            await self._arrived.wait()
            self._is_idle = False

    async def _until_lost(self) -> None:
        while not self._lost:
            self._arrived.clear()
            await self._arrived.wait()

    def _write(self, data: bytes) -> None:
        self._out.append(data)
        self._out_size += len(data)
        if self._out_size > _CHUNK:
            # So that the transport says when it has enough: few bytes in may be many bytes out.
            self._write_out()
        # One system call for all answers of one turn of the event loop.
        elif not self._write_scheduled:
            self._write_scheduled = True
            self._loop.call_soon(self._write_scheduled_out)

    def _write_scheduled_out(self) -> None:
        self._write_scheduled = False
        self._write_out()

    def _write_out(self) -> None:
        if self._out and not self._lost and not self._transport.is_closing():
            if self._before_write is not None:
                self._before_write()
            self._transport.write(b"".join(self._out))
        self._out.clear()
        self._out_size = 0

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
