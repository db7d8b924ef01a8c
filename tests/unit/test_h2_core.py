"""HTTP/2's core: what any chunking of the bytes gives, and what a broken peer cannot do."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from gatelet.agent.scoring import h2_frames as h2
from gatelet.agent.scoring.h2_core import Core, CoreLimits
from gatelet.agent.scoring.h2_frames import ConnectionRefused, ErrorCode, NotHttp2
from gatelet.agent.scoring.h2_headers import HeaderReader, literals
from gatelet.agent.scoring.h2_sending import Stream
from hpack import Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

FIELDS = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/a/b"),
    (b"content-type", b"application/grpc"),
]


class Recorder:
    def __init__(self, limits: CoreLimits | None = None) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.core: Core[Any] = Core(self, HeaderReader(tuple, 65536), limits)
        self.core.out.clear()

    def on_headers(self, stream: Stream, head: Any, ended: bool) -> None:
        self.events.append(("headers", stream.id, head, ended))

    def on_data(self, stream: Stream, data: bytes, ended: bool) -> None:
        self.events.append(("data", stream.id, data, ended))
        if not ended:
            self.core.consumed(stream, len(data))

    def on_reset(self, stream: Stream) -> None:
        self.events.append(("reset", stream.id))

    def on_sent(self, stream: Stream) -> None:
        self.events.append(("sent", stream.id))

    def receive(self, *frames: bytes) -> None:
        self.core.receive(b"".join(frames), 0.0)

    @property
    def sent(self) -> list[tuple[int, int, int, bytes]]:
        return list(split(self.core.take() if self.core.out else b""))


def split(data: bytes) -> Any:
    while data:
        first, flags, stream = h2.unpack_head(data, 0)
        end = 9 + (first >> 8)
        yield first & 255, flags, stream, data[9:end]
        data = data[end:]


def greeted(limits: CoreLimits | None = None) -> Recorder:
    recorder = Recorder(limits)
    recorder.receive(h2.PREFACE, h2.settings({}))
    recorder.core.out.clear()
    return recorder


def headers(number: int, flags: int = 5, block: bytes | None = None) -> bytes:
    return h2.frame(h2.HEADERS, flags, number, literals(FIELDS) if block is None else block)


def a_session() -> bytes:
    encoder = Encoder()
    parts = [h2.PREFACE, h2.settings({h2.INITIAL_WINDOW_SIZE: 100})]
    for number in (1, 3, 5, 7):
        block = encoder.encode(FIELDS)
        if number == 5:
            parts.append(h2.frame(h2.HEADERS, 0, number, block[:2]))
            parts.append(h2.frame(h2.CONTINUATION, 4, number, block[2:]))
        else:
            parts.append(
                h2.frame(h2.HEADERS, 4 | 8 | 32, number, b"\3" + bytes(5) + block + bytes(3))
            )
        parts.append(h2.frame(h2.DATA, 8, number, b"\2hello\0\0"))
        parts.append(h2.frame(h2.PING, 0, 0, b"12345678"))
        if number != 7:
            parts.append(h2.frame(h2.DATA, 1, number, b"x" * 500))
    parts += [h2.rst_stream(7, ErrorCode.CANCEL), h2.window_update(0, 10), h2.frame(77, 1, 9, b"?")]
    return b"".join(parts)


SESSION = a_session()


@given(st.lists(st.integers(0, len(SESSION)), max_size=30))
def test_any_chunking_gives_the_same_events(cuts: list[int]) -> None:
    whole, cut = Recorder(), Recorder()
    whole.receive(SESSION)
    edges = sorted([0, *cuts, len(SESSION)])
    for start, end in pairwise(edges):
        cut.receive(SESSION[start:end])
    assert cut.events == whole.events
    assert len(whole.events) == 4 + 7 + 1
    assert cut.sent == whole.sent


def test_byte_by_byte() -> None:
    whole, cut = Recorder(), Recorder()
    whole.receive(SESSION)
    for at in range(len(SESSION)):
        cut.receive(SESSION[at : at + 1])
    assert cut.events == whole.events


@settings(max_examples=300)
@given(st.data())
def test_mutated_frames_break_nothing(data: st.DataObject) -> None:
    broken = bytearray(SESSION)
    for _ in range(data.draw(st.integers(1, 6))):
        broken[data.draw(st.integers(24, len(broken) - 1))] = data.draw(st.integers(0, 255))
    recorder = Recorder()
    try:
        recorder.receive(bytes(broken))
    except ConnectionRefused:
        pass
    assert len(recorder.core._rest) <= len(SESSION)


@given(st.binary(max_size=3000))
def test_random_bytes_break_nothing(data: bytes) -> None:
    recorder = greeted()
    try:
        recorder.receive(data)
    except ConnectionRefused:
        pass


def test_other_protocols_are_seen_at_their_first_byte() -> None:
    with pytest.raises(NotHttp2):
        Recorder().receive(b"G")


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([h2.frame(h2.DATA, 0, 0, b"x")], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.DATA, 0, 3, b"x")], ErrorCode.PROTOCOL_ERROR),
        ([headers(2)], ErrorCode.PROTOCOL_ERROR),
        ([headers(1, 0), h2.frame(h2.PING, 0, 0, bytes(8))], ErrorCode.PROTOCOL_ERROR),
        ([headers(1, block=b"\xff\xff\xff\xff\xff\xff")], ErrorCode.COMPRESSION_ERROR),
        ([headers(1, 0), *[h2.frame(h2.CONTINUATION, 0, 1)] * 20], ErrorCode.ENHANCE_YOUR_CALM),
        ([h2.frame(h2.CONTINUATION, 4, 1)], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.PING, 0, 0, b"x")], ErrorCode.FRAME_SIZE_ERROR),
        ([h2.frame(h2.SETTINGS, 0, 0, b"x")], ErrorCode.FRAME_SIZE_ERROR),
        ([h2.settings({h2.INITIAL_WINDOW_SIZE: 2**31})], ErrorCode.FLOW_CONTROL_ERROR),
        ([h2.settings({h2.MAX_FRAME_SIZE: 1})], ErrorCode.PROTOCOL_ERROR),
        ([h2.window_update(0, 0)], ErrorCode.PROTOCOL_ERROR),
        ([h2.window_update(0, 2**31 - 1)], ErrorCode.FLOW_CONTROL_ERROR),
        ([h2.window_update(9, 1)], ErrorCode.PROTOCOL_ERROR),
        ([h2.rst_stream(9, ErrorCode.CANCEL)], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.PUSH_PROMISE, 4, 1, bytes(4))], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.DATA, 0, 1, bytes(16385))], ErrorCode.FRAME_SIZE_ERROR),
        ([headers(1, 4), h2.frame(h2.DATA, 8, 1, b"\5a")], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.PING, 0, 0, bytes(8))] * 1500, ErrorCode.ENHANCE_YOUR_CALM),
        ([h2.settings({})] * 1500, ErrorCode.ENHANCE_YOUR_CALM),
        (
            [headers(n, 4) + h2.rst_stream(n, ErrorCode.CANCEL) for n in range(1, 3001, 2)],
            ErrorCode.ENHANCE_YOUR_CALM,
        ),
        ([headers(1, 4), *[h2.frame(h2.DATA, 0, 1)] * 1500], ErrorCode.ENHANCE_YOUR_CALM),
    ],
)
def test_broken_connections_end(frames: list[bytes], code: ErrorCode) -> None:
    recorder = greeted()
    with pytest.raises(ConnectionRefused) as refused:
        recorder.receive(*frames)
    assert refused.value.code is code


def test_first_comes_settings() -> None:
    with pytest.raises(ConnectionRefused):
        Recorder().receive(h2.PREFACE, headers(1))


def test_too_many_streams_are_refused_one_by_one() -> None:
    recorder = greeted(CoreLimits(streams=1))
    recorder.receive(headers(1), headers(3))
    assert recorder.sent == [(h2.RST_STREAM, 0, 3, b"\0\0\0\7")]
    assert [event[1] for event in recorder.events] == [1]


def test_answers_wait_for_both_windows() -> None:
    recorder = greeted()
    recorder.receive(h2.settings({h2.INITIAL_WINDOW_SIZE: 10}), headers(1), headers(3))
    recorder.core.out.clear()
    for number in (1, 3):
        recorder.core.answer(recorder.core.streams[number], b"\x88", b"y" * 25, b"\x88")
    assert [(f[0], f[2], len(f[3])) for f in recorder.sent] == [
        *((1, 1, 1), (0, 1, 10), (1, 3, 1), (0, 3, 10)),
    ]
    recorder.receive(h2.window_update(1, 15))
    assert [(f[0], f[1], len(f[3])) for f in recorder.sent] == [(0, 0, 15), (1, 5, 1)]
    assert ("sent", 1) in recorder.events
    assert set(recorder.core.streams) == {3}
    recorder.receive(h2.settings({h2.INITIAL_WINDOW_SIZE: 100}))
    assert [f[0] for f in recorder.sent] == [h2.SETTINGS, h2.DATA, h2.HEADERS]
    assert not recorder.core.streams
    assert not recorder.core.waiting


def test_what_a_peer_may_send_ahead_is_bounded() -> None:
    limits = CoreLimits(stream_window=1000)
    recorder = greeted(limits)
    recorder.receive(headers(1, 4))
    for _ in range(10):
        recorder.receive(h2.frame(h2.DATA, 0, 1, bytes(900)))
    assert {f[0] for f in recorder.sent} == {h2.WINDOW_UPDATE}
    recorder.receive(h2.frame(h2.DATA, 0, 1, bytes(2000)))
    assert recorder.sent == [(h2.RST_STREAM, 0, 1, b"\0\0\0\3")]
    assert recorder.events[-1] == ("reset", 1)


def test_after_goodbye_new_streams_are_ignored() -> None:
    recorder = greeted()
    recorder.receive(headers(1, 4))
    recorder.core.leave()
    recorder.receive(headers(3, 4), h2.frame(h2.DATA, 1, 3, b"x"), h2.frame(h2.DATA, 1, 1, b"y"))
    assert [event[1] for event in recorder.events] == [1, 1]
    assert recorder.sent == [(h2.GOAWAY, 0, 0, b"\0\0\0\1\0\0\0\0")]


@given(st.lists(st.lists(st.sampled_from(range(12)), max_size=6), max_size=12))
def test_remembered_blocks_mean_what_they_said(requests: list[list[int]]) -> None:
    encoder, reader = Encoder(), HeaderReader(list, 65536)
    for fields in requests * 2:
        pairs = [(b"n%d" % n, b"v%d" % (n * n)) for n in fields]
        assert reader.read(encoder.encode(pairs)) == pairs


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([h2.frame(h2.PRIORITY, 0, 3, b"\0\0\0\3\x10")], ErrorCode.PROTOCOL_ERROR),
        ([headers(1, 5 | 32, b"\0\0\0\1\x10" + literals(FIELDS))], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.PRIORITY, 0, 3, b"\0\0")], ErrorCode.FRAME_SIZE_ERROR),
        ([h2.frame(h2.SETTINGS, 0, 1)], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.SETTINGS, 1, 0, bytes(6))], ErrorCode.FRAME_SIZE_ERROR),
        ([h2.frame(h2.GOAWAY, 0, 0, b"x")], ErrorCode.FRAME_SIZE_ERROR),
        ([h2.frame(h2.GOAWAY, 0, 1, bytes(8))], ErrorCode.PROTOCOL_ERROR),
        ([h2.frame(h2.RST_STREAM, 0, 1, b"x")], ErrorCode.FRAME_SIZE_ERROR),
        ([h2.frame(h2.WINDOW_UPDATE, 0, 0, b"x")], ErrorCode.FRAME_SIZE_ERROR),
        ([headers(1, 4), h2.frame(h2.DATA, 8, 1)], ErrorCode.FRAME_SIZE_ERROR),
        ([h2.frame(200, 0, 0)] * 1500, ErrorCode.ENHANCE_YOUR_CALM),
        ([h2.frame(h2.PING, 1, 0, bytes(8))] * 1500, ErrorCode.ENHANCE_YOUR_CALM),
        ([headers(n, 4) for n in range(1, 4001, 2)], ErrorCode.ENHANCE_YOUR_CALM),
        # Streams that the server has to reset because of what the client sends on them.
        (
            [headers(n, 4) + h2.window_update(n, 0) for n in range(1, 3001, 2)],
            ErrorCode.ENHANCE_YOUR_CALM,
        ),
        ([headers(1, 5), *[h2.frame(h2.DATA, 0, 1, b"x")] * 1500], ErrorCode.ENHANCE_YOUR_CALM),
    ],
)
def test_more_broken_connections_end(frames: list[bytes], code: ErrorCode) -> None:
    recorder = greeted()
    with pytest.raises(ConnectionRefused) as refused:
        recorder.receive(*frames)
    assert refused.value.code is code


def test_settings_count_once_however_often_they_are_named() -> None:
    recorder = greeted()
    recorder.receive(headers(1))
    many = h2.SETTING.pack(h2.INITIAL_WINDOW_SIZE, 7) * 2000
    recorder.receive(h2.frame(h2.SETTINGS, 0, 0, many + h2.SETTING.pack(h2.INITIAL_WINDOW_SIZE, 9)))
    assert recorder.core.streams[1].send_window == 9


def test_a_bomb_of_headers_is_not_unpacked() -> None:
    bomb = Encoder().encode([(b"x-large", b"y" * 3000)]) + b"\xbe" * 4000
    with pytest.raises(ConnectionRefused) as refused:
        greeted().receive(headers(1, block=bomb))
    assert refused.value.code is ErrorCode.COMPRESSION_ERROR


def open_wide() -> Recorder:
    recorder = greeted()
    wide = h2.settings({h2.INITIAL_WINDOW_SIZE: 2**31 - 1})
    recorder.receive(wide, h2.window_update(0, 2**30), headers(1), headers(3))
    recorder.core.out.clear()
    return recorder


def test_large_answers_leave_in_parts_and_in_turns() -> None:
    recorder = open_wide()
    core = recorder.core
    for number in (1, 3):
        core.answer(core.streams[number], b"\x88", bytes(3_000_000), b"\x88")
    sizes = []
    while core.more or core.out:
        if core.more:
            core.pump()
        parts = recorder.sent
        sizes.append(sum(len(part[3]) for part in parts))
        assert {part[2] for part in parts} == {1, 3} or not core.streams
    assert sum(sizes) == 2 * 3_000_002
    assert max(sizes) < 1_100_000
    assert not core.streams
    assert not core.waiting


def test_every_one_of_many_large_answers_has_its_turn() -> None:
    recorder, numbers = open_wide(), range(5, 85, 2)
    recorder.receive(*[headers(number) for number in numbers])
    core = recorder.core
    core.out.clear()
    for number in numbers:
        core.answer(core.streams[number], b"\x88", bytes(500_000), b"\x88")
    served: set[int] = set()
    sent = 0
    while sent < 4_000_000:
        core.pump()
        parts = [part for part in recorder.sent if part[0] == h2.DATA]
        served |= {part[2] for part in parts}
        sent += sum(len(part[3]) for part in parts)
    # None is behind by more than a turn, and few are through.
    assert served == set(numbers)
    assert len(core.waiting) > 30


def test_nothing_large_leaves_while_the_way_is_full() -> None:
    recorder = open_wide()
    core = recorder.core
    core.corked = True
    core.answer(core.streams[1], b"\x88", b"answer", b"\x88")
    assert [part[0] for part in recorder.sent] == [h2.HEADERS]
    recorder.receive(h2.window_update(0, 1), h2.frame(h2.PING, 0, 0, bytes(8)))
    assert [part[0] for part in recorder.sent] == [h2.PING]
    core.corked = False
    core.pump()
    assert [part[0] for part in recorder.sent] == [h2.DATA, h2.HEADERS]
    assert ("sent", 1) in recorder.events


def test_streams_on_their_way_at_the_first_goodbye_are_taken() -> None:
    recorder = greeted()
    recorder.receive(headers(1))
    recorder.core.retire()
    first, ping = recorder.sent
    assert first[3][:4] == b"\x7f\xff\xff\xff"
    recorder.receive(headers(3), h2.frame(h2.PING, 1, 0, ping[3]), headers(5))
    assert [event[1] for event in recorder.events] == [1, 3]
    assert [part[3][:4] for part in recorder.sent] == [b"\0\0\0\3"]


def test_when_a_frame_began_that_does_not_end() -> None:
    recorder = greeted()
    core, whole = recorder.core, headers(1, 0)
    core.receive(whole[:5], 1.0)
    core.receive(whole[5:12], 2.0)
    assert core.partial_since == 1.0
    # The block of headers is as unfinished as the frame was.
    core.receive(whole[12:], 3.0)
    core.receive(h2.frame(h2.CONTINUATION, 0, 1), 4.0)
    assert core.partial_since == 1.0
    core.receive(h2.frame(h2.CONTINUATION, 4, 1), 5.0)
    assert core.partial_since is None
    core.receive(h2.frame(h2.DATA, 1, 1, b"x") + b"\0", 6.0)
    assert core.partial_since == 6.0


def test_answers_earn_what_cancellations_cost() -> None:
    recorder = greeted()
    for number in range(1, 8001, 4):
        recorder.receive(headers(number))
        recorder.core.answer(recorder.core.streams[number], b"\x88", b"", b"\x88")
        recorder.receive(headers(number + 2, 4), h2.rst_stream(number + 2, ErrorCode.CANCEL))
        recorder.core.out.clear()
