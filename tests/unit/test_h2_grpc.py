"""gRPC over HTTP/2 without any I/O: headers, packed messages, and plans of requests and answers."""

from __future__ import annotations

import gzip
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from gatelet.agent.scoring import h2_context, h2_incoming
from gatelet.agent.scoring.h2_call import CHUNK
from gatelet.agent.scoring.h2_context import Inbox
from gatelet.agent.scoring.h2_grpc import (
    Failed,
    Method,
    framed,
    percent_encoded,
    read_head,
    read_timeout,
    unpack,
)
from gatelet.agent.scoring.h2_plans import AnswerPlans, RequestPlans
from gatelet.agent.scoring.oip_messages import decode_request, encode_response
from gatelet.agent.scoring.shared_memory import SharedMemory
from gatelet.agent.scoring.types import InferenceResponse, Tensor
from gatelet.protos import open_inference_pb2 as oip
from hypothesis import given
from hypothesis import strategies as st

METHOD = Method("/a/b", lambda: None, bytes, False, False)
FIELDS = [
    *((b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/a/b")),
    *((b"content-type", b"application/grpc+proto"), (b"te", b"trailers")),
]


def changed(**fields: bytes | None) -> list[tuple[bytes, bytes]]:
    """The usual headers with others; "_" stands for "-", a leading "p_" for ":"."""
    wanted = dict(FIELDS)
    for name, value in fields.items():
        key = (":" + name[2:] if name.startswith("p_") else name).replace("_", "-").encode()
        if value is None:
            del wanted[key]
        else:
            wanted[key] = value
    return list(wanted.items())


@pytest.mark.parametrize(
    ("pairs", "outcome"),
    [
        (FIELDS, "ok"),
        (changed(te=None), "ok"),
        (changed(te=b"gzip"), "malformed"),
        (changed(p_path=None), "malformed"),
        (changed(p_scheme=b""), "malformed"),
        ([*FIELDS, (b":path", b"/a/b")], "malformed"),
        ([*FIELDS, (b":status", b"200")], "malformed"),
        ([*FIELDS, (b"Upper", b"x")], "malformed"),
        ([*FIELDS, (b"", b"x")], "malformed"),
        ([*FIELDS, (b"a b", b"x")], "malformed"),
        ([*FIELDS, (b"x", b"a\r\nb")], "malformed"),
        ([*FIELDS, (b"x", b"\0")], "malformed"),
        ([*FIELDS, (b"connection", b"close")], "malformed"),
        ([*FIELDS, (b"transfer-encoding", b"chunked")], "malformed"),
        (changed(p_method=b"GET"), 405),
        (changed(content_type=b"application/json"), 415),
        (changed(content_type=b"application/grpc-web"), 415),
        (changed(content_type=None), 415),
        (changed(p_path=b"/a/c"), Failed(12, "")),
        (changed(grpc_encoding=b"snappy"), Failed(12, "")),
        (changed(grpc_timeout=b"soon"), Failed(13, "")),
        (changed(x=b"y" * 2000), Failed(8, "")),
    ],
)
def test_what_is_a_call(pairs: list[tuple[bytes, bytes]], outcome: Any) -> None:
    head = read_head(pairs, {"/a/b": METHOD}, 1000)
    if outcome == "malformed":
        assert head.malformed
    elif isinstance(outcome, int):
        assert (head.malformed, head.http_status) == (False, outcome)
    elif isinstance(outcome, Failed):
        assert head.failed is not None
        assert head.failed.status == outcome.status
    else:
        assert (head.malformed, head.http_status, head.failed) == (False, 200, None)
        assert head.method is METHOD


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1H", 3600), ("2M", 120), ("3S", 3), ("40m", 0.04), ("500u", 0.0005), ("99999999n", 0.1)],
)
def test_timeouts(text: str, seconds: float) -> None:
    assert read_timeout(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "S", "1", "1x", "-1S", "123456789S", "1.5S", "\u0661S"])
def test_what_is_no_timeout(text: str) -> None:
    with pytest.raises(Failed):
        read_timeout(text)


@given(st.text(max_size=200))
def test_messages_come_back(text: str) -> None:
    encoded = percent_encoded(text)
    assert all(0x20 <= byte < 0x7F for byte in encoded)
    assert unquote(encoded.decode()) == text.encode("utf-8", "replace").decode()


@given(st.binary(max_size=5000))
def test_any_bytes_unpack_or_fail(data: bytes) -> None:
    try:
        unpack(data, 1000, lambda size: True)
    except Failed:
        pass
    assert unpack(gzip.compress(data), 5000, lambda size: True) == data


def test_a_bomb_is_unpacked_as_far_as_there_is_room() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    reserved: list[int] = []

    def reserve(size: int) -> bool:
        reserved.append(size)
        return len(reserved) <= 3

    with pytest.raises(Failed, match="too much is being received"):
        unpack(bomb, 2**30, reserve)
    assert sum(reserved) < 5_000_000
    reserved.clear()
    assert unpack(gzip.compress(b"small"), 1000, reserve) == b"small"
    # No more than it takes.
    assert reserved == [5]
    with pytest.raises(Failed, match="more than the allowed 2000000 bytes"):
        unpack(bomb, 2_000_000, lambda size: True)
    with pytest.raises(Failed, match="no whole gzip"):
        unpack(bomb[:-9] if len(bomb) < 100 else gzip.compress(b"x")[:-4], 1000, lambda size: True)


# --- messages of a stream


class Hold:
    """A host's memory."""

    def __init__(self, most: int = 2**40) -> None:
        self.used, self.most = 0, most

    def reserve(self, size: int) -> bool:
        if self.used + size > self.most:
            return False
        self.used += size
        return True

    def release(self, size: int) -> None:
        self.used -= size


class FakeCall:
    def __init__(self) -> None:
        self.held = 0
        self.started = 0.0
        self.head = read_head(FIELDS, {"/a/b": METHOD}, 1000)


def a_stream(memory: Hold) -> tuple[Any, Inbox, list[int]]:
    wanted: list[int] = []
    inbox = Inbox(bytes, unpack_nothing, memory, lambda: wanted.append(1), lambda failed: None)
    call: Any = FakeCall()
    host: Any = memory
    return h2_incoming.ManyMessages(call, inbox, host, 10_000_000), inbox, wanted


def unpack_nothing(message: bytes, reserve: Any) -> bytes:
    return message


@given(st.lists(st.binary(max_size=300), max_size=60), st.data())
def test_messages_come_out_as_they_went_in(messages: list[bytes], data: st.DataObject) -> None:
    memory = Hold()
    stream, inbox, _ = a_stream(memory)
    sent = b"".join(framed(message) for message in messages)
    got, credit, at = [], 0, 0
    while at < len(sent):
        size = data.draw(st.integers(1, 400))
        credit += stream.feed(sent[at : at + size], False, 1.0)
        at += size
        if inbox.size or not inbox.has_room():
            got.append(next(inbox))
            credit += stream.advance(1.0)
    credit += stream.feed(b"", True, 1.0)
    while len(got) < len(messages):
        got.append(next(inbox))
        credit += stream.advance(1.0)
    assert got == messages
    assert list(inbox) == []
    # Every byte made room for another one, as soon as it was taken.
    assert credit == len(sent)
    assert memory.used == 0


def test_an_inbox_that_nobody_empties_takes_no_more() -> None:
    memory = Hold()
    stream, inbox, wanted = a_stream(memory)
    credit = 0
    for _ in range(1000):
        credit += stream.feed(framed(bytes(1000)), False, 1.0)
    # Only what is ready for the handler: the rest is the stream's window.
    assert credit < 20_000
    assert inbox.size <= h2_context.AHEAD * 1000
    assert memory.used == stream.size + inbox.size
    assert len(next(inbox)) == 1000
    assert wanted == [1]
    assert stream.advance(1.0) == 0
    for _ in range(999):
        next(inbox)
        stream.advance(1.0)
    assert memory.used == 0


def test_a_message_larger_than_the_window_comes_through() -> None:
    memory = Hold()
    stream, inbox, _ = a_stream(memory)
    sent = framed(bytes(5_000_000))
    credit = 0
    for at in range(0, len(sent), 16_384):
        credit += stream.feed(sent[at : at + 16_384], False, 1.0)
    # But for its last part, which fills the inbox.
    assert credit > len(sent) - 20_000
    assert memory.used == 5_000_000
    assert len(next(inbox)) == 5_000_000
    stream.advance(1.0)
    # It counts as long as the handler has it.
    assert memory.used == 5_000_000
    inbox.close()
    assert memory.used == 0


def test_a_stream_of_large_messages_fails_where_there_is_no_room() -> None:
    stream, _, _ = a_stream(Hold(most=3 * CHUNK))
    stream.feed(bytes((0, 0, 16, 0, 0)) + bytes(2 * CHUNK), False, 1.0)
    with pytest.raises(Failed, match="too much is being received"):
        stream.feed(bytes(CHUNK), False, 1.0)


# --- plans


def encode(answer: InferenceResponse) -> oip.ModelInferResponse:
    return encode_response(answer, True)


DATATYPES = {"FP32": np.float32, "INT8": np.int8, "UINT64": np.uint64, "FP16": np.float16}


@st.composite
def requests(draw: st.DrawFn) -> oip.ModelInferRequest:
    made = oip.ModelInferRequest(
        model_name=draw(st.sampled_from(["m", "model", "\u00e4"])),
        model_version=draw(st.sampled_from(["", "3"])),
        id=draw(st.sampled_from(["", "", "id"])),
    )
    for number in range(draw(st.integers(1, 3))):
        datatype = draw(st.sampled_from(sorted(DATATYPES)))
        shape = draw(st.sampled_from([(1, 4), (2, 2), (0, 3), (5,)]))
        made.inputs.add(name=f"x{number}", datatype=datatype, shape=shape)
        size = int(np.prod(shape)) * np.dtype(DATATYPES[datatype]).itemsize
        contents = draw(st.binary(min_size=size, max_size=size))
        # Contents that look like what comes before contents.
        made.raw_input_contents.append((b":\x10" + contents)[:size] if size > 2 else contents)
    if draw(st.booleans()):
        made.outputs.add(name="y")
    if draw(st.integers(0, 5)) == 0:
        made.parameters["priority"].int64_param = 3
    return made


@given(st.lists(requests(), min_size=1, max_size=8))
def test_plans_read_as_the_messages_say(messages: list[oip.ModelInferRequest]) -> None:
    plans, memory = RequestPlans(), SharedMemory()
    for message in messages * 2:
        data = message.SerializeToString()
        expected = decode_request(message, 1.5, memory, headers={"a": "b"}).request
        plan = plans.match(data)
        if plan is None:
            plans.learn(data, message)
            plan = plans.match(data)
        if plan is None:
            assert message.id or message.parameters or len(messages) > 1
            continue
        found = plan.request(data, 1.5, {"a": "b"})
        for name in ("model", "version", "id", "outputs", "deadline", "priority"):
            assert getattr(found, name) == getattr(expected, name)
        assert dict(found.classes) == dict(expected.classes)
        assert dict(found.headers) == {"a": "b"}
        for one, other in zip(found.inputs, expected.inputs, strict=True):
            assert (one.name, one.datatype, one.shape) == (other.name, other.datatype, other.shape)
            assert one.array.tobytes() == other.array.tobytes()


@given(requests(), st.binary(max_size=40), st.integers(0, 100))
def test_other_messages_are_never_read_by_a_plan(
    message: oip.ModelInferRequest, noise: bytes, at: int
) -> None:
    data = message.SerializeToString()
    plans = RequestPlans()
    plans.learn(data, message)
    broken = (data[:at] + noise + data[at + len(noise) :])[: len(data)]
    plan = plans.match(broken)
    if plan is not None:
        found = plan.request(broken, None, {})
        # Then only the tensors' contents differ.
        whole = oip.ModelInferRequest.FromString(broken)
        assert [one.array.tobytes() for one in found.inputs] == list(whole.raw_input_contents)
        del whole.raw_input_contents[:], message.raw_input_contents[:]
        assert whole == message


def test_requests_are_stacked_along_their_first_dimension() -> None:
    x, plans, messages = np.arange(24, dtype=np.float32).reshape(4, 2, 3), RequestPlans(), []
    for row in x:
        made = oip.ModelInferRequest(model_name="m", raw_input_contents=[row.tobytes()])
        made.inputs.add(name="x", datatype="FP32", shape=row.shape)
        messages.append(made.SerializeToString())
    plans.learn(messages[0], made)
    plan = plans.match(messages[3])
    assert plan is not None
    assert plan.rows == 2
    made.model_version = "1"
    of_version = made.SerializeToString()
    plans.learn(of_version, made)
    versioned = plans.match(of_version)
    assert versioned is not None
    assert versioned.rows == 0
    stacked = plan.stacked(messages).inputs[0].array
    assert stacked.tolist() == x.reshape(8, 3).tolist()
    for outputs in (1, 2):
        tensors = tuple(Tensor(f"y{n}", "FP32", stacked + n) for n in range(outputs))
        parts = AnswerPlans(encode).parts(InferenceResponse("m", "1", tensors), 4)
        for row, part in zip(x, parts, strict=True):
            answer = oip.ModelInferResponse.FromString(part[5:])
            assert answer.raw_output_contents[0] == row.tobytes()
            assert list(answer.outputs[0].shape) == [2, 3]
            assert len(answer.outputs) == outputs


@given(st.lists(st.sampled_from([(1, 2), (3, 1), (0, 2)]), min_size=1, max_size=6), st.text())
def test_answers_are_written_as_protobuf_does(shapes: list[tuple[int, ...]], version: str) -> None:
    plans = AnswerPlans(encode)
    for shape in shapes:
        array = np.full(shape, 7.5, np.float32)
        answer = InferenceResponse("m", version, (Tensor("y", "FP32", array),))
        found = oip.ModelInferResponse.FromString(plans.write(answer)[5:])
        assert found == encode_response(answer, True)
