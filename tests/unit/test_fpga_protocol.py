"""Messages and shared memory of the fabric protocol: round trip, limits, and hostile bytes."""

from __future__ import annotations

import fcntl
import math
import os
import socket
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from gatelet.accelerators.errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    InvalidTensor,
    LoadError,
)
from gatelet.accelerators.fpga import protocol
from gatelet.accelerators.fpga.client import FabricClient
from gatelet.accelerators.fpga.protocol import (
    INFERRED,
    FabricSick,
    Inference,
    ProtocolError,
    UnknownHandle,
    decode_message,
    encode_message,
    error_header,
    raise_for,
    receive_packet,
    receive_request,
    send_packet,
)
from gatelet.accelerators.fpga.shared_memory import (
    SEGMENT_LIMIT,
    lay_out,
    make_segment,
    open_segment,
)
from hypothesis import given
from hypothesis import strategies as st

HEADERS = st.dictionaries(
    st.text(max_size=8),
    st.none() | st.booleans() | st.integers(-(2**50), 2**50) | st.text(max_size=20),
    max_size=4,
)
INFERENCES = st.builds(
    Inference,
    st.binary(min_size=16, max_size=16),
    st.floats(allow_nan=False),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
)
SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=4).map(tuple)


@given(HEADERS)
def test_json_messages_round_trip(header: dict) -> None:
    assert decode_message(encode_message(header)) == header


@given(INFERENCES)
def test_inferences_round_trip(request: Inference) -> None:
    assert decode_message(request.encode()) == request


@given(
    st.binary(max_size=200)
    | st.binary(max_size=200).map(lambda b: b"GLJ2" + b)
    | st.binary(min_size=36, max_size=36).map(lambda b: INFERRED + b)
)
def test_arbitrary_bytes_are_a_protocol_error_or_a_message(packet: bytes) -> None:
    try:
        message = decode_message(packet)
    except ProtocolError:
        return
    assert isinstance(message, (Inference, dict))


def test_no_deadline_is_not_not_a_number() -> None:
    endless = Inference(bytes(16), math.inf, 1, 64)
    assert decode_message(endless.encode()) == endless
    with pytest.raises(ProtocolError, match="deadline"):
        decode_message(Inference(bytes(16), math.nan, 1, 64).encode())


@given(SIZES, SIZES, st.integers(0, 3000))
def test_tensors_in_a_segment_do_not_overlap(
    inputs: tuple[int, ...], outputs: tuple[int, ...], items: int
) -> None:
    layout = lay_out(inputs, outputs, items)
    assert layout is not None
    places = (*layout.inputs, *layout.outputs)
    assert [place.item_bytes for place in places] == [*inputs, *outputs]
    ends = [place.offset + place.items * place.item_bytes for place in places]
    assert all(end <= after.offset for end, (_, after) in zip(ends, pairwise(places), strict=False))
    assert ends[-1] <= layout.nbytes
    assert all(place.offset % 64 == 0 for place in places)


def test_too_many_items_have_no_layout() -> None:
    limit = protocol.PAYLOAD_LIMIT
    largest = lay_out((limit,), (limit,), 1)
    assert largest is not None
    assert largest.nbytes <= SEGMENT_LIMIT
    assert lay_out((limit + 1,), (1,), 1) is None
    assert lay_out((1,), (limit // 2, limit // 2), 2) is None
    assert lay_out((4,), (4,), 2**32 - 1) is None


def test_what_one_side_writes_the_other_reads() -> None:
    layout = lay_out((3, 5), (7,), 11)
    assert layout is not None
    ours, descriptor = make_segment(layout.nbytes)
    try:
        theirs = open_segment(descriptor)
    finally:
        os.close(descriptor)
    rng = np.random.default_rng(0)
    for one, other, places in (
        (ours, theirs, layout.inputs),
        (theirs, ours, layout.outputs),
    ):
        for place in places:
            data = rng.integers(0, 256, (place.items, place.item_bytes)).astype(np.uint8)
            one.view(place)[:] = data
            np.testing.assert_array_equal(other.view(place), data)


def test_a_segment_cannot_be_made_smaller() -> None:
    _, descriptor = make_segment(1 << 20)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 1 << 21)
    finally:
        os.close(descriptor)


def _memfd(size: int, seals: int) -> int:
    descriptor = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


FIXED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@pytest.mark.parametrize(
    ("size", "seals"),
    [
        (4096, 0),
        (4096, fcntl.F_SEAL_GROW),
        (4096, fcntl.F_SEAL_SHRINK),
        (4096, FIXED | fcntl.F_SEAL_WRITE),
        (0, FIXED),
        (SEGMENT_LIMIT + 4096, FIXED),
    ],
)
def test_memory_that_could_change_under_the_server_is_refused(size: int, seals: int) -> None:
    descriptor = _memfd(size, seals)
    try:
        with pytest.raises(ProtocolError):
            open_segment(descriptor)
    finally:
        os.close(descriptor)


def test_descriptors_that_are_no_memory_are_refused() -> None:
    reading, writing = os.pipe()
    with tempfile.TemporaryFile(dir="/var/tmp") as file:
        file.truncate(4096)
        try:
            for descriptor in (reading, writing, file.fileno()):
                with pytest.raises(ProtocolError):
                    open_segment(descriptor)
        finally:
            os.close(reading)
            os.close(writing)


def _open() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_descriptors_too_many_are_refused_and_closed() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other, tempfile.TemporaryFile() as file:
        before = _open()
        for count in (2, 3, 50):
            socket.send_fds(other, [b"GLJ2{}"], [file.fileno()] * count)
            with pytest.raises(ProtocolError):
                receive_request(one)
            assert _open() == before
        send_packet(other, b"x", file.fileno())
        request = receive_request(one)
        assert request is not None
        packet, descriptor = request
        assert packet == b"x"
        assert descriptor is not None
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)


def test_messages_over_the_limit_are_refused() -> None:
    with pytest.raises(ProtocolError, match="limit"):
        encode_message({"x": "y" * protocol.MESSAGE_LIMIT})
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        for receive in (receive_packet, receive_request):
            other.send(bytes(protocol.MESSAGE_LIMIT + 1))
            with pytest.raises(ProtocolError, match="limit"):
                receive(one)


@pytest.mark.parametrize(
    "kind",
    [UnknownHandle, FabricSick, BackendUnavailable, DeadlineExceeded, InvalidTensor, LoadError,
     BackendError],
)  # fmt: skip
def test_errors_keep_their_type(kind: type[BackendError]) -> None:
    with pytest.raises(kind, match="what happened") as caught:
        raise_for(error_header(kind("what happened")))
    assert type(caught.value) is kind


def test_another_version_is_told_apart_when_a_connection_is_made(tmp_path: Path) -> None:
    path = tmp_path / "fabric.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                receive_packet(connection, time.monotonic() + 5)
                send_packet(connection, encode_message({"ok": True, "protocol": 2}))

        old = threading.Thread(target=greet)
        old.start()
        try:
            with pytest.raises(BackendUnavailable, match=r"version 2 .* the same gatelet"):
                FabricClient(path).call({"op": "status"})
        finally:
            old.join(10)


def test_a_silent_peer_costs_no_more_than_the_deadline() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            receive_packet(one, started + 0.1)
        assert time.monotonic() - started < 15
        other.close()
        assert receive_packet(one) is None
        assert receive_request(one) is None
