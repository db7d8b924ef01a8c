"""What is wanted and what is seen, in few words, for tables of the planner.

Modules are written as in `C("web", 2)`: a container module of version 2. On the device, `box` is a
container, `engine` and `store` name images as "web2", `loaded` instances and `routes` endpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from gatelet.agent.deployments import instance_name
from gatelet.agent.plan import (
    Collect,
    Create,
    Failure,
    History,
    InstanceView,
    Load,
    Observed,
    Plan,
    Probe,
    Pull,
    Remove,
    RemoveImage,
    Resolve,
    Rules,
    Start,
    Step,
    Stop,
    Switch,
    Unload,
    Wanted,
    WantedModule,
    plan,
    routes_of,
)
from gatelet.agent.restarts import RestartState
from gatelet.agent.runtime.container import ContainerSpec, ContainerView
from gatelet.agent.scoring_env import ScoringOptions

NOW = 10_000.0
WALL = datetime(2030, 1, 1, tzinfo=timezone.utc)
LAST = 4294967295


def digest(name: str) -> str:
    return "sha256:" + hashlib.sha256(name.encode()).hexdigest()


def container(name: str, version: int, body: str = "{}") -> ContainerSpec:
    return ContainerSpec(name, name, f"r/{name}:{version}", digest(f"{name}{version}"), body)


def module(name: str, version: int, kind: str, **changes: Any) -> WantedModule:
    options = ScoringOptions(endpoint=changes.pop("endpoint", name))
    body = changes.pop("body", "{}")
    pinned = digest(f"{name}{version}") if kind else None
    contained = kind in ("container", "scoring")
    made = container(name, version, body) if contained else None
    instance = None
    if kind in ("model", "scoring"):
        instance = instance_name(
            name, pinned or "", options, made.fingerprint() if made is not None else ""
        )
    return WantedModule(
        name,
        f"r/{name}:{version}",
        pinned,
        instance,
        options,
        kind=kind,  # type: ignore[arg-type]
        container=made,
        socket=f"/run/{name}.sock" if kind == "scoring" else "",
        **changes,
    )


def C(name: str, version: int = 1, **changes: Any) -> WantedModule:  # noqa: N802
    return module(name, version, "container", **changes)


def M(name: str, version: int = 1, **changes: Any) -> WantedModule:  # noqa: N802
    return module(name, version, "model", **changes)


def S(name: str, version: int = 1, **changes: Any) -> WantedModule:  # noqa: N802
    return module(name, version, "scoring", **changes)


def U(name: str, version: int = 1, **changes: Any) -> WantedModule:  # noqa: N802
    """One whose image name was not resolved yet."""
    return module(name, version, "", **changes)


def box(name: str, version: int = 1, state: str = "running", **changes: Any) -> ContainerView:
    body = changes.pop("body", "{}")
    return ContainerView(
        name,
        changes.pop("called", name),
        f"id-{name}",
        container(name, version, body).fingerprint(),
        digest(f"{name}{version}"),
        state,  # type: ignore[arg-type]
        **changes,
    )


@dataclass
class Row:
    """`steps` in order; `old` is the last good deployment. `restarts`, `unready` and `failing` are
    History and failures; `waits` names modules that wait for a start group."""

    name: str
    wanted: list[WantedModule]
    steps: list[str]
    old: list[WantedModule] | None = None
    boxes: list[ContainerView] = field(default_factory=list)
    engine: str = ""
    store: str = ""
    loaded: Mapping[str, str] = field(default_factory=dict)
    routes: list[WantedModule] = field(default_factory=list)
    up: str = "up"
    scoring: bool = True
    mode: str = "NonBlocking"
    restarts: Mapping[str, RestartState] = field(default_factory=dict)
    unready: Mapping[str, float] = field(default_factory=dict)
    failing: list[Failure] = field(default_factory=list)
    discard: tuple[Collect | RemoveImage, ...] = ()
    waits: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)
    settled: bool = False
    wake_in: float | None = None

    def observed(self) -> Observed:
        return Observed(
            frozenset(map(digest, self.store.split())),
            self.scoring,
            {name: InstanceView(name, state) for name, state in self.loaded.items()},
            tuple(routes_of(self.routes).values()),
            self.up,  # type: ignore[arg-type]
            "" if self.up == "up" else "gone",
            {view.name: view for view in self.boxes} if self.up == "up" else {},
            frozenset(map(digest, self.engine.split())) if self.up == "up" else frozenset(),
        )

    def plan(self) -> Plan:
        return plan(
            Wanted(2, tuple(self.wanted), self.mode),  # type: ignore[arg-type]
            None if self.old is None else Wanted(1, tuple(self.old)),
            self.observed(),
            {failure.step: failure for failure in self.failing},
            NOW,
            History(self.restarts, self.unready, self.discard),
            Rules(startup_wait=60.0),
        )


def short(step: Step) -> str:
    if isinstance(step, Switch):
        return "switch " + ",".join(route.endpoint for route in step.routes)
    if isinstance(step, Unload):
        return f"unload {step.instance.partition('@')[0]}"
    if isinstance(step, (Collect, RemoveImage)):
        return "discard"
    names = {
        Resolve: "resolve",
        Pull: "pull",
        Load: "load",
        Probe: "probe",
        Create: "create",
        Stop: "stop",
        Remove: "remove",
    }
    if isinstance(step, Start):
        return f"{'restart' if step.automatic else 'start'} {step.module}"
    return f"{names[type(step)]} {step.module}"


def ended(since: float = 0.0, count: int = 0, **changes: Any) -> RestartState:
    """A container that ended by itself `since` seconds ago."""
    return RestartState(count=count, exits=1, trouble_since=NOW - since, **changes)


def stamp(name: str, restarts: RestartState, version: int = 1) -> Mapping[str, RestartState]:
    return {name: replace(restarts, container=container(name, version).fingerprint())}


def ready(*modules: WantedModule, state: str = "ready") -> dict[str, str]:
    return {m.instance: state for m in modules if m.instance is not None}


EXIT = {"exit_code": 1}
A1, A2, B1, B2 = C("a"), C("a", 2), C("b"), C("b", 2)
FIRST, SECOND = {"order": 1}, {"order": 2}
