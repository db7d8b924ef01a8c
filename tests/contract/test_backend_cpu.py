"""What every Backend must do. Another backend joins by adding its case to CASES."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from gatelet.accelerators.backend import Backend, LoadOptions, Session, Variant
from gatelet.accelerators.cpu import CpuBackend
from gatelet.accelerators.errors import (
    BackendError,
    BackendUnavailable,
    InvalidTensor,
    LoadError,
)
from gatelet.accelerators.numpy_backend import NumpyBackend
from gatelet.accelerators.tensors import NUMPY_DTYPES, TensorSpec
from onnx import helper

from ..bench import onnx_models


@dataclass(frozen=True)
class Case:
    """A backend, and how to write a model folder for it that computes y = 2x, FP32[-1,4]."""

    backend: Callable[[], Backend]
    write: Callable[[Path], Variant]
    foreign: Variant


def _write_onnx(folder: Path) -> Variant:
    onnx_models.scale_folder(folder, 2.0)
    return Variant("onnx", "onnx/model.onnx")


CASES = {
    "cpu": Case(CpuBackend, _write_onnx, Variant("finn", "overlay", "pynq-z2")),
    "numpy": Case(NumpyBackend, _write_onnx, Variant("finn", "overlay", "pynq-z2")),
}


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def session(case: Case, tmp_path: Path) -> Session:
    return case.backend().load(tmp_path, case.write(tmp_path), LoadOptions())


def rows(count: int) -> np.ndarray:
    return np.arange(count * 4, dtype=np.float32).reshape(count, 4)


def test_accepts_its_own_kind_and_explains_others(case: Case, tmp_path: Path) -> None:
    backend = case.backend()
    assert backend.accepts(case.write(tmp_path)) is None
    reason = backend.accepts(case.foreign)
    assert reason
    assert case.foreign.kind in reason
    with pytest.raises(LoadError):
        backend.load(tmp_path, case.foreign, LoadOptions())


def test_a_session_tells_its_signature(case: Case, session: Session) -> None:
    assert session.backend == case.backend().name
    assert session.healthy
    assert session.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    assert TensorSpec("y", "FP32", (-1, 4)) in session.outputs


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_computes_any_batch(session: Session, batch: int) -> None:
    result = session.run({"x": rows(batch)}, ["y"])
    assert list(result) == ["y"]
    np.testing.assert_allclose(result["y"], 2 * rows(batch))
    assert result["y"].dtype == np.float32


def test_takes_read_only_input_and_leaves_it_alone(session: Session) -> None:
    array = np.frombuffer(rows(2).tobytes(), np.float32).reshape(2, 4)
    session.run({"x": array}, ["y"])
    np.testing.assert_array_equal(array, rows(2))


def test_all_outputs_by_default(session: Session) -> None:
    assert set(session.run({"x": rows(1)})) == {spec.name for spec in session.outputs}


def test_answers_several_threads(session: Session) -> None:
    def one(n: int) -> bool:
        array = np.full((1, 4), n, np.float32)
        return bool(np.array_equal(session.run({"x": array}, ["y"])["y"], 2 * array))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(200)))


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"x": rows(1).astype(np.float64)},
        {"x": np.zeros((1, 5), np.float32)},
        {"x": np.zeros(4, np.float32)},
        {"x": rows(1), "other": rows(1)},
    ],
    ids=["missing", "dtype", "width", "rank", "unknown"],
)
def test_a_tensor_that_does_not_fit(session: Session, inputs: dict[str, np.ndarray]) -> None:
    with pytest.raises(InvalidTensor):
        session.run(inputs)
    assert session.run({"x": rows(1)})["y"].shape == (1, 4)


def test_an_output_that_does_not_exist(session: Session) -> None:
    with pytest.raises(InvalidTensor):
        session.run({"x": rows(1)}, ["nothing"])


def test_closing_twice_is_fine_and_running_after_it_is_unavailable(session: Session) -> None:
    session.close()
    session.close()
    assert not session.healthy
    with pytest.raises(BackendUnavailable):
        session.run({"x": rows(1)})


def test_a_missing_or_broken_file(case: Case, tmp_path: Path) -> None:
    variant = case.write(tmp_path)
    path = tmp_path / variant.path
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(LoadError, match=re.escape(path.name)):
        case.backend().load(tmp_path, variant, LoadOptions())
    path.unlink()
    with pytest.raises(LoadError, match=re.escape(path.name)):
        case.backend().load(tmp_path, variant, LoadOptions())


# From here on: what only the CPU backend does.


def onnx_session(folder: Path, content: bytes) -> Session:
    (folder / "model.onnx").write_bytes(content)
    return CpuBackend().load(folder, Variant("onnx", "model.onnx"), LoadOptions())


@pytest.mark.parametrize("datatype", onnx_models.DATATYPES)
def test_cpu_every_datatype_passes_unchanged(tmp_path: Path, datatype: str) -> None:
    session = onnx_session(tmp_path, onnx_models.identity(datatype))
    assert session.inputs == (TensorSpec("x", datatype, (-1, 2)),)
    if datatype == "BYTES":
        array = np.array([[b"", b"a"], ["ä€".encode(), b"x" * 300]], np.object_)
    elif datatype == "BOOL":
        array = np.array([[True, False], [False, True]])
    else:
        kind = NUMPY_DTYPES[datatype]
        limits = np.finfo(kind) if kind.kind == "f" else np.iinfo(kind)  # type: ignore[arg-type]
        array = np.array([[limits.min, limits.max], [0, 1]], kind)
    result = session.run({"x": array})["y"]
    assert result.dtype == NUMPY_DTYPES[datatype]
    np.testing.assert_array_equal(result, array)


def test_cpu_text_that_is_not_utf8_is_the_callers_fault(tmp_path: Path) -> None:
    session = onnx_session(tmp_path, onnx_models.identity("BYTES"))
    with pytest.raises(InvalidTensor, match="x: element 1 is not UTF-8"):
        session.run({"x": np.array([[b"ok", b"\xff"]], np.object_)})


def test_cpu_a_failure_inside_the_graph_is_a_backend_error(tmp_path: Path) -> None:
    content = onnx_models.build(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [("x", "FP32", (-1,))],
        [("y", "FP32", (3, 3))],
        {"shape": np.array([3, 3], np.int64)},
    )
    session = onnx_session(tmp_path, content)
    with pytest.raises(BackendError, match="Reshape") as caught:
        session.run({"x": np.zeros(7, np.float32)})
    assert not isinstance(caught.value, InvalidTensor | BackendUnavailable)
    assert "onnxruntime_src" not in str(caught.value)


def test_cpu_an_index_out_of_range_is_the_callers_fault(tmp_path: Path) -> None:
    content = onnx_models.build(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        [("x", "INT64", (-1,))],
        [("y", "FP32", (-1,))],
        {"table": np.zeros(2, np.float32)},
    )
    with pytest.raises(InvalidTensor, match="out of data bounds"):
        onnx_session(tmp_path, content).run({"x": np.array([7])})


def test_cpu_outputs_that_are_no_tensors_are_refused_with_a_hint(tmp_path: Path) -> None:
    from onnx import TensorProto

    content = helper.make_model(
        helper.make_graph(
            [helper.make_node("SequenceConstruct", ["x"], ["y"])],
            "sequence",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
            [helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    ).SerializeToString()
    with pytest.raises(LoadError, match=r"output 'y' is a seq\(tensor\(float\)\).*zipmap"):
        onnx_session(tmp_path, content)
