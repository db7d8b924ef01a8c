"""Ensembles: the pure graph, and one that is served over the models of its steps."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from gatelet.accelerators.tensors import TensorSpec
from gatelet.agent.scoring.client import ScoringClient
from gatelet.agent.scoring.ensemble import (
    Graph,
    Signature,
    build_graph,
    check_types,
    find_circle,
    parse_ensemble,
)
from gatelet.agent.scoring.errors import Code, ScoringError
from gatelet.modules.errors import InvalidModel
from gatelet.protos import control_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from ..bench import onnx_models
from ..bench.scoring_site import Site, serve

ONES = np.ones((1, 4), np.float32)
X = TensorSpec("x", "FP32", (-1, 4))
Y = TensorSpec("y", "FP32", (-1, 4))
TOTAL = TensorSpec("total", "FP32", (-1, 1))


def step(model: str, takes: dict[str, str], gives: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"model_name": model, "input_map": takes, "output_map": gives, **more}


CHAIN = [
    step("double", {"x": "x"}, {"y": "doubled"}),
    step("triple", {"x": "doubled"}, {"y": "y", "total": "total"}),
]
DIAMOND = [
    step("double", {"x": "x"}, {"y": "left"}),
    step("triple", {"x": "x"}, {"y": "right"}),
    step("add", {"a": "left", "b": "right"}, {"sum": "y"}),
]


def document(steps: list[dict[str, Any]]) -> bytes:
    return json.dumps({"ensemble_scheduling": {"step": steps}}).encode()


def graph(steps: list[dict[str, Any]], outputs: tuple[TensorSpec, ...] = (Y,)) -> Graph:
    return build_graph(parse_ensemble(document(steps), "e"), (X,), outputs, "e")


def test_steps_wait_for_what_they_need() -> None:
    assert graph(CHAIN).after == (frozenset(), frozenset({0}))
    assert graph(DIAMOND).after == (frozenset(), frozenset(), frozenset({0, 1}))
    extra = [*DIAMOND, step("double", {"x": "x"}, {"y": "unused"})]
    assert graph(extra).needed(["y"]) == {0, 1, 2}


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([step("a", {"x": "nowhere"}, {"y": "y"})], "needs tensor 'nowhere', which no step makes"),
        ([step("a", {"x": "x"}, {"y": "other"})], "no step makes the ensemble's output 'y'"),
        ([step("a", {"x": "x"}, {"y": "x"})], "is an input of the ensemble already"),
        (
            [step("a", {"x": "x"}, {"y": "y"}), step("b", {"x": "x"}, {"y": "y"})],
            "made by step 2 .b. and is made by step 1 .a. already",
        ),
        (
            [step("a", {"x": "q"}, {"y": "y"}), step("b", {"x": "y"}, {"y": "q"})],
            "steps wait for each other: step 1 .a. -> step 2 .b. -> step 1 .a.",
        ),
        ([step("a", {"x": "y"}, {"y": "y"})], "wait for each other: step 1 .a. -> step 1 .a."),
        ([], "found 0 steps"),
        ([{"model_name": "a"}], "missing required field"),
        ([step("a", {"x": "x"}, {"y": "y"}, priority=1)], "unknown field"),
    ],
)
def test_what_is_no_graph(steps: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(InvalidModel, match=words):
        graph(steps)


def test_types_are_checked_between_steps() -> None:
    scale = Signature((X,), (Y, TOTAL))
    good = graph(CHAIN, (Y, TOTAL))
    assert check_types(good, (X,), (Y, TOTAL), {0: scale, 1: scale}) == ""
    whole = Signature((TensorSpec("x", "INT64", (-1, 4)),), (Y, TOTAL))
    assert "takes x INT64" in check_types(good, (X,), (Y, TOTAL), {0: scale, 1: whole})
    wide = Signature((TensorSpec("x", "FP32", (-1, 5)),), (Y, TOTAL))
    assert "tensor 'doubled' is y" in check_types(good, (X,), (Y, TOTAL), {0: scale, 1: wide})
    bare = Signature((X,), (Y,))
    assert "has no output 'total'" in check_types(good, (X,), (Y, TOTAL), {0: scale, 1: bare})
    other = Signature((TensorSpec("q", "FP32", (-1, 4)),), (Y, TOTAL))
    assert "has no input 'x', it has 'q'" in check_types(good, (X,), (Y,), {0: other, 1: scale})
    two = Signature((X, TensorSpec("z", "FP32", (1,))), (Y, TOTAL))
    assert "needs the input 'z' too" in check_types(good, (X,), (Y,), {0: scale, 1: two})
    spare = Signature(two.inputs, two.outputs, frozenset({"z"}))
    assert check_types(good, (X,), (Y,), {0: scale, 1: spare}) == ""
    promised = TensorSpec("y", "FP64", (-1, 4))
    assert "where it is made" in check_types(good, (X,), (promised,), {0: scale, 1: scale})


nodes = st.integers(0, 6)


@given(st.dictionaries(nodes, st.sets(nodes), max_size=7))
def test_circles_are_found_exactly_where_no_order_exists(after: dict[int, set[int]]) -> None:
    circle = find_circle(after)
    if circle:
        assert len(circle) > 1
        assert circle[0] == circle[-1]
        assert all(b in after[a] for a, b in itertools.pairwise(circle))
        return
    done: set[int] = set()
    for _ in after:
        done |= {node for node, waits in after.items() if waits & after.keys() <= done}
    assert done == after.keys()


# -- served --------------------------------------------------------------------------------------


def ensemble_folder(
    folder: Path,
    steps: list[dict[str, Any]],
    outputs: tuple[TensorSpec, ...] = (Y,),
    sample: dict[str, Any] | None = None,
) -> Path:
    folder.mkdir()
    (folder / "ensemble.json").write_bytes(document(steps))
    described = {
        "name": "together",
        "version": "1",
        "framework": "ensemble",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [
            {"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in outputs
        ],
        "variants": [{"kind": "ensemble", "path": "ensemble.json"}],
    }
    (folder / "model.json").write_text(json.dumps(described))
    return folder


def adder(folder: Path) -> Path:
    specs = [("a", "FP32", (-1, 4)), ("b", "FP32", (-1, 4))]
    content = onnx_models.build(
        [onnx_models.helper.make_node("Add", ["a", "b"], ["sum"])],
        specs,
        [("sum", "FP32", (-1, 4))],
    )
    return onnx_models.write_folder(folder, content, specs, [("sum", "FP32", (-1, 4))])


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with serve(tmp_path / "s") as site:
        for name, factor in (("double", 2), ("triple", 3)):
            site.load(name, onnx_models.scale_folder(tmp_path / name, factor))
            site.probe(name)
        site.load("add", adder(tmp_path / "add"))
        site.probe("add")
        yield site


MODELS = {name: [(name, 0, True)] for name in ("double", "triple", "add")}


def add_ensemble(site: Site, folder: Path) -> None:
    site.switch(MODELS)
    site.load("e", folder)
    assert site.probe("e").state == pb.InstanceStatus.READY
    site.switch({**MODELS, "e": [("e", 0, True)]})


def test_an_ensemble_answers_over_the_models_of_its_steps(site: Site, tmp_path: Path) -> None:
    add_ensemble(site, ensemble_folder(tmp_path / "e", CHAIN, (Y, TOTAL)))
    with ScoringClient(site.address) as client:
        answer = client.infer("e", {"x": ONES})
        assert answer["y"].tolist() == [[6.0] * 4]
        assert answer["total"].tolist() == [[24.0]]
        one = client.request("e", {"x": ONES}, outputs=["total"])
        assert [tensor.name for tensor in one.outputs] == ["total"]
        assert client.metadata("e").platform == "ensemble"
        with pytest.raises(ScoringError, match="expected \\[-1, 4\\]"):
            client.infer("e", {"x": np.ones((1, 5), np.float32)})


def test_triton_clients_see_what_it_is_made_of(site: Site, tmp_path: Path) -> None:
    import tritonclient.grpc as triton

    add_ensemble(site, ensemble_folder(tmp_path / "e", CHAIN))
    with triton.InferenceServerClient(site.address) as client:
        config = client.get_model_config("e").config
    assert config.platform == "ensemble"
    first, last = config.ensemble_scheduling.step
    assert (first.model_name, first.model_version, last.model_name) == ("double", -1, "triple")
    assert dict(first.output_map) == {"y": "doubled"}
    assert dict(last.input_map) == {"x": "doubled"}


def test_independent_steps_run_at_the_same_time(site: Site, tmp_path: Path) -> None:
    import threading

    add_ensemble(site, ensemble_folder(tmp_path / "e", DIAMOND))
    meeting = threading.Barrier(2, timeout=20)
    for name in ("double", "triple"):
        session = site.server_instance(name).members[0].session

        def run(*arguments: Any, run: Any = session.run) -> Any:
            # Passed only while the other step waits here too.
            meeting.wait()
            return run(*arguments)

        session.run = run  # type: ignore[method-assign]
    with ScoringClient(site.address) as client:
        assert client.infer("e", {"x": ONES})["y"].tolist() == [[5.0] * 4]


def test_a_step_that_is_not_deployed_yet_is_waited_for(site: Site, tmp_path: Path) -> None:
    site.load("e", ensemble_folder(tmp_path / "e", CHAIN))
    with pytest.raises(grpc.RpcError) as caught:
        site.probe("e")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "endpoint 'double', which is not deployed here now" in caught.value.details()
    site.switch(MODELS)
    assert site.probe("e").state == pb.InstanceStatus.READY


def test_a_step_that_went_away_or_changed_is_unavailable(site: Site, tmp_path: Path) -> None:
    add_ensemble(site, ensemble_folder(tmp_path / "e", CHAIN))
    with ScoringClient(site.address) as client:
        changed = {**MODELS, "e": [("e", 0, True)], "triple": [("add", 0, True)]}
        site.switch(changed)
        with pytest.raises(ScoringError, match="has no output 'y', it has 'sum'") as caught:
            client.infer("e", {"x": ONES})
        assert caught.value.code is Code.UNAVAILABLE
        site.switch({**MODELS, "e": [("e", 0, True)]})
        assert client.infer("e", {"x": ONES})["y"][0, 0] == 6.0


def test_the_steps_follow_a_swap_of_their_model(site: Site, tmp_path: Path) -> None:
    add_ensemble(site, ensemble_folder(tmp_path / "e", CHAIN))
    site.load("ten", onnx_models.scale_folder(tmp_path / "ten", 10, version="2"))
    site.probe("ten")
    site.switch({**MODELS, "double": [("ten", 0, True)], "e": [("e", 0, True)]})
    with ScoringClient(site.address) as client:
        assert client.infer("e", {"x": ONES})["y"][0, 0] == 30.0


def test_a_wrong_graph_is_refused_when_it_is_loaded(site: Site, tmp_path: Path) -> None:
    for number, steps in enumerate(([step("a", {"x": "no"}, {"y": "y"})], [])):
        with pytest.raises(grpc.RpcError) as caught:
            site.load(f"e{number}", ensemble_folder(tmp_path / f"e{number}", steps))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "ensemble.json" in caught.value.details()


def test_ensembles_that_would_ask_each_other_are_refused(site: Site, tmp_path: Path) -> None:
    first = [step("double", {"x": "x"}, {"y": "y"})]
    add_ensemble(site, ensemble_folder(tmp_path / "e", first))
    site.load("f", ensemble_folder(tmp_path / "f", [step("e", {"x": "x"}, {"y": "y"})]))
    site.probe("f")
    with pytest.raises(grpc.RpcError) as caught:
        site.switch({"e": [("e", 0, True)], "double": [("f", 0, True)]})
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "ensembles ask each other: e -> double -> e" in caught.value.details()
    with ScoringClient(site.address) as client:
        assert client.infer("e", {"x": ONES})["y"][0, 0] == 2.0


def test_a_steps_error_names_the_step(site: Site, tmp_path: Path) -> None:
    from gatelet.accelerators.errors import BackendError

    add_ensemble(site, ensemble_folder(tmp_path / "e", CHAIN))
    session = site.server_instance("triple").members[0].session

    def fail(*_: Any) -> Any:
        raise BackendError("bad luck")

    session.run = fail  # type: ignore[method-assign]
    with ScoringClient(site.address) as client, pytest.raises(ScoringError) as caught:
        client.infer("e", {"x": ONES})
    assert caught.value.code is Code.INTERNAL
    assert "step 2 (triple)" in caught.value.message
