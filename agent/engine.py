"""The agent's hold on a container engine: what is seen of it, kept fresh by its events.

An engine that hangs must not hold up models: a look that takes too long counts as "down" until it
comes back.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .clock import Clock
from .runtime.container import ContainerRuntime, RuntimeFailed
from .seams import EngineView
from .twin.backoff import full_jitter

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 5.0
"""How long a pass of the control loop waits for the engine."""

STALE_SECONDS = 30.0
"""What was seen is looked at again after this time, even if the engine told of no change."""

RETRY_BASE_SECONDS = 0.5
RETRY_CAP_SECONDS = 30.0


class Engine:
    """`EngineHold` on a ContainerRuntime. `on_change` is called whenever to look again."""

    def __init__(
        self,
        runtime: ContainerRuntime,
        clock: Clock,
        on_change: Callable[[], None] = lambda: None,
        *,
        socket: Path | None = None,
        expected: bool = True,
        jitter: random.Random | None = None,
    ) -> None:
        """While `socket` does not exist, the runtime is not touched; where no engine is `expected`,
        there is none then."""
        self._socket = socket
        self._expected = expected
        self._runtime = runtime
        self._clock = clock
        self.on_change = on_change
        self._jitter = jitter or random.Random()
        self._changes = 0
        self._seen = -1
        self._seen_at = 0.0
        self._asking: asyncio.Task[None] | None = None
        self._late = False
        self._view = EngineView("down", "it was not asked yet")

    @property
    def runtime(self) -> ContainerRuntime:
        return self._runtime

    def changed(self) -> None:
        self._changes += 1

    async def observe(self) -> EngineView:
        now = self._clock.monotonic()
        fresh = self._seen == self._changes and now - self._seen_at < STALE_SECONDS
        if fresh and self._view.state == "up":
            return self._view
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._ask())
            self._late = False
        await asyncio.wait({self._asking}, timeout=0 if self._late else PATIENCE_SECONDS)
        if self._asking is not None:
            self._late = True
            self._away(f"no answer within {PATIENCE_SECONDS:g} s")
        return self._view

    def _missing(self) -> bool:
        return self._socket is not None and not self._socket.exists()

    async def _ask(self) -> None:
        changes = self._changes
        try:
            if self._missing():
                raise RuntimeFailed(f"there is no {self._socket}", retryable=True)
            if self._view.state == "up" and self._view.root:
                root = self._view.root
            else:
                root = (await self._runtime.info()).root_dir
            containers, images = await asyncio.gather(
                self._runtime.containers(), self._runtime.images()
            )
        except RuntimeFailed as error:
            self._away(str(error))
        else:
            if self._view.state != "up":
                log.info("the container engine answers")
                self._expected = True
            self._view = replace(
                self._view,
                state="up",
                error="",
                containers=containers,
                images=images,
                root=root,
            )
            self._seen, self._seen_at = changes, self._clock.monotonic()
        finally:
            self._asking = None
            if self._late:
                self.on_change()

    def _away(self, reason: str) -> None:
        if self._view.state == "up":
            log.warning("the container engine is away: %s", reason)
            self._outage()
        there = self._expected or not self._missing()
        self._view = replace(
            self._view,
            state="down" if there else "none",
            error=reason,
            containers=(),
            images=(),
        )

    def _outage(self) -> None:
        self._view = replace(self._view, outages=self._view.outages + 1)

    async def run(self) -> None:
        """Follow the engine's events until cancelled."""
        attempt = 0
        while True:
            try:
                if not self._missing():
                    async for _ in self._runtime.events():
                        attempt = 0
                        self.changed()
                        self.on_change()
            except RuntimeFailed as error:
                log.debug("no events from the container engine: %s", error)
                # It may be back before anybody asks, and its containers ended with it.
                if self._view.state == "up":
                    self._outage()
            if not self._missing():
                self.changed()
                self.on_change()
            await asyncio.sleep(
                full_jitter(attempt, RETRY_BASE_SECONDS, RETRY_CAP_SECONDS, self._jitter)
            )
            attempt += 1

    async def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        await self._runtime.close()
