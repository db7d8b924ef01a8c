"""Carrying out the steps of a plan."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from ..modules.errors import ImageError
from ..modules.oci.manifest import MODEL_LABEL
from ..modules.oci.reference import ImageRef
from .plan import (
    Announce,
    Collect,
    Create,
    Kind,
    Load,
    Observed,
    Probe,
    Pull,
    Remove,
    RemoveImage,
    Resolve,
    Start,
    Step,
    Stop,
    Switch,
    Unload,
)
from .runtime.container import ContainerRuntime, PullProgress, RuntimeFailed
from .runtime.scoring_module import is_scoring, named_model
from .seams import (
    DISK_FULL,
    Credentials,
    EngineHold,
    EngineView,
    Images,
    NoEngine,
    Progress,
    Resolved,
    ScoringControl,
    ScoringView,
    StepFailed,
    StoredView,
)

__all__ = [
    "Executor",
    "Images",
    "Progress",
    "ScoringControl",
    "StepFailed",
    "kind_of",
    "same_image",
]

PinStore = Callable[[int, str, str, Kind, str], None]
"""(generation, module, digest, kind, model)"""
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
        seen = replace(
            observed,
            scoring_up=True,
            instances=instances,
            routes=view.routes,
            announced=view.announced,
        )
        return seen, view

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
            self._pin(step.generation, step.module, resolved.digest, resolved.kind, resolved.model)
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
        elif isinstance(step, Announce):
            await self._scoring.announce(step.endpoints)
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
                return resolved_as(digest, known.labels)
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


def resolved_as(digest: str, labels: Mapping[str, str]) -> Resolved:
    """An image with these config labels."""
    kind = kind_of(labels)
    return Resolved(digest, kind, named_model(labels) if kind == "scoring" else "")


def same_image(one: str, other: str) -> bool:
    """Whether two names stand for the same image, as Docker reads names."""
    try:
        return ImageRef.parse(one) == ImageRef.parse(other)
    except ImageError:
        return False
