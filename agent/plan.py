"""What to do next: a pure function from what is wanted and what is seen to the steps between.

Nothing here remembers a plan. Every pass plans anew from what is observed, so a step that was lost
to a crash is simply planned again; every step may therefore run twice and must be idempotent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .scoring_env import ScoringOptions


@dataclass(frozen=True, slots=True)
class WantedModule:
    """A model module of a deployment. `digest` is None until its image name was resolved.

    `instance` is the name under which the scoring process knows this module with this image and
    these load options; None until `digest` is known.
    """

    name: str
    image: str
    digest: str | None
    instance: str | None
    options: ScoringOptions
    running: bool = True
    may_pull: bool = True


@dataclass(frozen=True, slots=True)
class Wanted:
    """The modules of one deployment."""

    generation: int
    modules: tuple[WantedModule, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """A share of an endpoint's requests. `percent` of the default target is the remainder."""

    instance: str
    percent: int
    default: bool


@dataclass(frozen=True, slots=True)
class Route:
    endpoint: str
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class InstanceView:
    """A model inside the scoring process: `state` is "loaded", "ready" or "failed"."""

    name: str
    state: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class Observed:
    """`scoring_up` False means that instances and routes are unknown, not that there are none."""

    images: frozenset[str]
    scoring_up: bool
    instances: Mapping[str, InstanceView]
    routes: tuple[Route, ...]


@dataclass(frozen=True, slots=True)
class Pull:
    """Resolve the image name to a digest, pin it, and bring the image into the store, verified.

    With `only_local` (imagePullPolicy never) an image that is not in the store is an error.
    """

    generation: int
    module: str
    image: str
    only_local: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    module: str
    instance: str
    digest: str
    options: ScoringOptions


@dataclass(frozen=True, slots=True)
class Probe:
    module: str
    instance: str


@dataclass(frozen=True, slots=True)
class Switch:
    routes: tuple[Route, ...]


@dataclass(frozen=True, slots=True)
class Unload:
    instance: str


@dataclass(frozen=True, slots=True)
class Collect:
    """Remove an image that no deployment worth keeping names."""

    digest: str


Step = Pull | Load | Probe | Switch | Unload | Collect


def subject(step: Step) -> str:
    """What a step works on; at most one step per subject runs at a time.

    Steps with the same subject and kind share one back-off.
    """
    if isinstance(step, (Pull, Load, Probe)):
        return f"module:{step.module}"
    if isinstance(step, Switch):
        return "routes"
    if isinstance(step, Unload):
        return f"instance:{step.instance}"
    return f"image:{step.digest}"


@dataclass(frozen=True, slots=True)
class Failure:
    """The last failures of one step. `retry_at` is on the monotonic clock, in seconds."""

    step: Step
    count: int
    retry_at: float
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """`steps` may start now; `blocked` are failures that hold a step back, with their reasons.

    `settled`: every wanted module is ready and routed, and nothing else serves.
    """

    steps: tuple[Step, ...]
    blocked: tuple[Failure, ...]
    settled: bool


def plan(
    wanted: Wanted,
    fallback: Wanted | None,
    observed: Observed,
    failures: Mapping[Step, Failure],
    keep_images: frozenset[str],
    now: float,
) -> Plan:
    """The steps that bring `observed` to `wanted`.

    While an endpoint of `wanted` is not ready, the modules of `fallback` (the last good deployment)
    that serve it are wanted too: a restart in the middle of an update finds the old version again.
    `keep_images` are never collected, whatever else holds.
    """
    if fallback is not None and fallback.generation == wanted.generation:
        fallback = None
    ready = _ready_endpoints(wanted, observed)
    needed = [module for module in wanted.modules if module.running]
    wanted_endpoints = {module.options.endpoint for module in needed}
    if fallback is not None:
        needed += [
            module
            for module in fallback.modules
            if module.running
            and module.options.endpoint in wanted_endpoints - ready
            and module.digest in observed.images
        ]

    steps: list[Step] = []
    for module in needed:
        step = _next_step(module, wanted.generation, observed)
        if step is not None and step not in steps:
            steps.append(step)

    settled = False
    if observed.scoring_up:
        routes = wanted_routes(wanted, fallback, observed)
        if routes != observed.routes:
            steps.append(Switch(routes))
        routed = {
            target.instance for route in (*routes, *observed.routes) for target in route.targets
        }
        spared = routed | {module.instance for module in needed}
        steps += [Unload(name) for name in sorted(observed.instances) if name not in spared]
        settled = not steps and ready == wanted_endpoints
    if settled:
        in_use = keep_images | {module.digest for module in wanted.modules}
        steps += [Collect(digest) for digest in sorted(observed.images - in_use)]

    held = [failures[step] for step in steps if step in failures]
    blocked = tuple(f for f in held if not f.retryable or f.retry_at > now)
    waiting = {failure.step for failure in blocked}
    return Plan(tuple(step for step in steps if step not in waiting), blocked, settled)


def wanted_routes(wanted: Wanted, fallback: Wanted | None, observed: Observed) -> tuple[Route, ...]:
    """Routes by endpoint name: the new targets where all are ready, else what serves it now.

    What serves now is the present route as far as its instances are alive, else the ready ones
    of `fallback`.
    """
    ready = _ready_endpoints(wanted, observed)
    present = {route.endpoint: route for route in observed.routes}
    old = routes_of(fallback.modules) if fallback is not None else {}
    routes = []
    for endpoint, route in routes_of(wanted.modules).items():
        if endpoint in ready:
            routes.append(route)
            continue
        for candidate in (present.get(endpoint), old.get(endpoint)):
            if candidate is not None and all(
                _state(observed, target.instance) == "ready" for target in candidate.targets
            ):
                routes.append(candidate)
                break
    return tuple(sorted(routes, key=lambda route: route.endpoint))


def routes_of(modules: Iterable[WantedModule]) -> dict[str, Route]:
    """Endpoint -> route for the running modules, as if all of them were ready."""
    shares: dict[str, list[WantedModule]] = {}
    for module in modules:
        if module.running:
            shares.setdefault(module.options.endpoint, []).append(module)
    return {endpoint: Route(endpoint, _targets(sharing)) for endpoint, sharing in shares.items()}


def _targets(modules: list[WantedModule]) -> tuple[Target, ...]:
    # Without an explicit default the first module without a share is it; if each has a share,
    # the first one takes the remainder.
    ordered = sorted(modules, key=lambda module: (module.options.traffic is not None, module.name))
    default, *others = ordered
    percent = [module.options.traffic or 0 for module in others]
    return (
        Target(default.instance or "", max(0, 100 - sum(percent)), True),
        *(
            Target(module.instance or "", share, False)
            for module, share in zip(others, percent, strict=True)
        ),
    )


def _ready_endpoints(wanted: Wanted, observed: Observed) -> set[str]:
    waiting = {
        module.options.endpoint
        for module in wanted.modules
        if module.running and _state(observed, module.instance) != "ready"
    }
    return {m.options.endpoint for m in wanted.modules if m.running} - waiting


def _next_step(module: WantedModule, generation: int, observed: Observed) -> Step | None:
    if module.digest is None or module.instance is None or module.digest not in observed.images:
        return Pull(generation, module.name, module.image, not module.may_pull)
    if not observed.scoring_up:
        return None
    state = _state(observed, module.instance)
    if state is None:
        return Load(module.name, module.instance, module.digest, module.options)
    if state in ("loaded", "failed"):
        return Probe(module.name, module.instance)
    return None


def _state(observed: Observed, instance: str | None) -> str | None:
    view = observed.instances.get(instance) if instance is not None else None
    return None if view is None else view.state
