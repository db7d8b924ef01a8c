"""How the scoring process's own servers take connections."""

from __future__ import annotations

import asyncio
import queue
import socket

import pytest
from gatelet.agent.scoring.http_server import HttpServer


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_small_answers_do_not_wait_for_acknowledgements(host: str) -> None:
    options: queue.Queue[int] = queue.Queue()

    class Looks(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made = transport.get_extra_info("socket")
            options.put(made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            transport.close()

    server = HttpServer()
    address = server.listen_with(f"{host}:0", Looks)
    server.start()
    try:
        there, _, port = address.rpartition(":")
        with socket.create_connection((there.strip("[]"), int(port)), timeout=10):
            assert options.get(timeout=10) != 0
    finally:
        server.stop(0)
