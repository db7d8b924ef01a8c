"""Train the demo's models and write its data: `python -m gatelet.simulator.demo.train`.

Needs the extra `train`. The models come out the same, bit for bit, on every machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...accelerators.backend import Variant
from ...accelerators.tensors import TensorSpec
from ...modules.model_json import Batching, Model, Resources, encode_model
from ..board.bitstream import DenseLayer, write_overlay_package
from ..board.network import run_network
from .dataset import HELDOUT_FILE
from .digits_mlp import Dense, Floats, Labels, accuracy, forward, shifted, train
from .digits_onnx import INPUT, OUTPUT, float_model, int8_model, quantise

_SEED = 2
_SMALL, _SMALL_EPOCHS = (64, 32, 10), 200
# Five times the images: see `shifted`.
_LARGE, _LARGE_EPOCHS = (64, 64, 32, 10), 60
_HELD_OUT = 0.25
_SAMPLES = 8
_MAX_BATCH = 64
_BOARD, _PART = "pynq-z2", "xc7z020clg400-1"
_ONNX_PATH, _OVERLAY_PATH, _SAMPLE_PATH = "onnx/model.onnx", f"overlays/{_BOARD}", "sample.json"


@dataclass(frozen=True, eq=False)
class Digits:
    """Images float64 [n, 64] of pixels 0..16 and labels int64 [n], split in two."""

    train_images: Floats
    train_labels: Labels
    heldout_images: Floats
    heldout_labels: Labels


def load_digits() -> Digits:
    """scikit-learn's digits, a quarter of each class held out, both parts in file order."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    labels = labels.astype(np.int64)
    random = np.random.RandomState(_SEED)
    held_out = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        held_out[members[: round(len(members) * _HELD_OUT)]] = True
    return Digits(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def write_data(directory: Path, report: Any = lambda line: None) -> None:
    """Write heldout.npz and the four model folders into `directory`; `report` gets progress."""
    digits = load_digits()
    directory.mkdir(parents=True, exist_ok=True)
    np.savez(
        directory / HELDOUT_FILE,
        images=digits.heldout_images.astype(np.uint8),
        labels=digits.heldout_labels,
    )
    report(f"{len(digits.train_labels)} digits to train on, {len(digits.heldout_labels)} held out")

    images, labels = digits.train_images, digits.train_labels
    small = train(_SMALL, images, labels, epochs=_SMALL_EPOCHS, seed=_SEED)
    large = train(_LARGE, shifted(images), np.tile(labels, 5), epochs=_LARGE_EPOCHS, seed=_SEED)
    samples = images[:_SAMPLES]

    fp32 = float_model(small, "1")
    _write_model(directory / "v1", "1", "64-32-10 in fp32", fp32, samples, _scores(small, samples))
    report(_line("v1", _scores(small, digits.heldout_images), digits))

    for version, layers, clock_mhz in (("2", small, 100.0), ("3", large, 125.0)):
        quantised = quantise(layers, images)
        widths = "-".join(str(size) for size in (64, *(len(layer.bias) for layer in quantised)))
        model = directory / f"v{version}"
        write_overlay_package(
            model / _OVERLAY_PATH,
            name=f"digits_v{version}",
            board=_BOARD,
            part=_PART,
            clock_mhz=clock_mhz,
            layers=quantised,
            input=INPUT,
            output=OUTPUT,
            max_batch=_MAX_BATCH,
        )
        _write_model(
            model,
            version,
            f"{widths} in int8, with an overlay for the PYNQ-Z2",
            int8_model(quantised, version),
            samples,
            _int8_scores(quantised, samples),
            overlay=True,
        )
        report(_line(f"v{version}", _int8_scores(quantised, digits.heldout_images), digits))

    _write_model(
        directory / "broken",
        "4",
        "an ONNX file cut short: no runtime can load it",
        fp32[: len(fp32) // 2],
        samples,
        _scores(small, samples),
    )


def _scores(layers: Sequence[Dense], images: Floats) -> Floats:
    # In float64 and then cut to float32: what another order of summing changes is cut off.
    return forward(layers, images, rounded=False)[-1]


def _int8_scores(layers: Sequence[DenseLayer], images: Floats) -> Floats:
    items = np.clip(np.rint(images / layers[0].input_scale), -128, 127).astype(np.int8)
    return run_network(layers, items) * np.float64(layers[-1].output_scale)


def _write_model(
    directory: Path,
    version: str,
    description: str,
    onnx_file: bytes,
    samples: Floats,
    scores: Floats,
    *,
    overlay: bool = False,
) -> None:
    path = directory / _ONNX_PATH
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(onnx_file)
    variants = [Variant("onnx", _ONNX_PATH)]
    if overlay:
        variants.append(Variant("stream", _OVERLAY_PATH, _BOARD, _PART))
    model = Model(
        name="digits",
        version=version,
        framework="onnx",
        inputs=(INPUT,),
        outputs=(OUTPUT,),
        variants=tuple(variants),
        sample=_SAMPLE_PATH,
        batching=Batching(max=_MAX_BATCH),
        resources=Resources(cpu=1, memory_in_gb=0.25),
        description=f"Handwritten digits, 8x8 pixels of 0 to 16: {description}",
    )
    (directory / "model.json").write_bytes(encode_model(model))
    document = {
        "inputs": [_sample(INPUT, samples)],
        "outputs": [_sample(OUTPUT, scores)],
    }
    (directory / _SAMPLE_PATH).write_text(json.dumps(document) + "\n", "utf-8")


def _sample(spec: TensorSpec, values: Floats) -> dict[str, Any]:
    return {
        "name": spec.name,
        "datatype": spec.datatype,
        "shape": list(values.shape),
        "data": values.astype(np.float32).tolist(),
    }


def _line(name: str, scores: Floats, digits: Digits) -> str:
    return f"{name}: {accuracy(scores, digits.heldout_labels):.2%} of the held-out digits"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the data, by default over what is in the package."""
    parser = argparse.ArgumentParser(prog="python -m gatelet.simulator.demo.train")
    parser.add_argument("--directory", type=Path, default=Path(__file__).with_name("data"))
    directory: Path = parser.parse_args(arguments).directory
    started = time.monotonic()
    write_data(directory, lambda line: print(line, flush=True))
    print(f"wrote {directory} in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
