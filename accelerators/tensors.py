"""Open Inference Protocol datatypes, and the signature of a model in their terms.

Source: Open Inference Protocol v2, "Tensor Data Types". In memory a tensor is a C-contiguous
numpy array of the dtype below; BYTES is an object array of `bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]

NUMPY_DTYPES: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(np.object_),
}
"""OIP datatype name -> numpy dtype (little-endian, as raw contents are)."""

DATATYPES: dict[np.dtype[np.generic], str] = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
"""numpy dtype -> OIP datatype name."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model.

    `shape` holds one entry per dimension, -1 where the size is free (the first one is the batch).
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.datatype}[{','.join(map(str, self.shape))}]"


def shape_matches(spec: tuple[int, ...], actual: tuple[int, ...]) -> bool:
    """Whether `actual` fits `spec`, where -1 in `spec` stands for any size (0 included)."""
    if len(spec) != len(actual):
        return False
    # A plain loop: this is run for every tensor of every request.
    for want, have in zip(spec, actual):  # noqa: B905, SIM110
        if want != have and want != -1:
            return False
    return True
