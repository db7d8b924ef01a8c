"""Automatic rollout: laws of the state machine, and of what is kept across restarts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from gatelet.agent.canaries import Canaries
from gatelet.agent.canary import (
    Canary,
    CanaryPhase,
    CanaryRules,
    Counts,
    Sample,
    advance,
    inherited,
    percent,
)
from gatelet.agent.clock import SystemClock
from gatelet.agent.latencies import latencies
from gatelet.agent.plan import InstanceView, Route, Target, Wanted, WantedModule
from gatelet.agent.reconcile import Snapshot
from gatelet.agent.scoring_env import ScoringOptions
from gatelet.agent.seams import LoadedModel, ScoringView
from gatelet.agent.store import StateStore
from gatelet.agent.telemetry import canary_events
from hypothesis import given
from hypothesis import strategies as st

RULES = CanaryRules((5, 25, 100), 60.0, 0.01, 1.5, 50)
MS = 1_000_000


Noise = Callable[[random.Random], float]


def quiet(chance: random.Random) -> float:
    return chance.lognormvariate(0, 0.3)


def spiky(chance: random.Random) -> float:
    """One answer of twenty is late by a hundred times, as behind a garbage collection."""
    return chance.lognormvariate(0, 0.5) * (100 if chance.random() < 0.05 else 1)


def heavy(chance: random.Random) -> float:
    """Without a finite mean: no average of it ever settles."""
    return chance.paretovariate(0.9)


@dataclass
class Side:
    failures: int = 0
    times: list[int] = field(default_factory=list)

    def counts(self) -> Counts:
        return Counts(len(self.times), self.failures, latencies(self.times))


def counts_of(good: int, bad: int = 0, ms: float = 1.0) -> Counts:
    return Counts(good, bad, latencies([int(ms * MS)] * good))


class Rollout:
    """A canary in virtual time: traffic arrives, and every second it is looked at."""

    def __init__(self, rules: CanaryRules = RULES, seed: int = 1) -> None:
        self.rules = rules
        self.canary = Canary()
        self.random = random.Random(seed)
        self.now = 0.0
        self.boot_id = "a"
        self.new = Counts()
        self.old = Counts()
        self.shares: list[int] = []

    def run(
        self,
        seconds: int,
        *,
        per_second: int = 100,
        bad_new: float = 0.0,
        bad_old: float = 0.0,
        new_ms: float = 1.0,
        old_ms: float = 1.0,
        noise: Noise | None = None,
    ) -> None:
        """`noise`: what an answer's time is multiplied with."""
        for _ in range(seconds):
            new, old = Side(), Side()
            for _ in range(per_second):
                mine = self.random.random() * 100 < percent(self.rules, self.canary)
                side, bad, ms = (new, bad_new, new_ms) if mine else (old, bad_old, old_ms)
                if self.random.random() < bad:
                    side.failures += 1
                else:
                    side.times.append(int(ms * MS * (noise(self.random) if noise else 1)))
            self.new += new.counts()
            self.old += old.counts()
            self.now += 1.0
            self.look()

    def look(self) -> None:
        sample = Sample(self.boot_id, self.now, self.new, self.old)
        self.canary = advance(self.rules, self.canary, sample)
        self.shares.append(percent(self.rules, self.canary))


def test_a_good_canary_is_promoted_step_by_step() -> None:
    rollout = Rollout()
    rollout.run(190)
    assert list(dict.fromkeys(rollout.shares)) == [5, 25, 100]
    assert rollout.canary.phase is CanaryPhase.PROMOTED
    for share in (5, 25):
        assert rollout.shares.count(share) >= 60


def test_one_that_fails_more_often_is_rolled_back_and_stays_there() -> None:
    rollout = Rollout()
    rollout.run(70)
    rollout.run(60, bad_new=0.2)
    assert rollout.canary.phase is CanaryPhase.ROLLED_BACK
    assert "requests failed" in rollout.canary.reason
    # At 25 % of 100 a second, the 50 requests that are needed take two or three seconds.
    assert rollout.shares.index(0) <= 80
    rollout.run(1000)
    assert rollout.shares[-1] == 0


def test_failures_that_both_sides_have_are_not_held_against_it() -> None:
    rollout = Rollout()
    rollout.run(190, bad_new=0.3, bad_old=0.3)
    # In the last step, too, where nobody is left to compare with.
    assert rollout.canary.phase is CanaryPhase.PROMOTED


@pytest.mark.parametrize("seed", range(5))
def test_chance_alone_rolls_nobody_back(seed: int) -> None:
    rollout = Rollout(seed=seed)
    rollout.run(190, bad_new=0.02, bad_old=0.02)
    assert rollout.canary.phase is CanaryPhase.PROMOTED


def test_one_failure_is_no_verdict() -> None:
    canary = advance(RULES, Canary(), Sample("a", 0.0, Counts(), Counts()))
    old = counts_of(950)
    assert advance(RULES, canary, Sample("a", 1.0, counts_of(49, 1), old)) == canary
    worse = advance(RULES, canary, Sample("a", 1.0, counts_of(45, 5), old))
    assert worse.phase is CanaryPhase.ROLLED_BACK


def test_one_that_is_slower_is_rolled_back() -> None:
    rollout = Rollout()
    rollout.run(60, new_ms=1.6)
    assert rollout.canary.phase is CanaryPhase.ROLLED_BACK
    assert "allowed are 1.5 times as much" in rollout.canary.reason
    rollout = Rollout()
    rollout.run(190, new_ms=1.4)
    assert rollout.canary.phase is CanaryPhase.PROMOTED


@pytest.mark.parametrize("noise", [quiet, spiky, heavy], ids=lambda one: one.__name__)
@pytest.mark.parametrize("ratio", [1.0, 1.5])
@pytest.mark.parametrize("seed", range(6))
def test_noise_rolls_nobody_back(noise: Noise, ratio: float, seed: int) -> None:
    rollout = Rollout(msgspec.structs.replace(RULES, max_latency_ratio=ratio), seed)
    rollout.run(190, noise=noise)
    assert rollout.canary.phase is CanaryPhase.PROMOTED
    # It never goes back, not even for a look.
    assert list(dict.fromkeys(rollout.shares)) == [5, 25, 100]


@pytest.mark.parametrize("noise", [quiet, spiky, heavy], ids=lambda one: one.__name__)
@pytest.mark.parametrize("seed", range(6))
def test_noise_hides_nobody_who_is_slower(noise: Noise, seed: int) -> None:
    rollout = Rollout(seed=seed)
    rollout.run(190, new_ms=3.5, noise=noise)
    assert rollout.canary.phase is CanaryPhase.ROLLED_BACK
    assert rollout.shares.index(0) <= 60
    assert set(rollout.shares[rollout.shares.index(0) :]) == {0}


def test_one_that_is_late_now_and_then_is_rolled_back() -> None:
    canary = advance(RULES, Canary(), Sample("a", 0.0, Counts(), Counts()))
    new = Counts(500, 0, latencies([MS] * 430 + [20 * MS] * 70))
    after = advance(RULES, canary, Sample("a", 5.0, new, counts_of(5000)))
    assert after.phase is CanaryPhase.ROLLED_BACK
    assert "95% of the answers took up to" in after.reason


def test_too_few_requests_decide_nothing() -> None:
    rollout = Rollout()
    rollout.run(600, per_second=1, bad_new=1.0)
    assert rollout.new.requests < 50
    assert rollout.canary.phase is CanaryPhase.RUNNING
    assert set(rollout.shares) == {5}


@pytest.mark.parametrize("boot_id", ["a", "b"])
def test_a_restart_of_the_counting_process_measures_the_step_anew(boot_id: str) -> None:
    rollout = Rollout()
    rollout.run(59)
    rollout.new = rollout.old = Counts()
    rollout.boot_id = boot_id
    rollout.look()
    assert rollout.canary.phase is CanaryPhase.RUNNING
    rollout.run(59)
    assert set(rollout.shares) == {5}
    rollout.run(2)
    assert rollout.shares[-1] == 25


counts = st.builds(
    Counts,
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.lists(st.integers(0, 10**10), max_size=30).map(latencies),
)


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.floats(0, 100), counts, counts), min_size=1, max_size=40
    ),
    st.sets(st.integers(1, 100), min_size=1, max_size=5),
)
def test_laws(samples: list[tuple[str, float, Counts, Counts]], steps: set[int]) -> None:
    rules = CanaryRules(tuple(sorted(steps)), 10.0, 0.01, 1.5, 5)
    canary, now = Canary(), 0.0
    shares = [percent(rules, canary)]
    for boot_id, gap, new, old in samples:
        now += gap
        before = canary
        canary = advance(rules, canary, Sample(boot_id, now, new, old))
        shares.append(percent(rules, canary))
        if before.phase is not CanaryPhase.RUNNING:
            assert canary == before
    # Up one step at a time, or down to nothing for good.
    for one, other in itertools.pairwise(shares):
        assert other in (one, 0) or rules.steps.index(other) == rules.steps.index(one) + 1
    assert shares[0] == rules.steps[0]


def test_what_a_new_deployment_inherits() -> None:
    assert inherited(None) == Canary()
    assert inherited(Canary(2, CanaryPhase.PROMOTED)) == Canary(2, CanaryPhase.PROMOTED)
    running = Canary(1, start=Sample("a", 1.0, Counts(), Counts()))
    assert inherited(running) == Canary(1)
    assert inherited(Canary(1, CanaryPhase.ROLLED_BACK, "slow")) == Canary()


# -- with store and routes -----------------------------------------------------------------------


def module(name: str, canary: CanaryRules | None = None) -> WantedModule:
    options = ScoringOptions("e", 5 if canary else None, canary=canary)
    return WantedModule(name, "image", "sha256:1", f"{name}@1", options)


QUICK = CanaryRules((5, 100), 10.0, 0.01, 1.5, 10)
WANTED = Wanted(1, (module("old"), module("new", QUICK)))


def routes(share: int) -> tuple[Route, ...]:
    targets = (Target("old@1", 100 - share, True), Target("new@1", share, False))
    return (Route("e", targets),)


def view(new: Counts, old: Counts) -> ScoringView:
    models = [
        LoadedModel(InstanceView(f"{name}@1", "ready"), "m", "1", (), (), counted)
        for name, counted in (("new", new), ("old", old))
    ]
    return ScoringView("boot", 1, tuple(models), ())


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    store = StateStore(tmp_path / "state.db", SystemClock())
    for _ in range(2):
        store.accept("local", 0, b"{}")
    return store


def share(canaries: Canaries, wanted: Wanted = WANTED) -> int | None:
    return canaries.shares(wanted).modules[1].options.traffic


GOOD = counts_of(100)


def test_the_share_follows_and_survives_a_restart_of_the_agent(store: StateStore) -> None:
    canaries = Canaries(store)
    assert share(canaries) == 5
    assert canaries.running(WANTED)
    assert not canaries.note(WANTED, routes(5), None, 0.0)
    assert not canaries.note(WANTED, routes(5), view(Counts(), Counts()), 0.0)
    # Not routed yet: whatever was counted, it was not with this share.
    assert not canaries.note(WANTED, routes(0), view(GOOD, GOOD), 11.0)
    assert canaries.note(WANTED, routes(5), view(GOOD, GOOD), 11.0)
    assert share(canaries) == 100
    again = Canaries(store)
    assert share(again) == 100
    assert again.views(WANTED)["new"].document() == {
        "phase": "running",
        "percent": 100,
        "steps": [5, 100],
    }
    assert canaries.shares(Wanted(1, (module("old"),))) == Wanted(1, (module("old"),))


def test_one_that_was_rolled_back_stays_so_until_a_new_deployment(store: StateStore) -> None:
    canaries = Canaries(store)
    canaries.note(WANTED, routes(5), view(Counts(), Counts()), 0.0)
    assert canaries.note(WANTED, routes(5), view(counts_of(10, 90), GOOD), 1.0)
    assert share(canaries) == share(Canaries(store)) == 0
    document = canaries.views(WANTED)["new"].document()
    assert (document["phase"], document["percent"]) == ("rolled-back", 0)
    assert "90 of 100 requests failed" in document["reason"]
    assert not canaries.running(WANTED)
    canaries.inherit(1, 2, {"old", "new"})
    assert share(canaries, Wanted(2, WANTED.modules)) == 5


def test_one_that_was_promoted_stays_so_unless_it_changes(store: StateStore) -> None:
    store.set_canary(1, "new", Canary(1, CanaryPhase.PROMOTED))
    canaries = Canaries(store)
    canaries.inherit(1, 2, {"new"})
    assert share(canaries, Wanted(2, WANTED.modules)) == 100
    store.accept("local", 0, b"{}")
    canaries.inherit(1, 3, {"old"})
    assert share(canaries, Wanted(3, WANTED.modules)) == 5


def test_how_it_ended_is_told_once(store: StateStore) -> None:
    canaries = Canaries(store)

    def told(wanted: Wanted) -> list[tuple[str, str]]:
        snapshot = Snapshot(wanted=wanted, canaries=canaries.views(wanted))
        return [(event.name, event.key) for event in canary_events(snapshot)]

    assert told(WANTED) == []
    assert canaries.views(WANTED)["new"].sentence() == "canary with 5 % of the requests"
    store.set_canary(1, "new", Canary(1, CanaryPhase.PROMOTED))
    canaries = Canaries(store)
    assert canaries.views(WANTED)["new"].sentence() == "canary promoted to 100 % of the requests"
    promoted = told(WANTED)
    assert promoted == [("canary.promoted", "canary/new@1/promoted")]
    canaries.inherit(1, 2, {"new"})
    assert told(Wanted(2, WANTED.modules)) == promoted
    store.set_canary(2, "new", Canary(0, CanaryPhase.ROLLED_BACK, "slow"))
    canaries = Canaries(store)
    assert told(Wanted(2, WANTED.modules)) == [("canary.rolledBack", "canary/2/new/rolledBack")]
    sentence = canaries.views(Wanted(2, WANTED.modules))["new"].sentence()
    assert sentence == "canary rolled back: slow"
