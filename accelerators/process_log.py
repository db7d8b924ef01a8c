"""A process's log in files of bounded size, with lines as edge modules log them:

    <6> 2026-11-21 05:47:00.123 +00:00 [INF] [component] text

The number is syslog's severity. Every physical line of a message carries the whole prefix, so that
readers never need the line before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import datetime, timezone
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

LEVELS = (
    (logging.CRITICAL, 2, "CRT"),
    (logging.ERROR, 3, "ERR"),
    (logging.WARNING, 4, "WRN"),
    (logging.INFO, 6, "INF"),
    (logging.NOTSET, 7, "DBG"),
)
PREFIXES = ("gatelet.agent.", "gatelet.accelerators.", "gatelet.")


class LineFormatter(logging.Formatter):
    """`clean` takes secrets out of the text."""

    def __init__(self, clean: Callable[[str], str] = str) -> None:
        super().__init__("%(message)s")
        self._clean = clean

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, timezone.utc)
        severity, word = next((s, w) for floor, s, w in LEVELS if record.levelno >= floor)
        prefix = next((p for p in PREFIXES if record.name.startswith(p)), "")
        component = record.name[len(prefix) :]
        stamp = f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03} +00:00"
        head = f"<{severity}> {stamp} [{word}] [{component}] "
        text = self._clean(super().format(record))
        return "\n".join(head + line for line in text.splitlines() or [""])


class BoundedLogFile(RotatingFileHandler):
    """`files` files of up to `max_bytes` each: PATH, PATH.1 and so on, the oldest last.

    Only the owner and the group may read them. Raises OSError when PATH cannot be opened.
    """

    def __init__(
        self, path: Path, max_bytes: int, files: int, clean: Callable[[str], str] = str
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        super().__init__(path, maxBytes=max_bytes, backupCount=files - 1, encoding="utf-8")
        self.setFormatter(LineFormatter(clean))

    def _open(self) -> IO[str]:  # type: ignore[override]
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
        return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        # A full disk must not flood standard error, which has the line anyway.
        pass
