"""The files the demo runs on: held-out digits and the folders of its models.

The digits are those of scikit-learn: UCI's Optical Recognition of Handwritten Digits (see NOTICE).
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

MODELS = ("v1", "v2", "v3", "broken")
"""fp32; int8 with an overlay; larger, int8 with another overlay; an ONNX file cut short."""

HELDOUT_FILE = "heldout.npz"


def load_heldout(data: Path | None = None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Images float32 [n, 64], pixels 0..16 row by row, and labels int64 [n] in 0..9.

    No model was trained or calibrated on them. `data` is a folder written by the train command,
    by default the one that comes with this package.
    """
    with np.load((data or _data()) / HELDOUT_FILE) as arrays:
        return arrays["images"].astype(np.float32), arrays["labels"].astype(np.int64)


def model_directory(version: str) -> Path:
    """The model folder (model.json and what it names) of one of MODELS; ValueError for another."""
    if version not in MODELS:
        raise ValueError(f"the demo has no model {version!r}, only {', '.join(MODELS)}")
    return _data() / version


def _data() -> Path:
    return Path(str(files(__package__))) / "data"
