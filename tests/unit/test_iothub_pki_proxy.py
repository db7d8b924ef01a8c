from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest
from gatelet.simulator.connect_proxy import ConnectProxy
from gatelet.simulator.pki import Pki


async def test_tls_with_the_issued_certificate(tmp_path: Path) -> None:
    pki = Pki(tmp_path / "pki")
    context = pki.server_context(["hub.example", "localhost", "127.0.0.1"])

    async def hello(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    server = await asyncio.start_server(hello, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    try:
        client = pki.client_context()
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        if hasattr(ssl, "VERIFY_X509_STRICT"):
            client.verify_flags |= ssl.VERIFY_X509_STRICT
        for name in ("hub.example", "127.0.0.1"):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=client, server_hostname=name
            )
            assert await reader.read() == b"hello"
            writer.close()
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.open_connection(
                "127.0.0.1", port, ssl=client, server_hostname="other.example"
            )
    finally:
        server.close()
        await server.wait_closed()


def test_files_are_made_once_and_again_for_new_names(tmp_path: Path) -> None:
    first = Pki(tmp_path)
    files = first.server(["hub.example"])
    before = files.certificate.read_bytes()
    second = Pki(tmp_path)
    assert second.ca_file.read_bytes() == first.ca_file.read_bytes()
    assert second.server(["hub.example"]).certificate.read_bytes() == before
    assert second.server(["hub.example", "::1"]).certificate.read_bytes() != before
    assert files.key.stat().st_mode & 0o077 == 0


def test_a_new_authority_issues_new_server_certificates(tmp_path: Path) -> None:
    before = Pki(tmp_path).server(["hub.example"]).certificate.read_bytes()
    (tmp_path / "ca.pem").unlink()
    assert Pki(tmp_path).server(["hub.example"]).certificate.read_bytes() != before


async def test_a_proxy_that_stops_while_a_client_speaks() -> None:
    """Cancelled in the very turn in which the request is complete."""
    for turns in range(4):
        reader = asyncio.StreamReader()
        task = asyncio.ensure_future(ConnectProxy()._target(reader))
        await asyncio.sleep(0)
        reader.feed_data(b"CONNECT a:1 HTTP/1.1\r\n\r\n")
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.done():
            break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_proxy_routes_names_to_ports() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read()).upper())  # all of it: the half-close must come through
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    proxy = ConnectProxy({"Hub.example:8883": ("127.0.0.1", port)})
    await proxy.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"CONNECT hub.EXAMPLE:8883 HTTP/1.0\r\nX: y\r\n\r\nearly ")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.write(b"late")
        writer.write_eof()
        assert await reader.read() == b"EARLY LATE"
        writer.close()
    finally:
        await proxy.stop()
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"CONNECT other.example:8883 HTTP/1.1", b"403"),
        (b"GET / HTTP/1.1", b"405"),
        (b"CONNECT gone.example:1 HTTP/1.1", b"502"),
        (b"CONNECT x:1 HTTP/1.1\r\nX: " + b"y" * 70_000, b"431"),
    ],
)
async def test_proxy_refuses(request_line: bytes, status: bytes) -> None:
    proxy = ConnectProxy({"gone.example:1": ("127.0.0.1", _free_port())})
    await proxy.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(request_line + b"\r\n\r\n")
        assert (await reader.readuntil(b"\r\n")).split()[1] == status
        writer.close()
    finally:
        await proxy.stop()


async def test_proxy_stops_with_open_tunnels() -> None:
    async def swallow(far: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await far.read()
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    proxy = ConnectProxy({"hub:1": ("127.0.0.1", port)})
    await proxy.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"CONNECT hub:1 HTTP/1.1\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    await asyncio.wait_for(proxy.stop(), 30)
    assert await reader.read() == b""
    writer.close()
    server.close()
    await server.wait_closed()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
