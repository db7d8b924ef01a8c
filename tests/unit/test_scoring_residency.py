"""The memory budget: who leaves, who waits, and that every model answers all the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from gatelet.accelerators.backend import LoadOptions, Session, Variant
from gatelet.accelerators.cpu import CpuBackend
from gatelet.accelerators.errors import BackendUnavailable, DeadlineExceeded, LoadError
from gatelet.accelerators.tensors import Array, TensorSpec
from gatelet.agent.scoring.client import ScoringClient
from gatelet.agent.scoring.prometheus import model_metrics, render
from gatelet.agent.scoring.residency import (
    BudgetedBackend,
    BudgetedSession,
    Residency,
    Resident,
    make_room,
)
from hypothesis import given
from hypothesis import strategies as st

from ..bench import onnx_models
from ..bench.scoring_site import Site, serve

MIB = 2**20
X = {"x": np.ones((1, 4), np.float32)}

residents = st.lists(
    st.builds(Resident, st.integers(), st.integers(0, 100), st.floats(0, 9), st.booleans()),
    unique_by=lambda one: one.key,
    max_size=8,
)


@given(residents, st.integers(0, 120), st.integers(0, 300))
def test_laws_of_making_room(there: list[Resident], needed: int, budget: int) -> None:
    room = make_room(there, needed, budget)
    leaving = [one for one in there if one.key in room.evict]
    staying = [one for one in there if one.key not in room.evict]
    assert not any(one.busy for one in leaving)
    after = sum(one.bytes for one in staying) + needed
    assert room.fits == (after <= budget or not staying)
    # Nobody leaves for nothing, and who leaves was longer unused than who stays.
    if leaving:
        last = max(leaving, key=lambda one: (one.used, one.key))
        assert after + last.bytes > budget
    for one in leaving:
        assert all((one.used, one.key) <= (s.used, s.key) for s in staying if not s.busy)
    if not room.fits:
        assert any(one.busy for one in staying)


class FakeSession:
    backend = "cpu"
    inputs = (TensorSpec("x", "FP32", (-1, 4)),)
    outputs = (TensorSpec("y", "FP32", (-1, 4)),)
    healthy = True

    def __init__(self, owner: FakeBackend, name: str) -> None:
        self._owner = owner
        self._name = name

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> dict[str, Array]:
        assert self._name in self._owner.open
        self._owner.entered.release()
        assert self._owner.go_on.wait(10)
        return {"y": np.asarray(inputs["x"])}

    def close(self) -> None:
        self._owner.open.discard(self._name)


class FakeBackend:
    """Models named by their variant, 1 MiB of file each, and what of them is in memory."""

    name = "cpu"

    def __init__(self) -> None:
        self.open: set[str] = set()
        self.most = 0
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.go_on.set()
        self.broken: set[str] = set()

    def accepts(self, variant: Variant) -> str | None:
        return None

    def load(self, directory: Path, variant: Variant, options: LoadOptions) -> Session:
        if variant.path in self.broken:
            raise LoadError("the file is gone")
        self.open.add(variant.path)
        self.most = max(self.most, len(self.open))
        return FakeSession(self, variant.path)


class Budget:
    """A budget for two models of 1 MiB and 1 MiB overhead each."""

    def __init__(self, folder: Path, models: int = 3) -> None:
        self.backend = FakeBackend()
        self.residency = Residency(4 * MIB + 4096, measure=lambda: 0)
        budgeted = BudgetedBackend(self.backend, self.residency)
        self.sessions: list[BudgetedSession] = []
        for number in range(models):
            (folder / str(number)).write_bytes(bytes(MIB))
            variant = Variant("onnx", str(number))
            self.sessions.append(budgeted.load(folder, variant, LoadOptions()))

    def ask(self, number: int, seconds: float | None = None) -> dict[str, Array]:
        deadline = None if seconds is None else time.monotonic() + seconds
        return self.sessions[number].run(X, None, deadline)


@pytest.fixture
def budget(tmp_path: Path) -> Iterator[Budget]:
    made = Budget(tmp_path)
    yield made
    made.backend.go_on.set()
    for session in made.sessions:
        session.close()


def test_the_one_longest_unused_leaves_and_comes_back(budget: Budget) -> None:
    assert budget.backend.open == {"1", "2"}
    for number in (0, 2, 1, 0):
        assert budget.ask(number)["y"].tolist() == X["x"].tolist()
    assert budget.backend.open == {"0", "1"}
    reports = [session.memory() for session in budget.sessions]
    assert [report.resident for report in reports] == [True, True, False]
    assert [report.loads for report in reports] == [2, 1, 0]
    assert [report.evictions for report in reports] == [2, 1, 1]
    assert budget.residency.used <= 4 * MIB + 4096
    assert all(session.healthy for session in budget.sessions)


def test_many_threads_never_exceed_the_budget(budget: Budget) -> None:
    with ThreadPoolExecutor(8) as pool:
        rounds = [pool.submit(budget.ask, number % 3, 60.0) for number in range(300)]
        for one in rounds:
            assert one.result(90)["y"].shape == (1, 4)
    assert budget.backend.most == 2


def test_who_is_busy_stays_and_who_waits_has_a_deadline(budget: Budget) -> None:
    budget.backend.go_on.clear()
    with ThreadPoolExecutor(3) as pool:
        busy = [pool.submit(budget.ask, number) for number in (1, 2)]
        for _ in busy:
            assert budget.backend.entered.acquire(timeout=30)
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="waiting for memory"):
            budget.ask(0, 0.05)
        # And not for as long as without one.
        assert time.monotonic() - started < 15
        assert not budget.sessions[1].cool()
        waiting = pool.submit(budget.ask, 0, 30.0)
        budget.backend.go_on.set()
        assert waiting.result(30)["y"].shape == (1, 4)
        for one in busy:
            one.result(30)
    assert budget.backend.most == 2


def test_one_that_cannot_come_back_is_unavailable(budget: Budget) -> None:
    budget.backend.broken.add("0")
    with pytest.raises(BackendUnavailable, match="cannot be loaded again: the file is gone"):
        budget.ask(0)
    budget.backend.broken.clear()
    assert budget.ask(0)


def test_a_closed_one_gives_its_memory_back_for_good(budget: Budget) -> None:
    budget.sessions[1].close()
    assert budget.backend.open == {"2"}
    with pytest.raises(BackendUnavailable, match="was closed"):
        budget.ask(1)
    assert not budget.sessions[1].healthy
    budget.ask(0)
    assert budget.backend.open == {"0", "2"}


def test_one_that_is_closed_while_it_is_loaded_does_not_stay(
    budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = budget.backend.load

    def load_and_close(directory: Path, variant: Variant, options: LoadOptions) -> Session:
        session = load(directory, variant, options)
        budget.sessions[0].close()
        return session

    budget.ask(1)
    budget.ask(2)
    assert budget.backend.open == {"1", "2"}
    monkeypatch.setattr(budget.backend, "load", load_and_close)
    with pytest.raises(BackendUnavailable, match="was closed"):
        budget.ask(0)
    assert "0" not in budget.backend.open
    monkeypatch.undo()
    budget.ask(1)
    # Its share of the budget is free again.
    assert budget.residency.used == sum(one.size for one in budget.sessions[1:])


# -- served --------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Three endpoints, and memory for one model."""
    residency = Residency(2 * MIB)
    with serve(tmp_path / "s", [BudgetedBackend(CpuBackend(), residency)]) as site:
        site.deploy({name: onnx_models.scale_folder(tmp_path / name, int(name)) for name in "123"})
        yield site


def test_all_endpoints_answer_within_the_budget(site: Site) -> None:
    # An event loop must not wait for a model to be loaded.
    assert not any(member.prompt for member in site.server_instance("1").members)
    with ScoringClient(site.address) as client:
        for _ in range(3):
            for name in "123":
                assert client.infer(name, X)["y"][0, 0] == float(name)
        assert client.ready("1")
    status = {one.instance: one.memory for one in site.status().instances}
    assert sum(memory.resident for memory in status.values()) == 1
    assert all(memory.loads >= 2 and memory.evictions >= 2 for memory in status.values())
    assert site.plane is not None
    text = render(model_metrics(site.plane)).decode()
    assert 'gatelet_model_evictions_total{model="1",version="1"} ' in text


def test_triton_clients_load_and_unload_within_the_deployment(site: Site) -> None:
    import tritonclient.grpc as triton
    from tritonclient.utils import InferenceServerException

    def resident() -> list[str]:
        return [one.instance for one in site.status().instances if one.memory.resident]

    with triton.InferenceServerClient(site.address) as client:
        client.load_model("1")
        assert resident() == ["1"]
        client.unload_model("1")
        assert resident() == []
        client.load_model("2")
        assert resident() == ["2"]
        assert client.is_model_ready("1")
        with pytest.raises(InferenceServerException, match="does not name it"):
            client.load_model("4")
