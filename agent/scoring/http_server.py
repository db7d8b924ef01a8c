"""HTTP/1.1 listeners of the scoring process, all on one event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import stat
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

from .grpc_server import AddressUnavailable
from .http_connection import Connection
from .http_types import Handler, HttpLimits
from .prometheus import Family

log = logging.getLogger(__name__)

_SWEEP_SECONDS = 0.5
_RELOAD_SECONDS = 2.0
_BACKLOG = 1024


class TlsSource(Protocol):
    """Where a listener gets its certificates from."""

    def context(self) -> ssl.SSLContext: ...

    def renewed(self) -> ssl.SSLContext | None:
        """A context with the files of now, if they changed since the last one."""


class Member(Protocol):
    """A connection, as its server looks after it. `protocol`: http or grpc; `since`: when it became
    what it is."""

    protocol: str

    @property
    def since(self) -> float: ...
    @property
    def idle(self) -> bool: ...
    def end(self) -> None: ...
    def abort(self) -> None: ...
    def sweep(self, now: float) -> None: ...


@dataclass(slots=True)
class _Listener:
    """`newer`: certificates that are to be served from now on, and are not yet."""

    made: socket.socket
    connect: Callable[[], asyncio.Protocol]
    tls: TlsSource | None
    server: asyncio.Server | None = None
    newer: ssl.SSLContext | None = None


class HttpServer:
    """Listens from `listen` on, serves from `start` on. `post` may be called from any thread."""

    def __init__(self, limits: HttpLimits | None = None) -> None:
        self.limits = limits or HttpLimits()
        self.stopping = False
        self._listeners: list[_Listener] = []
        self._paths: list[str] = []
        self._connections: set[Member] = set()
        self._buffered = 0
        self._counting = threading.Lock()
        self._posted: deque[Callable[[], None]] = deque()
        self._woken = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._started = threading.Event()
        self._drain = 0.0
        self._end: asyncio.Event | None = None

    def listen(self, address: str, handler: Handler, tls: TlsSource | None = None) -> str:
        """Serve `handler` at host:port (port 0: any free one) or unix:path.

        The address with its real port. Raises AddressUnavailable.
        """
        return self.listen_with(address, lambda: Connection(self, handler), tls)

    def listen_with(
        self,
        address: str,
        connect: Callable[[], asyncio.Protocol],
        tls: TlsSource | None = None,
    ) -> str:
        """`listen` for connections of another protocol, each a `Member` of this server."""
        made, shown = _bound(address)
        if address.startswith("unix:"):
            self._paths.append(address.removeprefix("unix:"))
        self._listeners.append(_Listener(made, connect, tls))
        return shown

    def start(self) -> None:
        self._thread.start()
        self._started.wait()

    def stop(self, drain: float) -> None:
        """Take no more requests, give running ones `drain` seconds, and wait for the end."""
        self._drain = drain
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._begin_to_end)
            self._thread.join()
        for listener in self._listeners:
            listener.made.close()
        for path in self._paths:
            with suppress(OSError):
                os.unlink(path)
        if not self._loop.is_closed():
            self._loop.close()

    def _begin_to_end(self) -> None:
        self.stopping = True
        assert self._end is not None
        self._end.set()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        for listener in self._listeners:
            context = None if listener.tls is None else listener.tls.context()
            await self._serve_on(listener, context)
        looking = asyncio.ensure_future(self._look_after())
        self._started.set()
        await self._end.wait()
        for listener in self._listeners:
            if listener.server is not None:
                listener.server.close()
        until = monotonic() + self._drain
        for connection in tuple(self._connections):
            connection.end()
        while self._connections and monotonic() < until:
            await asyncio.wait([looking], timeout=0.02)
        looking.cancel()
        await asyncio.wait([looking])
        for listener in self._listeners:
            # One that took another's place meanwhile.
            if listener.server is not None:
                listener.server.close()
        for connection in tuple(self._connections):
            connection.abort()
        # What was aborted is told so in the loop's next turns.
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def _serve_on(self, listener: _Listener, context: ssl.SSLContext | None) -> None:
        listener.server = await self._loop.create_server(
            listener.connect,
            # A copy: closing a server closes its socket, and another one may take its place.
            sock=listener.made.dup(),
            ssl=context,
            ssl_handshake_timeout=None if context is None else self.limits.tls_handshake,
            backlog=_BACKLOG,
            # Below: where this is cancelled, the server is known already, and closed at the end.
            start_serving=False,
        )
        await listener.server.start_serving()

    async def _look_after(self) -> None:
        again = monotonic() + _RELOAD_SECONDS
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            now = monotonic()
            for connection in tuple(self._connections):
                try:
                    connection.sweep(now)
                except Exception:
                    # The others' time-outs must go on.
                    log.exception("looking after a connection hit a defect of the server")
                    connection.abort()
            if now >= again:
                again = now + _RELOAD_SECONDS
                for listener in self._listeners:
                    await self._renew(listener)

    async def _renew(self, listener: _Listener) -> None:
        if listener.tls is not None:
            listener.newer = listener.tls.renewed() or listener.newer
        if listener.newer is None:
            return
        before = listener.server
        try:
            await self._serve_on(listener, listener.newer)
        except OSError as error:
            # Out of descriptors, perhaps; nothing else may end with it.
            log.warning("new certificates are served later: %s", error)
            return
        listener.newer = None
        if before is not None:
            await self._retire(before)

    async def _retire(self, server: asyncio.Server) -> None:
        """Close `server` without losing what it accepted: asyncio sets a connection up in the turn
        after, and one whose server was closed meanwhile is dropped without a word."""
        for listening in server.sockets:
            self._loop.remove_reader(listening.fileno())
        try:
            for _ in range(2):
                await asyncio.sleep(0)
        finally:
            server.close()

    def metrics(self) -> list[Family]:
        """For `/metrics`."""
        connections = Family("gatelet_http_connections", "gauge", "Open HTTP connections")
        connections.add(sum(one.protocol == "http" for one in tuple(self._connections)))
        calls = Family("gatelet_grpc_connections", "gauge", "Open gRPC connections over HTTP/2")
        calls.add(sum(one.protocol == "grpc" for one in tuple(self._connections)))
        buffered = Family(
            "gatelet_http_buffered_bytes", "gauge", "Large bodies of requests under way"
        )
        buffered.add(self._buffered)
        return [connections, calls, buffered]

    # --- what connections need

    def joined(self, connection: Member) -> bool:
        """False when there are too many, all of them busy; one that idles makes room."""
        self._connections.add(connection)
        if len(self._connections) <= self.limits.max_connections:
            return not self.stopping
        idle = [one for one in self._connections if one.idle and one is not connection]
        if not idle:
            return False
        min(idle, key=lambda one: one.since).abort()
        return True

    def left(self, connection: Member) -> None:
        self._connections.discard(connection)

    def reserve(self, size: int) -> bool:
        """Whether `size` more bytes may be kept, until `release`; from any thread."""
        with self._counting:
            if self._buffered + size > self.limits.max_buffered_bytes:
                return False
            self._buffered += size
            return True

    def release(self, size: int) -> None:
        if size:
            with self._counting:
                self._buffered -= size

    def here(self) -> bool:
        """Whether this is the loop's thread."""
        return threading.get_ident() == self._thread.ident

    def post(self, work: Callable[[], None]) -> None:
        """Do `work` on the loop: at once if this is its thread."""
        if self.here():
            work()
            return
        self._posted.append(work)
        # One wake-up for all answers of a batch.
        if not self._woken:
            self._woken = True
            # The loop has ended when a model answers after the drain.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._do_posted)

    def soon(self, work: Callable[[], None]) -> None:
        """Do `work` after what arrived together with the present request; on the loop only."""
        self._loop.call_soon(work)

    def _do_posted(self) -> None:
        self._woken = False
        try:
            while self._posted:
                self._posted.popleft()()
        finally:
            # After a defect of one, which the loop logs, the others still have their turn.
            if self._posted:
                self._loop.call_soon(self._do_posted)


def _bound(address: str) -> tuple[socket.socket, str]:
    if address.startswith("unix:"):
        return _bound_unix(address.removeprefix("unix:")), address
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise AddressUnavailable(
            f"{address!r} is no address; write host:port or unix:/path, such as 127.0.0.1:8000"
        )
    name = host.strip("[]")
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            name or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # Named as TCP: asyncio sets TCP_NODELAY only on connections whose socket says so, and
        # without it a small frame behind another one waits for the peer's acknowledgement (40 ms).
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise AddressUnavailable(f"cannot listen on {address}: {error}") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(where)
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise AddressUnavailable(
            f"cannot listen on {address}: {error.strerror}; is another server using it? Set "
            "another address"
        ) from None
    made.setblocking(False)
    return made, f"{host}:{made.getsockname()[1]}"


def _bound_unix(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode) and not _answers(path):
                os.unlink(path)
        made.bind(path)
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise AddressUnavailable(
            f"cannot listen on unix:{path}: {error.strerror or error}; set another address"
        ) from None
    made.setblocking(False)
    return made


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
