"""Hostile and dying clients of the fabric process, and the memory that it maps for them."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from gatelet.accelerators.fpga.protocol import (
    INFERRED,
    Inference,
    decode_message,
    encode_message,
    send_packet,
)
from gatelet.accelerators.fpga.shared_memory import lay_out, make_segment

from .fabric_site import Site, mapped, until
from .fabric_site import running as running
from .fabric_site import site as site

pytestmark = pytest.mark.e2e


def connected(site: Site, *packets: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(15)
    connection.connect(str(site.socket))
    for packet in packets:
        connection.sendall(packet)
    return connection


def is_ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1 << 16) == b""
    except ConnectionResetError:
        return True


def test_hostile_bytes_end_only_their_own_connection(running: Site) -> None:
    session = running.load(1)
    for junk in (
        b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, INFERRED, b"GLJ2", b"GLJ2[]", bytes(100_000),
        Inference(bytes(16), 0.0, 1, 64).encode(),
    ):  # fmt: skip
        with connected(running, junk) as hostile:
            assert is_ended(hostile)
    running.check(session, 1)


HELLO = encode_message({"op": "hello", "client": "hostile"})


def loaded_by_hand(site: Site) -> tuple[socket.socket, bytes]:
    load = {"op": "load", "directory": str(site.root / "p1"), "kind": "stream"}
    connection = connected(site, HELLO)
    assert connection.recv(1 << 16)
    connection.sendall(encode_message(load))
    answer = decode_message(connection.recv(1 << 16))
    assert not isinstance(answer, Inference)
    return connection, bytes.fromhex(answer["handle"])


def test_a_request_that_lies_about_its_memory_reaches_no_memory(running: Site) -> None:
    session = running.load(1)
    connection, handle = loaded_by_hand(running)
    layout = lay_out((16,), (6,), 2)
    assert layout is not None
    _, descriptor = make_segment(layout.nbytes)
    honest = Inference(handle, math.inf, 2, layout.nbytes)
    with connection:
        connection.send(honest.encode())
        assert b"INVALID" in connection.recv(1 << 16), "there is no memory yet"
        send_packet(connection, honest.encode(), descriptor)
        assert connection.recv(1 << 16) == INFERRED
        for lie in (
            replace(honest, items=5),
            replace(honest, nbytes=2**63),
            replace(honest, items=2**32 - 1, nbytes=0),
            replace(honest, items=100_000, nbytes=lay_out((16,), (6,), 100_000).nbytes),
        ):
            connection.send(lie.encode())
            assert b"INVALID" in connection.recv(1 << 16)
        connection.send(replace(honest, handle=bytes(16)).encode())
        assert b"UNKNOWN_HANDLE" in connection.recv(1 << 16)
        connection.send(honest.encode())
        assert connection.recv(1 << 16) == INFERRED
    os.close(descriptor)
    running.check(session, 1)


def test_what_was_asked_for_before_is_checked_again_once_a_handle_goes(running: Site) -> None:
    connection, handle = loaded_by_hand(running)
    layout = lay_out((16,), (6,), 2)
    assert layout is not None
    _, descriptor = make_segment(layout.nbytes)
    request = Inference(handle, math.inf, 2, layout.nbytes).encode()
    with connection:
        send_packet(connection, request, descriptor)
        assert connection.recv(1 << 16) == INFERRED
        unload = {"op": "unload", "handle": handle.hex()}
        with connected(running, HELLO, encode_message(unload)) as other:
            assert other.recv(1 << 16)
            assert b'"ok":true' in other.recv(1 << 16)
            connection.send(request)
            assert b"UNKNOWN_HANDLE" in connection.recv(1 << 16)
    os.close(descriptor)


def test_memory_that_is_not_sealed_ends_the_connection(running: Site) -> None:
    connection, handle = loaded_by_hand(running)
    descriptor = os.memfd_create("hostile")
    os.ftruncate(descriptor, 4096)
    with connection:
        send_packet(connection, Inference(handle, math.inf, 1, 128).encode(), descriptor)
        assert is_ended(connection)
    os.close(descriptor)
    running.check(running.load(1), 1)


def test_a_client_that_dies_leaves_nothing_mapped(running: Site) -> None:
    session = running.load(1)
    running.check(session, 1)
    before = mapped(running)
    assert before == 1
    code = (
        "import os, sys, time, numpy as np\n"
        "from pathlib import Path\n"
        "from gatelet.accelerators.fpga.client import FabricClient, Form, prepare\n"
        "client = FabricClient(Path(sys.argv[1]))\n"
        "load = {'op': 'load', 'directory': sys.argv[2], 'kind': 'stream'}\n"
        "handle = client.call(load)['handle']\n"
        "x, y = (Form(np.dtype(np.uint8), (size,)) for size in (16, 6))\n"
        "request = prepare(handle, 5, (x,), (y,))\n"
        "print(len(client.infer(request, [np.zeros((5, 16), np.uint8)])[0]), flush=True)\n"
        "while True: client.infer(request, [np.zeros((5, 16), np.uint8)])"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(running.socket), str(running.root / "p2")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "5\n"
        assert mapped(running) == before + 1
        other.kill()
    until(lambda: mapped(running) == before)
    running.check(session, 1)


def test_the_memory_of_a_large_batch_goes_again(running: Site) -> None:
    session = running.load(1)
    for count in (5, 200_000, 600_000, 5):
        x = np.zeros((count, 16), np.float32)
        assert len(session.run({"x": x}, deadline=time.monotonic() + 50)["y"]) == count
    until(lambda: mapped(running) == 1)
