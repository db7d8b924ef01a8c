"""Copies of answered requests: compared and counted, never in anybody's way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from gatelet.accelerators.cpu import CpuBackend
from gatelet.accelerators.errors import BackendError
from gatelet.accelerators.tensors import Array
from gatelet.agent.scoring.dataplane import DataPlane
from gatelet.agent.scoring.instances import Instance
from gatelet.agent.scoring.loading import InstanceOptions, Loaded
from gatelet.agent.scoring.mirror import Copy, Mirror, difference
from gatelet.agent.scoring.routing import Target, make_route
from gatelet.agent.scoring.types import InferenceRequest, InferenceResponse, Tensor
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ..bench import onnx_models

DEADLINE = 30.0


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.002)


class Site:
    """Endpoint "e": 2 x, with every request copied to an instance that answers `factor` x."""

    def __init__(self, folder: Path, factor: float) -> None:
        self.loaded = []
        for name, by in (("old", 2.0), ("new", factor)):
            directory = onnx_models.scale_folder(folder / name, by, version=name)
            one = Loaded(directory, InstanceOptions(max_batch=1), {"cpu": CpuBackend()}, name)
            one.probe()
            self.loaded.append(one)
        self.plane = DataPlane("t")
        self.switch()

    @property
    def mirrored(self) -> Instance:
        return self.loaded[1].instance

    def switch(self, percent: int = 100) -> None:
        old, new = (one.instance for one in self.loaded)
        mirror = Target(new, "new", 0, "new", mirror=percent, tolerance=0.01)
        self.plane.switch([make_route("e", Target(old, "old", 0, "old"), [mirror])])

    def ask(self, headers: dict[str, str] | None = None) -> InferenceResponse:
        x = Tensor("x", "FP32", np.ones((1, 4), np.float32))
        return self.plane.infer(InferenceRequest("e", (x,), headers=headers or {}))

    def submit(self) -> InferenceResponse:
        answers: list[InferenceResponse] = []
        x = Tensor("x", "FP32", np.ones((1, 4), np.float32))
        self.plane.submit(InferenceRequest("e", (x,)), answers.append)  # type: ignore[arg-type]
        until(lambda: bool(answers))
        return answers[0]

    def close(self) -> None:
        self.plane.close()
        for one in self.loaded:
            one.instance.close(1.0)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path, 3.0)
    yield made
    made.close()


def test_an_answer_that_differs_is_counted_and_not_returned(site: Site) -> None:
    for ask in (site.ask, site.submit):
        answer = ask()
        assert answer.version == "old"
        assert answer.outputs[0].array.tolist() == [[2.0] * 4]
    until(lambda: site.mirrored.mirrored.snapshot().compared == 2)
    counts = site.mirrored.mirrored.snapshot()
    # total: 8 against 12.
    assert (counts.differing, counts.failed, counts.dropped) == (2, 0, 0)
    assert counts.largest == pytest.approx(4 / 9)


def test_the_same_answer_does_not_differ(tmp_path: Path) -> None:
    site = Site(tmp_path, 2.0)
    site.ask()
    until(lambda: site.mirrored.mirrored.snapshot().compared == 1)
    assert site.mirrored.mirrored.snapshot().differing == 0
    site.close()


def test_a_mirror_answers_who_names_it(site: Site) -> None:
    answer = site.ask({"azureml-model-deployment": "new"})
    assert answer.version == "new"
    assert site.plane.mirror.idle()
    assert site.mirrored.mirrored.snapshot().compared == 0


class Stuck:
    """Makes a session wait, or fail."""

    def __init__(self, instance: Instance) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.error: BackendError | None = None
        session = instance.members[0].session
        self._run = session.run
        session.run = self  # type: ignore[method-assign]

    def __call__(self, *arguments: object) -> dict[str, Array]:
        self.entered.set()
        assert self.go_on.wait(DEADLINE)
        if self.error is not None:
            raise self.error
        return self._run(*arguments)  # type: ignore[arg-type]


def test_a_mirror_that_hangs_costs_nobody_anything(site: Site) -> None:
    site.plane.mirror = Mirror(most_copies=3)
    stuck = Stuck(site.mirrored)
    site.ask()
    assert stuck.entered.wait(DEADLINE)
    started = time.monotonic()
    for _ in range(20):
        assert site.ask().version == "old"
    assert time.monotonic() - started < DEADLINE / 2
    assert site.mirrored.mirrored.snapshot().dropped == 17
    stuck.go_on.set()
    until(lambda: site.mirrored.mirrored.snapshot().compared == 4)
    until(site.plane.mirror.idle)


def test_copies_are_bounded_in_bytes_too(site: Site) -> None:
    site.plane.mirror = Mirror(most_bytes=10)
    site.ask()
    assert site.mirrored.mirrored.snapshot().dropped == 1


def test_texts_count_with_their_length(site: Site) -> None:
    target = site.plane.table.routes["e"].default
    texts = np.array([[b"a" * 1000, b"", "é".encode() * 500]], np.object_)
    assert Copy(target, {"x": texts}, {"y": texts[:, :1]}, 0.0).size >= 3000
    site.plane.mirror = Mirror(most_bytes=2500)
    site.plane.mirror.offer([target], {"x": texts}, {"y": texts})
    assert site.plane.mirror.idle()


def test_a_mirror_that_fails_is_counted(site: Site) -> None:
    stuck = Stuck(site.mirrored)
    stuck.go_on.set()
    stuck.error = BackendError("no")
    assert site.ask().version == "old"
    until(lambda: site.mirrored.mirrored.snapshot().failed == 1)


def test_the_mirrors_thread_yields_to_all_others(site: Site) -> None:
    import os

    site.ask()
    until(lambda: site.mirrored.mirrored.snapshot().compared == 1)
    thread = next(t for t in threading.enumerate() if t.name == "mirror")
    assert thread.native_id is not None
    assert os.getpriority(os.PRIO_PROCESS, thread.native_id) >= 10
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < 10


def test_one_that_is_being_closed_gets_no_copies(site: Site) -> None:
    site.mirrored.close(1.0)
    assert site.ask().version == "old"
    until(lambda: site.mirrored.mirrored.snapshot().dropped == 1)


floats = arrays.arrays(np.float32, (2, 3), elements=st.floats(width=32))


@given(floats, floats)
def test_differences(one: Array, other: Array) -> None:
    assert difference({"y": one}, {"y": one}) == 0.0
    found = difference({"y": one}, {"y": other})
    assert found >= 0.0
    equal = np.array_equal(one, other, equal_nan=True)
    assert (found == 0.0) == equal or found < 1e-30


def test_what_cannot_be_compared_differs_without_bound() -> None:
    y = np.ones((1, 2), np.float32)
    text = np.array([b"a"], np.object_)
    assert difference({"y": y}, {}) == float("inf")
    assert difference({"y": y}, {"y": y[0]}) == float("inf")
    assert difference({"y": text}, {"y": np.array([b"b"], np.object_)}) == float("inf")
    assert difference({"y": text}, {"y": text.copy()}) == 0.0
    assert difference({"y": y}, {"y": y * np.float32(np.nan)}) == float("inf")
    assert difference({"y": np.array([True])}, {"y": np.array([False])}) == 0.5
