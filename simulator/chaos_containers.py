"""A chaos run on a device with a container engine: containers and models side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..agent.container_modules import DeviceContainers
from ..agent.deployments import wanted_modules
from ..agent.manifest import Manifest, parse_manifest
from ..agent.module_spec import ModuleSpec
from ..agent.runtime.container import (
    DEVICE_LABEL,
    SPEC_LABEL,
    ContainerRuntime,
    PullProgress,
    RuntimeFailed,
)
from ..agent.seams import Resolved, StepFailed
from .chaos_device import MemoryImages
from .chaos_engine_faults import ENGINE_FAULTS, both_die, reboot
from .chaos_faults import FAULTS
from .chaos_life import DEVICE
from .chaos_manifest import manifest
from .chaos_scenario import MODULES, Scenario
from .engine import SimulatedEngine
from .engine_container import SimulatedContainer
from .engine_runtime import SimulatedRuntime, drift_of
from .virtual_time import VirtualClock

CONTAINERS = ("web", "cam", "db", "log")
CHECK = {"Test": ["CMD", "/probe", "check"], "Interval": 10 * 10**9, "Retries": 1}
_BAD = ("EXIT_AFTER_MS", "SICK_AFTER_MS")


@dataclass(slots=True)
class MixedImages(MemoryImages):
    """Its registry has images of containers as well."""

    digests: dict[str, str] = field(default_factory=dict)

    async def resolve(self, image: str, credentials: tuple[tuple[str, str, str], ...]) -> Resolved:
        found = await MemoryImages.resolve(self, image, credentials)
        digest = self.digests.get(image)
        return found if digest is None else Resolved(digest, "container")

    def ask(self, image: str) -> None:
        """What an engine gets from the registry now. Raises RuntimeFailed."""
        try:
            self._registry(image)
        except StepFailed as error:
            raise RuntimeFailed(str(error), retryable=True) from error


class WatchedRuntime(SimulatedRuntime):
    """Tells what is stopped and removed before it is."""

    def __init__(self, scenario: ContainerScenario) -> None:
        super().__init__(scenario.engine, DEVICE)
        self._scenario = scenario

    async def pull(
        self,
        image: str,
        digest: str,
        credentials: tuple[tuple[str, str, str], ...],
        on_progress: Callable[[PullProgress], None],
    ) -> None:
        self._scenario.images.ask(image)
        await super().pull(image, digest, credentials, on_progress)
        self._scenario.note(f"pulled {image}")

    async def start(self, name: str) -> None:
        await super().start(name)
        self._scenario.note(f"started container {name}")

    async def stop(self, name: str, timeout: float | None = None) -> None:
        self._scenario.judge_end(name)
        await super().stop(name, timeout)
        self._scenario.note(f"stopped container {name}")

    async def remove(self, name: str) -> None:
        self._scenario.judge_end(name)
        await super().remove(name)

    async def remove_image(self, digest: str) -> None:
        if digest in self._scenario.kept():
            self._scenario.engine_violations.append(
                f"removed image {digest}, which a deployment worth keeping names"
            )
        await super().remove_image(digest)


class ContainerScenario(Scenario):
    """Two models and four containers."""

    names = (*MODULES[:2], *CONTAINERS)
    faults = (*FAULTS, *ENGINE_FAULTS, *ENGINE_FAULTS)
    alone = (*Scenario.alone, both_die, reboot)
    images: MixedImages

    def __init__(
        self, seed: int, hours: float, folder: Path, clock: VirtualClock, pace: float = 1.0
    ) -> None:
        super().__init__(seed, hours, folder, clock, pace)
        self.images = MixedImages(self._fork(), self.note, self.kept)
        self.engine = SimulatedEngine(clock)
        self.engine.faults.call_seconds = 0.05
        self.engine.faults.pull_seconds = 20.0
        self.engine_violations: list[str] = []
        self.boots = 1

    @property
    def boot(self) -> str:  # type: ignore[override]
        return f"boot-{self.boots}"

    def runtime(self) -> ContainerRuntime:
        return WatchedRuntime(self)

    # -- the cloud -----------------------------------------------------------------------------

    def hosted(self, name: str) -> bool:
        return name not in CONTAINERS

    def image(self, name: str, kind: str) -> str:
        image = super().image(name, kind if self.hosted(name) else "good")
        if not self.hosted(name):
            layers = (("base", 1000), (image, 100))
            self.images.digests[image] = self.engine.publish(
                image, config={"Healthcheck": CHECK}, layers=layers
            )
        return image

    def manifest(self, kinds: dict[str, str]) -> dict[str, Any]:
        random = self.random
        whole = manifest({name: self.image(name, kind) for name, kind in kinds.items()})
        if random.random() < 0.3:
            waiting = {"ModuleUpdateMode": {"value": "WaitForAllPulls"}}
            whole["systemModules"]["edgeAgent"]["env"] = waiting
        for name, kind in kinds.items():
            if self.hosted(name):
                continue
            env, options, more = self._manner(kind)
            entry = whole["modules"][name]
            entry["env"] = {key: {"value": value} for key, value in env.items()}
            entry["settings"]["createOptions"] = json.dumps(options)
            entry.update(more)
        return whole

    def _manner(self, kind: str) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        """How a container behaves: its env, createOptions and manifest entry."""
        random = self.random
        env: dict[str, str] = {}
        options: dict[str, Any] = {}
        entry: dict[str, Any] = {
            "restartPolicy": random.choice(("always", "on-unhealthy", "on-failure")),
            "startupOrder": random.choice((0, 1, 4294967295)),
        }
        if kind == "broken":
            env = random.choice(
                (
                    {"EXIT_AFTER_MS": "400", "EXIT_CODE": "3"},
                    {"EXIT_AFTER_MS": "9000", "EXIT_CODE": "1"},
                )
            )
        elif kind == "deadly":
            if random.random() < 0.5:
                env = {"SICK_AFTER_MS": "6000"}
            else:
                options = {"HostConfig": {"Privileged": True}}
        else:
            if random.random() < 0.2:
                env = {"HEALTHY_AFTER_MS": "25000"}
                options = {"Healthcheck": {**CHECK, "StartPeriod": 60 * 10**9}}
            if random.random() < 0.2:
                env["IGNORE_TERM"] = "1"
                options["StopTimeout"] = random.choice((0, 5, 100, -1))
            if random.random() < 0.15:
                entry["status"] = "stopped"
        return env, options, entry

    def bad(self, module: ModuleSpec) -> bool:
        if self.hosted(module.name):
            return super().bad(module)
        spoiled = (
            any(name in _BAD for name, _ in module.env) or "Privileged" in module.create_options
        )
        return module.status == "running" and spoiled

    # -- what must hold ------------------------------------------------------------------------

    def violations(self) -> list[str]:
        return [*super().violations(), *self.engine_violations]

    def judge_end(self, name: str) -> None:
        """Before the agent stops or removes a container."""
        container = self.engine.find(name)
        if container is None or container.state["Status"] != "running" or drift_of(container):
            return
        if container.state.get("Health", {}).get("Status") == "unhealthy":
            return
        store = self.life.store
        latest, good = store.latest(), store.last_good()
        if latest is None or good is None:
            return
        maker = DeviceContainers(self.life.config)
        for deployment in (latest, good):
            wanted = wanted_modules(
                deployment.generation,
                parse_manifest(deployment.body),
                store.pinned(deployment.generation),
                maker,
            )
            specs = {m.container.fingerprint() for m in wanted.modules if m.container and m.running}
            if container.labels.get(SPEC_LABEL) not in specs:
                return
        self.engine_violations.append(f"{name} was well and wanted before and after, and was ended")

    def ours(self) -> list[SimulatedContainer]:
        """The containers of this device, in a fixed order."""
        found = [c for c in self.engine.containers() if c.labels.get(DEVICE_LABEL) == DEVICE]
        return sorted(found, key=lambda container: container.name)

    def unlike(self, wanted: Manifest, modules: dict[str, Any]) -> list[str]:
        found = super().unlike(wanted, modules)
        specs = [module for module in wanted.modules if not self.hosted(module.name)]
        asked = {spec.name: f"{spec.image} {spec.status}" for spec in specs}
        there = {}
        for container in self.ours():
            state = container.state
            there[container.name] = f"{container.image.name} {state['Status']}"
            if state["Status"] == "exited" and asked.get(container.name, "").endswith(" stopped"):
                there[container.name] = asked[container.name]
            if changed := drift_of(container):
                found.append(f"{container.name} is not as it was made: {changed}")
            if state["Running"] and state.get("Health", {}).get("Status") != "healthy":
                found.append(f"{container.name} is not healthy")
        # A module that shall not run needs no container.
        idle = {name for name, text in asked.items() if text.endswith(" stopped")}
        if {n: t for n, t in asked.items() if n not in idle or n in there} != there:
            found.append(f"containers {there} instead of {asked}")
        images = self.engine.image_digests()
        used = {container.image.digest for container in self.ours()}
        if idle_images := images - self.kept() - used:
            found.append(f"{len(idle_images)} images in the engine that nothing needs")
        return found

    def calm(self) -> None:
        super().calm()
        for container in self.engine.containers():
            if container.labels.get(DEVICE_LABEL) != DEVICE:
                self.engine.remove(container.name)
            elif container.state["Running"]:
                container.feel(sick=False)
            else:
                container.sick = False
        self.engine.faults.call_seconds = 0.05
        self.engine.faults.events_lost = False
        self.engine.faults.fail.clear()
        self.engine.faults.fail_always.clear()
        self.engine.start()
