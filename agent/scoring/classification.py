"""Triton's classification extension: the most probable classes of an output, as text.

Each class is the BYTES element `value:index`. Source: Triton Inference Server, "Classification
Extension".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...accelerators.tensors import Array
from .errors import Code, ScoringError
from .types import Tensor


def classify(tensor: Tensor, classes: int, *, batched: bool) -> Tensor:
    """The `classes` largest values, first the largest, as BYTES.

    `batched`: for every item of the first dimension, with shape [items, classes]; otherwise of the
    whole tensor, with shape [classes]. Fewer classes when the tensor has fewer elements. Raises
    ScoringError INVALID_ARGUMENT for an output that is no numbers.
    """
    array = tensor.array
    if array.dtype.kind not in "iuf":
        raise ScoringError(
            Code.INVALID_ARGUMENT,
            f"output {tensor.name!r}: classes cannot be told from {tensor.datatype}; request it "
            "without classification",
        )
    batched = batched and array.ndim > 0
    rows = array.reshape(array.shape[0], -1) if batched and array.size else array.reshape(1, -1)
    count = min(classes, rows.shape[1])
    # Stable, so that of equal values the first class comes first.
    keys: Any = _sortable(rows)
    order = np.argsort(-keys, axis=1, kind="stable")[:, :count]
    named = np.empty((len(rows), count), np.object_)
    for row, indices in enumerate(order.tolist()):
        for place, index in enumerate(indices):
            named[row, place] = f"{_text(rows[row, index].item())}:{index}".encode()
    if batched:
        shape: tuple[int, ...] = (array.shape[0], count if array.shape[0] else 0)
        return Tensor(tensor.name, "BYTES", named[: array.shape[0]].reshape(shape))
    return Tensor(tensor.name, "BYTES", named[0])


def _sortable(rows: Array) -> Array:
    if rows.dtype.kind == "f":
        wide = rows.astype(np.float64)
        # What is not a number is no candidate.
        return np.where(np.isnan(wide), -np.inf, wide)
    # Ranks: every integer type can be negated in them without overflow.
    return np.unique(rows, return_inverse=True)[1].reshape(rows.shape)


def _text(value: object) -> str:
    return f"{value:f}" if isinstance(value, float) else str(value)
