"""A device's access to the simulated engine, with the contract of `ContainerRuntime`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from ..agent.runtime.container import (
    DEVICE_LABEL,
    MODULE_LABEL,
    SPEC_LABEL,
    ContainerSpec,
    ContainerView,
    EngineImage,
    EngineInfo,
    LogFilter,
    LogLine,
    PullProgress,
    RuntimeFailed,
    canonical_body,
)
from ..agent.runtime.create_rules import CREATED_LABEL
from ..agent.runtime.drift import drift
from ..agent.runtime.engine_errors import explained, unreachable
from ..agent.runtime.inspection import container_view
from ..agent.runtime.policy import DockerPolicy, stop_seconds
from ..modules.errors import InvalidReference
from ..modules.oci.reference import ImageRef
from .engine_container import SIGTERM, SimulatedContainer, SimulatedImage

if TYPE_CHECKING:
    from .engine import SimulatedEngine

SOCKET = "/run/simulated-engine.sock"


class SimulatedRuntime:
    """`ContainerRuntime` on a simulated engine. Get one by `SimulatedEngine.runtime`."""

    def __init__(
        self, engine: SimulatedEngine, device_id: str, policy: DockerPolicy | None = None
    ) -> None:
        self._engine = engine
        self._device = device_id
        self._policy = policy
        self._wakers: set[asyncio.Event] = set()
        self._closed = False

    async def info(self) -> EngineInfo:
        await self._engine.answer("info", "ask the engine")
        return EngineInfo("20.10.24", "1.41", "linux", "amd64", "/var/lib/simulated-engine")

    async def close(self) -> None:
        self._closed = True
        for waker in self._wakers:
            waker.set()

    async def images(self) -> tuple[EngineImage, ...]:
        engine = self._engine
        await engine.answer("images", "list images")
        return tuple(
            EngineImage(
                id=image.id,
                names=tuple(name for name, digest in engine._tags.items() if digest == key),
                digests=(key,),
                labels=image.config.get("Labels") or {},
                size=sum(size for _, size in image.layers),
                created=created,
            )
            for key, (image, created) in engine._present.items()
        )

    async def pull(
        self,
        image: str,
        digest: str,
        credentials: tuple[tuple[str, str, str], ...],
        on_progress: Callable[[PullProgress], None],
    ) -> None:
        engine, doing = self._engine, f"pull {image} at {digest}"
        await engine.answer("pull", doing)
        try:
            ref = ImageRef.parse(image)
        except InvalidReference as error:
            raise RuntimeFailed(str(error), retryable=False) from error
        if digest not in engine._present:
            found = engine._published.get(f"{ref.registry}/{ref.repository}@{digest}")
            if found is None:
                raise explained(doing, f"manifest for {image} not found", host=ref.registry)
            if found.login is not None and (ref.registry, *found.login) not in credentials:
                raise explained(doing, "unauthorized", host=ref.registry)
            engine.pulls += 1
            await self._transfer(found, doing, on_progress)
            engine._present[digest] = (found, engine.clock.now())
        if ref.tag is not None:
            engine._tags[f"{ref.registry}/{ref.repository}:{ref.tag}"] = digest

    async def _transfer(
        self, image: SimulatedImage, doing: str, on_progress: Callable[[PullProgress], None]
    ) -> None:
        engine = self._engine
        there = {layer for present, _ in engine._present.values() for layer in present.layers}
        missing = [size for layer, size in image.layers if (layer, size) not in there]
        whole = len(image.layers) - len(missing)
        done, total = 0, sum(missing)
        on_progress(PullProgress(done, total, whole, len(image.layers)))
        for size in missing:
            await asyncio.sleep(engine.faults.pull_seconds)
            engine._reachable(doing)
            done, whole = done + size, whole + 1
            on_progress(PullProgress(done, total, whole, len(image.layers)))

    async def remove_image(self, digest: str) -> None:
        engine = self._engine
        await engine.answer("remove_image", f"remove image {digest}")
        for container in engine._containers.values():
            if container.image.digest == digest and digest in engine._present:
                raise RuntimeFailed(
                    f"cannot remove image {digest}: container {container.name} uses it; "
                    "remove that first",
                    retryable=True,
                )
        engine._present.pop(digest, None)
        for name in [name for name, tagged in engine._tags.items() if tagged == digest]:
            del engine._tags[name]

    async def containers(self) -> tuple[ContainerView, ...]:
        await self._engine.answer("containers", "list containers")
        views = [
            container_view(container.inspect(), drift_of(container))
            for container in self._engine._containers.values()
            if self._is_ours(container)
        ]
        return tuple(sorted(views, key=lambda view: (view.module, view.name)))

    async def create(self, spec: ContainerSpec) -> None:
        engine, doing = self._engine, f"create container {spec.name}"
        await engine.answer("create", doing)
        leftover = engine._find(spec.name)
        if leftover is not None:
            if not self._is_ours(leftover):
                raise RuntimeFailed(
                    f"cannot {doing}: container {leftover.id[:12]} has this name and is not "
                    f"gatelet's; remove or rename it ('docker rename {spec.name} NEW')",
                    retryable=False,
                )
            same = leftover.labels.get(SPEC_LABEL) == spec.fingerprint()
            if same and leftover.state["Status"] == "created" and not drift_of(leftover):
                return
            engine._drop(leftover)
        if spec.digest not in engine._present:
            raise RuntimeFailed(
                f"cannot {doing}: the engine has no {spec.image} at {spec.digest}; "
                "it has to be pulled first",
                retryable=True,
            )
        image = engine._image(spec.digest)
        body = json.loads(spec.body)
        created = {"name": spec.name, "image": image.id, "body": body}
        labels = {
            **(body.get("Labels") or {}),
            SPEC_LABEL: spec.fingerprint(),
            CREATED_LABEL: canonical_body(created),
        }
        engine._add(spec.name, image, {**body, "Labels": labels})

    async def start(self, name: str) -> None:
        engine, doing = self._engine, f"start container {name}"
        await engine.answer("start", doing)
        container = engine._find(name)
        if container is None:
            raise explained(doing, f"No such container: {name}", status=404)
        if not container.state["Running"]:
            container.begin()

    async def stop(self, name: str, timeout: float | None = None) -> None:
        engine = self._engine
        await engine.answer("stop", f"stop container {name}")
        container = engine._find(name)
        if container is None or not container.state["Running"]:
            return
        if container.ignores_stop:
            seconds = stop_seconds(self._policy, container.body.get("StopTimeout"))
            await container.kill_after(seconds if timeout is None else timeout)
            return
        if container.command[0] == "serve" or len(container.command) > 3:
            container.write("stdout", "ended")
            container.end(0)
        else:
            container.end(SIGTERM)

    async def remove(self, name: str) -> None:
        await self._engine.answer("remove", f"remove container {name}")
        container = self._engine._find(name)
        if container is not None:
            self._engine._drop(container)

    async def logs(self, name: str, wanted: LogFilter, *, follow: bool) -> AsyncIterator[LogLine]:
        engine, doing = self._engine, f"read the logs of container {name}"
        await engine.answer("logs", doing)
        container = engine._find(name)
        if container is None:
            raise RuntimeFailed(
                f"cannot {doing}: there is no such container; 'gatelet list' names all",
                retryable=False,
            )
        given = 0
        first = True
        with _Waker(engine, self) as waker:
            while True:
                waker.clear()
                fresh = [line for line in container.lines[given:] if _within(line, wanted)]
                given = len(container.lines)
                if first and wanted.tail is not None:
                    fresh = fresh[max(0, len(fresh) - wanted.tail) :]
                first = False
                for line in fresh:
                    yield line
                if not follow or self._closed or container.id not in engine._containers:
                    return
                engine._reachable(doing)
                if len(container.lines) == given:
                    await waker.wait()

    async def events(self) -> AsyncIterator[None]:
        engine, doing = self._engine, "watch the engine"
        await engine.answer("events", doing)
        with _Waker(engine, self) as waker:
            waker.set()
            while True:
                await waker.wait()
                waker.clear()
                engine._reachable(doing)
                if self._closed:
                    raise unreachable(doing, SOCKET, "closed")
                if not engine.faults.events_lost:
                    yield None

    def _is_ours(self, container: SimulatedContainer) -> bool:
        labels = container.labels
        return labels.get(DEVICE_LABEL) == self._device and MODULE_LABEL in labels


class _Waker:
    """An event that every change of the engine sets."""

    def __init__(self, engine: SimulatedEngine, runtime: SimulatedRuntime) -> None:
        self._sets = (engine._wakers, runtime._wakers)
        self._event = asyncio.Event()

    def __enter__(self) -> asyncio.Event:
        for wakers in self._sets:
            wakers.add(self._event)
        return self._event

    def __exit__(self, *_: object) -> None:
        for wakers in self._sets:
            wakers.discard(self._event)


def drift_of(container: SimulatedContainer) -> tuple[str, ...]:
    """What somebody changed on it since it was made."""
    inspect = container.inspect()
    created = json.loads(container.labels.get(CREATED_LABEL, "{}"))
    if not created:
        return (f"Labels.{CREATED_LABEL}",)
    config = container.image.config
    return drift(created["name"], created["image"], created["body"], inspect, config)


def _within(line: LogLine, wanted: LogFilter) -> bool:
    if line.at is None:
        return True
    return (wanted.since is None or line.at >= wanted.since) and (
        wanted.until is None or line.at <= wanted.until
    )
