"""How the scoring process's own servers take connections."""

from __future__ import annotations

import asyncio
import errno
import queue
import socket
import ssl
import threading

import pytest
from gatelet.agent.scoring import http_server
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


class Renewed:
    """Certificates that change once, right after the start."""

    def __init__(self) -> None:
        self.news = [ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)]

    def context(self) -> ssl.SSLContext:
        return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def renewed(self) -> ssl.SSLContext | None:
        return self.news.pop() if self.news else None


class Scarce:
    """A listening socket for which there is no second descriptor at first."""

    def __init__(self, made: socket.socket) -> None:
        self.made = made
        self.asked = 0
        self.again = threading.Event()

    def dup(self) -> socket.socket:
        self.asked += 1
        if self.asked == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        if self.asked == 3:
            self.again.set()
        return self.made.dup()

    def close(self) -> None:
        self.made.close()


def test_certificates_that_could_not_be_taken_are_taken_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_server, "_SWEEP_SECONDS", 0.01)
    monkeypatch.setattr(http_server, "_RELOAD_SECONDS", 0.0)
    server = HttpServer()
    server.listen_with("127.0.0.1:0", asyncio.Protocol, Renewed())
    listener = server._listeners[0]
    scarce = listener.made = Scarce(listener.made)  # type: ignore[assignment]
    server.start()
    try:
        # And connections are looked after as before.
        assert scarce.again.wait(15)
    finally:
        server.stop(0)
    assert "Too many open files" in caplog.text
