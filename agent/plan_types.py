"""What the planner reads and what it says: modules wanted, the device as seen, steps, failures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from .module_spec import MAX_STARTUP_ORDER, RestartPolicy
from .restarts import RestartRules, RestartState
from .runtime.container import ContainerSpec, ContainerView
from .scoring_env import ScoringOptions

Kind = Literal["", "model", "container", "scoring"]
"""What an image is: a model for the scoring process, any other image, one that serves the Open
Inference Protocol on a socket; "" while its name was not resolved yet."""

UpdateMode = Literal["NonBlocking", "WaitForAllPulls"]
"""edgeAgent's ModuleUpdateMode: change each module when its image is there, or all when all are."""


@dataclass(frozen=True, slots=True)
class WantedModule:
    """A module of a deployment. `digest` is None and `kind` "" until its image name was resolved.

    `instance` is the name under which the scoring process knows this module with this image and
    these load options; None until `digest` is known, and for plain containers. `container` is what
    a container module runs as, None where `refused` says why it may not.
    """

    name: str
    image: str
    digest: str | None
    instance: str | None
    options: ScoringOptions
    running: bool = True
    may_pull: bool = True
    kind: Kind = "model"
    container: ContainerSpec | None = None
    refused: str = ""
    socket: str = ""
    policy: RestartPolicy = "on-unhealthy"
    order: int = MAX_STARTUP_ORDER
    probation_seconds: float | None = None

    @property
    def contained(self) -> bool:
        """Whether it runs as a container."""
        return self.kind in ("container", "scoring")

    @property
    def scores(self) -> bool:
        """Whether requests may be routed to it; unknown, so possible, before it was resolved."""
        return self.kind != "container"

    def runs_as(self, other: WantedModule | None) -> bool:
        """Whether it is the very same as `other` of another deployment, as far as what runs goes.

        The digests tell containers apart that this device refuses.
        """
        return (
            other is not None
            and self.digest is not None
            and (self.running, self.digest, self.container, self.instance)
            == (other.running, other.digest, other.container, other.instance)
        )


@dataclass(frozen=True, slots=True)
class Wanted:
    """The modules of one deployment."""

    generation: int
    modules: tuple[WantedModule, ...]
    update_mode: UpdateMode = "NonBlocking"


@dataclass(frozen=True, slots=True)
class Target:
    """A share of an endpoint's requests. `percent` of the default target is the remainder.

    `mirror`: percent of them that it gets a copy of; its answers may differ by `tolerance`.
    """

    instance: str
    percent: int
    default: bool
    mirror: int = 0
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class Route:
    """`sticky`: the header whose equal values go to one target; "" for the usual one."""

    endpoint: str
    targets: tuple[Target, ...]
    sticky: str = ""


@dataclass(frozen=True, slots=True)
class WantedEndpoint:
    """What the scoring process is told of an endpoint before its models are there."""

    endpoint: str
    auth: str = "none"


UNTOLD: Final = (WantedEndpoint(""),)
"""Of a scoring process that was told nothing yet, not even that no endpoint is wanted."""


@dataclass(frozen=True, slots=True)
class InstanceView:
    """A model inside the scoring process: `state` is "loaded", "ready" or "failed".

    `healthy` is False when none of its backends answers now.
    """

    name: str
    state: str
    error: str = ""
    healthy: bool = True


@dataclass(frozen=True, slots=True)
class Observed:
    """The device as seen. `scoring_up` False and `engine` "down" mean that instances, routes and
    containers are unknown, not that there are none; `engine` "none": there is nothing to ask.

    `images` are digests in the model store, `engine_images` those in the engine; `containers` go
    by container name. `announced`: the endpoints that the scoring process was told of, None where
    it takes no such word.
    """

    images: frozenset[str]
    scoring_up: bool
    instances: Mapping[str, InstanceView]
    routes: tuple[Route, ...]
    engine: Literal["none", "down", "up"] = "none"
    engine_error: str = ""
    containers: Mapping[str, ContainerView] = field(default_factory=dict)
    engine_images: frozenset[str] = frozenset()
    announced: tuple[WantedEndpoint, ...] | None = None


# -- steps -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resolve:
    """Find out the digest and the kind of a module's image, and pin both.

    With `only_local` (imagePullPolicy never) an image that is not on the device is an error.
    """

    generation: int
    module: str
    image: str
    only_local: bool = False


@dataclass(frozen=True, slots=True)
class Pull:
    """Bring the image, verified, into the model store or into the engine."""

    module: str
    image: str
    digest: str
    kind: Kind = "model"
    only_local: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """`socket` in place of an image in the model store: where a container serves the model."""

    module: str
    instance: str
    digest: str
    options: ScoringOptions
    socket: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    module: str
    instance: str


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the scoring process which endpoints are wanted, loaded or not."""

    endpoints: tuple[WantedEndpoint, ...]


@dataclass(frozen=True, slots=True)
class Switch:
    routes: tuple[Route, ...]


@dataclass(frozen=True, slots=True)
class Unload:
    instance: str


@dataclass(frozen=True, slots=True)
class Create:
    module: str
    container: ContainerSpec


@dataclass(frozen=True, slots=True)
class Start:
    """`automatic`: the restart policy asks for it, so it counts as a restart."""

    module: str
    name: str
    automatic: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    module: str
    name: str
    reason: str
    automatic: bool = False


@dataclass(frozen=True, slots=True)
class Remove:
    """Remove a container that does not run."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Collect:
    """Remove a model image that nothing needs."""

    digest: str


@dataclass(frozen=True, slots=True)
class RemoveImage:
    """Remove an image from the engine that nothing needs and that gatelet brought there."""

    digest: str


Step = (
    Resolve
    | Pull
    | Load
    | Probe
    | Announce
    | Switch
    | Unload
    | Create
    | Start
    | Stop
    | Remove
    | Collect
    | RemoveImage
)

MODULE_STEPS = (Resolve, Pull, Load, Probe, Create, Start, Stop, Remove)


def subject(step: Step) -> str:
    """What a step works on; at most one step per subject runs at a time.

    Bringing an image is a subject of its own: the old version of a module is looked after while
    the new one arrives.
    """
    if isinstance(step, (Resolve, Pull)):
        return f"pull:{step.module}"
    if isinstance(step, (Load, Probe, Create, Start, Stop, Remove)):
        return f"module:{step.module}"
    if isinstance(step, Announce):
        return "endpoints"
    if isinstance(step, Switch):
        return "routes"
    if isinstance(step, Unload):
        return f"instance:{step.instance}"
    return f"image:{step.digest}"


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
    if isinstance(step, Announce):
        names = ", ".join(one.endpoint for one in step.endpoints)
        return f"announce {names or 'that no endpoint is wanted'}"
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


def module_of(step: Step) -> str | None:
    """The module that a step is for, None for those of the whole device."""
    return step.module if isinstance(step, MODULE_STEPS) else None


@dataclass(frozen=True, slots=True)
class Failure:
    """The last failures of one step. `retry_at` is on the monotonic clock, in seconds.

    `code` is for machines: "DISK_FULL", "NO_ENGINE", "ENGINE_DOWN", "REFUSED" or empty.
    """

    step: Step
    count: int
    retry_at: float
    message: str
    retryable: bool
    code: str = ""


def attempts(count: int) -> str:
    """Says how often something failed: rounded, for a number that changes with every attempt of an
    outage would be reported as often."""
    least = attempts_told(count)
    return f"attempt {count}" if least == count else f"more than {least} attempts"


def attempts_told(count: int) -> int:
    """`count` as reports have it: up to 3 itself, then the next lower of 3, 30, 300 and so on."""
    least = 3
    while least * 10 < count:
        least *= 10
    return min(least, count)


# -- what the plan also depends on -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rules:
    """Numbers of the planner, in seconds. `startup_wait` 0: start groups do not wait."""

    startup_wait: float = 60.0
    restarts: RestartRules = field(default_factory=RestartRules)


@dataclass(frozen=True, slots=True)
class History:
    """What happened before and cannot be seen on the device.

    `restarts` by module; `unready` says since when (monotonic) a module holds later start groups
    back; `discard` are the images to remove. `proven`: the deployment was good before, so nothing
    of it is given up: there is nothing better, and what is in its way may go. `patience`: until
    when (monotonic) a container that somebody keeps changing is left as it is, by module.
    """

    restarts: Mapping[str, RestartState] = field(default_factory=dict)
    unready: Mapping[str, float] = field(default_factory=dict)
    discard: tuple[Collect | RemoveImage, ...] = ()
    proven: bool = False
    patience: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """`steps` may start now; `blocked` are failures, with their reasons, that hold a step back, or
    of one that is tried although it cannot succeed as things are.

    `settled`: every wanted module is at its goal and routed, and nothing else runs or serves.
    `at_goal` names the wanted modules that are as they shall be: running and healthy, ended as
    they may, or stopped. `waits` says of modules that could go on why they do not. `wake_at` is
    when time alone changes the plan (monotonic), None if it does not. `fatal` is the first of
    `blocked` that no further attempt can heal, unless it concerns what the deployment to fall back
    to runs just so: to go back would not heal it.
    """

    steps: tuple[Step, ...]
    blocked: tuple[Failure, ...]
    settled: bool
    at_goal: frozenset[str] = frozenset()
    waits: tuple[tuple[str, str], ...] = ()
    wake_at: float | None = None
    fatal: Failure | None = None
