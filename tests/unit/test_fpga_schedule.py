"""Whose turn it is at the fabric: laws over random traffic, in virtual time, and single rules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gatelet.accelerators.fpga import schedule
from gatelet.accelerators.fpga.schedule import (
    Demand,
    Fabric,
    Grant,
    Policy,
    Prefetch,
    Wait,
    Waiting,
    decide,
    hopeless,
)
from hypothesis import given, settings
from hypothesis import strategies as st

POLICY = Policy(patience=0.25, hold=0.1, linger=0.002, prefetch_after=3)
CONFIGURE, SERVE = 0.03, 0.001


@dataclass
class Run:
    """One virtual fabric, and what became of each request: ticket -> (fate, moment)."""

    fabric: Fabric
    now: float = 0.0
    fates: dict[int, tuple[str, float]] = field(default_factory=dict)
    swaps: int = 0
    longest_wait: float = 0.0
    last_grant: dict[int, float] = field(default_factory=dict)

    def refuse(self) -> None:
        for w in hopeless(self.fabric, POLICY, self.now):
            late = self.now >= w.deadline
            self.fates[w.ticket] = ("expired" if late else "refused", self.now)
            self.fabric = schedule.without(self.fabric, [w.ticket])
            if not late:
                self.fabric = schedule.refused(self.fabric, POLICY, w.overlay, self.now)

    def step(self, horizon: float) -> float:
        """Decide once; when the fabric is free again, or something may change."""
        self.fabric = schedule.current(self.fabric, POLICY, self.now)
        decision = decide(self.fabric, POLICY, self.now)
        if isinstance(decision, Wait):
            assert decision.until > self.now
            return min(decision.until, schedule.next_loss(self.fabric) + 1e-9, horizon)
        end = self.now
        if isinstance(decision, Prefetch):
            assert decision.overlay != self.fabric.loaded
            self.fabric = schedule.answered(self.fabric, decision.overlay)
            self.swaps += 1
            self.fabric = schedule.worked(self.fabric, decision.overlay, end + CONFIGURE)
            return end + CONFIGURE
        w = next(w for w in self.fabric.waiting if w.ticket == decision.ticket)
        assert w.overlay is not None
        first = all(o.ticket >= w.ticket for o in self.fabric.waiting if o.overlay == w.overlay)
        if w.overlay != self.fabric.loaded:
            end += CONFIGURE
            self.swaps += 1
        elif first:
            came = max(w.arrived, self.last_grant.get(w.overlay, 0.0))
            self.longest_wait = max(self.longest_wait, self.now - came)
        if first:
            self.last_grant[w.overlay] = self.now
        self.fates[w.ticket] = ("served", end)
        self.fabric = schedule.without(self.fabric, [w.ticket])
        self.fabric = schedule.worked(self.fabric, w.overlay, end + SERVE)
        return end + SERVE


def simulate(requests: list[Waiting], overlays: int) -> Run:
    run = Run(Fabric(costs=dict.fromkeys(range(overlays), CONFIGURE)))
    coming = sorted(requests, key=lambda w: (w.arrived, w.ticket))
    for _ in range(100_000):
        while coming and coming[0].arrived <= run.now:
            run.fabric = schedule.arrived(run.fabric, coming.pop(0))
        run.refuse()
        if not coming and not run.fabric.waiting:
            return run
        run.now = run.step(coming[0].arrived if coming else math.inf)
    raise AssertionError("it does not end")


@st.composite
def traffic(draw: st.DrawFn) -> tuple[list[Waiting], int]:
    overlays = draw(st.integers(1, 4))
    gaps = st.sampled_from([0.0, 0.0001, 0.001, 0.005, 0.03, 0.2])
    limits = st.sampled_from([math.inf, math.inf, 0.005, 0.02, 0.05, 0.2, 1.0])
    moment, requests = 0.0, []
    for ticket in range(draw(st.integers(0, 120))):
        moment += draw(gaps)
        overlay = draw(st.integers(0, overlays - 1))
        requests.append(Waiting(ticket, overlay, moment, moment + draw(limits)))
    return requests, overlays


@settings(max_examples=150, deadline=None)
@given(traffic())
def test_every_request_is_answered_or_refused_by_its_deadline(
    case: tuple[list[Waiting], int],
) -> None:
    requests, overlays = case
    run = simulate(requests, overlays)
    assert set(run.fates) == {w.ticket for w in requests}
    for w in requests:
        fate, moment = run.fates[w.ticket]
        if fate == "served":
            assert moment <= w.deadline + 1e-6
        elif fate == "refused":
            assert moment < w.deadline
        else:
            # The fabric was busy with one piece of work when the deadline passed.
            assert moment <= w.deadline + CONFIGURE + SERVE + 1e-6
        if w.deadline == math.inf:
            assert fate == "served"


@settings(max_examples=8, deadline=None)
@given(
    st.integers(2, 4), st.integers(0, 3), st.integers(1500, 1800), st.sampled_from([9e-4, 11e-4])
)
def test_no_overlay_starves_under_overload(
    overlays: int, rare: int, count: int, gap: float
) -> None:
    """One overlay asks once while all others ask without pause."""
    rare %= overlays
    busy = [o for o in range(overlays) if o != rare]
    requests = [Waiting(t, busy[t % len(busy)], t * gap) for t in range(count)]
    requests.append(Waiting(count, rare, count * gap / 4))
    run = simulate(requests, overlays)
    _, served = run.fates[count]
    bound = POLICY.patience + overlays * (POLICY.hold + CONFIGURE + SERVE)
    assert served - requests[-1].arrived <= bound + CONFIGURE
    assert run.longest_wait <= bound + CONFIGURE


def test_alternating_requests_are_grouped() -> None:
    requests = [Waiting(t, t % 2, t * 0.0005) for t in range(400)]
    run = simulate(requests, 2)
    assert run.swaps <= 5, "in order of arrival there would be 400"


LOADED = Fabric(loaded=1, since=0.0, used=9.999, costs={1: 0.03, 2: 0.03})


def test_the_loaded_overlay_is_lingered_with_for_a_moment() -> None:
    fabric = schedule.arrived(LOADED, Waiting(1, 2, 9.998))
    decision = decide(fabric, POLICY, 10.0)
    assert isinstance(decision, Wait)
    assert abs(decision.until - (9.999 + POLICY.linger)) < 1e-9
    assert decide(fabric, POLICY, decision.until) == Grant(1)
    more = schedule.arrived(fabric, Waiting(2, 1, 10.0))
    assert decide(more, POLICY, 10.0) == Grant(2)


def test_a_deadline_is_worth_a_swap_when_the_overlay_had_its_time() -> None:
    fabric = schedule.arrived(LOADED, Waiting(1, 1, 10.0))
    fabric = schedule.arrived(fabric, Waiting(2, 2, 10.0, deadline=10.05))
    assert decide(fabric, POLICY, 10.0) == Grant(1)
    assert decide(fabric, POLICY, 10.017) == Grant(2)
    young = Fabric(1, 9.99, 9.999, fabric.waiting, LOADED.costs)
    assert decide(young, POLICY, 10.017) == Grant(1)
    assert [w.ticket for w in hopeless(young, POLICY, 10.0)] == [2]


def test_what_cannot_be_configured_in_time_is_refused_at_once() -> None:
    fabric = schedule.arrived(LOADED, Waiting(1, 2, 10.0, deadline=10.02))
    assert [w.ticket for w in hopeless(fabric, POLICY, 10.0)] == [1]
    own = schedule.arrived(LOADED, Waiting(1, 1, 10.0, deadline=10.02))
    assert not hopeless(own, POLICY, 10.0)


def test_a_part_of_the_loaded_design_is_charged_what_the_part_takes() -> None:
    fabric = LOADED
    for overlay, static in ((1, "shell"), (2, "shell"), (3, "other"), (4, None)):
        fabric = schedule.described(fabric, overlay, static)
        fabric = schedule.configured(fabric, overlay, 0.03)
    fabric = schedule.configured(fabric, 2, 0.004, partial=True)
    for overlay, late in ((2, False), (3, True), (4, True)):
        waiting = schedule.arrived(fabric, Waiting(1, overlay, 10.0, deadline=10.01))
        assert bool(hopeless(waiting, POLICY, 10.0)) is late, overlay
        assert math.isclose(schedule.next_loss(waiting), 10.01 - (0.03 if late else 0.004))
    # From another design it is all of it, and packages without parts never share.
    fabric = schedule.described(schedule.worked(fabric, 4, 10.0), 5, None)
    fabric = schedule.configured(fabric, 5, 0.03)
    for overlay in (2, 5):
        waiting = schedule.arrived(fabric, Waiting(1, overlay, 10.0, deadline=10.01))
        assert hopeless(waiting, POLICY, 10.0)
    gone = schedule.forgotten(fabric, 2)
    assert 2 not in {*gone.statics, *gone.partial_costs, *gone.costs}


def test_refusals_bring_the_overlay_in() -> None:
    fabric = LOADED
    for refusal in range(3):
        assert isinstance(decide(fabric, POLICY, 10.1), Wait), refusal
        fabric = schedule.refused(fabric, POLICY, 2, 10.1)
    assert decide(fabric, POLICY, 10.1) == Prefetch(2)
    busy = schedule.arrived(fabric, Waiting(1, 1, 10.1))
    assert decide(busy, POLICY, 10.1) == Grant(1)
    lasting = Fabric(1, 0.0, 10.0, busy.waiting, LOADED.costs, {}, {2: Demand(10.1, 10.4, 9)})
    assert decide(lasting, POLICY, 10.1 + POLICY.patience) == Prefetch(2)
    assert not schedule.current(fabric, POLICY, 11.0).demands
    assert not schedule.worked(fabric, 2, 10.2).demands


def test_work_on_the_fabric_itself_goes_first() -> None:
    fabric = schedule.arrived(LOADED, Waiting(1, 1, 10.0))
    fabric = schedule.arrived(fabric, Waiting(2, None, 10.0))
    assert decide(fabric, POLICY, 10.0) == Grant(2)
