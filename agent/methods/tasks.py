"""Long work that direct methods start: bounded in number and time, its outcome kept for a while."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..redaction import redact

log = logging.getLogger(__name__)

TASKS_AT_ONCE = 4
TASKS_KEPT = 64
TASK_SECONDS = 600.0

TaskState = Literal["NotStarted", "Running", "Completed", "Cancelled", "Failed", "Unknown"]


class TooBusy(Exception):
    """Too many tasks run already."""


class TaskFailed(Exception):
    """The work did not succeed; the message is for people and holds no secret."""


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """edgeAgent's answer to GetTaskStatus."""

    id: str
    state: TaskState
    message: str = ""

    def document(self) -> dict[str, Any]:
        return {"status": self.state, "message": self.message, "correlationId": self.id}


class BackgroundTasks:
    """Runs on one event loop. Outcomes live as long as the process, the newest `TASKS_KEPT`."""

    def __init__(self, at_once: int = TASKS_AT_ONCE, seconds: float = TASK_SECONDS) -> None:
        self._at_once = at_once
        self._seconds = seconds
        self._running: dict[str, asyncio.Task[None]] = {}
        self._known: dict[str, TaskStatus] = {}

    def start(self, name: str, work: Callable[[], Awaitable[None]]) -> TaskStatus:
        """Begin `work`, which raises TaskFailed when it fails. Raises TooBusy."""
        if len(self._running) >= self._at_once:
            raise TooBusy(f"{len(self._running)} tasks are running; try again later")
        status = TaskStatus(str(uuid.uuid4()), "Running")
        self._keep(status)
        self._running[status.id] = asyncio.ensure_future(self._run(status, name, work))
        return status

    def status(self, task: str) -> TaskStatus:
        """`Unknown` for a task of an earlier life of the process, too."""
        return self._known.get(task, TaskStatus(task, "Unknown"))

    async def close(self) -> None:
        """Cancel what runs and wait for its end."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _keep(self, status: TaskStatus) -> None:
        self._known[status.id] = status
        ended = [task for task in self._known if task not in self._running]
        for task in ended[: max(0, len(self._known) - TASKS_KEPT)]:
            if task != status.id:
                del self._known[task]

    async def _run(self, begun: TaskStatus, name: str, work: Callable[[], Awaitable[None]]) -> None:
        job = asyncio.ensure_future(work())
        try:
            await asyncio.wait({job}, timeout=self._seconds)
            if not job.done():
                raise TaskFailed(f"not done after {self._seconds:g} s")
            await job
        except asyncio.CancelledError:
            ended = replace(begun, state="Cancelled", message=f"{name}: the agent is stopping")
        except TaskFailed as error:
            ended = replace(begun, state="Failed", message=f"{name}: {redact(str(error))}")
        except Exception as error:
            # A defect must be told to whoever asks for the outcome, and must not go unseen.
            log.exception("%s: unexpected error", name)
            text = f"{name}: unexpected {type(error).__name__}; see the agent's log"
            ended = replace(begun, state="Failed", message=text)
        else:
            ended = replace(begun, state="Completed")
        finally:
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)
            self._running.pop(begun.id, None)
        self._keep(ended)
        log.info("task %s: %s", ended.id, f"{ended.state} {ended.message}".strip())
