"""A container engine in memory, with the contract of the real one and faults on demand.

Everything happens in the event loop and by its time, so a virtual loop runs days of it at once and
two runs with the same calls are equal. Several runtimes (an agent, the same agent after a restart,
another device's) may use one engine. What a simulated process does is in `engine_container`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ..agent.clock import Clock, SystemClock
from ..agent.runtime.container import RuntimeFailed
from ..agent.runtime.engine_errors import unreachable
from ..agent.runtime.policy import DockerPolicy
from ..modules.oci.reference import ImageRef
from .engine_container import SIGKILL, SimulatedContainer, SimulatedImage
from .engine_runtime import SOCKET, SimulatedRuntime

__all__ = ["EngineFaults", "SimulatedEngine", "SimulatedImage", "SimulatedRuntime"]


@dataclass(slots=True)
class EngineFaults:
    """`down`: no answer. `events_lost`: nobody hears of changes. `call_seconds`: what each call
    takes; `pull_seconds`: what each layer takes. `fail` holds failures by call (`pull`, `create`,
    `start`, `stop`, `remove`, ...), used up one by one, `fail_always` those that stay."""

    down: bool = False
    events_lost: bool = False
    call_seconds: float = 0.0
    pull_seconds: float = 0.0
    fail: dict[str, list[RuntimeFailed]] = field(default_factory=dict)
    fail_always: dict[str, RuntimeFailed] = field(default_factory=dict)


class SimulatedEngine:
    """Images, containers and the registries they come from. `runtime` gives access for a device."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.faults = EngineFaults()
        self.pulls = 0
        self._published: dict[str, SimulatedImage] = {}
        self._present: dict[str, tuple[SimulatedImage, datetime]] = {}
        self._tags: dict[str, str] = {}
        self._containers: dict[str, SimulatedContainer] = {}
        self._made = 0
        self._wakers: set[asyncio.Event] = set()

    def runtime(self, device_id: str, policy: DockerPolicy | None = None) -> SimulatedRuntime:
        return SimulatedRuntime(self, device_id, policy)

    def publish(
        self,
        name: str,
        *,
        config: Mapping[str, Any] | None = None,
        layers: tuple[tuple[str, int], ...] = (("base", 1000), ("program", 100)),
        login: tuple[str, str] | None = None,
    ) -> str:
        """Put an image into its registry, for pulls to find; returns its digest."""
        settings = {"Entrypoint": ["/probe"], **(config or {})}
        identity = json.dumps([settings, layers], sort_keys=True)
        digest = f"sha256:{hashlib.sha256(identity.encode()).hexdigest()}"
        ref = ImageRef.parse(name)
        image = SimulatedImage(name, digest, settings, layers, login)
        self._published[f"{ref.registry}/{ref.repository}@{digest}"] = image
        return digest

    # What others do to an engine

    def stop(self) -> None:
        """The engine ends, and its containers with it."""
        self.faults.down = True
        for container in self._containers.values():
            container.end(0)
        self._notify()

    def start(self) -> None:
        self.faults.down = False
        self._notify()

    def signal(self, name: str, number: str) -> None:
        """SIGUSR1: sick, SIGUSR2: well again, SIGKILL."""
        container = self._named(name)
        if number == "SIGKILL":
            container.end(SIGKILL)
            return
        container.feel(sick=number == "SIGUSR1")

    def update(self, name: str, **settings: Any) -> None:
        """`docker update`."""
        self._named(name).host.update(settings)
        self._notify()

    def rename(self, name: str, new: str) -> None:
        self._named(name).name = new
        self._notify()

    def pause(self, name: str) -> None:
        """`docker pause`."""
        container = self._named(name)
        if container.state["Running"]:
            container.state["Status"] = "paused"
            self._notify()

    def remove(self, name: str) -> None:
        """`docker rm -f`."""
        self._drop(self._named(name))

    def wipe(self) -> None:
        """Another engine in its place: no container is there any more, and no image."""
        for container in [*self._containers.values()]:
            self._drop(container)
        self._present.clear()
        self._tags.clear()

    def create_foreign(self, name: str, image: str) -> None:
        """A container that gatelet did not make, of an image that it may have brought."""
        digest = self._tags.get(image) or next(iter(self._present))
        self._add(name, self._image(digest), {"Image": image})

    def find(self, name: str) -> SimulatedContainer | None:
        return self._find(name)

    def containers(self) -> tuple[SimulatedContainer, ...]:
        """All of them, whoever made them."""
        return tuple(self._containers.values())

    def image_digests(self) -> frozenset[str]:
        """What was pulled and is there."""
        return frozenset(self._present)

    def inspect(self, name: str) -> dict[str, Any]:
        return self._named(name).inspect()

    # What runtimes use

    async def answer(self, call: str, doing: str) -> None:
        """One call's time and faults. Raises RuntimeFailed."""
        self._reachable(doing)
        # Every call gives others a turn, as a real one does.
        await asyncio.sleep(self.faults.call_seconds)
        self._reachable(doing)
        waiting = self.faults.fail.get(call)
        if waiting:
            raise waiting.pop(0)
        if call in self.faults.fail_always:
            raise self.faults.fail_always[call]

    def _reachable(self, doing: str) -> None:
        if self.faults.down:
            raise unreachable(doing, SOCKET, "the simulated engine is down")

    def _notify(self) -> None:
        for waker in self._wakers:
            waker.set()

    def _named(self, name: str) -> SimulatedContainer:
        found = self._find(name)
        if found is None:
            raise KeyError(f"no container {name}")
        return found

    def _find(self, name: str) -> SimulatedContainer | None:
        for container in self._containers.values():
            if container.name == name:
                return container
        return None

    def _drop(self, container: SimulatedContainer) -> None:
        container.end(SIGKILL)
        self._containers.pop(container.id, None)
        self._notify()

    def _image(self, digest: str) -> SimulatedImage:
        return self._present[digest][0]

    def _add(self, name: str, image: SimulatedImage, sent: dict[str, Any]) -> SimulatedContainer:
        self._made += 1
        identity = hashlib.sha256(f"{self._made} {name}".encode()).hexdigest()
        container = SimulatedContainer(identity, name, image, sent, self.clock, self._notify)
        self._containers[identity] = container
        self._notify()
        return container
