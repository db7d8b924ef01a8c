"""The server's side of one HTTP/2 connection (RFC 9113) without any I/O: bytes in, calls of a sink
and bytes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from . import h2_frames as h2
from .h2_frames import (
    DATA,
    END_STREAM,
    HEADERS,
    LARGEST_WINDOW,
    PADDED,
    ConnectionRefused,
    ErrorCode,
    NotHttp2,
    unpack_head,
)
from .h2_headers import HeaderReader
from .h2_sending import Sending, SendingSink, Stream

H = TypeVar("H")
H_contra = TypeVar("H_contra", contravariant=True)

# What a peer may cost without asking for an answer (control frames, resets, streams refused): at
# once, and a second. Answers that it takes earn some.
_BUDGET = 1000.0
_BUDGET_PER_SECOND = 200.0
_MOST_CONTINUATIONS = 16
_LARGEST = h2.MAX_FRAME << 8 | 255
_WHOLE_HEADERS = h2.END_HEADERS | h2.END_STREAM


@dataclass(frozen=True, slots=True)
class CoreLimits:
    """`header_bytes`: of one encoded block; windows: bytes that a peer may send ahead."""

    streams: int = 128
    header_bytes: int = 64 * 1024
    header_list: int = 16 * 1024
    stream_window: int = 1024 * 1024
    connection_window: int = 4 * 1024 * 1024


class Sink(SendingSink, Protocol[H_contra]):
    """What a connection tells. The stream of `on_reset` takes no answer any more."""

    def on_headers(self, stream: Stream, head: H_contra, ended: bool) -> None: ...
    def on_data(self, stream: Stream, data: bytes, ended: bool) -> None: ...
    def on_reset(self, stream: Stream) -> None: ...


class Core(Sending, Generic[H]):
    """`partial_since`: when a frame or a block of headers began that has not ended, as told to
    `receive`; None between frames. `peer_leaves`: it will open no more streams."""

    def __init__(
        self, sink: Sink[H], headers: HeaderReader[H], limits: CoreLimits | None = None
    ) -> None:
        self._limits = limits = limits or CoreLimits()
        greeting = h2.settings(
            {
                h2.MAX_CONCURRENT_STREAMS: limits.streams,
                h2.INITIAL_WINDOW_SIZE: limits.stream_window,
                h2.MAX_HEADER_LIST_SIZE: limits.header_list,
            }
        )
        more = h2.window_update(0, limits.connection_window - h2.DEFAULT_WINDOW)
        super().__init__(sink, [greeting, more])
        self._sink = sink
        self._headers = headers
        # The last stream that the peer opened.
        self._seen = 0
        self.greeted = self.settled = self.peer_leaves = False
        self.partial_since: float | None = None
        self._rest = b""
        # Of a header block in several frames: stream, flags, what came, how many frames.
        self._block: tuple[int, int, bytearray] | None = None
        self._continuations = 0
        self._window = limits.connection_window
        self._unread = 0
        self._budget = _BUDGET
        self._at = 0.0
        self._now = 0.0
        self._opened = False
        # Whether frames may come in any order: settled, and no block of headers is open.
        self._ready = False

    def receive(self, data: bytes, now: float) -> None:
        """Raises ConnectionRefused and NotHttp2; nothing more may be received then."""
        self._now = now
        if self._rest:
            data = self._rest + data
        position = 0
        if not self.greeted:
            if data[: len(h2.PREFACE)] != h2.PREFACE[: len(data)]:
                raise NotHttp2
            if len(data) < len(h2.PREFACE):
                self._rest = data
                return
            self.greeted = True
            position = len(h2.PREFACE)
        size, began = len(data), position
        while size - position >= 9:
            first, flags, number = unpack_head(data, position)
            if first > _LARGEST:
                raise _size("a frame is too large")
            start = position + 9
            end = start + (first >> 8)
            if end > size or self.closed:
                break
            position = end
            kind, number = first & 255, number & LARGEST_WINDOW
            if not self._ready:
                self._frame(kind, flags, number, data, start, end)
            elif kind == DATA:
                self._data(flags, number, data, start, end)
            elif kind == HEADERS and flags | END_STREAM == _WHOLE_HEADERS and number & 1:
                self._whole_block(number, flags, data[start:end])
            else:
                self._frame(kind, flags, number, data, start, end)
        self._rest = data[position:]
        if self._opened:
            # Once for all windows that were opened together.
            self._opened = False
            self.pump()
        if not self._rest and self._block is None:
            self.partial_since = None
        elif self.partial_since is None or (position > began and self._block is None):
            self.partial_since = now

    def _frame(self, kind: int, flags: int, number: int, data: bytes, start: int, end: int) -> None:
        if self._block is not None and kind != h2.CONTINUATION:
            raise _broken("a block of headers is interrupted")
        if not self.settled and kind != h2.SETTINGS:
            raise _broken("the first frame must be SETTINGS")
        if kind == h2.DATA:
            self._data(flags, number, data, start, end)
        elif kind == h2.HEADERS:
            self._start_block(flags, number, data, start, end)
        elif kind == h2.WINDOW_UPDATE:
            self._window_update(number, data, start, end)
        else:
            self._control(kind, flags, number, data[start:end])

    def _control(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == h2.CONTINUATION:
            self._continue_block(flags, number, payload)
            return
        if kind == h2.RST_STREAM:
            self._reset(number, payload)
            return
        if flags & h2.ACK and kind in (h2.PING, h2.SETTINGS):
            if number or len(payload) != (8 if kind == h2.PING else 0):
                raise _size()
            self.charge()
            if kind == h2.PING:
                self.pinged_back(payload)
            return
        self.charge()
        if kind == h2.SETTINGS:
            self._settings(number, payload)
        elif kind == h2.PING:
            if number:
                raise _broken("PING belongs to no stream")
            if len(payload) != 8:
                raise _size()
            self.out.append(h2.frame(h2.PING, h2.ACK, 0, payload))
        elif kind == h2.GOAWAY:
            if number:
                raise _broken("GOAWAY belongs to no stream")
            if len(payload) < 8:
                raise _size()
            self.peer_leaves = True
        elif kind == h2.PRIORITY:
            if not number:
                raise _broken("PRIORITY belongs to a stream")
            if len(payload) != 5:
                raise _size()
            _check_priority(number, payload, 0)
        elif kind == h2.PUSH_PROMISE:
            raise _broken("clients push nothing")

    def charge(self, cost: float = 1.0) -> None:
        """Of what a peer may cost us without asking for an answer. Raises ConnectionRefused."""
        earned, self._earned = self._earned, 0.0
        self._budget += (self._now - self._at) * _BUDGET_PER_SECOND + earned
        self._budget = min(self._budget, _BUDGET) - cost
        self._at = self._now
        if self._budget < 0:
            text = "too many frames that ask for nothing"
            raise ConnectionRefused(ErrorCode.ENHANCE_YOUR_CALM, text)

    def _data(self, flags: int, number: int, data: bytes, start: int, end: int) -> None:
        length = end - start
        self._window -= length
        if self._window < 0:
            raise _flow("more than the window allows")
        self._unread += length
        if self._unread > self._limits.connection_window // 2:
            self._window += self._unread
            self.out.append(h2.window_update(0, self._unread))
            self._unread = 0
        if flags & PADDED:
            start, end = _unpadded(data, start, end)
        stream = self.streams.get(number)
        if stream is None:
            if number > self._seen or not number & 1:
                raise _broken("DATA for a stream that is not open")
            # What was on its way when the stream ended; nobody has that much on its way for long.
            self.charge()
            return
        stream.receive_window -= length
        if stream.remote_ended or stream.receive_window < 0:
            ended = stream.remote_ended
            self.charge()
            code = ErrorCode.STREAM_CLOSED if ended else ErrorCode.FLOW_CONTROL_ERROR
            self.reset(stream, code, told=True)
            return
        if flags & END_STREAM:
            stream.remote_ended = True
            self._sink.on_data(stream, data[start:end], True)
            return
        if start == end:
            self.charge()
        # Padding is never read by anyone.
        stream.unread += length - (end - start)
        self._sink.on_data(stream, data[start:end], False)

    def consumed(self, stream: Stream, size: int) -> None:
        """`size` bytes of the stream's data make room for others."""
        stream.unread += size
        if stream.unread > self._limits.stream_window // 2 and not stream.remote_ended:
            stream.receive_window += stream.unread
            self.out.append(h2.window_update(stream.id, stream.unread))
            stream.unread = 0

    def _start_block(self, flags: int, number: int, data: bytes, start: int, end: int) -> None:
        if not number & 1:
            raise _broken("clients open streams with odd numbers")
        if flags & PADDED:
            start, end = _unpadded(data, start, end)
        if flags & h2.PRIORITISED:
            if start + 5 > end:
                raise _size()
            _check_priority(number, data, start)
            start += 5
        if flags & h2.END_HEADERS:
            self._whole_block(number, flags, data[start:end])
        else:
            self._continuations = 0
            self._block = (number, flags, bytearray(data[start:end]))
            self._ready = False

    def _continue_block(self, flags: int, number: int, payload: bytes) -> None:
        if self._block is None or self._block[0] != number:
            raise _broken("CONTINUATION of nothing")
        first, block = self._block[1], self._block[2]
        block += payload
        self._continuations += 1
        if len(block) > self._limits.header_bytes or self._continuations > _MOST_CONTINUATIONS:
            raise ConnectionRefused(ErrorCode.ENHANCE_YOUR_CALM, "the headers are too large")
        if flags & h2.END_HEADERS:
            self._block = None
            self._ready = True
            self._whole_block(number, first, bytes(block))

    def _whole_block(self, number: int, flags: int, block: bytes) -> None:
        # Read whatever becomes of it: the table must stay the same on both sides.
        head = self._headers.read(block)
        ended = bool(flags & h2.END_STREAM)
        stream = self.streams.get(number)
        if stream is not None:
            self._trailers(stream, ended)
            return
        if number <= self._seen:
            # Of a stream that we ended before these arrived.
            self.charge()
            return
        self._seen = number
        if self.closed or self.leaving:
            self.charge()
            return
        self.last = number
        limits = self._limits
        if len(self.streams) >= limits.streams:
            self.charge()
            self.out.append(h2.rst_stream(number, ErrorCode.REFUSED_STREAM))
            return
        stream = Stream(number, limits.stream_window, self._initial_send)
        stream.remote_ended = ended
        self.streams[number] = stream
        self._sink.on_headers(stream, head, ended)

    def _trailers(self, stream: Stream, ended: bool) -> None:
        if stream.remote_ended or not ended:
            self.charge()
            self.reset(stream, ErrorCode.PROTOCOL_ERROR, told=True)
            return
        stream.remote_ended = True
        self._sink.on_data(stream, b"", True)

    def _reset(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _size()
        if number > self._seen or not number & 1:
            raise _broken("RST_STREAM for a stream that is not open")
        self.charge()
        if (stream := self.streams.pop(number, None)) is not None:
            self.drop(stream)
            self._sink.on_reset(stream)

    def reset(self, stream: Stream, code: ErrorCode, *, told: bool = False) -> None:
        """`told`: the sink is to be told."""
        if self.streams.pop(stream.id, None) is not None:
            self.out.append(h2.rst_stream(stream.id, code))
            self.drop(stream)
            if told:
                self._sink.on_reset(stream)

    def _settings(self, number: int, payload: bytes) -> None:
        if number:
            raise _broken("SETTINGS belong to no stream")
        if len(payload) % 6:
            raise _size()
        self.settled = self._ready = True
        window = self._initial_send
        for key, value in h2.SETTING.iter_unpack(payload):
            if key == h2.INITIAL_WINDOW_SIZE:
                if value > h2.LARGEST_WINDOW:
                    raise _flow("a window is too large")
                window = value
            elif key == h2.MAX_FRAME_SIZE:
                if not h2.MAX_FRAME <= value < 2**24:
                    raise _broken("SETTINGS_MAX_FRAME_SIZE is out of range")
                self._max_frame = min(value, h2.LARGEST_SENT)
            elif key == h2.ENABLE_PUSH and value > 1:
                raise _broken("SETTINGS_ENABLE_PUSH is out of range")
        # Applied once, however often the frame names it.
        change, self._initial_send = window - self._initial_send, window
        if change:
            for stream in self.streams.values():
                stream.send_window += change
                if stream.send_window > h2.LARGEST_WINDOW:
                    raise _flow("a window is opened too far")
        self.out.append(h2.frame(h2.SETTINGS, h2.ACK, 0))
        self._opened = True

    def _window_update(self, number: int, data: bytes, start: int, end: int) -> None:
        if end - start != 4:
            raise _size()
        increment = h2.NUMBER.unpack_from(data, start)[0] & h2.LARGEST_WINDOW
        if not number:
            if not increment:
                raise _broken("a window is opened by nothing")
            self._send_window += increment
            if self._send_window > h2.LARGEST_WINDOW:
                raise _flow("a window is opened too far")
            self._opened = True
            return
        stream = self.streams.get(number)
        if stream is None:
            if number > self._seen or not number & 1:
                raise _broken("WINDOW_UPDATE for a stream that is not open")
            return
        stream.send_window += increment
        if not increment or stream.send_window > h2.LARGEST_WINDOW:
            self.charge()
            code = ErrorCode.FLOW_CONTROL_ERROR if increment else ErrorCode.PROTOCOL_ERROR
            self.reset(stream, code, told=True)
        else:
            self._opened = True


def _unpadded(data: bytes, start: int, end: int) -> tuple[int, int]:
    if start == end:
        raise _size()
    padding = data[start]
    if start + 1 + padding > end:
        raise _broken("the padding is larger than the frame")
    return start + 1, end - padding


def _check_priority(number: int, data: bytes, start: int) -> None:
    if h2.NUMBER.unpack_from(data, start)[0] & LARGEST_WINDOW == number:
        raise _broken("a stream cannot depend on itself")


def _broken(text: str) -> ConnectionRefused:
    return ConnectionRefused(ErrorCode.PROTOCOL_ERROR, text)


def _size(text: str = "a frame has the wrong size") -> ConnectionRefused:
    return ConnectionRefused(ErrorCode.FRAME_SIZE_ERROR, text)


def _flow(text: str) -> ConnectionRefused:
    return ConnectionRefused(ErrorCode.FLOW_CONTROL_ERROR, text)
