"""A device in memory for the real agent: image store and scoring process with faults on demand."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from ..agent.plan import InstanceView, Route, WantedEndpoint
from ..agent.plan_types import UNTOLD
from ..agent.scoring_env import ScoringOptions
from ..agent.seams import (
    BackendView,
    LoadedModel,
    Progress,
    Resolved,
    ScoringView,
    StepFailed,
    StoredView,
)

_CPU = BackendView("cpu", True, "", 0, 0)


def image_digest(image: str) -> str:
    return "sha256:" + hashlib.sha256(image.encode()).hexdigest()


@dataclass(slots=True)
class MemoryImages:
    """Registry and store: the registry may be away or fail, the store lasts."""

    random: Random
    note: Callable[[str], None]
    kept: Callable[[], frozenset[str]] = frozenset
    """Digests that must not be removed now."""
    stored_digests: set[str] = field(default_factory=set)
    registry_up: bool = True
    errors: float = 0.0
    violations: list[str] = field(default_factory=list)

    async def stored(self) -> frozenset[str]:
        return frozenset(self.stored_digests)

    async def resolve(self, image: str, credentials: tuple[tuple[str, str, str], ...]) -> Resolved:
        await asyncio.sleep(self.random.uniform(0.1, 2))
        self._registry(image)
        return Resolved(image_digest(image), "model")

    async def pull(
        self,
        image: str,
        digest: str,
        credentials: tuple[tuple[str, str, str], ...],
        on_progress: Callable[[Progress], None],
    ) -> None:
        layers = self.random.randint(1, 4)
        for layer in range(layers):
            self._registry(image)
            on_progress(Progress("layers", layer, layers, layer, layers))
            await asyncio.sleep(self.random.uniform(0.1, 60))
        self._registry(image)
        self.stored_digests.add(digest)
        self.note(f"pulled {image}")

    def views(self) -> tuple[StoredView, ...]:
        return tuple(StoredView(digest, "", 1) for digest in sorted(self.stored_digests))

    def _registry(self, image: str) -> None:
        if not self.registry_up:
            raise StepFailed(
                f"{image}: the registry cannot be reached", retryable=True, unreachable=True
            )
        if self.random.random() < self.errors:
            raise StepFailed(f"{image}: the registry answered 503", retryable=True)

    async def find(self, image: str) -> str | None:
        digest = image_digest(image)
        return digest if digest in self.stored_digests else None

    async def model_directory(self, digest: str) -> Path:
        if digest not in self.stored_digests:
            raise StepFailed(f"{digest} is not in the store", retryable=True)
        return Path("/images") / digest

    async def remove(self, digest: str) -> None:
        if digest in self.kept():
            self.violations.append(f"removed {digest}, which a deployment worth keeping names")
        self.stored_digests.discard(digest)
        self.note(f"removed {digest[7:15]}")


@dataclass(slots=True)
class MemoryScoring:
    """A scoring process. `broken` digests never load, `deadly` ones kill the process."""

    random: Random
    note: Callable[[str], None]
    lasting: Callable[[], frozenset[str]] = frozenset
    """Endpoints that must go on being served, if they are."""
    boot: int = 1
    up: bool = True
    errors: float = 0.0
    states: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    routes: tuple[Route, ...] = ()
    announced: tuple[WantedEndpoint, ...] = UNTOLD
    broken: set[str] = field(default_factory=set)
    deadly: set[str] = field(default_factory=set)
    violations: list[str] = field(default_factory=list)

    def crash(self) -> None:
        self.boot += 1
        self.states.clear()
        self.digests.clear()
        self.routes = ()
        self.announced = UNTOLD
        self.note("scoring crashed")

    def serving(self) -> dict[str, str]:
        """Endpoint -> digest behind its default target."""
        return {
            route.endpoint: self.digests.get(target.instance, "")
            for route in self.routes
            for target in route.targets
            if target.default
        }

    async def close(self) -> None:
        """Nothing to close: the process outlives the agent."""

    async def status(self) -> ScoringView:
        await asyncio.sleep(0.001)
        if not self.up:
            raise StepFailed("the scoring process does not answer", retryable=True)
        models = tuple(
            LoadedModel(InstanceView(name, state), "m", "1", (_CPU,), ())
            for name, state in self.states.items()
        )
        return ScoringView(f"boot-{self.boot}", 1, models, self.routes, (), self.announced)

    async def load(self, instance: str, directory: Path, options: ScoringOptions) -> None:
        await self._work(10)
        digest = directory.name
        if digest in self.broken:
            raise StepFailed(f"{digest[:19]} is not a model", retryable=False)
        if digest in self.deadly:
            self.crash()
            raise StepFailed("the scoring process died", retryable=True)
        self.states[instance] = "loaded"
        self.digests[instance] = digest
        self.note(f"loaded {instance}")

    async def attach(self, instance: str, socket: str, options: ScoringOptions) -> None:
        raise StepFailed("no container serves here", retryable=False)

    async def probe(self, instance: str) -> None:
        await self._work(5)
        if instance not in self.states:
            raise StepFailed(f"{instance} is not loaded", retryable=True)
        self.states[instance] = "ready"

    async def announce(self, endpoints: tuple[WantedEndpoint, ...]) -> None:
        await self._work(0.1)
        self.announced = endpoints

    async def switch(self, routes: tuple[Route, ...]) -> None:
        await self._work(0.1)
        targets = [target.instance for route in routes for target in route.targets]
        if any(self.states.get(instance) != "ready" for instance in targets):
            raise StepFailed("a target is not ready", retryable=True)
        gone = {r.endpoint for r in self.routes} - {r.endpoint for r in routes}
        stopped = gone & self.lasting()
        if stopped:
            self.violations.append(f"stopped {sorted(stopped)}, which every deployment wants")
        self.routes = routes
        self.note(f"routed {[(r.endpoint, r.targets[0].instance) for r in routes]}")

    async def unload(self, instance: str) -> None:
        await self._work(0.1)
        if any(target.instance == instance for route in self.routes for target in route.targets):
            raise StepFailed(f"{instance} is routed", retryable=True)
        self.states.pop(instance, None)
        self.digests.pop(instance, None)

    async def _work(self, seconds: float) -> None:
        boot = self.boot
        await asyncio.sleep(self.random.uniform(0, seconds))
        if not self.up or boot != self.boot:
            raise StepFailed("the scoring process does not answer", retryable=True)
        if self.random.random() < self.errors:
            raise StepFailed("the scoring process is busy", retryable=True)
