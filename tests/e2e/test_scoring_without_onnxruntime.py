"""The scoring process where onnxruntime cannot be imported, as on armv7l boards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from gatelet.agent.scoring.client import ScoringClient
from gatelet.protos import control_pb2 as pb
from gatelet.simulator.demo.dataset import load_heldout, model_directory
from onnx import helper

from ..bench import onnx_models
from ..bench.scoring_site import ScoringProcess, scoring_process

pytestmark = pytest.mark.e2e

_BLOCKER = """
import sys

class NoOnnxruntime:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "onnxruntime":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoOnnxruntime())
"""


@pytest.fixture(scope="module")
def scoring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScoringProcess]:
    folder = tmp_path_factory.mktemp("without")
    (folder / "sitecustomize.py").write_text(_BLOCKER)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with scoring_process(folder / "s", env=env) as process:
        yield process
        assert process.terminate() == 0


def test_nothing_of_onnxruntime_is_loaded(scoring: ScoringProcess, tmp_path: Path) -> None:
    scoring.site.deploy({"e": onnx_models.scale_folder(tmp_path / "m", 2)})
    maps = Path(f"/proc/{scoring.process.pid}/maps").read_text()
    assert "numpy" in maps
    assert "onnxruntime" not in maps


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_demos_models_answer(scoring: ScoringProcess, version: str) -> None:
    images, labels = load_heldout()
    status = scoring.site.load(version, model_directory(version), backends=["fpga", "cpu"])
    assert "cpu: numpy: onnxruntime is not installed" in status.notes
    status = scoring.site.probe(version)
    assert status.state == pb.InstanceStatus.READY, status.error
    assert [backend.name for backend in status.backends] == ["cpu"]
    scoring.site.switch({version: [(version, 0, True)]})
    with ScoringClient(scoring.site.address) as client:
        scores = client.infer(version, {"x": images})["scores"]
    assert np.mean(scores.argmax(axis=1) == labels) > 0.93


def test_an_operator_that_numpy_does_not_run_is_refused(
    scoring: ScoringProcess, tmp_path: Path
) -> None:
    specs = [("x", "FP32", (-1, 4))], [("y", "FP32", (-1, 4))]
    content = onnx_models.build([helper.make_node("Erf", ["x"], ["y"], "gelu")], *specs)
    folder = onnx_models.write_folder(tmp_path / "m", content, *specs)
    with pytest.raises(grpc.RpcError) as caught:
        scoring.site.load("erf", folder)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    message = caught.value.details() or ""
    assert "operator Erf (gelu) is not among those that run without onnxruntime" in message
    assert "score the model where onnxruntime is installed" in message


def test_numpy_may_be_asked_for_where_onnxruntime_is(tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 2)
    with scoring_process(tmp_path / "s") as process:
        for instance, names in {"one": ["numpy"], "other": []}.items():
            status = process.site.load(instance, folder, backends=names)
            assert [backend.name for backend in status.backends] == (names or ["cpu"])
            assert not status.notes
        process.site.probe("one")
        process.site.switch({"one": [("one", 0, True)]})
        with ScoringClient(process.site.address) as client:
            x = np.ones((1, 4), np.float32)
            assert client.infer("one", {"x": x})["y"].tolist() == [[2.0] * 4]
        assert process.terminate() == 0
