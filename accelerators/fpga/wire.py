"""Between the FP32 tensors of clients and the int8 items of the fabric.

Bit-exact with ONNX QuantizeLinear and DequantizeLinear as onnxruntime computes them, so that a
model gives the same answer on either side.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import InvalidTensor
from ..tensors import Array
from .package import WireFormat


def quantise(tensor: Array, wire: WireFormat) -> npt.NDArray[np.int8]:
    """FP32 [n, ...] -> int8 [n, elements]: float32 division, round half to even, saturate.

    Raises InvalidTensor for NaN, whose conversion ONNX leaves undefined.
    """
    items = np.asarray(tensor, np.float32).reshape(len(tensor), wire.elements)
    with np.errstate(over="ignore"):
        scaled = items / np.float32(wire.scale)
    low, high = np.float32(-128 - wire.zero_point), np.float32(127 - wire.zero_point)
    np.clip(scaled, low, high, out=scaled)
    if np.isnan(scaled).any():
        raise InvalidTensor("the tensor contains NaN, which has no quantised value")
    np.rint(scaled, out=scaled)
    return (scaled.astype(np.int16) + np.int16(wire.zero_point)).astype(np.int8)


def dequantise(
    items: npt.NDArray[np.int8], wire: WireFormat, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """int8 [n, elements] -> FP32 of `shape` with -1 for n: exact difference, float32 product."""
    centred = items.astype(np.int32) - wire.zero_point
    values = centred.astype(np.float32) * np.float32(wire.scale)
    return values.reshape(len(items), *shape[1:])
