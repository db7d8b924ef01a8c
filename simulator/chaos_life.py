"""One agent process on a virtual loop: the real Agent on simulated seams."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from ..agent.clock import Clock
from ..agent.config import (
    AgentConfig,
    DeviceConfig,
    DockerConfig,
    ImagesConfig,
    TelemetryConfig,
)
from ..agent.outbox import Limits, Outbox
from ..agent.process import Agent
from ..agent.reconcile import ReconcileSettings
from ..agent.runtime.container import ContainerRuntime
from ..agent.store import StateStore
from .chaos_device import MemoryImages, MemoryScoring
from .chaos_link import MemoryHubLink

DEVICE = "edge-1"
SETTINGS = ReconcileSettings(
    probation_seconds=30.0,
    retry_base_seconds=1.0,
    retry_cap_seconds=60.0,
    busy_poll_seconds=60.0,
    idle_poll_seconds=3600.0,
)
"""The agent's own, but it looks less often by itself: a thousand hours have many half seconds."""

_LIFE: contextvars.ContextVar[Life | None] = contextvars.ContextVar("life", default=None)


def register_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """From now on each task belongs to the life that started it, and dies with it."""

    def make(
        loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=loop, **options)
        life = _LIFE.get()
        if life is not None:
            life.tasks.append(task)
            if len(life.tasks) > life.prune_at:
                life.tasks = [one for one in life.tasks if not one.done()]
                life.prune_at = 2 * len(life.tasks) + 100
        return task

    factory: Any = make  # what it must take differs from one Python to the next
    loop.set_task_factory(factory)


class NoControl:
    """In place of the control service: nobody asks on a command line here."""

    def __init__(self, *arguments: object) -> None:
        pass

    async def start(self) -> None:
        pass

    async def changed(self) -> None:
        pass

    async def stop(self) -> None:
        pass


@dataclass
class Life:
    """From start to stop or kill; state.db and outbox.db in `folder` outlive it.

    `runtime`: access to a container engine, None where there is none; `boot` tells the starts of
    the host apart.
    """

    folder: Path
    clock: Clock
    link: MemoryHubLink
    images: MemoryImages
    scoring: MemoryScoring
    random: Random
    limits: Limits = field(default_factory=Limits)
    fault: Callable[[str], None] = lambda point: None
    runtime: ContainerRuntime | None = None
    boot: str = ""
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)
    prune_at: int = 100

    def start(self) -> None:
        self.config = config = AgentConfig(
            device=DeviceConfig(
                id=DEVICE, state_dir=self.folder, run_dir=self.folder / "run", board="none"
            ),
            docker=DockerConfig(enabled=False),
            # The host's disk is no part of the run.
            images=ImagesConfig(keep_days=1 / 24, min_free_percent=0, min_free_bytes=0),
            telemetry=TelemetryConfig(
                max_size_bytes=self.limits.max_bytes, ttl_seconds=self.limits.ttl_seconds or 0
            ),
        )
        self.store = StateStore(self.folder / "state.db", self.clock)
        # A single name for all lives, so that runs can be compared.
        self.outbox = Outbox(
            self.folder / "outbox.db", self.clock, self.limits, instance="chaos", fault=self.fault
        )
        self.agent = Agent(
            config,
            self.store,
            self.clock,
            (self.link,),
            self.outbox,
            images=self.images,
            scoring=self.scoring,
            control=NoControl,
            settings=SETTINGS,
            jitter=self.random,
            runtime=self.runtime,
            boot=self.boot,
        )
        self._stop = asyncio.Event()
        self._main = self.spawn(self.agent.run(self._stop))

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that belongs to this process: what a module on the device would do."""
        context = contextvars.copy_context()
        context.run(_LIFE.set, self)
        return context.run(asyncio.ensure_future, coroutine)

    def check(self) -> None:
        """Raises what ended the agent, if something did."""
        if self._main.done():
            self._main.result()
            raise RuntimeError("the agent ended by itself")

    async def stop(self) -> None:
        """As on SIGTERM."""
        self._stop.set()
        await asyncio.wait({self._main})
        self._main.result()
        self.link.cut("the agent stopped")
        await self._cancel_all()
        await self.outbox.close()
        self.store.close()

    async def kill(self) -> None:
        """As on SIGKILL: nothing is said, sent or stored from here on."""
        self.link.die()
        for task in self.tasks:
            task.cancel()
        self.store.close()
        self.outbox.abandon()
        await self._cancel_all()

    async def _cancel_all(self) -> None:
        while left := [task for task in self.tasks if not task.done()]:
            for task in left:
                task.cancel()
            await asyncio.wait(left)
        for task in self.tasks:
            if not task.cancelled():
                task.exception()  # seen: a killed process has nobody to tell
