"""A container engine in memory, with the contract of the real one and faults on demand.

Everything happens in the event loop and by its time, so a virtual loop runs days of it at once and
two runs with the same calls are equal. Several runtimes (an agent, the same agent after a restart,
another device's) may use one engine.

A simulated process does what its command and environment say, in the words of the test image:
`serve` (default) runs until it is stopped; EXIT_AFTER_MS and EXIT_CODE end it; with a health check
it is well from HEALTHY_AFTER_MS until SICK_AFTER_MS; IGNORE_TERM makes it wait for SIGKILL;
`exit N` ends at once, `lines N [PAUSE_MS [serve]]` writes lines, `eat` is killed for its memory,
`env` writes its environment.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ..agent.clock import Clock, SystemClock
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
from ..modules.errors import InvalidReference
from ..modules.oci.reference import ImageRef

SOCKET = "/run/simulated-engine.sock"

_YEAR_ONE = "0001-01-01T00:00:00Z"
_SIGTERM, _SIGKILL = 143, 137


@dataclass(frozen=True, slots=True)
class SimulatedImage:
    """`config` is the Docker config (Cmd, Env, Labels, Healthcheck, ...), `layers` are (id, bytes).

    `login` is (username, password) where the registry asks for it.
    """

    name: str
    digest: str
    config: Mapping[str, Any]
    layers: tuple[tuple[str, int], ...]
    login: tuple[str, str] | None

    @property
    def id(self) -> str:
        return f"sha256:{hashlib.sha256(self.digest.encode()).hexdigest()}"


@dataclass(slots=True)
class EngineFaults:
    """`down`: no answer. `call_seconds`: what each call takes; `pull_seconds`: what each layer
    takes. `fail` holds failures by call (`pull`, `create`, `start`, `stop`, `remove`, ...), used up
    one by one, `fail_always` those that stay."""

    down: bool = False
    call_seconds: float = 0.0
    pull_seconds: float = 0.0
    fail: dict[str, list[RuntimeFailed]] = field(default_factory=dict)
    fail_always: dict[str, RuntimeFailed] = field(default_factory=dict)


class _Container:
    def __init__(self, identity: str, name: str, image: SimulatedImage, sent: dict[str, Any]):
        self.id = identity
        self.name = name
        self.image = image
        self.body = sent
        self.host = dict(sent.get("HostConfig") or {})
        self.state: dict[str, Any] = {
            "Status": "created",
            "Running": False,
            "ExitCode": 0,
            "OOMKilled": False,
            "Error": "",
            "StartedAt": _YEAR_ONE,
            "FinishedAt": _YEAR_ONE,
        }
        self.lines: list[LogLine] = []
        self.timers: list[asyncio.TimerHandle] = []
        self.sick = False
        self.started = 0.0

    @property
    def labels(self) -> dict[str, str]:
        return {**(self.image.config.get("Labels") or {}), **(self.body.get("Labels") or {})}

    @property
    def command(self) -> list[str]:
        return list(self.body.get("Cmd") or self.image.config.get("Cmd") or ["serve"])

    @property
    def environment(self) -> dict[str, str]:
        entries = [*(self.image.config.get("Env") or []), *(self.body.get("Env") or [])]
        return {name: value for name, _, value in (entry.partition("=") for entry in entries)}

    @property
    def health_check(self) -> Mapping[str, Any]:
        given = {
            **(self.image.config.get("Healthcheck") or {}),
            **(self.body.get("Healthcheck") or {}),
        }
        return {} if given.get("Test") in (None, [], ["NONE"]) else given

    def inspect(self) -> dict[str, Any]:
        """As the real engine's `GET /containers/{id}/json`, as far as it is looked at."""
        image = self.image.config
        config = {key: value for key, value in self.body.items() if key != "HostConfig"}
        config |= {"Labels": self.labels}
        config["Env"] = [f"{name}={value}" for name, value in self.environment.items()]
        for key in ("Entrypoint", "Cmd", "User", "WorkingDir"):
            config[key] = self.body.get(key) or image.get(key)
        config["Healthcheck"] = {**(image.get("Healthcheck") or {}), **self.health_check} or None
        mode = self.host.get("NetworkMode") or "default"
        networks = (self.body.get("NetworkingConfig") or {}).get("EndpointsConfig") or {}
        return {
            "Id": self.id,
            "Name": f"/{self.name}",
            "Image": self.image.id,
            "Config": config,
            "HostConfig": {**self.host, "NetworkMode": mode},
            "State": dict(self.state),
            "NetworkSettings": {
                "Networks": {
                    name: {} for name in (*networks, "bridge" if mode == "default" else mode)
                }
            },
        }


class SimulatedEngine:
    """Images, containers and the registries they come from. `runtime` gives access for a device."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.faults = EngineFaults()
        self.pulls = 0
        self._published: dict[str, SimulatedImage] = {}
        self._present: dict[str, tuple[SimulatedImage, datetime]] = {}
        self._tags: dict[str, str] = {}
        self._containers: dict[str, _Container] = {}
        self._made = 0
        self._wakers: set[asyncio.Event] = set()

    def runtime(self, device_id: str) -> SimulatedRuntime:
        return SimulatedRuntime(self, device_id)

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
            self._ended(container, 0)
        self._notify()

    def start(self) -> None:
        self.faults.down = False
        self._notify()

    def signal(self, name: str, number: str) -> None:
        """SIGUSR1: sick, SIGUSR2: well again, SIGKILL."""
        container = self._named(name)
        if number == "SIGKILL":
            self._ended(container, _SIGKILL)
            return
        container.sick = number == "SIGUSR1"
        self._check_health(container)

    def update(self, name: str, **settings: Any) -> None:
        """`docker update`."""
        self._named(name).host.update(settings)
        self._notify()

    def rename(self, name: str, new: str) -> None:
        self._named(name).name = new
        self._notify()

    def create_foreign(self, name: str, image: str) -> None:
        """A container that gatelet did not make."""
        self._add(name, self._image(self._tags[image]), {"Image": image})

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

    def _named(self, name: str) -> _Container:
        found = self._find(name)
        if found is None:
            raise KeyError(f"no container {name}")
        return found

    def _find(self, name: str) -> _Container | None:
        for container in self._containers.values():
            if container.name == name:
                return container
        return None

    def _image(self, digest: str) -> SimulatedImage:
        return self._present[digest][0]

    def _stamp(self) -> str:
        return self.clock.now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    def _add(self, name: str, image: SimulatedImage, sent: dict[str, Any]) -> _Container:
        self._made += 1
        identity = hashlib.sha256(f"{self._made} {name}".encode()).hexdigest()
        container = _Container(identity, name, image, sent)
        self._containers[identity] = container
        self._notify()
        return container

    def _write(self, container: _Container, stream: str, text: str) -> None:
        container.lines.append(LogLine(self.clock.now(), stream, text))
        self._notify()

    def _later(self, container: _Container, seconds: float, work: Callable[[], None]) -> None:
        container.timers.append(asyncio.get_running_loop().call_later(seconds, work))

    def _begin(self, container: _Container) -> None:
        """The process starts."""
        state, environment = container.state, container.environment
        state.update(Status="running", Running=True, ExitCode=0, OOMKilled=False, Error="")
        state["StartedAt"] = self._stamp()
        container.sick = False
        container.started = asyncio.get_running_loop().time()
        check = container.health_check
        if check:
            state["Health"] = {"Status": "starting", "Log": []}
            self._later(
                container, check.get("Interval", 30e9) / 1e9, lambda: self._check_health(container)
            )
        words = container.command
        if words[0] == "exit":
            self._later(container, 0, lambda: self._ended(container, int((*words, "0")[1])))
        elif words[0] == "eat":
            self._later(container, 0, lambda: self._ended(container, _SIGKILL, oom=True))
        elif words[0] == "env":
            for name, value in environment.items():
                self._write(container, "stdout", f"{name}={value}")
            self._later(container, 0, lambda: self._ended(container, 0))
        elif words[0] == "lines":
            self._lines(container, words)
        if words[0] == "serve" or len(words) > 3:
            self._write(container, "stdout", "started")
            end = environment.get("EXIT_AFTER_MS")
            if end is not None:
                code = int(environment.get("EXIT_CODE", "1"))
                self._later(container, int(end) / 1000, lambda: self._ended(container, code))
        self._notify()

    def _lines(self, container: _Container, words: list[str]) -> None:
        count, pause = int((*words, "1")[1]), int(words[2]) / 1000 if len(words) > 2 else 0.0
        for number in range(count):
            stream = "stderr" if number % 2 else "stdout"
            text = f"line {number}"
            if pause == 0:
                self._write(container, stream, text)
            else:
                self._later(
                    container,
                    number * pause,
                    lambda stream=stream, text=text: self._write(container, stream, text),  # type: ignore[misc]
                )
        if len(words) <= 3:
            self._later(container, count * pause, lambda: self._ended(container, 0))

    def _check_health(self, container: _Container) -> None:
        if not container.state["Running"] or not container.health_check:
            return
        environment = container.environment
        age = (asyncio.get_running_loop().time() - container.started) * 1000
        sick_after = float(environment.get("SICK_AFTER_MS", "inf"))
        well_from = float(environment.get("HEALTHY_AFTER_MS", "0"))
        # A timer may come a little early by the rounding of its sum.
        well = not container.sick and well_from <= age + 0.001 and age + 0.001 < sick_after
        health = container.state["Health"]
        grace = float(container.health_check.get("StartPeriod") or 0) / 1e6
        # What fails in the start period does not count until the first success.
        begins = health["Status"] == "starting" and age + 0.001 < grace
        status = "healthy" if well else "starting" if begins else "unhealthy"
        if health["Status"] != status:
            health["Status"] = status
            health["Log"] = [{"ExitCode": 0 if well else 1, "Output": "well" if well else "sick"}]
            self._notify()
        coming = [at - age for at in (well_from, sick_after, grace) if at - age > 0.001]
        if coming and min(coming) != float("inf"):
            self._later(container, min(coming) / 1000, lambda: self._check_health(container))

    def _ended(self, container: _Container, code: int, *, oom: bool = False) -> None:
        if not container.state["Running"]:
            return
        for timer in container.timers:
            timer.cancel()
        container.timers.clear()
        container.state.update(
            Status="exited", Running=False, ExitCode=code, OOMKilled=oom, FinishedAt=self._stamp()
        )
        self._notify()


class SimulatedRuntime:
    """`ContainerRuntime` on a simulated engine. Get one by `SimulatedEngine.runtime`."""

    def __init__(self, engine: SimulatedEngine, device_id: str) -> None:
        self._engine = engine
        self._device = device_id
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
            container_view(container.inspect(), _drift(container))
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
            if same and leftover.state["Status"] == "created" and not _drift(leftover):
                return
            self._remove(leftover)
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
            engine._begin(container)

    async def stop(self, name: str, timeout: float = 10.0) -> None:
        engine = self._engine
        await engine.answer("stop", f"stop container {name}")
        container = engine._find(name)
        if container is None or not container.state["Running"]:
            return
        if "IGNORE_TERM" in container.environment:
            await asyncio.sleep(timeout)
            engine._ended(container, _SIGKILL)
            return
        if container.command[0] == "serve" or len(container.command) > 3:
            engine._write(container, "stdout", "ended")
            engine._ended(container, 0)
        else:
            engine._ended(container, _SIGTERM)

    async def remove(self, name: str) -> None:
        await self._engine.answer("remove", f"remove container {name}")
        container = self._engine._find(name)
        if container is not None:
            self._remove(container)

    def _remove(self, container: _Container) -> None:
        self._engine._ended(container, _SIGKILL)
        self._engine._containers.pop(container.id, None)
        self._engine._notify()

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
                yield None

    def _is_ours(self, container: _Container) -> bool:
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


def _drift(container: _Container) -> tuple[str, ...]:
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
