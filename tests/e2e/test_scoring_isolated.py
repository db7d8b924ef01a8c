"""Models in processes of their own: what one of them does to its process, nobody else notices."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from gatelet.agent.scoring.client import ScoringClient
from gatelet.agent.scoring.errors import Code, ScoringError
from gatelet.protos import control_pb2 as pb

from ..bench import onnx_models
from ..bench.scoring_site import ScoringProcess, gone, scoring_process
from .test_scoring_crash import ENDLESS, looping_folder, over_grpc

X = {"x": np.ones((1, 4), np.float32)}
SECONDS = 30.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("i")


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ScoringProcess]:
    with scoring_process(tmp_path / "s") as process:
        yield process


def children(process: ScoringProcess) -> list[psutil.Process]:
    return psutil.Process(process.process.pid).children()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL], ids=lambda n: n.name)
def test_a_crash_is_the_models_own(
    process: ScoringProcess, folder: Path, number: signal.Signals
) -> None:
    site = process.site
    site.load("looping", looping_folder(folder / f"looping{number}"), isolate=True)
    site.load("plain", onnx_models.scale_folder(folder / f"plain{number}", 2.0))
    for name in ("looping", "plain"):
        assert site.probe(name).state == pb.InstanceStatus.READY
    site.switch({name: [(name, 0, True)] for name in ("looping", "plain")})
    (child,) = children(process)
    assert over_grpc(site.address, 5) == "OK"

    ended = threading.Event()
    answers: list[object] = []

    def ask() -> None:
        with ScoringClient(site.address, timeout=SECONDS) as client:
            while not ended.is_set():
                try:
                    answers.append(client.infer("plain", X)["total"].tolist())
                except ScoringError as error:
                    answers.append(error)

    with ThreadPoolExecutor(3) as clients:
        asking = clients.submit(ask)
        try:
            spent = child.cpu_times().user
            running = [clients.submit(over_grpc, site.address, ENDLESS) for _ in range(2)]
            until(lambda: child.cpu_times().user > spent + 0.3)
            os.kill(child.pid, number)
            assert [one.result(SECONDS) for one in running] == ["UNAVAILABLE"] * 2
            codes = set()
            deadline = time.monotonic() + SECONDS
            while "OK" not in codes and time.monotonic() < deadline:
                codes.add(over_grpc(site.address, 5))
            assert "OK" in codes
            assert codes <= {"OK", "UNAVAILABLE"}
            asked = len(answers)
            until(lambda: len(answers) > asked + 20)
        finally:
            ended.set()
            asking.result(SECONDS)
    assert [answer for answer in answers if answer != [[8.0]]] == []
    until(lambda: len(children(process)) == 1)
    (after,) = children(process)
    assert after.pid != child.pid
    assert process.process.poll() is None


def test_it_ends_with_its_instance_and_with_the_process(
    process: ScoringProcess, folder: Path
) -> None:
    site, model = process.site, onnx_models.scale_folder(folder / "ends", 2.0)
    for name in ("one", "two"):
        status = site.load(name, model, isolate=True)
        assert [backend.name for backend in status.backends] == ["cpu"]
        site.probe(name)
    site.switch({name: [(name, 0, True)] for name in ("one", "two")})
    with ScoringClient(site.address, timeout=SECONDS) as client:
        for name in ("one", "two"):
            assert client.infer(name, X)["total"].tolist() == [[8.0]]
            with pytest.raises(ScoringError) as refused:
                client.infer(name, {"x": np.ones((1, 3), np.float32)})
            assert refused.value.code is Code.INVALID_ARGUMENT
    first, second = children(process)
    site.switch({"two": [("two", 0, True)]})
    site.unload("one")
    until(lambda: gone(first) or gone(second))
    until(lambda: len(children(process)) == 1)
    (left,) = children(process)
    assert process.terminate() == 0
    until(lambda: gone(left))


def test_it_ends_when_the_process_is_killed(process: ScoringProcess, folder: Path) -> None:
    process.site.load("one", onnx_models.scale_folder(folder / "killed", 2.0), isolate=True)
    (child,) = children(process)
    process.process.kill()
    process.process.wait(SECONDS)
    until(lambda: gone(child))


def test_a_model_that_does_not_load_is_refused_as_ever(
    process: ScoringProcess, folder: Path
) -> None:
    model = onnx_models.scale_folder(folder / "broken", 2.0)
    (model / "onnx/model.onnx").write_bytes(b"no")
    with pytest.raises(grpc.RpcError) as refused:
        process.site.load("one", model, isolate=True)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "onnxruntime cannot load" in refused.value.details()
    until(lambda: children(process) == [])
