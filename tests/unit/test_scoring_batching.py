"""Laws of the pure core: a queue that is fed and served in virtual time."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from gatelet.agent.scoring.batching import (
    DEFAULT_PRIORITY,
    LAST_PRIORITY,
    Admission,
    BatchConfig,
    Overflow,
    Waiting,
    admit,
    decide,
    normalised_priority,
)
from hypothesis import given
from hypothesis import strategies as st


def waiting(number: int, **options: object) -> Waiting:
    made: dict[str, object] = {"items": 1, "arrived": 0.0, **options}
    return Waiting(number, **made)  # type: ignore[arg-type]


configs = st.builds(
    BatchConfig,
    max_batch=st.integers(1, 8),
    max_delay=st.sampled_from([0.0, 0.5, 2.0]),
    preferred=st.sampled_from([(), (4,), (2, 4), (3, 8)]),
    max_queue=st.integers(1, 12),
    overflow=st.sampled_from(list(Overflow)),
    slots=st.integers(1, 3),
)
arrivals = st.lists(
    st.tuples(
        st.floats(0, 3),  # seconds since the one before
        st.integers(0, 10),  # items
        st.sampled_from(["a", "b"]),  # alike
        st.one_of(st.none(), st.floats(0, 4)),  # deadline after the arrival
        st.integers(1, 3),  # priority
    ),
    max_size=30,
)


@dataclass
class Model:
    """A model in virtual time that takes `seconds` per run, with everything that happened to it."""

    config: BatchConfig
    seconds: float
    now: float = 0.0
    queue: list[Waiting] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    answers: dict[int, list[str]] = field(default_factory=dict)
    batches: list[tuple[float, tuple[Waiting, ...], tuple[Waiting, ...]]] = field(
        default_factory=list
    )

    def answer(self, one: Waiting, what: str) -> None:
        self.answers.setdefault(one.number, []).append(what)

    def arrive(self, one: Waiting) -> None:
        admission = admit(self.queue, one, self.config)
        if not admission.admitted:
            self.answer(one, "refused")
            return
        if admission.shed is not None:
            self.queue.remove(admission.shed)
            self.answer(admission.shed, "shed")
        self.queue = sorted([*self.queue, one], key=lambda w: w.order)
        assert len(self.queue) <= self.config.max_queue

    def step(self) -> float | None:
        """Do what is to be done now; when to look again, if that is known."""
        self.ends = [end for end in self.ends if end > self.now]
        while self.queue:
            if len(self.ends) >= self.config.slots:
                return min(self.ends)
            before = tuple(self.queue)
            decision = decide(self.queue, self.now, self.config, self.seconds)
            for one in (*decision.expired, *decision.batch):
                self.queue.remove(one)
            for one in decision.expired:
                assert one.deadline is not None
                assert one.deadline <= self.now
                self.answer(one, "expired")
            if decision.batch:
                assert decision.again_at is None
                for one in decision.batch:
                    self.answer(one, "run")
                self.batches.append((self.now, decision.batch, before))
                self.ends.append(self.now + self.seconds)
            elif not decision.expired:
                assert decision.again_at is not None
                assert decision.again_at > self.now
                return decision.again_at
        return None

    def run_until(self, end: float) -> None:
        while True:
            again = self.step()
            if again is None or again > end:
                self.now = max(self.now, end)
                return
            self.now = again


@given(configs, arrivals, st.sampled_from([0.1, 1.0]))
def test_laws(
    config: BatchConfig,
    arriving: list[tuple[float, int, str, float | None, int]],
    seconds: float,
) -> None:
    model = Model(config, seconds)
    at = 0.0
    for number, (gap, items, alike, deadline, priority) in enumerate(arriving, 1):
        at += gap
        model.run_until(at)
        urgent = not model.queue and len(model.ends) < config.slots
        ends = None if deadline is None else at + deadline
        model.arrive(Waiting(number, items, at, alike, ends, priority, urgent))
    model.run_until(at + 1000)

    # Nobody is lost, nobody is answered twice.
    assert sorted(model.answers) == list(range(1, len(arriving) + 1))
    assert all(len(answers) == 1 for answers in model.answers.values())
    for now, batch, before in model.batches:
        # Never above the maximum, except a request that is larger by itself.
        assert len(batch) == 1 or sum(one.items for one in batch) <= config.max_batch
        assert len({one.alike for one in batch}) == 1
        # Work whose deadline has passed is not begun.
        assert all(one.deadline is None or one.deadline > now for one in batch)
        # In order, and nobody of their kind was passed over.
        orders = [one.order for one in batch]
        assert orders == sorted(orders)
        left = [one for one in before if one not in batch and one.alike == batch[0].alike]
        alive = [one for one in left if one.deadline is None or one.deadline > now]
        assert all(one.order > orders[-1] for one in alive)
        # The first in line goes first.
        first = next(one for one in before if one.deadline is None or one.deadline > now)
        assert batch[0] == first


@given(configs, st.integers(1, 10))
def test_a_request_that_finds_the_model_idle_runs_at_once(config: BatchConfig, items: int) -> None:
    one = Waiting(1, items, 5.0, urgent=True)
    assert decide([one], 5.0, config).batch == (one,)


def test_what_gathered_waits_for_company_but_not_longer_than_the_delay() -> None:
    config = BatchConfig(max_batch=4, max_delay=2.0)
    queue = [waiting(1), waiting(2, arrived=1.0)]
    assert decide(queue, 1.0, config).again_at == 2.0
    assert decide(queue, 2.0, config).batch == tuple(queue)
    full = [*queue, waiting(3), waiting(4)]
    assert decide(full, 1.0, config).batch == tuple(full)


def test_a_deadline_shortens_the_delay_by_the_time_of_a_run() -> None:
    config = BatchConfig(max_batch=4, max_delay=10.0)
    queue = [waiting(1), waiting(2, deadline=5.0)]
    decision = decide(queue, 0.0, config, 1.0)
    assert (decision.batch, decision.again_at) == ((), 4.0)
    assert decide(queue, 4.0, config, 1.0).batch == tuple(queue)


def test_preferred_sizes_are_aimed_at() -> None:
    config = BatchConfig(max_batch=8, preferred=(4,))
    queue = [waiting(number) for number in range(1, 8)]
    assert len(decide(queue, 0.0, config).batch) == 4
    assert len(decide(queue[:3], 0.0, config).batch) == 3
    late = BatchConfig(max_batch=8, max_delay=1.0, preferred=(4,))
    assert len(decide(queue[:4], 0.0, late).batch) == 4
    assert decide(queue[:3], 0.0, late).again_at == 1.0


def test_a_large_request_is_not_overtaken_by_a_small_one_of_its_kind() -> None:
    config = BatchConfig(max_batch=4)
    queue = [waiting(1, items=2), waiting(2, items=3), waiting(3, items=1)]
    assert decide(queue, 0.0, config).batch == (queue[0],)


def test_only_like_requests_are_stacked() -> None:
    config = BatchConfig(max_batch=4)
    queue = [waiting(1, alike="a"), waiting(2, alike="b"), waiting(3, alike="a")]
    assert decide(queue, 0.0, config).batch == (queue[0], queue[2])


def test_a_full_queue_rejects_or_sheds() -> None:
    queue = [waiting(1, priority=2), waiting(2, priority=3), waiting(3, priority=3)]
    reject = BatchConfig(max_queue=3)
    shed = BatchConfig(max_queue=3, overflow=Overflow.SHED_OLDEST)
    assert admit(queue, waiting(4), reject) == Admission(False)
    assert admit(queue, waiting(4, priority=3), shed) == Admission(True, queue[1])
    assert admit(queue, waiting(4, priority=4), shed) == Admission(False)
    assert admit(queue[:2], waiting(4), reject) == Admission(True)


@pytest.mark.parametrize(
    ("sent", "meant"),
    [(0, DEFAULT_PRIORITY), (1, 1), (7, 7), (2**64 - 1, LAST_PRIORITY)],
)
def test_priorities(sent: int, meant: int) -> None:
    assert normalised_priority(sent) == meant
