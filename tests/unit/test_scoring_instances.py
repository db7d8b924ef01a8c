from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from gatelet.accelerators.errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    InvalidTensor,
)
from gatelet.accelerators.tensors import Array, TensorSpec
from gatelet.agent.scoring import breaker as circuit
from gatelet.agent.scoring.errors import Code, ScoringError
from gatelet.agent.scoring.instances import Instance, Member

SPEC = (TensorSpec("x", "FP32", (-1,)),)
INPUT = {"x": np.zeros(1, np.float32)}


class Device:
    """A session whose health and answers the test decides."""

    inputs = SPEC
    outputs = SPEC

    def __init__(self, backend: str, answer: float) -> None:
        self.backend = backend
        self.answer = answer
        self.healthy = True
        self.error: BackendError | None = None
        self.calls = 0
        self.deadline: float | None = None
        self.closed = False
        self.entered = threading.Event()
        self.hold: threading.Event | None = None

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> dict[str, Array]:
        self.calls += 1
        self.deadline = deadline
        self.entered.set()
        if self.hold is not None:
            assert self.hold.wait(10)
        if self.error is not None:
            raise self.error
        return {"x": np.full(1, self.answer, np.float32)}

    def close(self) -> None:
        self.closed = True


class Time:
    def __init__(self) -> None:
        self.value = 100.0

    def __call__(self) -> float:
        return self.value


class Pair:
    """An instance on an FPGA (answers 1) and the CPU (answers 2), at a time the test sets."""

    def __init__(self) -> None:
        self.time = Time()
        self.fpga, self.cpu = Device("fpga", 1.0), Device("cpu", 2.0)
        self.instance = Instance(
            "i",
            "digits",
            "3",
            SPEC,
            SPEC,
            [Member(device, "v", self.time) for device in (self.fpga, self.cpu)],
            now=self.time,
        )

    def answer(self, deadline: float | None = None) -> float:
        return float(self.instance.run(INPUT, None, deadline)["x"][0])

    def counts(self) -> list[tuple[str, int, int, int]]:
        reports = [member.report() for member in self.instance.members]
        return [(r.name, r.requests, r.failures, r.fallbacks) for r in reports]


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_the_preferred_backend_answers(pair: Pair) -> None:
    assert pair.answer() == 1.0
    assert pair.counts() == [("fpga", 1, 0, 0), ("cpu", 0, 0, 0)]


def test_a_request_that_a_backend_cannot_take_goes_to_the_next(pair: Pair) -> None:
    pair.fpga.error = BackendUnavailable("fabric hangs")
    assert pair.answer() == 2.0
    assert pair.counts() == [("fpga", 1, 1, 1), ("cpu", 1, 0, 0)]
    assert pair.instance.members[0].report().detail == "fabric hangs"


def test_an_unhealthy_backend_is_skipped_until_it_says_otherwise(pair: Pair) -> None:
    pair.fpga.healthy = False
    assert pair.answer() == 2.0
    assert pair.fpga.calls == 0
    assert pair.counts()[0] == ("fpga", 0, 0, 1)
    assert not pair.instance.members[0].report().healthy
    pair.fpga.healthy = True
    assert pair.answer() == 1.0


def test_a_backend_that_keeps_failing_is_left_alone_for_a_while(pair: Pair) -> None:
    pair.fpga.error = BackendUnavailable("busy")
    for _ in range(circuit.FAILURES_TO_OPEN):
        pair.answer()
    for _ in range(10):
        assert pair.answer() == 2.0
    assert pair.fpga.calls == circuit.FAILURES_TO_OPEN
    assert not pair.instance.members[0].report().healthy
    pair.time.value += circuit.FIRST_PAUSE
    pair.fpga.error = None
    assert pair.answer() == 1.0
    assert pair.instance.members[0].report().healthy
    assert pair.instance.members[0].report().detail == ""


def test_one_request_at_a_time_tries_a_backend_on_probation(pair: Pair) -> None:
    pair.fpga.error = BackendUnavailable("busy")
    for _ in range(circuit.FAILURES_TO_OPEN):
        pair.answer()
    pair.time.value += circuit.FIRST_PAUSE
    member = pair.instance.members[0]
    assert [member.allowed() for _ in range(3)] == [True, False, False]


def test_each_failed_trial_doubles_the_pause_up_to_a_limit() -> None:
    state, now = circuit.CLOSED, 0.0
    pauses = []
    for _ in range(circuit.FAILURES_TO_OPEN - 1):
        state = circuit.after_failure(state, now)
        assert circuit.allows(state, now)
    for _ in range(12):
        state = circuit.after_failure(state, now)
        pauses.append(state.open_until - now)
        now = state.open_until
    assert pauses[:3] == [circuit.FIRST_PAUSE, 2 * circuit.FIRST_PAUSE, 4 * circuit.FIRST_PAUSE]
    assert pauses[-1] == circuit.LONGEST_PAUSE


def test_the_last_backend_is_asked_even_on_probation(pair: Pair) -> None:
    pair.cpu.healthy = False
    pair.fpga.error = BackendUnavailable("busy")
    for _ in range(circuit.FAILURES_TO_OPEN):
        with pytest.raises(ScoringError, match=r"no backend can answer now .*fpga: busy"):
            pair.answer()
    pair.fpga.error = None
    assert pair.answer() == 1.0


def test_nobody_left_is_unavailable(pair: Pair) -> None:
    pair.fpga.healthy = pair.cpu.healthy = False
    with pytest.raises(ScoringError, match="fpga: away; cpu: away") as caught:
        pair.answer()
    assert caught.value.code is Code.UNAVAILABLE
    assert not pair.instance.healthy


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidTensor("x: too wide"), Code.INVALID_ARGUMENT),
        (DeadlineExceeded("2 ms"), Code.DEADLINE_EXCEEDED),
        (BackendError("division by zero"), Code.INTERNAL),
    ],
)
def test_other_errors_are_the_requests_own(pair: Pair, error: BackendError, code: Code) -> None:
    pair.fpga.error = error
    with pytest.raises(ScoringError, match=str(error)) as caught:
        pair.answer()
    assert caught.value.code is code
    assert pair.cpu.calls == 0


def test_time_is_kept_for_the_cpu_and_one_that_used_its_own_up_is_left_alone(pair: Pair) -> None:
    assert pair.answer(deadline=108.0) == 1.0
    assert pair.fpga.deadline == 106.0
    pair.fpga.error = DeadlineExceeded("no answer")
    assert pair.answer(deadline=108.0) == 2.0
    assert pair.cpu.deadline == 108.0
    assert pair.answer(deadline=108.0) == 2.0
    assert pair.fpga.calls == 2, "others do not wait for it as well"
    pair.fpga.error = None
    pair.time.value += circuit.FIRST_PAUSE
    assert pair.answer(deadline=108.0) == 1.0


def test_no_more_than_half_the_time_is_kept_for_a_slow_cpu(pair: Pair) -> None:
    original = pair.cpu.run

    def slow(*arguments: object) -> dict[str, Array]:
        pair.time.value += 3
        return original(*arguments)  # type: ignore[arg-type]

    pair.cpu.run = slow  # type: ignore[method-assign]
    pair.fpga.healthy = False
    pair.answer()
    pair.fpga.healthy = True
    now = pair.time.value
    for left, kept in ((4.0, 2.0), (10.0, 5.0), (16.0, 6.0), (40.0, 10.0)):
        assert pair.answer(deadline=now + left) == 1.0
        assert pair.fpga.deadline == now + left - kept


def test_nothing_is_kept_for_a_cpu_that_could_not_answer(pair: Pair) -> None:
    pair.cpu.healthy = False
    assert pair.answer(deadline=108.0) == 1.0
    assert pair.fpga.deadline == 108.0
    pair.fpga.error = DeadlineExceeded("no answer")
    with pytest.raises(ScoringError) as caught:
        pair.answer(deadline=108.0)
    assert caught.value.code is Code.DEADLINE_EXCEEDED


def test_time_is_checked_before_each_attempt(pair: Pair) -> None:
    with pytest.raises(ScoringError, match="before the model was run") as caught:
        pair.answer(deadline=99.0)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert pair.fpga.calls == 0

    pair.fpga.error = BackendUnavailable("gave up")
    original = pair.fpga.run

    def slow(*arguments: object) -> dict[str, Array]:
        pair.time.value += 5
        return original(*arguments)  # type: ignore[arg-type]

    pair.fpga.run = slow  # type: ignore[method-assign]
    with pytest.raises(ScoringError, match=r"deadline passed \(fpga: gave up\)") as caught:
        pair.answer(deadline=104.0)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert pair.cpu.calls == 0


def test_closing_waits_for_running_requests_and_takes_no_more(pair: Pair) -> None:
    pair.fpga.hold = threading.Event()
    assert pair.instance.begin()
    closed: list[bool] = []
    closer = threading.Thread(target=lambda: closed.append(pair.instance.close(10.0)))

    def request() -> None:
        try:
            pair.answer()
        finally:
            pair.instance.end()

    runner = threading.Thread(target=request)
    runner.start()
    assert pair.fpga.entered.wait(10)
    closer.start()
    # Condition: the closer has got hold of the instance, which it then refuses to everybody.
    while pair.instance.begin():
        pair.instance.end()
    assert not pair.fpga.closed
    pair.fpga.hold.set()
    runner.join(10)
    closer.join(10)
    assert closed == [True]
    assert pair.fpga.closed
    assert pair.cpu.closed


def test_draining_is_bounded(pair: Pair) -> None:
    assert pair.instance.begin()
    assert pair.instance.close(0.01) is False
    assert pair.fpga.closed


def test_a_backend_may_join_later_but_not_a_closed_instance(pair: Pair) -> None:
    late = Device("npu", 3.0)
    pair.instance.add(Member(late, "v", pair.time), 0)
    assert pair.answer() == 3.0
    pair.instance.close(0)
    later = Device("late", 4.0)
    pair.instance.add(Member(later, "v", pair.time), 0)
    assert later.closed
