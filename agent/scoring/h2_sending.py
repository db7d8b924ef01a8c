"""The sending half of one HTTP/2 connection (RFC 9113) without any I/O: answers wait here for the
peer's windows and for the way to it."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from . import h2_frames as h2
from .h2_frames import ErrorCode

# Of what waits: given out in one go, and of one stream before others have their turn.
_AT_ONCE = 1024 * 1024
_TURN = 64 * 1024
_BUDGET_PER_ANSWER = 2.0
_HEAD = h2.pack_head
_LAST = h2.END_HEADERS | h2.END_STREAM
_GOODBYE = b"goodbye!"


class Stream:
    """`call` is the sink's. `queue`: data that waits to be sent, then `trailers`; `sent`: of the
    data since there is a queue. `watched` is whoever's who looks at progress."""

    __slots__ = (
        "call",
        "id",
        "queue",
        "receive_window",
        "remote_ended",
        "send_window",
        "sent",
        "trailers",
        "unread",
        "watched",
    )

    def __init__(self, number: int, receive_window: int, send_window: int) -> None:
        self.id = number
        self.receive_window = receive_window
        self.send_window = send_window
        self.unread = 0
        self.remote_ended = False
        self.queue: deque[bytes | memoryview] | None = None
        self.sent = 0
        self.trailers: bytes | None = None
        self.watched: tuple[float, int] | None = None
        self.call: Any = None


class SendingSink(Protocol):
    """What the sending half tells."""

    def on_sent(self, stream: Stream) -> None:
        """All that had waited of the stream's data is on its way."""


class Sending:
    """`out` holds what is to be sent, until `take`. `more`: something waits that `pump` may send
    after that. `corked`: nothing but control frames and small answers' headers leaves,
    because the way to the peer is full."""

    def __init__(self, sink: SendingSink, greeting: list[bytes]) -> None:
        self._sent_to = sink
        self.streams: dict[int, Stream] = {}
        self.waiting: dict[int, Stream] = {}
        self.out = greeting
        self.more = self.corked = False
        self.leaving = self.retiring = self.closed = False
        self.pinging = False
        # The last stream that was taken.
        self.last = 0
        self._send_window = self._initial_send = h2.DEFAULT_WINDOW
        self._max_frame = h2.MAX_FRAME
        self._earned = 0.0
        # Of large answers, in `out`.
        self._given = 0

    def take(self) -> bytes:
        """What is to be sent now."""
        out, self.out = self.out, []
        self._given = 0
        return out[0] if len(out) == 1 else b"".join(out)

    def answer(self, stream: Stream, head: bytes, data: bytes, trailers: bytes) -> None:
        """A whole answer: two encoded blocks of headers and what is between them."""
        size, number = len(data), stream.id
        if (
            size <= self._max_frame
            and size <= self._send_window
            and size <= stream.send_window
            and not self.corked
            and stream.queue is None
            and number in self.streams
        ):
            self._send_window -= size
            self.out.append(
                b"".join(
                    (
                        _HEAD(len(head) << 8 | h2.HEADERS, h2.END_HEADERS, number),
                        head,
                        _HEAD(size << 8, 0, number),
                        data,
                        _HEAD(len(trailers) << 8 | h2.HEADERS, _LAST, number),
                        trailers,
                    )
                )
            )
            self._done(stream)
            return
        self.head(stream, head)
        self._queue(stream, data)
        self.end(stream, trailers)
        self.pump()

    def head(self, stream: Stream, block: bytes, *, last: bool = False) -> None:
        """`last`: with nothing after it."""
        if stream.id in self.streams:
            self._headers_out(stream, block, h2.END_STREAM if last else 0)
            if last:
                self._done(stream)

    def _headers_out(self, stream: Stream, block: bytes, flags: int) -> None:
        kind = h2.HEADERS
        while len(block) > h2.MAX_FRAME:
            self.out.append(h2.frame(kind, flags, stream.id, block[: h2.MAX_FRAME]))
            block, kind, flags = block[h2.MAX_FRAME :], h2.CONTINUATION, 0
        self.out.append(h2.frame(kind, flags | h2.END_HEADERS, stream.id, block))

    def data(self, stream: Stream, data: bytes) -> None:
        """Sent as far as the windows allow; the rest waits in `Stream.queue`."""
        self._queue(stream, data)
        self.pump()

    def _queue(self, stream: Stream, data: bytes) -> None:
        if stream.id not in self.streams or not data:
            return
        if stream.queue is None:
            stream.queue = deque()
            stream.sent = 0
            stream.watched = None
            self.waiting[stream.id] = stream
        stream.queue.append(data)

    def end(self, stream: Stream, trailers: bytes) -> None:
        """After whatever waits."""
        if stream.id not in self.streams:
            return
        if stream.queue is not None:
            stream.trailers = trailers
            return
        self._headers_out(stream, trailers, h2.END_STREAM)
        self._done(stream)

    def pump(self) -> None:
        """Send what waits, in turns, as far as the windows allow and not everything at once."""
        self.more = False
        progress = bool(self.waiting) and not self.corked
        while progress:
            progress = False
            for stream in tuple(self.waiting.values()):
                room = _AT_ONCE - self._given
                if room <= 0:
                    self.more = True
                    return
                size = self._send_part(stream, min(room, _TURN))
                self._given += size
                progress = progress or size > 0
                if size and self.waiting.pop(stream.id, None) is not None:
                    # Behind those that this time's share does not reach.
                    self.waiting[stream.id] = stream

    def _send_part(self, stream: Stream, most: int) -> int:
        queue, before = stream.queue, most
        while queue:
            data = queue[0]
            size = min(len(data), most, self._max_frame, self._send_window, stream.send_window)
            if size <= 0:
                return before - most
            most -= size
            self._send_window -= size
            stream.send_window -= size
            stream.sent += size
            if size == len(data):
                queue.popleft()
                self.out.append(h2.frame(h2.DATA, 0, stream.id, data))
            else:
                # Parts of large answers are not copied again for every frame.
                whole = memoryview(data)
                queue[0] = whole[size:]
                self.out.append(h2.frame(h2.DATA, 0, stream.id, whole[:size]))
        stream.queue = None
        self.waiting.pop(stream.id, None)
        if stream.trailers is not None and stream.id in self.streams:
            self._headers_out(stream, stream.trailers, h2.END_STREAM)
            self._done(stream)
        self._sent_to.on_sent(stream)
        return before - most

    def _done(self, stream: Stream) -> None:
        self._earned += _BUDGET_PER_ANSWER
        del self.streams[stream.id]
        if not stream.remote_ended:
            # It need not send the rest.
            self.out.append(h2.rst_stream(stream.id, ErrorCode.NO_ERROR))

    def drop(self, stream: Stream) -> None:
        """Forget what waits of a stream that is gone."""
        stream.queue = None
        self.waiting.pop(stream.id, None)

    def ping(self) -> None:
        self.pinging = True
        self.out.append(h2.frame(h2.PING, 0, 0, b"gatelet?"))

    def retire(self) -> None:
        """Ask for no more streams, and take those that are on their way until the peer has
        answered; `leave` follows (RFC 9113, section 6.8)."""
        if not self.leaving and not self.retiring:
            self.retiring = True
            self.out.append(h2.goaway(h2.LARGEST_WINDOW, ErrorCode.NO_ERROR))
            self.out.append(h2.frame(h2.PING, 0, 0, _GOODBYE))

    def pinged_back(self, payload: bytes) -> None:
        """The peer answered a PING."""
        self.pinging = False
        if payload == _GOODBYE and self.retiring:
            self.leave()

    def leave(self, code: ErrorCode = ErrorCode.NO_ERROR, text: str = "") -> None:
        """Take no more streams; the ones that are open go on unless `code` is an error."""
        if not self.closed and (not self.leaving or code):
            self.out.append(h2.goaway(self.last, code, text))
        self.leaving = True
        self.closed = self.closed or bool(code)
