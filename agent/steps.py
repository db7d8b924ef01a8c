"""Carrying out the steps of a plan: the seams to images and to the scoring process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from ..modules.errors import ImageError
from ..modules.oci.manifest import MODEL_LABEL
from ..modules.oci.reference import ImageRef
from .canary import Counts
from .plan import (
    Collect,
    Create,
    InstanceView,
    Kind,
    Load,
    Observed,
    Probe,
    Pull,
    Remove,
    RemoveImage,
    Resolve,
    Route,
    Start,
    Step,
    Stop,
    Switch,
    Unload,
)
from .runtime.container import (
    ContainerRuntime,
    ContainerView,
    EngineImage,
    PullProgress,
    RuntimeFailed,
)
from .runtime.scoring_module import is_scoring
from .scoring_env import ScoringOptions

DISK_FULL = "DISK_FULL"


class StepFailed(Exception):
    """A step did not succeed; `retryable` tells whether the same step may succeed later.

    `unreachable`: whoever could say more does not answer. `code`: see `Failure.code`.
    """

    def __init__(
        self, message: str, *, retryable: bool, unreachable: bool = False, code: str = ""
    ) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.unreachable = unreachable
        self.code = code


@dataclass(frozen=True, slots=True)
class BackendView:
    name: str
    healthy: bool
    detail: str
    requests: int
    failures: int


@dataclass(frozen=True, slots=True)
class MirrorView:
    """What became of the copies of requests that an instance got; see SCORING_MIRROR."""

    compared: int
    differing: int
    failed: int
    dropped: int
    largest_difference: float


@dataclass(frozen=True, slots=True)
class MemoryView:
    """A model under the memory budget. `loads` on demand, `evictions` for others."""

    resident: bool
    bytes: int
    loads: int
    evictions: int


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What the scoring process says of one instance; `counts` since it was loaded."""

    view: InstanceView
    model: str
    version: str
    backends: tuple[BackendView, ...]
    notes: tuple[str, ...]
    counts: Counts = field(default_factory=Counts)
    mirror: MirrorView | None = None
    memory: MemoryView | None = None


@dataclass(frozen=True, slots=True)
class ScoringView:
    """The scoring process as seen now. `boot_id` differs after each of its starts; `addresses` is
    where its clients connect, by protocol."""

    boot_id: str
    pid: int
    models: tuple[LoadedModel, ...]
    routes: tuple[Route, ...]
    addresses: tuple[tuple[str, str], ...] = ()


class ScoringControl(Protocol):
    """The agent's hold on the scoring process. Every call is idempotent and raises StepFailed."""

    async def status(self) -> ScoringView: ...

    async def load(self, instance: str, directory: Path, options: ScoringOptions) -> None: ...

    async def attach(self, instance: str, socket: str, options: ScoringOptions) -> None:
        """Load what a container serves on the Unix socket `socket`."""

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


Credentials = tuple[tuple[str, str, str], ...]
"""(address, username, password) from the manifest."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """What an image name stands for now."""

    digest: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class StoredView:
    """A model image in the store; `size` in bytes."""

    digest: str
    name: str
    size: int


class Images(Protocol):
    """The agent's hold on registries and model images; all calls raise StepFailed."""

    async def stored(self) -> frozenset[str]:
        """Digests of the model images that are whole and verified in the store."""

    async def resolve(self, image: str, credentials: Credentials) -> Resolved:
        """Ask the registry what `image` is; nothing is downloaded."""

    async def pull(
        self,
        image: str,
        digest: str,
        credentials: Credentials,
        on_progress: Callable[[Progress], None],
    ) -> None:
        """Bring the model image with `digest` into the store.

        Cancelling the call stops the transfer; what arrived is kept for the next attempt.
        """

    async def find(self, image: str) -> str | None:
        """The digest of the stored image that was pulled by this name, None if there is none."""

    async def model_directory(self, digest: str) -> Path: ...

    async def remove(self, digest: str) -> None: ...

    def views(self) -> tuple[StoredView, ...]:
        """The images in the store, with their sizes."""
        ...


@dataclass(frozen=True, slots=True)
class EngineView:
    """The container engine as seen. "none": there is none, `error` says why; "down": it does not
    answer. `outages` changes whenever it was away: what ran in it may have ended with it."""

    state: Literal["none", "down", "up"] = "none"
    error: str = "none is configured"
    containers: tuple[ContainerView, ...] = ()
    images: tuple[EngineImage, ...] = ()
    outages: int = 0
    root: str = ""

    def digests(self) -> frozenset[str]:
        return frozenset(digest for image in self.images for digest in (*image.digests, image.id))


class EngineHold(Protocol):
    """The agent's hold on the engine: see `engine.Engine`."""

    @property
    def runtime(self) -> ContainerRuntime | None: ...

    async def observe(self) -> EngineView: ...

    def changed(self) -> None:
        """What was seen last is no longer true."""


class NoEngine:
    """A device without an engine."""

    def __init__(self, reason: str = "none is configured") -> None:
        self._view = EngineView("none", reason)

    @property
    def runtime(self) -> ContainerRuntime | None:
        return None

    async def observe(self) -> EngineView:
        return self._view

    def changed(self) -> None:
        pass


PinStore = Callable[[int, str, str, Kind], None]
Verify = Callable[[str, str, Credentials, bool], Awaitable[None]]
"""(image, digest, credentials, local): whether the device may use it; `local` asks no registry.

Raises StepFailed.
"""
Bringing = Callable[[str, str, str], None]


class Executor:
    """Runs one step against the seams; knows nothing about when or why."""

    def __init__(
        self,
        images: Images,
        scoring: ScoringControl,
        pin: PinStore,
        engine: EngineHold | None = None,
        bringing: Bringing = lambda digest, place, image: None,
        verify: Verify | None = None,
    ) -> None:
        """`bringing(digest, "store"|"engine", image)` is told before an image is brought here.

        `verify` is asked before a name is pinned to a digest, even of an image that is here
        already: it may have come by another name, for which no signature is asked.
        """
        self._images = images
        self._scoring = scoring
        self._pin = pin
        self._engine: EngineHold = engine or NoEngine()
        self._bringing = bringing
        self._verify = verify
        self.engine_view = EngineView()

    async def observe(self) -> tuple[Observed, ScoringView | None]:
        """What is there now. Raises StepFailed when the image store cannot be read."""
        stored = await self._images.stored()
        engine = self.engine_view = await self._engine.observe()
        observed = Observed(
            stored,
            False,
            {},
            (),
            engine.state,
            engine.error,
            {view.name: view for view in engine.containers},
            engine.digests(),
        )
        try:
            view = await self._scoring.status()
        except StepFailed:
            return observed, None
        instances = {
            model.view.name: replace(
                model.view, healthy=not model.backends or any(b.healthy for b in model.backends)
            )
            for model in view.models
        }
        return replace(observed, scoring_up=True, instances=instances, routes=view.routes), view

    def stored_images(self) -> tuple[StoredView, ...]:
        return self._images.views()

    async def run(
        self, step: Step, credentials: Credentials, on_progress: Callable[[Progress], None]
    ) -> None:
        """Carry out `step`. Raises StepFailed."""
        if isinstance(step, Resolve):
            resolved = await self._resolve(step, credentials)
            if self._verify is not None:
                await self._verify(step.image, resolved.digest, credentials, step.only_local)
            self._pin(step.generation, step.module, resolved.digest, resolved.kind)
        elif isinstance(step, Pull):
            await self._pull(step, credentials, on_progress)
        elif isinstance(step, Load):
            if step.socket:
                await self._scoring.attach(step.instance, step.socket, step.options)
            else:
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
        else:
            await self._in_engine(step)

    async def _resolve(self, step: Resolve, credentials: Credentials) -> Resolved:
        if step.only_local:
            found = await self._find(step.image)
            if found is None:
                raise StepFailed(
                    f"{step.image} is not on this device, and imagePullPolicy is never; "
                    "set it to on-create",
                    retryable=False,
                )
            return found
        try:
            return await self._images.resolve(step.image, credentials)
        except StepFailed as error:
            found = await self._find(step.image) if error.unreachable else None
            if found is None:
                raise
            return found

    async def _find(self, image: str) -> Resolved | None:
        """What is on the device under this name."""
        stored = await self._images.find(image)
        if stored is not None:
            return Resolved(stored, "model")
        for known in self.engine_view.images:
            if any(same_image(name, image) for name in known.names) or any(
                image.endswith(f"@{digest}") for digest in known.digests
            ):
                digest = known.digests[0] if known.digests else known.id
                return Resolved(digest, kind_of(known.labels))
        return None

    async def _pull(
        self, step: Pull, credentials: Credentials, on_progress: Callable[[Progress], None]
    ) -> None:
        if step.only_local:
            raise StepFailed(
                f"{step.image} ({step.digest[:19]}) is no longer on this device, and "
                "imagePullPolicy is never; set it to on-create",
                retryable=False,
            )
        if step.kind == "model":
            self._bringing(step.digest, "store", step.image)
            await self._images.pull(step.image, step.digest, credentials, on_progress)
            return
        if self._verify is not None:
            await self._verify(step.image, step.digest, credentials, False)
        self._bringing(step.digest, "engine", step.image)

        def progress(now: PullProgress) -> None:
            on_progress(
                Progress(
                    "download", now.bytes_done, now.bytes_total, now.layers_done, now.layers_total
                )
            )

        try:
            await self._runtime().pull(step.image, step.digest, credentials, progress)
        except RuntimeFailed as error:
            raise _failed(error) from error
        finally:
            self._engine.changed()

    async def _in_engine(self, step: Create | Start | Stop | Remove | RemoveImage) -> None:
        runtime = self._runtime()
        try:
            if isinstance(step, Create):
                await runtime.create(step.container)
            elif isinstance(step, Start):
                await runtime.start(step.name)
            elif isinstance(step, Stop):
                await runtime.stop(step.name)
            elif isinstance(step, Remove):
                await runtime.remove(step.name)
            else:
                await runtime.remove_image(step.digest)
        except RuntimeFailed as error:
            raise _failed(error) from error
        finally:
            self._engine.changed()

    def _runtime(self) -> ContainerRuntime:
        runtime = self._engine.runtime
        if runtime is None:
            raise StepFailed("this device has no container engine", retryable=False)
        return runtime


def _failed(error: RuntimeFailed) -> StepFailed:
    full = "no space left" in str(error).lower()
    return StepFailed(str(error), retryable=error.retryable or full, code=DISK_FULL if full else "")


def kind_of(labels: Mapping[str, str]) -> Kind:
    """What an image with these config labels is."""
    if MODEL_LABEL in labels:
        return "model"
    return "scoring" if is_scoring(labels) else "container"


def same_image(one: str, other: str) -> bool:
    """Whether two names stand for the same image, as Docker reads names."""
    try:
        return ImageRef.parse(one) == ImageRef.parse(other)
    except ImageError:
        return False


def describe(step: Step) -> str:
    """One line for journals and people."""
    if isinstance(step, Resolve):
        return f"resolve {step.image} for {step.module}"
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
    if isinstance(step, Create):
        return f"create the container of {step.module} ({step.container.digest[:19]})"
    if isinstance(step, Start):
        return f"{'restart' if step.automatic else 'start'} {step.module}"
    if isinstance(step, Stop):
        return f"stop {step.module}: {step.reason}"
    if isinstance(step, Remove):
        return f"remove the container of {step.module}"
    where = " from the engine" if isinstance(step, RemoveImage) else ""
    return f"remove image {step.digest[:19]}{where}"
