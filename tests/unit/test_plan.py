"""The planner: laws over random worlds, and the cases that operators would ask about."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from gatelet.agent.deployments import instance_name
from gatelet.agent.plan import (
    Announce,
    Collect,
    Failure,
    History,
    InstanceView,
    Load,
    Observed,
    Plan,
    Probe,
    Pull,
    Resolve,
    Route,
    Step,
    Switch,
    Unload,
    Wanted,
    WantedEndpoint,
    WantedModule,
    plan,
    routes_of,
    subject,
)
from gatelet.agent.plan_types import UNTOLD
from gatelet.agent.scoring_env import ScoringOptions
from hypothesis import given, settings
from hypothesis import strategies as st


def options(endpoint: str, traffic: int | None = None) -> ScoringOptions:
    return ScoringOptions(endpoint=endpoint, traffic=traffic)


def module(
    name: str,
    version: str,
    *,
    endpoint: str | None = None,
    traffic: int | None = None,
    pinned: bool = True,
    running: bool = True,
) -> WantedModule:
    chosen = options(endpoint or name, traffic)
    digest = f"sha256:{version * 64}"[:71] if pinned else None
    return WantedModule(
        name=name,
        image=f"registry/{name}:{version}",
        digest=digest,
        instance=None if digest is None else instance_name(name, digest, chosen),
        options=chosen,
        running=running,
        kind="model" if pinned else "",
    )


@dataclass
class World:
    """A device on which every step works at once; counts what a client would notice."""

    images: set[str] = field(default_factory=set)
    instances: dict[str, str] = field(default_factory=dict)
    routes: tuple[Route, ...] = ()
    pins: dict[tuple[int, str], str] = field(default_factory=dict)
    announced: tuple[WantedEndpoint, ...] | None = None

    def observed(self) -> Observed:
        views = {name: InstanceView(name, state) for name, state in self.instances.items()}
        images = frozenset(self.images)
        return Observed(images, True, views, self.routes, announced=self.announced)

    def crash(self) -> None:
        """Of the scoring process."""
        self.instances.clear()
        self.routes = ()
        self.announced = UNTOLD

    def served(self) -> set[str]:
        return {
            route.endpoint
            for route in self.routes
            if all(self.instances.get(target.instance) == "ready" for target in route.targets)
        }

    def take(self, step: Step) -> None:
        if isinstance(step, Resolve):
            self.pins[step.generation, step.module] = step.image
        elif isinstance(step, Pull):
            assert step.digest == _digest(step.image), "pulled something else than was pinned"
            self.images.add(step.digest)
        elif isinstance(step, Load):
            assert step.digest in self.images, "loaded an image that is not there"
            self.instances[step.instance] = "loaded"
        elif isinstance(step, Probe):
            self.instances[step.instance] = "ready"
        elif isinstance(step, Announce):
            self.announced = step.endpoints
        elif isinstance(step, Switch):
            for route in step.routes:
                for target in route.targets:
                    assert self.instances[target.instance] == "ready", "routed to a dead instance"
            self.routes = step.routes
        elif isinstance(step, Unload):
            routed = {target.instance for route in self.routes for target in route.targets}
            assert step.instance not in routed, "unloaded a serving instance"
            del self.instances[step.instance]
        elif isinstance(step, Collect):
            self.images.discard(step.digest)


def _digest(image: str) -> str:
    version = image.rpartition(":")[2]
    return f"sha256:{version * 64}"[:71]


def pinned(wanted: Wanted, world: World) -> Wanted:
    """`wanted` as the agent sees it: digests only where the world has pinned them."""
    modules = []
    for m in wanted.modules:
        known = (wanted.generation, m.name) in world.pins
        modules.append(
            module(
                m.name,
                m.image.rpartition(":")[2],
                endpoint=m.options.endpoint,
                traffic=m.options.traffic,
                pinned=known,
                running=m.running,
            )
        )
    return Wanted(wanted.generation, tuple(modules))


NAMES = ("a", "b", "c")
VERSIONS = ("1", "2", "3")


@st.composite
def wanteds(draw: st.DrawFn, generation: int) -> Wanted:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3))
    return Wanted(
        generation,
        tuple(
            module(
                name,
                draw(st.sampled_from(VERSIONS)),
                endpoint=draw(st.sampled_from(("x", "y"))),
                running=draw(st.integers(0, 4)) > 0,
            )
            for name in names
        ),
    )


def converge(
    wanted: Wanted,
    fallback: Wanted | None,
    world: World,
    draw: st.DataObject,
    crash: bool,
) -> None:
    """Take steps in any order until nothing is left; the endpoints that serve must go on."""
    for _ in range(60):
        seen = None if fallback is None else pinned(fallback, world)
        current = plan(pinned(wanted, world), seen, world.observed(), {}, 0.0)
        if not current.steps:
            assert current.settled
            return
        step = draw.draw(st.sampled_from(current.steps))
        before = world.served()
        world.take(step)
        still_wanted = {m.options.endpoint for m in wanted.modules if m.running}
        lost = (before & still_wanted) - world.served()
        assert not lost, f"{step} stopped {lost}"
        if crash and draw.draw(st.integers(0, 15)) == 0:
            world.crash()
            crash = False
    pytest.fail("the plan does not come to an end")


@given(st.data(), st.booleans())
@settings(max_examples=120, deadline=None)
def test_every_update_converges_and_never_stops_what_serves(
    data: st.DataObject, crash: bool
) -> None:
    world = World(announced=UNTOLD)
    first = data.draw(wanteds(1))
    second = data.draw(wanteds(2))
    converge(first, None, world, data, crash=False)
    converge(second, first, world, data, crash=crash)
    running = [m for m in pinned(second, world).modules if m.running]
    assert set(world.instances) == {m.instance for m in running}
    assert {route.endpoint: route for route in world.routes} == routes_of(running)
    endpoints = sorted({m.options.endpoint for m in running})
    assert world.announced == tuple(WantedEndpoint(endpoint) for endpoint in endpoints)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_rolling_back_in_the_middle_of_an_update_never_stops_what_serves(
    data: st.DataObject,
) -> None:
    world = World()
    first = data.draw(wanteds(1))
    second = data.draw(wanteds(2))
    converge(first, None, world, data, crash=False)
    for _ in range(data.draw(st.integers(0, 8))):
        current = plan(pinned(second, world), pinned(first, world), world.observed(), {}, 0.0)
        if not current.steps or any(isinstance(step, Collect) for step in current.steps):
            break
        world.take(data.draw(st.sampled_from(current.steps)))
    converge(first, None, world, data, crash=False)
    assert world.served() == {m.options.endpoint for m in first.modules if m.running}


def look(wanted: Wanted, world: World, fallback: Wanted | None = None) -> Plan:
    return plan(wanted, fallback, world.observed(), {}, 0.0)


def test_a_restarted_scoring_process_gets_the_old_version_while_the_new_one_cannot_load() -> None:
    good = Wanted(1, (module("digits", "1"),))
    bad = Wanted(2, (module("digits", "2", pinned=False),))
    world = World(images={good.modules[0].digest or ""}, pins={(1, "digits"): "x:1"})
    kinds = [type(step) for step in look(bad, world, good).steps]
    assert kinds == [Resolve, Load]
    instance = good.modules[0].instance or ""
    world.instances[instance] = "ready"
    steps = look(bad, world, good).steps
    assert Switch(tuple(routes_of(good.modules).values())) in steps


def test_a_restarted_scoring_process_is_told_what_is_wanted_before_anything_is_loaded() -> None:
    guarded = ScoringOptions(endpoint="digits", traffic=5, auth="key")
    modules = (
        module("a", "1", endpoint="digits"),
        replace(module("b", "2"), options=guarded),
        module("late", "3", pinned=False),
        module("off", "1", running=False),
        replace(module("web", "2"), kind="container"),
    )
    world = World(announced=UNTOLD)
    told = Announce((WantedEndpoint("digits", "key"),))
    assert told in look(Wanted(1, modules), world).steps
    world.take(told)
    assert not [s for s in look(Wanted(1, modules), world).steps if isinstance(s, Announce)]
    # That nothing is wanted is told, too: until then nobody knows.
    world.crash()
    assert look(Wanted(2, ()), world).steps == (Announce(()),)
    # A process of an earlier release takes no such word.
    assert look(Wanted(1, modules[:1]), World()).steps == (
        Pull("a", "registry/a:1", modules[0].digest or ""),
    )


def test_what_is_held_until_an_update_can_begin_stays_announced() -> None:
    good = Wanted(1, (module("digits", "1"), module("gone", "1")))
    new = Wanted(2, (module("digits", "2", pinned=False), module("more", "3")))
    world = World(images={good.modules[0].digest or ""}, announced=UNTOLD)
    (told,) = (s for s in look(new, world, good).steps if isinstance(s, Announce))
    assert [one.endpoint for one in told.endpoints] == ["digits", "gone", "more"]


def test_an_endpoint_serves_as_soon_as_its_default_module_does() -> None:
    modules = (
        module("old", "1", endpoint="digits"),
        module("new", "2", endpoint="digits", traffic=10),
        module("third", "3", endpoint="digits", traffic=20),
    )
    old, new, third = (one.instance or "" for one in modules)
    world = World(images={one.digest or "" for one in modules})
    wanted = Wanted(1, modules)

    def shares() -> dict[str, int]:
        for step in look(wanted, world).steps:
            if isinstance(step, Switch):
                world.take(step)
        return {t.instance: t.percent for route in world.routes for t in route.targets}

    world.instances = {new: "ready", old: "loaded"}
    assert shares() == {}
    world.instances[old] = "ready"
    assert shares() == {old: 90, new: 10}
    world.instances[third] = "loaded"
    assert shares() == {old: 90, new: 10}
    world.instances[third] = "ready"
    assert shares() == {old: 70, new: 10, third: 20}
    assert look(wanted, world).settled


def test_nothing_is_loaded_or_unloaded_while_the_scoring_process_is_away() -> None:
    wanted = Wanted(1, (module("digits", "1"),))
    digest = wanted.modules[0].digest or ""
    away = Observed(frozenset({digest}), False, {}, ())
    current = plan(wanted, None, away, {}, 0.0)
    assert current == Plan((), (), False)


def test_a_failed_step_waits_for_its_time_and_is_then_planned_again() -> None:
    wanted = Wanted(1, (module("digits", "1", pinned=False),))
    step = Resolve(1, "digits", "registry/digits:1")
    failure = Failure(step, 1, 10.0, "registry is down", retryable=True)
    world = World()
    for now, steps, blocked in ((9.9, (), (failure,)), (10.0, (step,), ())):
        current = plan(wanted, None, world.observed(), {step: failure}, now)
        assert (current.steps, current.blocked) == (steps, blocked)
        assert not current.settled


def test_a_fatal_failure_is_never_planned_again() -> None:
    wanted = Wanted(1, (module("digits", "1", pinned=False),))
    step = Resolve(1, "digits", "registry/digits:1")
    failure = Failure(step, 1, 0.0, "not a model image", retryable=False)
    current = plan(wanted, None, World().observed(), {step: failure}, 1e9)
    assert current.blocked == (failure,)
    assert current.steps == ()


def test_one_bad_module_does_not_hold_the_others_back() -> None:
    wanted = Wanted(1, (module("a", "1", pinned=False), module("b", "2")))
    step = Resolve(1, "a", "registry/a:1")
    failure = Failure(step, 1, 0.0, "no such image", retryable=False)
    world = World(images={wanted.modules[1].digest or ""})
    current = plan(wanted, None, world.observed(), {step: failure}, 0.0)
    assert [type(step) for step in current.steps] == [Load]


def test_traffic_shares_and_the_default() -> None:
    modules = (
        module("canary", "2", endpoint="digits", traffic=10),
        module("stable", "1", endpoint="digits"),
    )
    (route,) = routes_of(modules).values()
    assert [(t.instance.split("@")[0], t.percent, t.default) for t in route.targets] == [
        ("stable", 90, True),
        ("canary", 10, False),
    ]


def test_images_are_discarded_on_request_but_never_those_of_a_wanted_module() -> None:
    wanted = Wanted(2, (module("a", "2"),))
    stray = f"sha256:{'9' * 64}"
    new = wanted.modules[0]
    world = World(images={new.digest or "", stray}, instances={new.instance or "": "ready"})
    world.routes = tuple(routes_of(wanted.modules).values())
    discard = (Collect(stray), Collect(new.digest or ""))
    current = plan(wanted, None, world.observed(), {}, 0.0, History(discard=discard))
    assert current.steps == (Collect(stray),)
    assert current.settled


def test_steps_on_different_modules_may_run_side_by_side() -> None:
    wanted = Wanted(1, (module("a", "1", pinned=False), module("b", "2", pinned=False)))
    steps = look(wanted, World()).steps
    assert len({subject(step) for step in steps}) == len(steps) == 2
