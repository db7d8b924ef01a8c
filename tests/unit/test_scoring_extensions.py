"""Choosing batches, classification, BF16, optional inputs and statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from gatelet.accelerators.backend import BatchLimited
from gatelet.accelerators.cpu import CpuBackend
from gatelet.accelerators.tensors import Array, TensorSpec
from gatelet.agent.scoring.batching import Overflow
from gatelet.agent.scoring.batching_choice import (
    NotSeparable,
    batch_config,
    largest_batch,
    measure,
    pays,
)
from gatelet.agent.scoring.classification import classify
from gatelet.agent.scoring.dataplane import DataPlane
from gatelet.agent.scoring.errors import Code, ScoringError
from gatelet.agent.scoring.loading import InstanceOptions, Loaded
from gatelet.agent.scoring.routing import Target, make_route
from gatelet.agent.scoring.statistics import Statistics
from gatelet.agent.scoring.tensor_codec import decode_raw, decode_typed, encode_raw
from gatelet.agent.scoring.types import InferenceRequest, Tensor
from gatelet.modules.model_json import Batching
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ..bench import onnx_models

FREE = (TensorSpec("x", "FP32", (-1, 2)),)
FIXED = (TensorSpec("x", "FP32", (1, 2)),)


class Session:
    """Two times x, or the mean of the batch."""

    backend = "cpu"
    inputs = outputs = FREE
    healthy = True
    mixes = False

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> dict[str, Array]:
        x = inputs["x"]
        return {"x": x - x.mean(0, keepdims=True) if self.mixes else 2 * x}

    def close(self) -> None:
        pass


class Limited(Session):
    max_batch = 6


def test_the_largest_batch() -> None:
    def largest(asked: int, model: int, specs: tuple[TensorSpec, ...] = FREE) -> int:
        return largest_batch(asked, Batching(max=model), specs, FREE, [Session()])

    assert [largest(0, 1), largest(0, 32), largest(1, 32), largest(4, 32), largest(64, 32)] == [
        *(1, 32, 1, 4, 64)
    ]
    assert largest(8, 1, FIXED) == 1
    assert isinstance(Limited(), BatchLimited)
    assert largest_batch(0, Batching(max=32), FREE, FREE, [Session(), Limited()]) == 6


def test_the_configuration_of_a_model() -> None:
    batching = Batching(
        max=32, preferred=(4, 32), max_delay_us=500, max_queue=7, overflow="shed-oldest"
    )
    config = batch_config(8, 0.0, batching, cores=4)
    assert (config.max_batch, config.preferred, config.slots) == (8, (4,), 2)
    assert (config.max_delay, config.max_queue) == (0.0005, 7)
    assert config.overflow is Overflow.SHED_OLDEST
    assert batch_config(8, 0.002, batching, cores=1).max_delay == 0.002
    assert batch_config(1, 0.0, Batching(), cores=4).slots == 4


@pytest.mark.parametrize(
    ("single", "stacked", "expected"), [(48, 8 * 33, True), (1270, 8 * 1270, False), (5, 6, True)]
)
def test_stacking_pays_for_the_small_models_of_serving(
    single: float, stacked: float, expected: bool
) -> None:
    assert pays(single, stacked, 8) is expected


def test_measuring_takes_the_cost_of_one_and_of_many() -> None:
    # A run that takes long is not repeated: two readings of the clock for each.
    times = iter([0.0, 1.0, 0.0, 3.0])
    single, stacked = measure(Session(), {"x": np.ones((1, 2), np.float32)}, 8, lambda: next(times))
    assert (single, stacked) == (1.0, 3.0)


def test_a_model_that_mixes_its_items_is_found_out() -> None:
    session = Session()
    session.mixes = True
    with pytest.raises(NotSeparable, match="changes with the items beside it"):
        measure(session, {"x": np.ones((1, 2), np.float32)}, 8)


def loaded(folder: Path, **options: object) -> Loaded:
    made = Loaded(folder, InstanceOptions(**options), {"cpu": CpuBackend()}, "i")  # type: ignore[arg-type]
    made.probe()
    return made


def test_only_what_allows_it_is_stacked(tmp_path: Path) -> None:
    plain = onnx_models.scale_folder(tmp_path / "plain", 2.0)
    assert loaded(plain).instance.batching.max_batch == 1
    assert loaded(plain, max_batch=8, max_delay=0.001).instance.batching.max_delay == 0.001
    assert loaded(plain, max_batch=8).instance.batching.max_batch == 8
    willing = onnx_models.scale_folder(tmp_path / "willing", 2.0, batching={"max": 16})
    assert loaded(willing).instance.batching.max_batch == 16
    assert loaded(willing, max_batch=1).instance.batching.max_batch == 1

    fixed = onnx_models.write_folder(
        tmp_path / "fixed",
        onnx_models.identity("FP32", (1, 2)),
        [("x", "FP32", (1, 2))],
        [("y", "FP32", (1, 2))],
    )
    refused = loaded(fixed, max_batch=8)
    assert refused.instance.batching.max_batch == 1
    assert any("not every tensor has a free first dimension" in note for note in refused.notes)


def test_an_input_with_a_default_may_be_left_out(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        "optional",
        [value("x", TensorProto.FLOAT, ["n", 2]), value("factor", TensorProto.FLOAT, [1])],
        [value("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(np.array([3], np.float32), "factor")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    folder = onnx_models.write_folder(
        tmp_path / "m",
        model.SerializeToString(),
        [("x", "FP32", (-1, 2)), ("factor", "FP32", (1,))],
        [("y", "FP32", (-1, 2))],
    )
    instance = loaded(folder).instance
    assert instance.optional == {"factor"}
    plane = DataPlane("test")
    plane.switch([make_route("m", Target(instance, "1", 0))])
    x = Tensor("x", "FP32", np.ones((1, 2), np.float32))
    factor = Tensor("factor", "FP32", np.array([5], np.float32))

    def y(*tensors: Tensor) -> list[list[float]]:
        return plane.infer(InferenceRequest("m", tensors)).outputs[0].array.tolist()  # type: ignore[no-any-return]

    assert y(x) == [[3.0, 3.0]]
    assert y(x, factor) == [[5.0, 5.0]]
    with pytest.raises(ScoringError, match="needs 1 inputs, found 1; missing: 'x'"):
        y(factor)


def test_the_data_plane_answers_event_loops_too(tmp_path: Path) -> None:
    import threading

    instance = loaded(onnx_models.scale_folder(tmp_path / "m", 2.0)).instance
    plane = DataPlane("test")
    plane.switch([make_route("m", Target(instance, "1", 0))])
    done, answers = threading.Semaphore(0), []

    def answered(value: object) -> None:
        answers.append(value)
        done.release()

    x = Tensor("x", "FP32", np.ones((1, 4), np.float32))
    plane.submit(InferenceRequest("m", (x,), outputs=("total",), id="7"), answered)
    assert done.acquire(timeout=10)
    assert answers[0].outputs[0].array.tolist() == [[8.0]]
    assert (answers[0].id, instance.in_flight) == ("7", 0)
    with pytest.raises(ScoringError, match="no input 'q'"):
        plane.submit(InferenceRequest("m", (Tensor("q", "FP32", x.array),)), answered)
    assert instance.in_flight == 0
    assert instance.statistics.snapshot().failures == {Code.INVALID_ARGUMENT: 1}
    assert instance.close(1.0)


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_bf16_keeps_what_it_can_hold(values: list[float]) -> None:
    array = np.array(values, np.float32)
    raw = encode_raw(Tensor("x", "BF16", array))
    assert len(raw) == 2 * len(values)
    back = decode_raw("x", "BF16", [len(values)], raw)
    assert back.array.dtype == np.float32
    # What came from BF16 goes there unchanged.
    assert encode_raw(back) == raw
    finite = np.abs(array) < 3.3e38
    np.testing.assert_allclose(
        back.array[finite], array[finite], rtol=2**-8, atol=float(np.finfo(np.float32).tiny)
    )
    np.testing.assert_array_equal(np.isnan(back.array), np.isnan(array))


def test_bf16_has_two_bytes_and_no_typed_contents() -> None:
    assert decode_raw("x", "BF16", [2], b"\x80\x3f\x00\xc0").array.tolist() == [1.0, -2.0]
    with pytest.raises(ScoringError, match="3 bytes, expected 4 for BF16"):
        decode_raw("x", "BF16", [2], b"abc")
    with pytest.raises(ScoringError, match="BF16 has no typed contents"):
        decode_typed("x", "BF16", [1], [1.0])


@pytest.mark.parametrize(
    ("array", "batched", "classes", "expected"),
    [
        (np.array([[1.5, 2.5]]), True, 1, [[b"2.500000:1"]]),
        (np.array([3, 9, 9], np.uint8), False, 2, [b"9:1", b"9:2"]),
        (np.array([[[1, 2], [4, 3]]]), True, 3, [[b"4:2", b"3:3", b"2:1"]]),
        (np.array([np.nan, -1.0]), False, 5, [b"-1.000000:1", b"nan:0"]),
        (np.zeros((0, 4), np.float32), True, 2, []),
    ],
)
def test_classes(array: Array, batched: bool, classes: int, expected: object) -> None:
    result = classify(Tensor("y", "FP32", array), classes, batched=batched)
    assert (result.datatype, result.array.tolist()) == ("BYTES", expected)


def test_sizes_that_clients_invent_do_not_fill_the_memory() -> None:
    statistics = Statistics()
    assert statistics.snapshot().execution_count == 0
    for size in range(1000):
        statistics.answered_alone(size, 10, 7)
    snapshot = statistics.snapshot(pending=3)
    assert (snapshot.execution_count, snapshot.compute_infer.ns) == (1000, 7000)
    assert len(snapshot.batches) <= 64
    assert snapshot.inference_count == sum(range(1000))
    assert snapshot.pending == 3
