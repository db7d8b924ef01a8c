"""Carrying out the steps of a plan: the seams to images and to the scoring process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .plan import (
    Collect,
    InstanceView,
    Load,
    Observed,
    Probe,
    Pull,
    Route,
    Step,
    Switch,
    Unload,
)
from .scoring_env import ScoringOptions


class StepFailed(Exception):
    """A step did not succeed; `retryable` tells whether the same step may succeed later."""

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


@dataclass(frozen=True, slots=True)
class BackendView:
    name: str
    healthy: bool
    detail: str
    requests: int
    failures: int


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the scoring process says of one instance."""

    view: InstanceView
    model: str
    version: str
    backends: tuple[BackendView, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ScoringView:
    """The scoring process as seen now. `boot_id` differs after each of its starts."""

    boot_id: str
    pid: int
    models: tuple[LoadedModel, ...]
    routes: tuple[Route, ...]


class ScoringControl(Protocol):
    """The agent's hold on the scoring process. Every call is idempotent and raises StepFailed."""

    async def status(self) -> ScoringView: ...

    async def load(self, instance: str, directory: Path, options: ScoringOptions) -> None: ...

    async def probe(self, instance: str) -> None: ...

    async def switch(self, routes: tuple[Route, ...]) -> None: ...

    async def unload(self, instance: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pull is, in layers and bytes; totals are 0 until they are known."""

    phase: str
    bytes_done: int
    bytes_total: int
    layers_done: int
    layers_total: int


class Images(Protocol):
    """The agent's hold on model images; all calls raise StepFailed."""

    async def stored(self) -> frozenset[str]:
        """Digests of the images that are whole and verified in the store."""

    async def pull(
        self,
        image: str,
        credentials: tuple[tuple[str, str, str], ...],
        on_resolved: Callable[[str], None],
        on_progress: Callable[[Progress], None],
    ) -> str:
        """Bring `image` into the store and return its digest.

        `credentials` are (address, username, password) from the manifest. `on_resolved` gets the
        digest before any layer is fetched. Cancelling the call stops the transfer; what arrived
        is kept for the next attempt.
        """

    async def find(self, image: str) -> str | None:
        """The digest of the stored image that was pulled by this name, None if there is none."""

    async def model_directory(self, digest: str) -> Path: ...

    async def remove(self, digest: str) -> None: ...


PinStore = Callable[[int, str, str], None]


class Executor:
    """Runs one step against the seams; knows nothing about when or why."""

    def __init__(self, images: Images, scoring: ScoringControl, pin: PinStore) -> None:
        self._images = images
        self._scoring = scoring
        self._pin = pin

    async def observe(self) -> tuple[Observed, ScoringView | None]:
        """What is there now. Raises StepFailed when the image store cannot be read."""
        stored = await self._images.stored()
        try:
            view = await self._scoring.status()
        except StepFailed:
            return Observed(stored, False, {}, ()), None
        instances = {model.view.name: model.view for model in view.models}
        return Observed(stored, True, instances, view.routes), view

    async def run(
        self,
        step: Step,
        credentials: tuple[tuple[str, str, str], ...],
        on_progress: Callable[[Progress], None],
    ) -> None:
        """Carry out `step`. Raises StepFailed."""
        if isinstance(step, Pull):

            def pin(digest: str) -> None:
                self._pin(step.generation, step.module, digest)

            if step.only_local:
                digest = await self._images.find(step.image)
                if digest is None:
                    raise StepFailed(
                        f"{step.image} is not on this device, and imagePullPolicy is never; "
                        "set it to on-create",
                        retryable=False,
                    )
                pin(digest)
            else:
                pin(await self._images.pull(step.image, credentials, pin, on_progress))
        elif isinstance(step, Load):
            directory = await self._images.model_directory(step.digest)
            await self._scoring.load(step.instance, directory, step.options)
        elif isinstance(step, Probe):
            await self._scoring.probe(step.instance)
        elif isinstance(step, Switch):
            await self._scoring.switch(step.routes)
        elif isinstance(step, Unload):
            await self._scoring.unload(step.instance)
        elif isinstance(step, Collect):
            await self._images.remove(step.digest)


def describe(step: Step) -> str:
    """One line for journals and people."""
    if isinstance(step, Pull):
        return f"pull {step.image} for {step.module}"
    if isinstance(step, Load):
        return f"load {step.module} ({step.digest[:19]})"
    if isinstance(step, Probe):
        return f"probe {step.module}"
    if isinstance(step, Switch):
        endpoints = ", ".join(route.endpoint for route in step.routes) or "nothing"
        return f"switch routes to {endpoints}"
    if isinstance(step, Unload):
        return f"unload {step.instance}"
    return f"remove image {step.digest[:19]}"
