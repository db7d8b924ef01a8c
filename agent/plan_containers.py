"""The engine's share of a plan: what brings one container to what it shall be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .plan_types import (
    Create,
    History,
    Observed,
    Remove,
    Rules,
    Start,
    Step,
    Stop,
    WantedModule,
)
from .restarts import NEW, Verdict, asked_for, decide
from .runtime.container import ContainerView

RUNNING_STATES = ("running", "paused", "restarting")


@dataclass(frozen=True, slots=True)
class Move:
    """The next step for a container, None for none.

    `fresh`: it changes or begins something, so it waits for earlier start groups and, where all
    images must be there first, for those. `wake_at`: when a restart is due.
    """

    step: Step | None = None
    fresh: bool = False
    wake_at: float | None = None


def has_image(module: WantedModule, observed: Observed) -> bool:
    """Whether a container of this module can be made, or is there already."""
    if module.kind == "model":
        return module.digest in observed.images
    if module.digest in observed.engine_images:
        return True
    view = view_of(module, observed)
    return view is not None and _is_as_wanted(module, view)


def view_of(module: WantedModule, observed: Observed) -> ContainerView | None:
    return None if module.container is None else observed.containers.get(module.container.name)


def is_healthy(
    module: WantedModule, observed: Observed, history: History, rules: Rules, now: float
) -> bool:
    """Whether the container is as it shall be: the wanted one, running and healthy, or ended as
    its policy permits. One without a health check is healthy while it runs."""
    view = view_of(module, observed)
    if view is None or not _is_as_wanted(module, view):
        return False
    state = history.restarts.get(module.name, NEW)
    if asked_for(state):
        return False
    if view.state == "running":
        return view.health in ("none", "healthy") and state.trouble_since is None
    verdict = decide(module.policy, state, view, rules.restarts, now)
    return verdict.action == "ended" and view.exit_code == 0 and not view.oom_killed


def advance(
    module: WantedModule, observed: Observed, history: History, rules: Rules, now: float
) -> Move:
    """The next step towards a running container of `module`, whose image is there."""
    container = module.container
    if container is None:
        return Move()
    view = view_of(module, observed)
    if view is None:
        return Move(Create(module.name, container), fresh=True)
    if not _is_as_wanted(module, view) or view.state in ("dead", "paused"):
        until = history.patience.get(module.name, now)
        if now < until and view.state == "running" and view.spec == container.fingerprint():
            return Move(wake_at=until)
        return Move(_out_of_the_way(view, _why(module, view)), fresh=True)
    state = history.restarts.get(module.name, NEW)
    if view.state == "created":
        return Move(Start(module.name, view.name), fresh=True)
    if view.state == "running" and asked_for(state):
        return Move(Stop(module.name, view.name, "a restart was asked for"))
    if view.state == "exited" and asked_for(state):
        return Move(Start(module.name, view.name))
    verdict: Verdict = decide(module.policy, state, view, rules.restarts, now)
    if verdict.action == "start":
        return Move(Start(module.name, view.name), fresh=True)
    if verdict.action == "wait":
        return Move(wake_at=verdict.at)
    if verdict.action == "restart":
        if view.state == "running":
            return Move(Stop(module.name, view.name, "it is unhealthy", automatic=True))
        return Move(Start(module.name, view.name, automatic=True))
    return Move()


def stop(module: str, observed: Observed, reason: str) -> Step | None:
    """What stops a module that shall not run; its container stays."""
    for view in _of(module, observed):
        if view.state in RUNNING_STATES:
            return Stop(module, view.name, reason)
    return None


def clear(module: str, observed: Observed, but: str | None = None) -> Step | None:
    """What takes the containers of a module away, except the one named `but`."""
    for view in _of(module, observed):
        if view.name != but:
            why = "no deployment wants it" if but is None else f"the module's container is {but}"
            return _out_of_the_way(view, why)
    return None


def strangers(names: Iterable[str], observed: Observed) -> list[str]:
    """Modules with a container here that are not among `names`, in order."""
    known = set(names)
    return sorted({view.module for view in observed.containers.values()} - known)


def _of(module: str, observed: Observed) -> list[ContainerView]:
    return [view for _, view in sorted(observed.containers.items()) if view.module == module]


def _is_as_wanted(module: WantedModule, view: ContainerView) -> bool:
    container = module.container
    return container is not None and view.spec == container.fingerprint() and not view.drift


def _why(module: WantedModule, view: ContainerView) -> str:
    if module.container is not None and view.spec != module.container.fingerprint():
        return "its deployment changed"
    if view.drift:
        return f"it was changed from outside: {', '.join(view.drift)}"
    return f"it is {view.state}"


def _out_of_the_way(view: ContainerView, reason: str) -> Step:
    if view.state in RUNNING_STATES:
        return Stop(view.module, view.name, reason)
    return Remove(view.module, view.name)
