"""Docker's log stream, as lines. Source: Docker Engine API v1.41, "Attach", stream format."""

from __future__ import annotations

from collections.abc import Iterator

from .container import LogLine
from .inspection import parse_time

MAX_LINE = 1024 * 1024
"""Bytes; a longer line is cut into several."""

_STREAMS = {0: "stdout", 1: "stdout", 2: "stderr"}


class LogDecoder:
    """Feed it the bytes of a log asked for with `timestamps`.

    Without a terminal there is a frame per message, each led by its time; a long line comes as
    several messages without line end. With a terminal (`tty`) there are lines without frames.
    `last` is the time of the newest line as Docker wrote it, with nanoseconds.
    """

    def __init__(self, tty: bool) -> None:
        self._tty = tty
        self._raw = bytearray()
        self._open: dict[str, tuple[str, bytearray]] = {}
        self.last = ""

    def feed(self, data: bytes) -> Iterator[LogLine]:
        self._raw += data
        if self._tty:
            yield from self._lines()
            return
        while len(self._raw) >= 8:
            size = int.from_bytes(self._raw[4:8], "big")
            if len(self._raw) < 8 + size:
                return
            stream = _STREAMS.get(self._raw[0], "stdout")
            message = bytes(self._raw[8 : 8 + size])
            del self._raw[: 8 + size]
            yield from self._message(stream, message)

    def end(self) -> Iterator[LogLine]:
        """What came without a line end."""
        if self._tty and self._raw:
            self._raw += b"\n"
            yield from self._lines()
        for stream in list(self._open):
            yield self._close(stream)

    def _lines(self) -> Iterator[LogLine]:
        while (end := self._raw.find(b"\n")) >= 0 or len(self._raw) > MAX_LINE:
            length = end + 1 if end >= 0 else MAX_LINE
            message = bytes(self._raw[:length])
            del self._raw[:length]
            yield from self._message("stdout", message)

    def _message(self, stream: str, message: bytes) -> Iterator[LogLine]:
        time, _, text = message.partition(b" ")
        if stream not in self._open:
            self._open[stream] = (time.decode("ascii", "replace"), bytearray())
        line = self._open[stream][1]
        line += text
        if line.endswith(b"\n") or len(line) > MAX_LINE:
            yield self._close(stream)

    def _close(self, stream: str) -> LogLine:
        time, line = self._open.pop(stream)
        self.last = max(self.last, time)
        text = line.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
        return LogLine(parse_time(time), stream, text)
