"""The seam to a container engine: what a module's container shall be, and what is seen of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

MODULE_LABEL = "io.gatelet.module"
"""Label of every container that gatelet made: the module's name."""

DEVICE_LABEL = "io.gatelet.device"
"""Label: the device's id, so that two agents on one engine leave each other's containers alone."""

DIGEST_LABEL = "io.gatelet.digest"
"""Label: the digest of the image (sha256:...) that the module was pinned to."""

SPEC_LABEL = "io.gatelet.spec"
"""Label: `ContainerSpec.fingerprint()` at creation."""

SCORING_LABEL = "io.gatelet.scoring"
"""Label of an image or container that serves the Open Inference Protocol on a Unix socket."""

ContainerState = Literal["created", "running", "paused", "restarting", "exited", "dead"]
Health = Literal["none", "starting", "healthy", "unhealthy"]


class RuntimeFailed(Exception):
    """The engine did not do what was asked; `retryable` tells whether it may later."""

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """A module's container as it shall be. `body` is the whole Docker create body in canonical
    JSON (Image, Env, Labels, HostConfig, ...), made by `create_body.create_body` from
    createOptions, the module's env and the device's policy; `name` is the container's name."""

    module: str
    name: str
    image: str
    digest: str
    body: str

    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that needs a new container when it changes."""
        text = "\0".join((self.module, self.name, self.digest, self.body))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ContainerView:
    """A container as the engine reports it.

    `spec` and `digest` are the labels of creation; `drift` names each setting that no longer is as
    it was created (empty: none). Times are aware UTC, None while there is none.
    """

    module: str
    name: str
    id: str
    spec: str
    digest: str
    state: ContainerState
    exit_code: int = 0
    oom_killed: bool = False
    error: str = ""
    health: Health = "none"
    health_log: str = ""
    started_at: datetime | None = None
    finished_at: datetime | None = None
    drift: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineImage:
    """An image in the engine. `digests` are the manifest digests (sha256:...) it was pulled by."""

    id: str
    names: tuple[str, ...]
    digests: tuple[str, ...]
    labels: Mapping[str, str]
    size: int
    created: datetime


@dataclass(frozen=True, slots=True)
class EngineInfo:
    version: str
    api_version: str
    os: str
    architecture: str
    root_dir: str


@dataclass(frozen=True, slots=True)
class PullProgress:
    bytes_done: int
    bytes_total: int
    layers_done: int
    layers_total: int


@dataclass(frozen=True, slots=True)
class LogLine:
    """`at` is aware UTC; `stream` is "stdout" or "stderr"; `text` has no line end."""

    at: datetime | None
    stream: str
    text: str


@dataclass(frozen=True, slots=True)
class LogFilter:
    """`tail`: the last n lines, None for all; `since` and `until` are aware UTC."""

    tail: int | None = None
    since: datetime | None = None
    until: datetime | None = None


class ContainerRuntime(Protocol):
    """A container engine. Every call is idempotent and raises RuntimeFailed."""

    async def info(self) -> EngineInfo: ...

    async def images(self) -> tuple[EngineImage, ...]: ...

    async def pull(
        self,
        image: str,
        digest: str,
        credentials: tuple[tuple[str, str, str], ...],
        on_progress: Callable[[PullProgress], None],
    ) -> None:
        """Bring `image` (name with tag) at exactly `digest` into the engine, and tag it.

        `credentials` are (address, username, password). Cancelling the call stops the transfer.
        """

    async def remove_image(self, digest: str) -> None:
        """Remove an image that no container uses; no error when it is not there."""

    async def containers(self) -> tuple[ContainerView, ...]:
        """Every container that carries this device's labels, in any state."""

    async def create(self, spec: ContainerSpec) -> None:
        """Create, without starting. A leftover of the same name with our labels is replaced;
        one without is refused, with its name."""

    async def start(self, name: str) -> None: ...

    async def stop(self, name: str, timeout: float | None = None) -> None:
        """The container's own StopSignal, after `timeout` seconds SIGKILL; no error when it does
        not run. None: its own StopTimeout, see `policy.stop_seconds`. May take that long; other
        calls do not wait for it. Cancelling the call ends the waiting, not always the stop."""

    async def remove(self, name: str) -> None:
        """Remove by force, with anonymous volumes; no error when it is not there."""

    def logs(self, name: str, wanted: LogFilter, *, follow: bool) -> AsyncIterator[LogLine]:
        """Lines oldest first; with `follow` goes on until the caller stops or the container is
        removed."""
        ...

    def events(self) -> AsyncIterator[None]:
        """One item whenever something may have changed for one of our containers. Ends by
        RuntimeFailed when the engine goes away."""
        ...

    async def close(self) -> None: ...


def canonical_body(body: Mapping[str, Any]) -> str:
    """JSON with sorted keys and no blanks."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"))
