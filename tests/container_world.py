"""A device with a simulated engine under the real control loop, on a virtual clock."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from random import Random
from typing import Any

from gatelet.agent.conditions import conditions
from gatelet.agent.config import AgentConfig, DeviceConfig
from gatelet.agent.container_modules import DeviceContainers
from gatelet.agent.engine import Engine
from gatelet.agent.hub_names import HubNames
from gatelet.agent.image_housekeeping import ImageHousekeeping
from gatelet.agent.image_retention import Disk, RetentionRules
from gatelet.agent.plan import InstanceView
from gatelet.agent.reconcile import Reconciler, ReconcileSettings
from gatelet.agent.seams import (
    BackendView,
    LoadedModel,
    Resolved,
    ScoringView,
    StepFailed,
    StoredView,
)
from gatelet.agent.snapshot import Snapshot
from gatelet.agent.steps import Executor, resolved_as
from gatelet.agent.store import StateStore
from gatelet.simulator.engine import SimulatedEngine
from gatelet.simulator.virtual_time import VirtualClock, run

HEALTHCHECK = {
    "Test": ["CMD", "/probe", "check"],
    "Interval": 1_000_000_000,
    "Timeout": 1_000_000_000,
    "Retries": 1,
}
SETTINGS = ReconcileSettings(probation_seconds=30.0, busy_poll_seconds=5.0, idle_poll_seconds=600.0)
V1, V2 = "r.io/app:1", "r.io/app:2"


class Registry:
    """`Images` whose registry is the simulated engine's; model images are of no account here."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine
        self.up = True
        self.models: set[str] = set()

    async def stored(self) -> frozenset[str]:
        return frozenset(self.models)

    async def resolve(self, image: str, credentials: object) -> Resolved:
        await asyncio.sleep(0.1)
        if not self.up:
            raise StepFailed("the registry is down", retryable=True, unreachable=True)
        for found in reversed(self.engine._published.values()):
            if found.name == image:
                return resolved_as(found.digest, found.config.get("Labels") or {})
        raise StepFailed(f"{image} does not exist", retryable=True)

    async def pull(self, image: str, digest: str, credentials: object, on_progress: object) -> None:
        await asyncio.sleep(1)
        self.models.add(digest)

    async def find(self, image: str) -> str | None:
        return None

    async def model_directory(self, digest: str) -> Path:
        return Path("/images") / digest

    async def remove(self, digest: str) -> None:
        self.models.discard(digest)

    def views(self) -> tuple[StoredView, ...]:
        return tuple(StoredView(digest, "", 1) for digest in sorted(self.models))


class Scoring:
    """A scoring process in memory. Sockets in `silent` have nobody behind them."""

    def __init__(self) -> None:
        self.boot = 1
        self.states: dict[str, str] = {}
        self.sockets: dict[str, str] = {}
        self.silent: set[str] = set()
        self.routes: tuple[Any, ...] = ()

    async def status(self) -> ScoringView:
        models = tuple(
            LoadedModel(
                InstanceView(name, state),
                "m",
                "1",
                (BackendView("b", self.sockets.get(name) not in self.silent, "", 0, 0),),
                (),
            )
            for name, state in self.states.items()
        )
        return ScoringView(f"boot-{self.boot}", 1, models, self.routes)

    async def load(self, instance: str, directory: Path, options: object) -> None:
        self.states[instance] = "loaded"

    async def attach(self, instance: str, socket: str, options: object) -> None:
        self.states[instance] = "loaded"
        self.sockets[instance] = socket

    async def probe(self, instance: str) -> None:
        self.states[instance] = "ready"

    async def announce(self, endpoints: object) -> None:
        raise AssertionError("this scoring process takes no such word")

    async def switch(self, routes: tuple[Any, ...]) -> None:
        self.routes = routes

    async def unload(self, instance: str) -> None:
        self.states.pop(instance, None)

    def crash(self) -> None:
        self.boot += 1
        self.states.clear()
        self.routes = ()


class Free:
    free = 10**12

    def usage(self, path: Path) -> Disk:
        return Disk(10**12, self.free)


class Device:
    """`start` and `kill` are those of the agent; engine, registry and state outlive it."""

    def __init__(
        self, folder: Path, clock: VirtualClock, settings: ReconcileSettings = SETTINGS
    ) -> None:
        self.folder = folder
        self.clock = clock
        self.settings = settings
        self.engine = SimulatedEngine(clock)
        self.engine.faults.pull_seconds = 2.0
        self.engine.faults.call_seconds = 0.05
        self.registry = Registry(self.engine)
        self.scoring = Scoring()
        self.disk = Free()
        self.boot_id = "boot-1"
        self.hub = HubNames()
        self.snapshot = Snapshot()
        self.random = Random(1)
        self._tasks: list[asyncio.Task[Any]] = []

    def start(self) -> None:
        self.store = StateStore(self.folder / "state.db", self.clock)
        runtime = self.engine.runtime("edge-1")
        self.hold = Engine(runtime, self.clock, lambda: self.reconciler.wake(), jitter=self.random)
        housekeeping = ImageHousekeeping(
            self.store, self.clock, RetentionRules(), self.disk, self.folder
        )
        config = AgentConfig(
            device=DeviceConfig(id="edge-1", state_dir=self.folder, run_dir=self.folder / "run")
        )
        self.reconciler = Reconciler(
            self.store,
            Executor(self.registry, self.scoring, self.store.pin, self.hold, housekeeping.bringing),
            self.clock,
            self.settings,
            self._publish,
            self.random,
            maker=DeviceContainers(config, lambda: self.hub),
            housekeeping=housekeeping,
            boot_id=self.boot_id,
        )
        self._tasks = [
            asyncio.ensure_future(self.reconciler.run()),
            asyncio.ensure_future(self.hold.run()),
        ]

    def _publish(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    async def kill(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.hold.close()
        self.store.close()

    # -- looking -------------------------------------------------------------------------------

    def phase(self) -> str:
        latest = self.store.latest()
        return "" if latest is None else latest.phase

    def description(self) -> str:
        latest = self.store.latest()
        return "" if latest is None else latest.description

    def containers(self) -> dict[str, str]:
        """Name -> image:state, of all containers on the engine."""
        return {
            container.name: f"{container.image.name} {container.state['Status']}"
            for container in self.engine._containers.values()
        }

    def ids(self) -> dict[str, str]:
        return {c.name: c.id for c in self.engine._containers.values()}

    async def until(self, condition: Callable[[], bool], seconds: float = 3600.0) -> float:
        """Virtual seconds it took."""
        began = self.clock.monotonic()
        while not condition():
            for task in self._tasks:
                if task.done():
                    task.result()
            if self.clock.monotonic() - began > seconds:
                raise AssertionError(
                    f"not within {seconds} s: {self.phase()} {self.description()} "
                    f"{self.containers()} {self.snapshot.plan}"
                )
            await asyncio.sleep(0.25)
        return self.clock.monotonic() - began

    async def good(self, body: bytes, source: str = "local") -> None:
        verdict = self.reconciler.submit(source, 0, body, always=True)
        assert verdict.code == 200, verdict
        await self.until(lambda: self.phase() != "applying" and self.phase() != "probation")
        assert self.phase() == "good", self.description()

    async def failed(self, body: bytes) -> str:
        verdict = self.reconciler.submit("local", 0, body, always=True)
        assert verdict.code == 200, verdict
        await self.until(lambda: self.phase() in ("failed", "good"))
        assert self.phase() == "failed"
        await self.settled()
        return self.description()

    async def settled(self) -> None:
        await self.until(lambda: self.snapshot.plan is not None and self.snapshot.plan.settled)


def manifest(agent_env: dict[str, str] | None = None, **modules: Any) -> bytes:
    """Modules by name: an image, or a dict with `image` and whatever a manifest entry has; `env`
    and `options` (createOptions) are plain dicts."""
    entries = {}
    for name, given in modules.items():
        entry = {"image": given} if isinstance(given, str) else dict(given)
        env = entry.pop("env", {})
        entries[name] = {
            "type": "docker",
            "status": "running",
            "restartPolicy": "always",
            "settings": {
                "image": entry.pop("image"),
                "createOptions": json.dumps(entry.pop("options", {})),
            },
            "env": {key: {"value": value} for key, value in env.items()},
            **entry,
        }
    agent = {"type": "docker", "settings": {"image": "gatelet:1"}}
    if agent_env:
        agent["env"] = {key: {"value": value} for key, value in agent_env.items()}
    return json.dumps(
        {
            "schemaVersion": "1.1",
            "runtime": {"type": "docker", "settings": {"minDockerVersion": "v1.25"}},
            "systemModules": {"edgeAgent": agent},
            "modules": entries,
        }
    ).encode()


def publish(device: Device, *names: str, **config: object) -> None:
    """Images for the device's engine to pull; `config` as an image has it."""
    for name in names:
        device.engine.publish(name, config=config or None, layers=((name, 1000),))


def status(device: Device, module: str) -> tuple[str, str]:
    """Of a module as the device reports it, and what it says about it."""
    (found,) = [c for c in conditions(device.snapshot, {}) if c.module == module]
    return found.status, found.description


def play(
    scenario: Callable[[Device], Coroutine[Any, Any, None]],
    settings: ReconcileSettings = SETTINGS,
) -> None:
    """Run a scenario on a started device."""

    async def main(clock: VirtualClock) -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            device = Device(Path(folder), clock, settings)
            device.start()
            try:
                await scenario(device)
            finally:
                await device.kill()

    run(main)
