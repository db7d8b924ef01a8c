from __future__ import annotations

import filecmp
from pathlib import Path

import numpy as np
import pytest
from gatelet.accelerators.backend import LoadOptions
from gatelet.accelerators.cpu import CpuBackend
from gatelet.accelerators.errors import LoadError
from gatelet.accelerators.fpga.bitfile import parse_bitfile
from gatelet.accelerators.fpga.packages.overlay_json import read_overlay_json
from gatelet.accelerators.fpga.wire import quantise
from gatelet.modules.model_json import load_model
from gatelet.modules.oci.build import build_model_image
from gatelet.modules.sample_json import load_sample
from gatelet.simulator.board.network import DenseLayer, decode_network, run_network
from gatelet.simulator.demo.dataset import HELDOUT_FILE, MODELS, load_heldout, model_directory

INT8 = ("v2", "v3")
LARGEST = 500_000


def cpu_scores(directory: Path, images: np.ndarray) -> np.ndarray:
    model = load_model(directory)
    session = CpuBackend().load(directory, model.variants[0], LoadOptions())
    try:
        return session.run({"x": images})["scores"]
    finally:
        session.close()


def share_right(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(scores.argmax(axis=1) == labels))


def fabric_layers(version: str) -> tuple[DenseLayer, ...]:
    model = load_model(model_directory(version))
    package = read_overlay_json(model_directory(version) / model.variants[1].path)
    return decode_network(parse_bitfile(package.bit.read_bytes()).data)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx")
    pytest.importorskip("sklearn")
    from gatelet.simulator.demo.train import write_data

    directory = tmp_path_factory.mktemp("data")
    write_data(directory)
    return directory


def files_below(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


def test_the_script_writes_the_committed_files_byte_for_byte(written: Path) -> None:
    committed = model_directory("v1").parent
    names = files_below(written)
    assert names == files_below(committed)
    # The container of an .npz is numpy's and Python's; what counts is inside.
    names.remove(HELDOUT_FILE)
    _, different, unreadable = filecmp.cmpfiles(written, committed, names, shallow=False)
    assert (different, unreadable) == ([], [])
    for ours, theirs in zip(load_heldout(written), load_heldout(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_no_training_image_is_held_out() -> None:
    pytest.importorskip("sklearn")
    from gatelet.simulator.demo.train import load_digits

    digits = load_digits()
    images, labels = load_heldout()
    np.testing.assert_array_equal(images, digits.heldout_images)
    assert len(images) + len(digits.train_images) == 1797
    assert (
        len(
            {row.tobytes() for row in digits.train_images}.intersection(
                row.tobytes() for row in digits.heldout_images
            )
        )
        == 0
    )
    # Stratified: a quarter of each class, to within rounding.
    counts = np.bincount(labels) / (np.bincount(labels) + np.bincount(digits.train_labels))
    assert np.all(np.abs(counts - 0.25) < 0.005)


def test_heldout_digits_have_the_documented_form() -> None:
    images, labels = load_heldout()
    assert (images.dtype, labels.dtype) == (np.float32, np.int64)
    assert images.shape == (len(labels), 64)
    assert images.min() == 0
    assert images.max() == 16
    np.testing.assert_array_equal(images, np.rint(images))
    assert set(labels.tolist()) == set(range(10))


def test_accuracy_on_the_heldout_digits() -> None:
    images, labels = load_heldout()
    right = {v: share_right(cpu_scores(model_directory(v), images), labels) for v in ("v1", *INT8)}
    assert right["v1"] >= 0.95
    assert right["v2"] >= right["v1"] - 0.02
    assert right["v3"] > right["v2"]


@pytest.mark.parametrize("version", INT8)
@pytest.mark.parametrize("inputs", ["heldout", "any"])
@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"])
def test_int8_has_the_same_bits_at_every_optimisation_level_and_in_the_fabric(
    version: str, inputs: str, level: str
) -> None:
    import onnxruntime

    if inputs == "heldout":
        images, _ = load_heldout()
    else:
        # Beyond pixels too: saturated inputs give the largest sums.
        images = np.random.default_rng(7).uniform(-40, 40, (500, 64)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    path = model_directory(version) / load_model(model_directory(version)).variants[0].path
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (scores,) = session.run(["scores"], {"x": images})

    layers = fabric_layers(version)
    port = read_overlay_json(model_directory(version) / "overlays/pynq-z2").inputs[0]
    items = run_network(layers, quantise(images, port.wire))
    np.testing.assert_array_equal(scores, items * np.float32(layers[-1].output_scale))


def test_default_optimisation_runs_int8_in_integer_kernels(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(
        str(model_directory("v3") / "onnx/model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    operators = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert operators == ["QuantizeLinear", "QGemm", "QGemm", "QGemm", "DequantizeLinear"]


@pytest.mark.parametrize("version", ["v1", *INT8])
def test_sample_holds_training_images_and_what_the_model_answers(version: str) -> None:
    directory = model_directory(version)
    sample = load_sample(directory, load_model(directory))
    assert sample is not None
    scores = cpu_scores(directory, sample.inputs["x"])
    if version in INT8:
        np.testing.assert_array_equal(scores, sample.outputs["scores"])
    else:
        np.testing.assert_allclose(scores, sample.outputs["scores"], rtol=1e-5, atol=1e-5)
    heldout = {row.tobytes() for row in load_heldout()[0]}
    assert not any(row.tobytes() in heldout for row in sample.inputs["x"])


@pytest.mark.parametrize("version", INT8)
def test_onnx_file_is_old_enough_for_every_supported_onnxruntime(version: str) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(model_directory(version) / "onnx/model.onnx")
    # onnxruntime 1.22: opset 22 and IR version 10.
    assert [(o.domain, o.version <= 22) for o in model.opset_import] == [("", True)]
    assert model.ir_version <= 10


def test_overlays_are_two_bitstreams_for_the_board_that_model_json_names() -> None:
    digests = set()
    for version in INT8:
        overlay = load_model(model_directory(version)).variants[1]
        package = read_overlay_json(model_directory(version) / overlay.path)
        assert (overlay.kind, package.board, package.part) == (
            "stream", overlay.board, overlay.part,
        )  # fmt: skip
        digests.add(package.sha256)
    assert len(digests) == 2


@pytest.mark.parametrize("version", MODELS)
def test_every_folder_builds_into_an_image(version: str, tmp_path: Path) -> None:
    image = build_model_image(model_directory(version), tmp_path / "image")
    assert image.model.name == "digits"


def test_broken_is_a_model_that_onnxruntime_refuses() -> None:
    directory = model_directory("broken")
    with pytest.raises(LoadError, match=r"model\.onnx"):
        CpuBackend().load(directory, load_model(directory).variants[0], LoadOptions())


def test_committed_files_stay_small() -> None:
    data = model_directory("v1").parent
    assert sum(path.stat().st_size for path in data.rglob("*") if path.is_file()) < LARGEST


def test_unknown_version_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="v1, v2, v3, broken"):
        model_directory("v9")
