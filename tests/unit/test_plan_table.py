"""The planner's golden table: what is wanted and what is seen, and the steps in their order.

Modules are written as in `C("web", 2)`: a container module of version 2. On the device, `box` is a
container, `engine` and `store` name images as "web2", `loaded` instances and `routes` endpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gatelet.agent.config import AgentConfig, DeviceConfig
from gatelet.agent.container_modules import DeviceContainers
from gatelet.agent.deployments import inherited_pins, instance_name, wanted_modules
from gatelet.agent.manifest import Manifest
from gatelet.agent.module_spec import ModuleSpec
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
    describe,
    plan,
    routes_of,
)
from gatelet.agent.restarts import RestartState
from gatelet.agent.runtime.container import ContainerSpec, ContainerView
from gatelet.agent.scoring_env import ScoringOptions
from gatelet.agent.store import Pin

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

TABLE = [
    # One container module, from nothing to running.
    Row("nothing", [], [], settled=True),
    Row("unknown image", [U("a")], ["resolve a"]),
    Row("resolved", [A1], ["pull a"]),
    Row("pulled", [A1], ["create a"], engine="a1"),
    Row("created", [A1], ["start a"], boxes=[box("a", state="created")], engine="a1"),
    Row("running", [A1], [], boxes=[box("a")], engine="a1", settled=True),
    Row("starting to be healthy", [A1], [], boxes=[box("a", health="starting")], engine="a1"),
    Row("healthy", [A1], [], boxes=[box("a", health="healthy")], engine="a1", settled=True),
    Row("image removed under it", [A1], [], boxes=[box("a")], settled=True),
    Row("may not pull", [C("a", may_pull=False)], ["pull a"]),
    # Updates: pull, stop, remove, create, start.
    Row("update unresolved", [U("a", 2)], ["resolve a"], old=[A1], boxes=[box("a")], engine="a1"),
    Row("update pulls first", [A2], ["pull a"], old=[A1], boxes=[box("a")], engine="a1"),
    Row("then stops", [A2], ["stop a"], old=[A1], boxes=[box("a")], engine="a1 a2"),
    Row(
        "then removes",
        [A2],
        ["remove a"],
        old=[A1],
        boxes=[box("a", state="exited")],
        engine="a1 a2",
    ),
    Row("then creates", [A2], ["create a"], old=[A1], engine="a1 a2"),
    Row(
        "then starts",
        [A2],
        ["start a"],
        old=[A1],
        boxes=[box("a", 2, "created")],
        engine="a1 a2",
    ),
    Row(
        "other options, same image",
        [C("a", body='{"x":1}')],
        ["stop a"],
        old=[A1],
        boxes=[box("a")],
        engine="a1",
    ),
    Row(
        "the old one ends while the new one is pulled",
        [A2],
        ["pull a", "restart a"],
        old=[A1],
        boxes=[box("a", state="exited", **EXIT)],
        engine="a1",
        restarts=stamp("a", ended(10)),
    ),
    Row(
        "the old one is gone while the new one is pulled",
        [A2],
        ["pull a", "create a"],
        old=[A1],
        engine="a1",
    ),
    Row(
        "a failed pull leaves the old one",
        [A2],
        [],
        old=[A1],
        boxes=[box("a")],
        engine="a1",
        failing=[Failure(Pull("a", "r/a:2", digest("a2"), "container"), 1, NOW + 5, "down", True)],
        blocked=["down"],
    ),
    Row("rollback recreates the old one", [A1], ["stop a"], boxes=[box("a", 2)], engine="a1 a2"),
    # Drift and broken containers.
    Row("drift", [A1], ["stop a"], boxes=[box("a", drift=("Memory",))], engine="a1"),
    Row("drift, image gone", [A1], ["pull a"], boxes=[box("a", drift=("Memory",))]),
    Row(
        "drift, stopped",
        [A1],
        ["remove a"],
        boxes=[box("a", state="exited", drift=("Memory",))],
        engine="a1",
    ),
    Row("dead", [A1], ["remove a"], boxes=[box("a", state="dead")], engine="a1"),
    Row("paused from outside", [A1], ["stop a"], boxes=[box("a", state="paused")], engine="a1"),
    Row(
        "a second container of the module",
        [A1],
        ["stop a"],
        boxes=[box("a"), box("a", called="a-old")],
        engine="a1",
    ),
    # Removal.
    Row("removed runs", [], ["stop a"], boxes=[box("a")]),
    Row("removed stands", [], ["remove a"], boxes=[box("a", state="exited")]),
    Row("removed was never started", [], ["remove a"], boxes=[box("a", state="created")]),
    Row(
        "removed only when all is here",
        [U("b")],
        ["resolve b"],
        old=[A1],
        boxes=[box("a")],
        engine="a1",
    ),
    Row(
        "what is to go is restarted as long as it is needed",
        [U("b")],
        ["resolve b", "restart a"],
        old=[A1],
        boxes=[box("a", state="exited", **EXIT)],
        engine="a1",
        restarts=stamp("a", ended(11)),
    ),
    Row("now it is here", [B1], ["stop a", "create b"], boxes=[box("a")], engine="a1 b1"),
    # Desired status.
    Row("stop", [C("a", running=False)], ["stop a"], boxes=[box("a")], engine="a1"),
    Row(
        "stopped",
        [C("a", running=False)],
        [],
        boxes=[box("a", state="exited")],
        engine="a1",
        settled=True,
    ),
    Row("stopped is not pulled", [C("a", running=False)], [], settled=True),
    Row(
        "started again after it was stopped, whatever the policy",
        [C("a", policy="never")],
        ["start a"],
        boxes=[box("a", state="exited")],
        engine="a1",
        restarts=stamp("a", RestartState(stopped=True)),
    ),
    # Restart policies at the end of a container.
    *(
        Row(
            f"{policy}, exit {code}",
            [C("a", policy=policy)],
            ["restart a"] if again else [],
            boxes=[box("a", state="exited", exit_code=code)],
            engine="a1",
            restarts=stamp("a", ended(10)),
            settled=not again and code == 0,
        )
        for policy, code, again in (
            ("never", 0, False),
            ("never", 1, False),
            ("on-failure", 0, False),
            ("on-failure", 1, True),
            ("on-unhealthy", 0, False),
            ("on-unhealthy", 1, True),
            ("always", 0, True),
            ("always", 1, True),
        )
    ),
    # ... and when it is unhealthy.
    *(
        Row(
            f"{policy}, unhealthy",
            [C("a", policy=policy)],
            ["stop a"] if again else [],
            boxes=[box("a", health="unhealthy")],
            engine="a1",
            restarts=stamp("a", RestartState(trouble_since=NOW - 10)),
        )
        for policy, again in (
            ("never", False),
            ("on-failure", False),
            ("on-unhealthy", True),
            ("always", True),
        )
    ),
    # The wait before restart n + 1 is min(10 * 2^n, 300) seconds; 20 restarts are the last.
    *(
        Row(
            f"{count} restarts, ended {since} s ago",
            [C("a", policy="always")],
            ["restart a"] if wait == 0 else [],
            boxes=[box("a", state="exited", **EXIT)],
            engine="a1",
            restarts=stamp("a", ended(since, count)),
            wake_in=wait or None,
        )
        for count, since, wait in (
            (0, 9, 1),
            (0, 10, 0),
            (1, 19, 1),
            (1, 20, 0),
            (4, 159, 1),
            (5, 299, 1),
            (5, 300, 0),
            (19, 299, 1),
            (19, 300, 0),
            (20, 99_999, None),
        )
    ),
    Row(
        "out of memory counts as a failure",
        [C("a", policy="on-failure")],
        ["restart a"],
        boxes=[box("a", state="exited", oom_killed=True)],
        engine="a1",
        restarts=stamp("a", ended(10)),
    ),
    # Restarts on request.
    Row(
        "asked for, runs",
        [C("a", policy="never")],
        ["stop a"],
        boxes=[box("a")],
        engine="a1",
        restarts=stamp("a", RestartState(asked=1)),
    ),
    Row(
        "asked for, stands",
        [C("a", policy="never")],
        ["start a"],
        boxes=[box("a", state="exited")],
        engine="a1",
        restarts=stamp("a", RestartState(asked=1, stopped=True)),
    ),
    Row(
        "done",
        [C("a", policy="never")],
        [],
        boxes=[box("a")],
        engine="a1",
        restarts=stamp("a", RestartState(asked=1, answered=1)),
        settled=True,
    ),
    # Update modes: NonBlocking changes each when its image is here, WaitForAllPulls all at once.
    *(
        Row(
            f"{mode}: one of two is here",
            [A2, B2],
            steps,
            old=[A1, B1],
            boxes=[box("a"), box("b")],
            engine="a1 b1 a2",
            mode=mode,
        )
        for mode, steps in (
            ("NonBlocking", ["stop a", "pull b"]),
            ("WaitForAllPulls", ["pull b"]),
        )
    ),
    *(
        Row(
            f"{mode}: both are here",
            [A2, B2],
            ["stop a", "stop b"],
            old=[A1, B1],
            boxes=[box("a"), box("b")],
            engine="a1 b1 a2 b2",
            mode=mode,
        )
        for mode in ("NonBlocking", "WaitForAllPulls")
    ),
    Row(
        "WaitForAllPulls: a crash is no change",
        [A1, B2],
        ["restart a", "pull b"],
        old=[A1, B1],
        boxes=[box("a", state="exited", **EXIT), box("b")],
        engine="a1 b1",
        mode="WaitForAllPulls",
        restarts=stamp("a", ended(10)),
    ),
    *(
        Row(
            f"{mode}: one is to stop",
            [C("a", running=False), B2],
            steps,
            old=[A1, B1],
            boxes=[box("a"), box("b")],
            engine="a1 b1",
            mode=mode,
        )
        for mode, steps in (
            ("NonBlocking", ["stop a", "pull b"]),
            ("WaitForAllPulls", ["pull b"]),
        )
    ),
    Row(
        "WaitForAllPulls: models too",
        [M("m", 2), B1],
        ["pull b"],
        old=[M("m")],
        store="m1 m2",
        loaded=ready(M("m")),
        routes=[M("m")],
        mode="WaitForAllPulls",
    ),
    Row(
        "NonBlocking: models at once",
        [M("m", 2), B1],
        ["load m", "pull b"],
        old=[M("m")],
        store="m1 m2",
        loaded=ready(M("m")),
        routes=[M("m")],
    ),
    Row(
        "WaitForAllPulls: a removed model serves on",
        [B1],
        ["pull b"],
        old=[M("m")],
        store="m1",
        loaded=ready(M("m")),
        routes=[M("m")],
        mode="WaitForAllPulls",
    ),
    Row(
        "NonBlocking: a removed model serves until all is here",
        [B1],
        ["pull b"],
        old=[M("m")],
        store="m1",
        loaded=ready(M("m")),
        routes=[M("m")],
    ),
    Row(
        "a removed model serves until all is here, after a reboot as well",
        [U("b")],
        ["resolve b", "switch m"],
        old=[M("m")],
        store="m1",
        loaded=ready(M("m")),
    ),
    Row(
        "what a deployment that is refused does not name goes on",
        [replace(B1, refused="privileged")],
        [],
        old=[A1, M("m")],
        boxes=[box("a")],
        engine="a1 b1",
        store="m1",
        loaded=ready(M("m")),
        routes=[M("m")],
        blocked=["privileged"],
    ),
    # Start groups.
    Row(
        "both are pulled, the first is made",
        [C("a", **FIRST), C("b", **SECOND)],
        ["create a"],
        engine="a1 b1",
        waits=["b"],
        wake_in=60,
    ),
    Row(
        "the second is pulled meanwhile",
        [C("a", **FIRST), C("b", **SECOND)],
        ["create a", "pull b"],
        engine="a1",
    ),
    Row(
        "the first runs, so the second is made",
        [C("a", **FIRST), C("b", **SECOND)],
        ["create b"],
        boxes=[box("a")],
        engine="a1 b1",
    ),
    Row(
        "the first is not healthy yet",
        [C("a", **FIRST), C("b", **SECOND)],
        [],
        boxes=[box("a", health="starting")],
        engine="a1 b1",
        unready={"a": NOW - 10},
        waits=["b"],
        wake_in=50,
    ),
    Row(
        "the first is sick for too long",
        [C("a", **FIRST), C("b", **SECOND)],
        ["create b"],
        boxes=[box("a", health="starting")],
        engine="a1 b1",
        unready={"a": NOW - 60},
    ),
    Row(
        "one that was given up holds nobody back for ever",
        [C("a", **FIRST, policy="never"), C("b", **SECOND)],
        ["create b"],
        boxes=[box("a", state="exited", **EXIT)],
        engine="a1 b1",
        restarts=stamp("a", ended(70)),
        unready={"a": NOW - 70},
    ),
    Row(
        "one that has done its work does not hold up",
        [C("a", **FIRST, policy="never"), C("b", **SECOND)],
        ["create b"],
        boxes=[box("a", state="exited")],
        engine="a1 b1",
        restarts=stamp("a", ended(1)),
    ),
    Row(
        "a stopped one does not hold up",
        [C("a", **FIRST, running=False), C("b", **SECOND)],
        ["create b"],
        engine="b1",
    ),
    Row(
        "the same group starts together",
        [C("a", **FIRST), C("b", **FIRST)],
        ["create a", "create b"],
        engine="a1 b1",
    ),
    Row(
        "a restart waits for nobody",
        [C("a", **FIRST), C("b", **SECOND, policy="always")],
        ["create a", "restart b"],
        boxes=[box("b", state="exited", **EXIT)],
        engine="a1 b1",
        restarts=stamp("b", ended(10)),
    ),
    Row(
        "after a reboot the groups start in order",
        [C("a", **FIRST), C("b", **SECOND)],
        ["start a"],
        boxes=[box("a", state="exited"), box("b", state="exited")],
        engine="a1 b1",
        restarts={
            **stamp("a", RestartState(stopped=True)),
            **stamp("b", RestartState(stopped=True)),
        },
        waits=["b"],
        wake_in=60,
    ),
    Row(
        "a model waits for a container of an earlier group",
        [C("a", **FIRST), M("m")],
        ["create a"],
        engine="a1",
        store="m1",
        waits=["m"],
        wake_in=60,
    ),
    # The engine.
    Row("no engine", [A1], [], up="none", blocked=["no container engine: gone"]),
    Row("no engine needed", [], [], up="none", settled=True),
    Row("engine down", [A1], [], up="down", blocked=["engine does not answer: gone"]),
    Row(
        "engine down, models go on",
        [A1, M("m")],
        ["load m"],
        up="down",
        store="m1",
        blocked=["engine does not answer: gone"],
    ),
    Row("engine down, resolving goes on", [U("a")], ["resolve a"], up="down"),
    Row(
        "what the device forbids is not made",
        [replace(A1, container=None, refused="Privileged is not allowed")],
        [],
        engine="a1",
        blocked=["Privileged is not allowed"],
    ),
    # Models and scoring containers.
    Row("model resolved", [M("m")], ["pull m"]),
    Row("model pulled", [M("m")], ["load m"], store="m1"),
    Row("model loaded", [M("m")], ["probe m"], store="m1", loaded=ready(M("m"), state="loaded")),
    Row("model probed", [M("m")], ["switch m"], store="m1", loaded=ready(M("m"))),
    Row(
        "model replaced",
        [M("m", 2)],
        ["unload m"],
        store="m2",
        loaded=ready(M("m"), M("m", 2)),
        routes=[M("m", 2)],
    ),
    Row("scoring process away", [M("m")], [], store="m1", scoring=False),
    Row("scoring container is made", [S("s")], ["create s"], engine="s1"),
    Row("... and attached", [S("s")], ["load s"], boxes=[box("s")], engine="s1"),
    Row(
        "... when it is healthy",
        [S("s")],
        [],
        boxes=[box("s", health="starting")],
        engine="s1",
    ),
    Row(
        "... and routed",
        [S("s")],
        ["switch s"],
        boxes=[box("s")],
        engine="s1",
        loaded=ready(S("s")),
    ),
    Row(
        "a removed scoring container loses its requests first",
        [],
        ["switch "],
        boxes=[box("s")],
        engine="s1",
        routes=[S("s")],
    ),
    Row(
        "... and its instance",
        [],
        ["switch "],
        boxes=[box("s")],
        engine="s1",
        loaded=ready(S("s")),
        routes=[S("s")],
    ),
    Row(
        "a container becomes a model",
        [M("a", 2)],
        ["stop a"],
        old=[A1],
        boxes=[box("a")],
        engine="a1",
        store="a2",
    ),
    # Images that may go.
    Row(
        "unused images go",
        [A1],
        ["discard", "discard"],
        boxes=[box("a")],
        engine="a1 x1",
        store="y1",
        discard=(RemoveImage(digest("x1")), Collect(digest("y1"))),
        settled=True,
    ),
    Row(
        "wanted images stay",
        [A1],
        [],
        old=[A2],
        boxes=[box("a")],
        engine="a1 a2",
        discard=(RemoveImage(digest("a1")), RemoveImage(digest("a2"))),
        settled=True,
    ),
]


def test_the_table_is_long_enough_and_its_rows_have_names_of_their_own() -> None:
    assert len(TABLE) >= 60
    assert len({row.name for row in TABLE}) == len(TABLE)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_table(row: Row) -> None:
    found = row.plan()
    assert [short(step) for step in found.steps] == row.steps
    assert found.settled is row.settled
    assert [module for module, _ in found.waits] == row.waits
    said = [failure.message for failure in found.blocked]
    assert len(said) == len(row.blocked)
    assert all(text in message for text, message in zip(row.blocked, said, strict=True))
    assert (found.wake_at is None) == (row.wake_in is None)
    if row.wake_in is not None and found.wake_at is not None:
        assert found.wake_at - NOW == pytest.approx(row.wake_in)
    assert all(describe(step) for step in found.steps)


SPEC = ModuleSpec(
    "web",
    "r.io/web:1",
    env=(("A", "1"),),
    create_options='{"HostConfig":{"Memory":1048576}}',
    startup_order=5,
    restart_policy="always",
    version="1",
)
CHANGES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("nothing", {}, []),
    ("image", {"image": "r.io/web:2"}, ["resolve web"]),
    ("env", {"env": (("A", "2"),)}, ["resolve web"]),
    ("create_options", {"create_options": "{}"}, ["resolve web"]),
    ("status", {"status": "stopped"}, ["stop web"]),
    ("restart_policy", {"restart_policy": "never"}, []),
    ("startup_order", {"startup_order": 0}, []),
    ("image_pull_policy", {"image_pull_policy": "never"}, ["resolve web"]),
    ("version", {"version": "2"}, ["resolve web"]),
    ("name", {"name": "other"}, ["resolve other"]),
]
AFTER_RESOLVING = {
    "image": ["stop web"],
    "env": ["stop web"],
    "create_options": ["stop web"],
    "image_pull_policy": [],
    "version": [],
}


@pytest.mark.parametrize(
    ("changed", "changes", "steps"), CHANGES, ids=lambda value: str(value)[:20]
)
def test_what_a_change_of_each_field_leads_to(
    changed: str, changes: dict[str, Any], steps: list[str]
) -> None:
    """An unchanged image name is resolved again where edgeAgent would pull again; a container is
    made anew only when it would be another one."""
    maker = DeviceContainers(AgentConfig(device=DeviceConfig(id="d", run_dir=Path("/run/g"))))
    before = Manifest("1.1", modules=(SPEC,))
    after = Manifest("1.1", modules=(msgspec.structs.replace(SPEC, **changes),))
    pin = Pin(digest("web1"), "container")
    old = wanted_modules(1, before, {"web": pin}, maker)
    made = old.modules[0].container
    assert made is not None
    view = ContainerView("web", "web", "id", made.fingerprint(), pin.digest, "running")
    new_digest = digest("web2") if changed == "image" else pin.digest
    observed = Observed(
        frozenset(),
        True,
        {},
        (),
        "up",
        "",
        {"web": view},
        frozenset({pin.digest, new_digest}),
    )
    pins = inherited_pins(after, before, {"web": pin})
    wanted = wanted_modules(2, after, pins, maker)
    found = plan(wanted, old, observed, {}, NOW)
    assert [short(step) for step in found.steps] == steps
    if changed in AFTER_RESOLVING:
        wanted = wanted_modules(2, after, {"web": Pin(new_digest, "container")}, maker)
        found = plan(wanted, old, observed, {}, NOW)
        assert [short(step) for step in found.steps] == AFTER_RESOLVING[changed]


def test_every_field_of_a_module_is_in_the_table() -> None:
    fields = {item.name for item in msgspec.structs.fields(ModuleSpec)} - {"type"}
    assert fields <= {name for name, _, _ in CHANGES}


def test_a_wall_clock_is_no_part_of_a_plan() -> None:
    past = box("a", state="exited", exit_code=1, finished_at=WALL - timedelta(days=4000))
    row = Row("", [C("a", policy="always")], [], boxes=[past], engine="a1")
    row.restarts = stamp("a", ended(9))
    assert row.plan().steps == ()
