"""The steps under way: one task for each subject, their failures, their progress."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable

from .clock import Clock
from .manifest import Manifest
from .plan import (
    Collect,
    Failure,
    Load,
    Plan,
    Pull,
    RemoveImage,
    Step,
    Wanted,
    describe,
    subject,
)
from .restart_memory import RestartMemory
from .seams import DISK_FULL, Progress, StepFailed
from .steps import Executor
from .store import StateStore
from .store_types import StoreError
from .twin.backoff import full_jitter

log = logging.getLogger(__name__)


DISCARD_CAP_SECONDS = 3600.0


class StepTasks:
    """`failures` of the steps that are still wanted; `exposed` is the newest generation of which a
    model was loaded."""

    def __init__(
        self,
        store: StateStore,
        executor: Executor,
        clock: Clock,
        restarts: RestartMemory,
        retry_seconds: tuple[float, float],
        jitter: random.Random,
        changed: Callable[[], None],
    ) -> None:
        """`retry_seconds` are base and cap of the back-off; `changed` is called at each end."""
        self._store = store
        self._executor = executor
        self._clock = clock
        self._restarts = restarts
        self._retry_base, self._retry_cap = retry_seconds
        self._jitter = jitter
        self._changed = changed
        self._tasks: dict[str, tuple[Step, asyncio.Task[None]]] = {}
        self._progress: dict[str, Progress] = {}
        self._done_at: dict[Step, float] = {}
        self.failures: dict[Step, Failure] = {}
        self.exposed = 0
        self._newest = 0

    def running(self) -> tuple[Step, ...]:
        return tuple(step for step, _ in self._tasks.values())

    def progress(self) -> tuple[tuple[str, Progress], ...]:
        """How far the pulls under way are, by subject."""
        return tuple(sorted(self._progress.items()))

    async def stop(self) -> None:
        """Cancel what runs and wait for its end."""
        tasks = [task for _, task in self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def begin(self, generation: int) -> None:
        """The newest deployment: what could not succeed before it is tried once more for it."""
        if generation != self._newest:
            self._newest = generation
            self.failures = {step: f for step, f in self.failures.items() if f.retryable}

    def forget(self, current: Plan) -> None:
        """Drop what belongs to steps that nobody wants any more; stop their transfers."""
        planned = {*current.steps, *(failure.step for failure in current.blocked)}
        alive = planned | set(self.running())
        self.failures = {s: f for s, f in self.failures.items() if s in alive}
        for step, task in list(self._tasks.values()):
            if isinstance(step, Pull) and step not in planned:
                task.cancel()

    def start(
        self, generation: int, manifest: Manifest, wanted: Wanted, steps: Iterable[Step]
    ) -> None:
        """Begin those of `steps` whose subjects are free, for the deployment `generation`."""
        credentials = tuple(
            (c.address, c.username, c.password) for c in manifest.registry_credentials
        )
        # A step that was done and is planned again had no lasting effect (the process lost it, or
        # somebody undoes it): it must not spin.
        soonest = self._clock.monotonic() - self._retry_base
        self._done_at = {step: at for step, at in self._done_at.items() if at > soonest}
        instances = {module.instance for module in wanted.modules}
        for step in steps:
            if subject(step) not in self._tasks and step not in self._done_at:
                if isinstance(step, Load) and step.instance in instances:
                    self.exposed = generation
                task = asyncio.get_running_loop().create_task(
                    self._carry_out(generation, step, credentials)
                )
                self._tasks[subject(step)] = (step, task)

    async def _carry_out(
        self, generation: int, step: Step, credentials: tuple[tuple[str, str, str], ...]
    ) -> None:
        name = subject(step)

        def on_progress(progress: Progress) -> None:
            self._progress[name] = progress

        try:
            self._journal(generation, step, "started")
            self._restarts.starting(step, again=step in self.failures)
            await self._executor.run(step, credentials, on_progress)
            self._restarts.done(step)
        except StepFailed as error:
            self._note_failure(
                generation, step, str(error), retryable=error.retryable, code=error.code
            )
        except StoreError as error:
            self._note_failure(generation, step, str(error), retryable=True, code=DISK_FULL)
        except Exception as error:
            # A defect in one step must not stop the other modules: it is logged whole, reported,
            # and tried again with the usual back-off.
            log.exception("%s: unexpected error", describe(step))
            message = f"unexpected {type(error).__name__}: {error}; see the agent's log"
            self._note_failure(generation, step, message, retryable=True)
        else:
            self.failures.pop(step, None)
            self._done_at[step] = self._clock.monotonic()
            log.info("%s: done", describe(step))
            self._journal(generation, step, "done")
        finally:
            self._progress.pop(name, None)
            self._tasks.pop(name, None)
            self._changed()

    def _journal(self, generation: int, step: Step, outcome: str, message: str = "") -> None:
        # Nothing is decided by the journal: a full disk must not stop what could help.
        try:
            self._store.journal(generation, describe(step), outcome, message)
        except StoreError as error:
            log.error("%s", error)

    def _note_failure(
        self, generation: int, step: Step, message: str, *, retryable: bool, code: str = ""
    ) -> None:
        try:
            self._restarts.failed(step)
        except StoreError as error:
            log.error("%s", error)
        count = self.failures[step].count + 1 if step in self.failures else 1
        delay = full_jitter(
            count - 1,
            self._retry_base,
            # What keeps an image here is somebody's container: that is for long.
            DISCARD_CAP_SECONDS if isinstance(step, (Collect, RemoveImage)) else self._retry_cap,
            self._jitter,
        )
        retry_at = self._clock.monotonic() + delay
        self.failures[step] = Failure(step, count, retry_at, message, retryable, code)
        log.warning("%s failed (attempt %d): %s", describe(step), count, message)
        self._journal(generation, step, "failed", message)
