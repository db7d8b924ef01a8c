"""Frames of the fabric protocol: round trip, limits, and hostile bytes."""

from __future__ import annotations

import json
import socket
import time

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
from gatelet.accelerators.fpga.protocol import (
    FabricSick,
    ProtocolError,
    UnknownHandle,
    decode_frame,
    decode_prefix,
    encode_frame,
    error_header,
    raise_for,
    receive_frame,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

TENSORS = st.dictionaries(
    st.text(max_size=8),
    st.sampled_from([np.int8, np.uint8, np.float32]).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0))
    ),
    max_size=3,
)
HEADERS = st.dictionaries(
    st.text(max_size=8).filter(lambda key: key != "tensors"),
    st.none() | st.booleans() | st.integers(-(2**50), 2**50) | st.text(max_size=20),
    max_size=4,
)


@given(HEADERS, TENSORS)
def test_frames_round_trip(header: dict, tensors: dict[str, np.ndarray]) -> None:
    raw = encode_frame(header, tensors)
    size, payload = decode_prefix(raw[: protocol.PREFIX_SIZE])
    body = raw[protocol.PREFIX_SIZE :]
    assert len(body) == size + payload
    frame = decode_frame(body[:size], body[size:])
    assert frame.header == header
    assert list(frame.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert frame.tensors[name].dtype == tensor.dtype
        assert frame.tensors[name].shape == tensor.shape
        assert frame.tensors[name].tobytes() == tensor.tobytes()


@given(st.binary(max_size=200), st.binary(max_size=50))
def test_arbitrary_bytes_are_a_protocol_error_or_a_frame(text: bytes, payload: bytes) -> None:
    try:
        decode_frame(text, payload)
    except ProtocolError:
        return
    assert json.loads(text)["tensors"] is not None


@pytest.mark.parametrize(
    "tensors",
    [
        [1],
        [{"name": "x", "dtype": "object", "shape": [1]}],
        [{"name": "x", "dtype": "int8", "shape": [-1]}],
        [{"name": "x", "dtype": "int8", "shape": [5]}],
        [{"name": "x", "dtype": "int8", "shape": [True, 4]}],
        [{"name": "x", "dtype": "int8", "shape": [2**40, 2**40]}],
        [{"name": "x", "dtype": "int8", "shape": [1] * 9}],
        [
            {"name": "x", "dtype": "int8", "shape": [2]},
            {"name": "x", "dtype": "int8", "shape": [2]},
        ],
        [],
    ],
)
def test_a_lying_header_is_refused(tensors: list) -> None:
    with pytest.raises(ProtocolError):
        decode_frame(json.dumps({"tensors": tensors}).encode(), b"abcd")


def test_sizes_over_the_limit_are_refused_before_reading() -> None:
    with pytest.raises(ProtocolError, match="limit"):
        decode_prefix(protocol._PREFIX.pack(protocol.MAGIC, protocol.HEADER_LIMIT + 1, 0))
    with pytest.raises(ProtocolError, match="limit"):
        decode_prefix(protocol._PREFIX.pack(protocol.MAGIC, 1, protocol.PAYLOAD_LIMIT + 1))
    with pytest.raises(ProtocolError):
        decode_prefix(b"GET / HTTP/1.1\r\n"[: protocol.PREFIX_SIZE])
    with pytest.raises(ProtocolError, match="limit"):
        encode_frame({"x": "y" * protocol.HEADER_LIMIT})
    with pytest.raises(ProtocolError, match="dtype"):
        encode_frame({}, {"x": np.zeros(1, np.float64)})


@pytest.mark.parametrize(
    "kind",
    [UnknownHandle, FabricSick, BackendUnavailable, DeadlineExceeded, InvalidTensor, LoadError,
     BackendError],
)  # fmt: skip
def test_errors_keep_their_type(kind: type[BackendError]) -> None:
    with pytest.raises(kind, match="what happened") as caught:
        raise_for(error_header(kind("what happened")))
    assert type(caught.value) is kind


def test_a_silent_peer_costs_no_more_than_the_deadline() -> None:
    one, other = socket.socketpair()
    with one, other:
        other.sendall(encode_frame({"op": "status"})[:10])
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            receive_frame(one, started + 0.1)
        assert time.monotonic() - started < 1


def test_an_end_within_a_frame_is_told_from_a_clean_one() -> None:
    one, other = socket.socketpair()
    with one, other:
        other.sendall(encode_frame({"op": "status"})[:-1])
        other.close()
        with pytest.raises(ConnectionResetError):
            receive_frame(one)
    one, other = socket.socketpair()
    with one, other:
        other.close()
        assert receive_frame(one) is None
