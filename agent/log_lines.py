"""Log lines: their prefix, choosing among them, the shape of edgeAgent's answers. No I/O."""

from __future__ import annotations

import gzip
import json
import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from .runtime.container import LogFilter, LogLine

DEFAULT_SEVERITY = 6
"""Lines without a prefix count as informational, as in edgeAgent."""

MATCHED_CHARACTERS = 4096
"""A regular expression looks at this much of a line."""

KEPT_BYTES = 16 * 1024 * 1024
"""Most of a log that is held at once: a device has little memory, and a container may say a lot."""
_LINE_OVERHEAD = 150

# The format that IoT Edge recommends to modules: <severity> yyyy-MM-dd HH:mm:ss.fff zzz text
_PREFIX = re.compile(
    r"(?:<([0-7])>)?\s*"
    r"(?:(\d{4}-\d{2}-\d{2})[ T](\d{2}:\d{2}:\d{2})(?:[.,](\d{1,9}))?\s?(Z|[+-]\d{2}:\d{2})\s)?"
    r"\s*(.*)",
    re.DOTALL | re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A line without its prefix. `at` is aware UTC, None where the line tells no time."""

    severity: int
    at: datetime | None
    text: str


def parse_line(line: str) -> Parsed:
    """Never fails: a line without the recommended prefix is all text."""
    found = _PREFIX.match(line)
    if found is None:
        return Parsed(DEFAULT_SEVERITY, None, line)
    severity, day, time, fraction, zone, text = found.groups()
    at = None
    if day is not None:
        micro = (fraction or "0")[:6].ljust(6, "0")
        offset = "+00:00" if zone == "Z" else zone
        try:
            at = datetime.fromisoformat(f"{day}T{time}.{micro}{offset}").astimezone(timezone.utc)
        except (ValueError, OverflowError):
            return Parsed(DEFAULT_SEVERITY, None, line)
    return Parsed(DEFAULT_SEVERITY if severity is None else int(severity), at, text)


@dataclass(frozen=True, slots=True)
class LineFilter:
    """`where` limits the lines read from the log; `severity` and `pattern` choose among them;
    its `tail` counts the chosen ones. A pattern may take long: see `methods/searching.py`."""

    where: LogFilter
    severity: int | None = None
    pattern: re.Pattern[str] | None = None

    @property
    def plain(self) -> bool:
        """Whether every line of `where` is taken, so that its tail may be taken early."""
        return self.severity is None and self.pattern is None

    def without_pattern(self) -> LineFilter:
        """What to read before the pattern is tried: then the tail must wait as well."""
        if self.pattern is None:
            return self
        return LineFilter(LogFilter(None, self.where.since, self.where.until), self.severity)

    def takes(self, line: LogLine) -> bool:
        return self.severity is None or parse_line(line.text).severity == self.severity


def within(line: LogLine, where: LogFilter) -> bool:
    """Whether the line's time is in the filter's span; lines without a time always are."""
    if line.at is None:
        return True
    after = where.since is None or line.at >= where.since
    return after and (where.until is None or line.at <= where.until)


class Choice:
    """The lines that a filter takes, its tail at most, and of these the newest `KEPT_BYTES`."""

    def __init__(self, wanted: LineFilter) -> None:
        self._wanted = wanted
        self._lines: deque[LogLine] = deque()
        self._size = 0

    def add(self, line: LogLine) -> None:
        wanted = self._wanted
        if not (within(line, wanted.where) and wanted.takes(line)):
            return
        self._lines.append(line)
        self._size += _size(line)
        tail = wanted.where.tail
        while self._lines and (
            self._size > KEPT_BYTES or (tail is not None and len(self._lines) > tail)
        ):
            self._size -= _size(self._lines.popleft())

    def lines(self) -> list[LogLine]:
        return list(self._lines)


def chosen(lines: Iterable[LogLine], wanted: LineFilter) -> list[LogLine]:
    """The same for lines that are there already."""
    choice = Choice(wanted)
    for line in lines:
        choice.add(line)
    return choice.lines()


def _size(line: LogLine) -> int:
    return len(line.text) + _LINE_OVERHEAD


def mentions(name: str) -> Callable[[str], bool]:
    """Whether a text names a module: as a word of its own, or as the start of an instance's."""
    pattern = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
    return lambda text: pattern.search(text) is not None


def as_text(lines: Iterable[LogLine]) -> str:
    return "".join(line.text + "\n" for line in lines)


def as_json(lines: Iterable[LogLine], hub: str, device: str, module: str) -> str:
    """edgeAgent's `ModuleLogMessage` array."""
    return json.dumps(
        [_message(line, hub, device, module) for line in lines],
        separators=(",", ":"),
        ensure_ascii=False,
    )


def _message(line: LogLine, hub: str, device: str, module: str) -> dict[str, Any]:
    parsed = parse_line(line.text)
    at = parsed.at or line.at
    return {
        "iothub": hub,
        "device": device,
        "id": module,
        "stream": line.stream,
        "loglevel": parsed.severity,
        "text": parsed.text,
        "timestamp": None if at is None else at.isoformat().replace("+00:00", "Z"),
    }


def encoded(text: str, *, gzipped: bool) -> bytes:
    body = text.encode("utf-8", "replace")
    # Without a time the same log gives the same bytes.
    return gzip.compress(body, mtime=0) if gzipped else body
