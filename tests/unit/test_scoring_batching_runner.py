"""The threads around the batching core, with a model whose runs the test holds and releases."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from gatelet.accelerators.tensors import Array
from gatelet.agent.scoring.batching import BatchConfig, Overflow
from gatelet.agent.scoring.batching_runner import BatchRunner
from gatelet.agent.scoring.errors import Code, ScoringError
from gatelet.agent.scoring.statistics import Statistics
from hypothesis import given, settings
from hypothesis import strategies as st

BATCHES = BatchConfig(max_batch=8)
DEADLINE = 10.0


class Doubler:
    """y = 2 x for every item, and total = sum of the row; refuses a negative x."""

    def __init__(self) -> None:
        self.runs: list[int] = []
        self.entered = threading.Semaphore(0)
        self.hold: threading.Event | None = None

    def __call__(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        deadline: float | None,
        requests: int,
    ) -> dict[str, Array]:
        x = inputs["x"]
        self.runs.append(len(x))
        self.entered.release()
        if self.hold is not None:
            assert self.hold.wait(DEADLINE)
        if (x < 0).any():
            raise ScoringError(Code.INVALID_ARGUMENT, "x must not be negative")
        results = {"y": 2 * x, "total": x.sum(1, keepdims=True)}
        return results if outputs is None else {name: results[name] for name in outputs}


class Busy:
    """A runner whose model computes already, so that what comes now gathers."""

    def __init__(self, config: BatchConfig = BATCHES) -> None:
        self.model = Doubler()
        self.statistics = Statistics()
        self.runner = BatchRunner("model 'm'", self.model, config, self.statistics, batched=True)
        self.pool = ThreadPoolExecutor(32)
        self.model.hold = threading.Event()
        self.first = self.call(np.zeros((1, 2), np.float32))
        assert self.model.entered.acquire(timeout=DEADLINE)

    def call(self, x: Array, **options: object) -> Future[dict[str, Array]]:
        arguments: dict[str, object] = {"outputs": None, "deadline": None, **options}
        return self.pool.submit(self.runner.call, {"x": x}, **arguments)  # type: ignore[arg-type]

    def gather(self, count: int) -> None:
        wait_for(lambda: self.runner.pending == count)

    def release(self) -> None:
        assert self.model.hold is not None
        self.model.hold.set()

    def close(self) -> None:
        self.release()
        self.runner.close()
        self.pool.shutdown()


def wait_for(condition: Callable[[], bool]) -> None:
    done = threading.Event()
    for _ in range(int(DEADLINE / 0.002)):
        if condition():
            return
        done.wait(0.002)
    raise AssertionError("it never came true")


@pytest.fixture
def busy() -> object:
    made = Busy()
    yield made
    made.close()


def row(value: float, items: int = 1) -> Array:
    return np.full((items, 2), value, np.float32)


def test_what_gathers_during_a_run_goes_together(busy: Busy) -> None:
    futures = [busy.call(row(n, 1 + n % 2), outputs=["y"]) for n in range(5)]
    busy.gather(5)
    busy.release()
    for n, future in enumerate(futures):
        y = future.result(DEADLINE)["y"]
        np.testing.assert_array_equal(y, 2 * row(n, 1 + n % 2))
        assert y.base is not None  # a view: split without copying
    assert busy.model.runs == [1, 7]
    # Counted before it is answered, and perhaps after the others.
    busy.first.result(DEADLINE)
    snapshot = busy.statistics.snapshot()
    assert (snapshot.success.count, snapshot.inference_count) == (6, 8)
    assert snapshot.execution_count == 2
    assert [(b.size, b.compute_infer.count) for b in snapshot.batches] == [(1, 1), (7, 1)]
    assert snapshot.queue.ns > 0


def test_each_gets_the_outputs_it_asked_for(busy: Busy) -> None:
    one, other = busy.call(row(1), outputs=["y"]), busy.call(row(2), outputs=["total"])
    everything = busy.call(row(3))
    busy.gather(3)
    busy.release()
    assert set(one.result(DEADLINE)) == {"y"}
    assert other.result(DEADLINE)["total"].tolist() == [[4.0]]
    assert set(everything.result(DEADLINE)) == {"y", "total"}
    assert busy.model.runs == [1, 3]


def test_one_bad_request_does_not_spoil_the_others(busy: Busy) -> None:
    good, bad, better = busy.call(row(1)), busy.call(row(-1)), busy.call(row(2))
    busy.gather(3)
    busy.release()
    assert good.result(DEADLINE)["y"].tolist() == [[2.0, 2.0]]
    assert better.result(DEADLINE)["y"].tolist() == [[4.0, 4.0]]
    with pytest.raises(ScoringError, match="must not be negative") as caught:
        bad.result(DEADLINE)
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_a_deadline_that_passes_in_the_queue(busy: Busy) -> None:
    late = busy.call(row(1), deadline=busy.runner._now() + 0.02)
    with pytest.raises(ScoringError, match="before the model was run") as caught:
        late.result(DEADLINE)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert busy.runner.pending == 0
    busy.release()
    busy.first.result(DEADLINE)
    assert busy.model.runs == [1]


def test_priority_goes_before_arrival() -> None:
    busy = Busy(BatchConfig(max_batch=1))
    order: list[str] = []
    for name, priority in (("last", 9), ("default", 0), ("first", 1)):
        busy.runner.submit(
            {"x": row(1)}, None, None, priority, lambda _, name=name: order.append(name)
        )
    busy.gather(3)
    busy.release()
    wait_for(lambda: len(order) == 3)
    busy.close()
    assert order == ["first", "default", "last"]


def test_a_full_queue_says_when_to_come_back() -> None:
    busy = Busy(BatchConfig(max_batch=8, max_queue=2))
    waiting = [busy.call(row(1)), busy.call(row(2))]
    busy.gather(2)
    with pytest.raises(ScoringError, match="2 requests are waiting already") as caught:
        busy.call(row(3)).result(DEADLINE)
    assert caught.value.code is Code.UNAVAILABLE
    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 0
    busy.release()
    assert [f.result(DEADLINE)["y"][0, 0] for f in waiting] == [2.0, 4.0]
    busy.close()


def test_shedding_turns_the_oldest_away() -> None:
    busy = Busy(BatchConfig(max_batch=8, max_queue=1, overflow=Overflow.SHED_OLDEST))
    oldest = busy.call(row(1))
    busy.gather(1)
    newest = busy.call(row(2))
    with pytest.raises(ScoringError, match="waiting already"):
        oldest.result(DEADLINE)
    busy.release()
    assert newest.result(DEADLINE)["y"][0, 0] == 4.0
    busy.close()


def test_closing_turns_away_what_waits(busy: Busy) -> None:
    waiting = busy.call(row(1))
    busy.gather(1)
    busy.runner.close()
    with pytest.raises(ScoringError, match="is being unloaded"):
        waiting.result(DEADLINE)
    with pytest.raises(ScoringError, match="is being unloaded"):
        busy.runner.call({"x": row(1)}, None, None)
    busy.release()
    assert busy.first.result(DEADLINE)["y"].tolist() == [[0.0, 0.0]]


def test_a_model_that_mixes_its_items_is_run_singly_from_then_on() -> None:
    busy = Busy()
    original = busy.runner._execute_model

    def mean(*arguments: object) -> dict[str, Array]:
        return {name: a.mean(0, keepdims=True) for name, a in original(*arguments).items()}  # type: ignore[arg-type]

    busy.runner._execute_model = mean  # type: ignore[assignment]
    futures = [busy.call(row(1)), busy.call(row(3))]
    busy.gather(2)
    busy.release()
    assert sorted(f.result(DEADLINE)["y"][0, 0] for f in futures) == [2.0, 6.0]
    assert busy.runner.config.max_batch == 1
    busy.close()


def test_a_defect_is_answered_and_the_next_requests_still_run(
    busy: Busy, caplog: pytest.LogCaptureFixture
) -> None:
    original = busy.runner._execute_model

    def broken(*arguments: object) -> dict[str, Array]:
        busy.runner._execute_model = original
        raise ZeroDivisionError

    waiting = [busy.call(row(1)), busy.call(row(2))]
    busy.gather(2)
    busy.runner._execute_model = broken  # type: ignore[assignment]
    busy.release()
    for future in waiting:
        with pytest.raises(ScoringError, match="a defect of its own") as caught:
            future.result(DEADLINE)
        assert caught.value.code is Code.INTERNAL
    assert "ZeroDivisionError" in caplog.text
    results: list[object] = []
    busy.runner.submit({"x": row(3)}, ["y"], None, 0, results.append)
    wait_for(lambda: bool(results))
    assert results[0]["y"].tolist() == [[6.0, 6.0]]  # type: ignore[index]


def test_requests_of_an_event_loop_are_turned_away_where_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = BatchRunner("model 'm'", Doubler(), BATCHES, Statistics(), batched=True)
    results: list[object] = []
    for _ in range(2):
        runner.submit({"x": row(1)}, None, None, 0, results.append, wake=False)

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        runner.serve_here(0.0)
    assert [type(one) for one in results] == [ScoringError, ScoringError]
    assert "no thread can be started" in str(results[0])
    assert runner.pending == 0
    runner.submit({"x": row(3)}, ["y"], None, 0, results.append, wake=False)
    runner.serve_here(0.0)
    wait_for(lambda: len(results) == 3)
    assert results[2]["y"].tolist() == [[6.0, 6.0]]  # type: ignore[index]
    runner.close()


def test_a_caller_that_cannot_take_its_answer_takes_nobody_elses(
    busy: Busy, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(value: object) -> None:
        raise RuntimeError("the loop is closed")

    busy.runner.submit({"x": row(1)}, None, None, 0, gone)
    other = busy.call(row(2))
    busy.gather(2)
    busy.release()
    assert other.result(DEADLINE)["y"].tolist() == [[4.0, 4.0]]
    assert "the loop is closed" in caplog.text


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=40),
    st.integers(1, 3),
    st.integers(1, 8),
)
def test_everyone_is_answered_once_and_rightly(
    requests: list[tuple[int, bool]], slots: int, max_batch: int
) -> None:
    config = BatchConfig(max_batch=max_batch, slots=slots)
    model = Doubler()
    statistics = Statistics()
    runner = BatchRunner("model 'm'", model, config, statistics, batched=True)
    answers: list[tuple[int, object]] = []

    def ask(index: int, items: int, blocking: bool) -> None:
        x = row(index, items)
        if blocking:
            answers.append((index, runner.call({"x": x}, None, None)))
        else:
            runner.submit({"x": x}, None, None, 0, lambda value: answers.append((index, value)))

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(ask, i, *one) for i, one in enumerate(requests)]:
            future.result(DEADLINE)
    wait_for(lambda: len(answers) == len(requests))
    runner.close()
    assert sorted(index for index, _ in answers) == list(range(len(requests)))
    for index, value in answers:
        assert isinstance(value, dict)
        np.testing.assert_array_equal(value["y"], 2 * row(index, requests[index][0]))
    assert statistics.snapshot().success.count == len(requests)
    assert sum(model.runs) == sum(items for items, _ in requests)


def test_the_endpoints_own_priority_is_for_requests_that_name_none() -> None:
    busy = Busy(BatchConfig(max_batch=1, priority=8))
    order: list[str] = []
    try:
        for name, priority in (("unnamed", 0), ("last", 9), ("middle", 5), ("first", 1)):
            busy.runner.submit(
                {"x": row(1)}, None, None, priority, lambda _, name=name: order.append(name)
            )
        busy.release()
        wait_for(lambda: len(order) == 4)
    finally:
        busy.close()
    assert order == ["first", "middle", "unnamed", "last"]
