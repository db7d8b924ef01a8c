"""MQTT over websockets (section 6): a server connection on an aiohttp websocket.

async def mqtt(request):
    return await serve_websocket(request, Connection(handler, limits))
"""

from __future__ import annotations

import asyncio
import ssl as ssl_module
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from aiohttp import WSCloseCode, WSMsgType, web

from .channel import Channel

SUBPROTOCOL: Final = "mqtt"
_FRAME: Final = 64 * 1024
_MAX_MESSAGE: Final = 4 * 1024 * 1024
_HIGH_WATER: Final = 64 * 1024


async def serve_websocket(request: web.Request, connection: Channel) -> web.StreamResponse:
    """Answer the request and carry `connection` until it ends.

    A client that does not offer the sub-protocol `mqtt` gets HTTP 400 [MQTT-6.0.0-3].
    """
    offered = ",".join(request.headers.getall("Sec-WebSocket-Protocol", []))
    if SUBPROTOCOL not in [name.strip() for name in offered.split(",")]:
        text = f"MQTT over websockets needs the sub-protocol {SUBPROTOCOL!r}\n"
        return web.Response(status=400, text=text)
    socket = web.WebSocketResponse(
        protocols=(SUBPROTOCOL,), max_msg_size=_MAX_MESSAGE, compress=False
    )
    await socket.prepare(request)
    transport = _WebsocketTransport(request, socket, connection)
    connection.connection_made(transport)
    await transport.run()
    return socket


class _WebsocketTransport(asyncio.Transport):
    """What `Channel` needs of a transport."""

    def __init__(
        self, request: web.Request, socket: web.WebSocketResponse, connection: Channel
    ) -> None:
        super().__init__()
        self._request = request
        self._socket = socket
        self._connection = connection
        self._out: deque[bytes] = deque()
        self._buffered = 0
        self._something = asyncio.Event()
        self._may_read = asyncio.Event()
        self._may_read.set()
        self._closing = False
        self._paused = False

    async def run(self) -> None:
        sender = asyncio.ensure_future(self._send())
        receiver = asyncio.ensure_future(self._receive())
        try:
            # Whichever ends first ends the other: a closed socket needs no writer, and a
            # connection we closed is not read any more.
            await asyncio.wait((sender, receiver), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sender, receiver):
                task.cancel()
            await asyncio.wait((sender, receiver))
            self._closing = True
            self._connection.connection_lost(None)

    async def _receive(self) -> None:
        while True:
            await self._may_read.wait()
            message = await self._socket.receive()
            if message.type is WSMsgType.BINARY:
                # Frames and packets have nothing to do with each other [MQTT-6.0.0-2].
                self._connection.data_received(message.data)
                continue
            if message.type is WSMsgType.TEXT:
                # [MQTT-6.0.0-1]
                await self._socket.close(
                    code=WSCloseCode.UNSUPPORTED_DATA, message=b"MQTT needs binary frames"
                )
            return

    async def _send(self) -> None:
        while True:
            while self._out:
                data = self._out.popleft()
                try:
                    for start in range(0, len(data), _FRAME):
                        await self._socket.send_bytes(data[start : start + _FRAME])
                except (ConnectionError, RuntimeError):
                    return
                self._buffered -= len(data)
                if self._paused and self._buffered < _HIGH_WATER // 4:
                    self._paused = False
                    self._connection.resume_writing()
            if self._closing:
                await self._socket.close()
                return
            self._something.clear()
            await self._something.wait()

    # asyncio.Transport

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self._out.append(bytes(data))
        self._buffered += len(data)
        self._something.set()
        if self._buffered > _HIGH_WATER and not self._paused:
            self._paused = True
            self._connection.pause_writing()

    def close(self) -> None:
        self._closing = True
        self._something.set()

    def abort(self) -> None:
        self._closing = True
        self._out.clear()
        self._something.set()
        if self._request.transport is not None:
            self._request.transport.abort()

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._may_read.clear()

    def resume_reading(self) -> None:
        self._may_read.set()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        transport = self._request.transport
        return default if transport is None else transport.get_extra_info(name, default)


class WebsocketListener:
    """An HTTP server whose only resource is the websocket, at `path` (any method but GET: 405)."""

    def __init__(
        self,
        connections: Callable[[], Channel],
        host: str,
        port: int = 0,
        path: str = "/mqtt",
        ssl: ssl_module.SSLContext | None = None,
    ) -> None:
        self._connections = connections
        self._address = (host, port)
        self._path = path
        self._ssl = ssl
        self._runner: web.AppRunner | None = None

    @property
    def port(self) -> int:
        """The port chosen by the system, from the first `start` on."""
        return self._address[1]

    async def start(self) -> None:
        """Raises OSError when the address cannot be had."""
        if self._runner is not None:
            return
        application = web.Application()
        application.router.add_get(self._path, self._serve)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=2)
        await runner.setup()
        try:
            site = web.TCPSite(runner, *self._address, ssl_context=self._ssl)
            await site.start()
        except OSError:
            await runner.cleanup()
            raise
        self._runner = runner
        self._address = (self._address[0], runner.addresses[0][1])

    async def pause(self) -> None:
        """Stop listening; connections stay."""
        if self._runner is not None:
            for site in list(self._runner.sites):
                await site.stop()

    async def resume(self) -> None:
        if self._runner is None:
            await self.start()
        elif not self._runner.sites:
            await web.TCPSite(self._runner, *self._address, ssl_context=self._ssl).start()

    async def stop(self) -> None:
        """Close the port; connections must be closed before."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        return await serve_websocket(request, self._connections())
