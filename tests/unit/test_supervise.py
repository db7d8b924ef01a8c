"""The supervisor: real processes, restarted when they die, ended with it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from gatelet.agent.clock import SystemClock
from gatelet.agent.supervise import AlreadyRunning, Program, Supervisor, alone

SLEEPER = (sys.executable, "-c", "import signal; signal.pause()")
DEAF = (
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); "
    "[signal.pause() for _ in iter(int, 1)]",
)


def processes(file: Path) -> dict[str, Any]:
    return json.loads(file.read_bytes()) if file.exists() else {}


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not reached within 10 s")


@asynccontextmanager
async def supervised(file: Path, *programs: Program) -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.ensure_future(Supervisor(programs, file, SystemClock()).run(stop))
    try:
        yield
    finally:
        stop.set()
        await task


async def test_a_killed_program_is_started_again_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "processes.json"
    async with supervised(file, Program("a", SLEEPER), Program("b", SLEEPER)):
        await until(lambda: {"a", "b"} <= set(processes(file)))
        before = processes(file)
        os.kill(before["a"]["pid"], signal.SIGKILL)
        await until(lambda: processes(file).get("a", before["a"])["pid"] != before["a"]["pid"])
        after = processes(file)
        assert after["a"]["restarts"] == 1
        assert after["b"] == before["b"]
        assert after["supervisor"]["pid"] == os.getpid()


async def test_all_programs_end_with_the_supervisor(tmp_path: Path) -> None:
    file = tmp_path / "processes.json"
    async with supervised(file, Program("a", SLEEPER), Program("b", SLEEPER)):
        await until(lambda: {"a", "b"} <= set(processes(file)))
        pids = [entry["pid"] for name, entry in processes(file).items() if name != "supervisor"]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not file.exists()


async def test_a_program_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("gatelet.agent.supervise.STOP_SECONDS", 0.2)
    file = tmp_path / "processes.json"
    async with supervised(file, Program("deaf", DEAF)):
        await until(lambda: "deaf" in processes(file))
        pid = processes(file)["deaf"]["pid"]
        ignored = 1 << (signal.SIGTERM - 1)

        def deaf() -> bool:
            status = Path(f"/proc/{pid}/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("SigIgn"))
            return bool(int(line.split()[1], 16) & ignored)

        await until(deaf)
    assert not psutil.pid_exists(pid)


async def test_a_program_that_cannot_start_does_not_stop_the_others(tmp_path: Path) -> None:
    file = tmp_path / "processes.json"
    missing = Program("missing", (str(tmp_path / "nothing"),))
    async with supervised(file, missing, Program("a", SLEEPER)):
        await until(lambda: "a" in processes(file))
        assert "missing" not in processes(file)


def test_a_second_supervisor_of_the_same_processes_refuses(tmp_path: Path) -> None:
    refused = pytest.raises(AlreadyRunning, match=f"another `gatelet run` serves {tmp_path}")
    with alone(tmp_path), refused, alone(tmp_path):
        pass
    with alone(tmp_path):
        pass
