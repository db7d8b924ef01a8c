"""Open Inference Protocol datatypes, and the numpy arrays that hold them.

Source: Open Inference Protocol v2, "Tensor Data Types". In memory a tensor is a C-contiguous
numpy array of the dtype below; BYTES is an object array of `bytes`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .signature import TensorSpec, shape_matches

__all__ = ["DATATYPES", "NUMPY_DTYPES", "Array", "TensorSpec", "shape_matches"]

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
