"""`gatelet run`: starts the device's processes, restarts those that die, and ends with them.

On a device systemd does this; here it is for containers, CI and laptops.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from .clock import Clock
from .endings import ending
from .file_lock import locked
from .twin.backoff import full_jitter

log = logging.getLogger(__name__)

RESTART_BASE_SECONDS = 0.1
RESTART_CAP_SECONDS = 10.0
STEADY_SECONDS = 60.0
"""A process that ran this long starts its back-off anew when it dies."""
STOP_SECONDS = 10.0
"""How long a process may take to end after SIGTERM."""


class AlreadyRunning(Exception):
    """Another supervisor has these processes; the message says how to get around it."""


def alone(run_dir: Path) -> AbstractContextManager[None]:
    """Two supervisors would start each other's processes over and over. Raises AlreadyRunning."""
    return locked(
        run_dir / "supervisor.lock",
        AlreadyRunning(
            f"another `gatelet run` serves {run_dir}; stop it, or give this one its own "
            "state-dir and run-dir"
        ),
    )


@dataclass(frozen=True, slots=True)
class Program:
    """One supervised process: its name and command line."""

    name: str
    command: tuple[str, ...]


class Supervisor:
    """Keeps `programs` running. `processes_file` always names the living ones with their pids."""

    def __init__(
        self,
        programs: Sequence[Program],
        processes_file: Path,
        clock: Clock,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._programs = tuple(programs)
        self._file = processes_file
        self._clock = clock
        self._environment = dict(os.environ if environment is None else environment)
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._restarts: dict[str, int] = {program.name: 0 for program in programs}
        self._jitter = random.Random()

    async def run(self, stop: asyncio.Event) -> None:
        """Run until `stop` is set, then end all processes in reverse order."""
        keepers = [asyncio.ensure_future(self._keep(program)) for program in self._programs]
        try:
            await stop.wait()
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)
            for program in reversed(self._programs):
                await self._end(program.name)
            self._file.unlink(missing_ok=True)

    async def _keep(self, program: Program) -> None:
        attempt = 0
        while True:
            started = self._clock.monotonic()
            try:
                process = await asyncio.create_subprocess_exec(
                    *program.command, env=self._environment, stdin=asyncio.subprocess.DEVNULL
                )
            except OSError as error:
                log.error("cannot start %s (%s): %s", program.name, program.command[0], error)
            else:
                self._running[program.name] = process
                self._note()
                log.info("%s started (pid %d)", program.name, process.pid)
                code = await process.wait()
                del self._running[program.name]
                log.warning("%s ended %s", program.name, ending(code))
            if self._clock.monotonic() - started > STEADY_SECONDS:
                attempt = 0
            self._restarts[program.name] += 1
            self._note()
            delay = full_jitter(attempt, RESTART_BASE_SECONDS, RESTART_CAP_SECONDS, self._jitter)
            attempt += 1
            await asyncio.sleep(delay)

    async def _end(self, name: str) -> None:
        process = self._running.pop(name, None)
        if process is None:
            return
        _signal(process.terminate)
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except asyncio.TimeoutError:
            log.error("%s did not end within %.0f s of SIGTERM; killing it", name, STOP_SECONDS)
            _signal(process.kill)
            await process.wait()

    def _note(self) -> None:
        state = {
            name: {"pid": process.pid, "restarts": self._restarts[name]}
            for name, process in self._running.items()
        }
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"supervisor": {"pid": os.getpid()}, **state}))
        temporary.replace(self._file)


def _signal(send: Callable[[], None]) -> None:
    try:
        send()
    except ProcessLookupError:
        # It ended between our look and our signal.
        pass
