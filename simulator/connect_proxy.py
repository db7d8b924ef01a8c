"""A small HTTP CONNECT proxy: any host name and port leads to a port of this machine.

It lets unmodified clients with fixed ports (azure-iot-device: 8883 and 443) reach servers on random
ports, under the servers' real names, so that runs do not collide.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

_HEAD_LIMIT = 16 * 1024
_HEAD_TIMEOUT = 10.0
_CHUNK = 64 * 1024

Target = tuple[str, int]


class ConnectProxy:
    """Serves `CONNECT host:port` for the routes it knows; everything else is answered 403.

    `routes` maps "host:port" (host without case) to an address, and may be changed while running.
    """

    def __init__(
        self,
        routes: Mapping[str, Target] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.routes: dict[str, Target] = {}
        self._host = host
        self._port = port
        self._server: asyncio.Server | None = None
        self._tunnels: set[asyncio.Task[None]] = set()
        for name, target in (routes or {}).items():
            self.add(name, target)

    def add(self, name: str, target: Target) -> None:
        """Adds or replaces the route of "host:port"."""
        self.routes[name.lower()] = target

    @property
    def port(self) -> int:
        if self._server is None:
            raise RuntimeError("the proxy is not started")
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Raises OSError."""
        self._server = await asyncio.start_server(
            self._accept, self._host, self._port, limit=_HEAD_LIMIT
        )

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for tunnel in self._tunnels:
            tunnel.cancel()
        await asyncio.gather(*self._tunnels, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tunnel = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tunnels.add(tunnel)
        tunnel.add_done_callback(self._tunnels.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            target = await self._target(reader)
            if isinstance(target, bytes):
                writer.write(b"HTTP/1.1 " + target + b"\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
                return
            await self._tunnel(reader, writer, target)
        except (OSError, EOFError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _target(self, reader: asyncio.StreamReader) -> Target | bytes:
        reading = asyncio.ensure_future(reader.readuntil(b"\r\n\r\n"))
        try:
            # Not `wait_for`: before Python 3.12 it can lose the cancellation that ends the proxy.
            await asyncio.wait({reading}, timeout=_HEAD_TIMEOUT)
            if not reading.done():
                return b"408 Request Timeout"
            head = reading.result()
        except asyncio.LimitOverrunError:
            return b"431 Request Header Fields Too Large"
        finally:
            reading.cancel()
        method, _, rest = head.decode("latin-1").partition(" ")
        if method != "CONNECT":
            return b"405 Method Not Allowed"
        return self.routes.get(rest.partition(" ")[0].lower(), b"403 Forbidden")

    async def _tunnel(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: Target
    ) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*target)
        except OSError:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            return
        try:
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            pumps = [
                asyncio.ensure_future(_pump(reader, far_writer)),
                asyncio.ensure_future(_pump(far_reader, writer)),
            ]
            try:
                await asyncio.gather(*pumps)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            far_writer.close()
            with contextlib.suppress(OSError):
                await far_writer.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies until end of file, then passes that end on (half-close)."""
    while chunk := await reader.read(_CHUNK):
        writer.write(chunk)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
