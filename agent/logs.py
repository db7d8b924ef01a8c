"""The logs that gatelet's own processes keep in `state-dir/logs`: reading and following them."""

from __future__ import annotations

import asyncio
import heapq
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

from .log_lines import LineFilter, chosen, parse_line, within
from .runtime.container import LogFilter, LogLine

FOLLOW_SECONDS = 0.25
_CHUNK = 256 * 1024
_LONGEST_LINE = 64 * 1024
_START = datetime.min.replace(tzinfo=timezone.utc)


@dataclass(frozen=True, slots=True)
class LogPart:
    """Lines of one process's log; `about` chooses among them by their text."""

    role: str
    about: Callable[[str], bool] | None = None


class _Tail:
    """One process's log from its oldest file on; goes on where it ended, over rotations too."""

    def __init__(self, folder: Path, part: LogPart) -> None:
        self._path = folder / f"{part.role}.log"
        self._about = part.about
        self._file: BinaryIO | None = None
        self._rest = b""
        self._last: datetime | None = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def history(self) -> Iterator[LogLine]:
        """Everything up to now."""
        self._open()
        current = None if self._file is None else os.fstat(self._file.fileno()).st_ino
        for path in reversed(rotated(self._path)):
            try:
                with open(path, "rb") as file:
                    if os.fstat(file.fileno()).st_ino != current:
                        yield from self._lines(file)
            except FileNotFoundError:
                pass  # it was the oldest, and has just been rotated away
        yield from self.more()

    def more(self) -> Iterator[LogLine]:
        """What was added since."""
        if self._file is None and not self._open():
            return
        while self._file is not None:
            yield from self._lines(self._file)
            if self._is_current():
                return
            # Rotated: what was written to it before we looked comes first.
            yield from self._lines(self._file)
            self.close()
            self._open()

    def _open(self) -> bool:
        try:
            self._file = open(self._path, "rb")  # noqa: SIM115 (stays open between calls)
        except FileNotFoundError:
            return False
        return True

    def _is_current(self) -> bool:
        assert self._file is not None
        try:
            return os.stat(self._path).st_ino == os.fstat(self._file.fileno()).st_ino
        except FileNotFoundError:
            return True

    def _lines(self, file: BinaryIO) -> Iterator[LogLine]:
        while data := file.read(_CHUNK):
            *whole, self._rest = (self._rest + data).split(b"\n")
            if len(self._rest) > _LONGEST_LINE:
                whole.append(self._rest)
                self._rest = b""
            for raw in whole:
                text = raw.decode("utf-8", "replace")
                if self._about is None or self._about(text):
                    # Lines of another making (a library's) are as old as the line before.
                    self._last = parse_line(text).at or self._last
                    yield LogLine(self._last, "stderr", text)


def rotated(path: Path) -> list[Path]:
    """The older files of a log that exist, newest first."""
    found = []
    for older in path.parent.glob(f"{path.name}.*"):
        number = older.name[len(path.name) + 1 :]
        if number.isdecimal():
            found.append((int(number), older))
    return [older for _, older in sorted(found)]


def read_logs(folder: Path, parts: Sequence[LogPart], wanted: LogFilter) -> list[LogLine]:
    """The lines of all parts in the order of time, oldest first. Blocking. Raises OSError."""
    with ExitStack() as cleanup:
        tails = [_tail(folder, part, cleanup) for part in parts]
        return _history(tails, wanted)


async def follow_logs(
    folder: Path, parts: Sequence[LogPart], wanted: LogFilter
) -> AsyncIterator[LogLine]:
    """The same, and then every new line until the caller stops. Raises OSError."""
    with ExitStack() as cleanup:
        tails = [_tail(folder, part, cleanup) for part in parts]
        for line in await asyncio.to_thread(_history, tails, wanted):
            yield line
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            for line in _merged(tail.more() for tail in tails):
                if within(line, wanted):
                    yield line


def _tail(folder: Path, part: LogPart, cleanup: ExitStack) -> _Tail:
    tail = _Tail(folder, part)
    cleanup.callback(tail.close)
    return tail


def _history(tails: Sequence[_Tail], wanted: LogFilter) -> list[LogLine]:
    return chosen(_merged(tail.history() for tail in tails), LineFilter(wanted))


def _merged(parts: Iterable[Iterable[LogLine]]) -> Iterator[LogLine]:
    return heapq.merge(*parts, key=lambda line: line.at or _START)
