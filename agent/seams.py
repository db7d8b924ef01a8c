"""The agent's holds on what it changes: images, the scoring process and the container engine.

Each is a Protocol over frozen views of what is there, with one real and several simulated sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from .canary import Counts
from .plan import InstanceView, Kind, Route, WantedEndpoint
from .runtime.container import ContainerRuntime, ContainerView, EngineImage
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
    where its clients connect, by protocol; `announced`: see `plan_types.Observed`; `fabric` is what
    the fabric process tells of itself (see docs/fpga.md), None without an FPGA."""

    boot_id: str
    pid: int
    models: tuple[LoadedModel, ...]
    routes: tuple[Route, ...]
    addresses: tuple[tuple[str, str], ...] = ()
    announced: tuple[WantedEndpoint, ...] | None = None
    fabric: Mapping[str, Any] | None = None


class ScoringControl(Protocol):
    """The agent's hold on the scoring process. Every call is idempotent and raises StepFailed."""

    async def status(self) -> ScoringView: ...

    async def load(self, instance: str, directory: Path, options: ScoringOptions) -> None: ...

    async def attach(self, instance: str, socket: str, options: ScoringOptions) -> None:
        """Load what a container serves on the Unix socket `socket`."""

    async def probe(self, instance: str) -> None: ...

    async def announce(self, endpoints: tuple[WantedEndpoint, ...]) -> None:
        """Say which endpoints are wanted. Only asked where `ScoringView.announced` is not None."""

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
    """What an image name stands for now; `model`: the one that a scoring image's label names."""

    digest: str
    kind: Kind
    model: str = ""


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
