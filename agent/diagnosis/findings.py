"""What a check found, and running many checks at once with a time limit on each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["ok", "warning", "error", "skipped"]

CHECK_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """`fix` says what to do next; empty where nothing is wrong."""

    name: str
    level: Level
    message: str
    fix: str = ""

    def document(self) -> dict[str, str]:
        return {"name": self.name, "status": self.level, "message": self.message, "fix": self.fix}


@dataclass(frozen=True, slots=True)
class Check:
    """`run` may block; it returns (level, message, fix) and raises OSError at most."""

    name: str
    run: Callable[[], tuple[Level, str, str]]


Outcome = tuple[Level, str, str]


def ok(message: str) -> Outcome:
    return "ok", message, ""


def warning(message: str, fix: str) -> Outcome:
    return "warning", message, fix


def error(message: str, fix: str) -> Outcome:
    return "error", message, fix


def skipped(message: str) -> Outcome:
    return "skipped", message, ""


def run_checks(checks: Sequence[Check], seconds: float = CHECK_SECONDS) -> Iterator[Finding]:
    """All checks side by side; findings in the order of `checks`, each as soon as it is there.

    A check that takes longer than `seconds` is an error and is left behind: its thread ends with
    the process.
    """
    started = time.monotonic()
    running = [_Running(check) for check in checks]
    for job in running:
        yield job.finding(started + seconds - time.monotonic(), seconds)


class _Running:
    def __init__(self, check: Check) -> None:
        self._check = check
        self._result: Outcome | None = None
        self._thread = threading.Thread(target=self._run, name=check.name, daemon=True)
        self._thread.start()

    def finding(self, left: float, seconds: float) -> Finding:
        self._thread.join(max(0.0, left))
        outcome = self._result
        if outcome is None:
            outcome = error(
                f"no answer within {seconds:g} s", "look at what this check reaches for, then retry"
            )
        return Finding(self._check.name, *outcome)

    def _run(self) -> None:
        try:
            self._result = self._check.run()
        except OSError as failure:
            self._result = error(str(failure), "see the message")


def summary(findings: Sequence[Finding]) -> dict[str, Any]:
    """The document of `gatelet check --json`."""
    count = {level: sum(f.level == level for f in findings) for level in ("ok", "warning", "error")}
    return {
        "checks": [finding.document() for finding in findings],
        "ok": count["ok"],
        "warnings": count["warning"],
        "errors": count["error"],
    }
