"""The quantised network inside the simulated fabric: dense layers in integer arithmetic.

Requantisation follows onnxruntime's QLinearMatMul and QGemm on int8 by int8: the accumulator is
exact in int32, the multiplier is the float32 value of `input_scale * weight_scale /
output_scale`, the float32 product is clamped and rounded half to even before the zero point is
added. Relu is saturation at the output's zero point.

To get the same bits from onnxruntime on every CPU, set its session option
`session.x64quantprecision` (or keep weights within 7 bits): the int8 kernels of x86 CPUs without
VNNI saturate 16-bit sums otherwise. And give a layer with Relu the output zero point -128, where
saturation is the Relu: with another one onnxruntime computes the layer in floating point.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

MAGIC = b"GTLTNET1"
_LAYOUT = struct.Struct("<II")
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """One fully connected layer, int8 in and int8 out.

    `weights` int8 [in, out], zero point 0; `bias` int32 [out] in units of `input_scale *
    weight_scale`; `weight_scale` a float or float32 [out] (per channel). Raises ValueError when
    shapes, ranges or dtypes do not fit, or the accumulator could leave int32.
    """

    weights: npt.NDArray[np.int8]
    bias: npt.NDArray[np.int32]
    input_scale: float
    weight_scale: float | npt.NDArray[np.float32]
    output_scale: float
    input_zero_point: int = 0
    output_zero_point: int = 0
    relu: bool = False

    def __post_init__(self) -> None:
        weights, bias = self.weights, self.bias
        if weights.dtype != np.int8 or weights.ndim != 2 or 0 in weights.shape:
            raise ValueError(f"weights must be int8 [in, out], not {weights.dtype}{weights.shape}")
        if bias.dtype != np.int32 or bias.shape != (weights.shape[1],):
            raise ValueError(f"bias must be int32 [{weights.shape[1]}]: {bias.dtype}{bias.shape}")
        scale = np.asarray(self.weight_scale, np.float32)
        if scale.shape not in ((), (1,), (weights.shape[1],)):
            raise ValueError(f"weight_scale must be one number or one per output: {scale.shape}")
        if not (np.all(scale > 0) and self.input_scale > 0 and self.output_scale > 0):
            raise ValueError("scales must be positive")
        for point in (self.input_zero_point, self.output_zero_point):
            if not -128 <= point <= 127:
                raise ValueError(f"zero point {point} does not fit int8")
        worst = np.abs(weights.astype(np.int64)).sum(axis=0) * 255 + np.abs(bias.astype(np.int64))
        if int(worst.max()) > _INT32_MAX:
            raise ValueError("the accumulator could leave int32; the layer is too wide")

    @property
    def multiplier(self) -> npt.NDArray[np.float32]:
        """float32 [1] or [out]: accumulator units per output unit, as onnxruntime computes it."""
        scale = np.atleast_1d(np.asarray(self.weight_scale, np.float32))
        product = np.float32(self.input_scale) * scale
        return (product / np.float32(self.output_scale)).astype(np.float32)

    def forward(self, items: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
        """int8 [n, in] -> int8 [n, out]."""
        # float64 holds every int32 accumulator exactly, and has a fast matrix product.
        centred = items.astype(np.float64) - self.input_zero_point
        accumulator = centred @ self.weights.astype(np.float64) + self.bias
        scaled = accumulator.astype(np.float32) * self.multiplier
        zero = self.output_zero_point
        low = 0 if self.relu else -128 - zero
        rounded = np.rint(np.clip(scaled, np.float32(low), np.float32(127 - zero)))
        codes: npt.NDArray[np.int8] = (rounded.astype(np.int32) + zero).astype(np.int8)
        return codes


def check_chain(layers: Sequence[DenseLayer]) -> None:
    """Raise ValueError unless every layer takes what the one before it gives."""
    if not layers:
        raise ValueError("a network needs at least one layer")
    for index, (before, after) in enumerate(pairwise(layers), 1):
        if before.weights.shape[1] != after.weights.shape[0]:
            raise ValueError(
                f"layer {index} takes {after.weights.shape[0]} values but is given "
                f"{before.weights.shape[1]}"
            )
        given = (np.float32(before.output_scale), before.output_zero_point)
        if given != (np.float32(after.input_scale), after.input_zero_point):
            raise ValueError(f"layer {index} takes another scale or zero point than it is given")


def run_network(layers: Sequence[DenseLayer], items: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """int8 [n, first in] -> int8 [n, last out]."""
    for layer in layers:
        items = layer.forward(items)
    return items


def encode_network(layers: Sequence[DenseLayer]) -> bytes:
    """The container a simulated bitstream carries: magic, CRC-32, JSON header, raw arrays.

    Whole 32-bit words, and the same bytes for the same layers.
    """
    check_chain(layers)
    header = []
    arrays = []
    for layer in layers:
        scale = np.atleast_1d(np.asarray(layer.weight_scale, "<f4"))
        header.append(
            {
                "in": layer.weights.shape[0],
                "out": layer.weights.shape[1],
                "scales": len(scale),
                "inputScale": float(np.float32(layer.input_scale)),
                "outputScale": float(np.float32(layer.output_scale)),
                "inputZeroPoint": int(layer.input_zero_point),
                "outputZeroPoint": int(layer.output_zero_point),
                "relu": bool(layer.relu),
            }
        )
        arrays += [
            scale.tobytes(),
            layer.bias.astype("<i4").tobytes(),
            np.ascontiguousarray(layer.weights).tobytes(),
        ]
    text = json.dumps({"layers": header}, sort_keys=True, separators=(",", ":")).encode()
    body = struct.pack("<I", len(text)) + text + b"".join(arrays)
    packed = MAGIC + _LAYOUT.pack(len(body), zlib.crc32(body)) + body
    return packed + bytes(-len(packed) % 4)


def decode_network(data: bytes) -> tuple[DenseLayer, ...]:
    """The layers in a container. Raises ValueError when it is damaged or is none."""
    if not data.startswith(MAGIC):
        raise ValueError("holds no network for the simulated fabric")
    try:
        size, crc = _LAYOUT.unpack_from(data, len(MAGIC))
        start = len(MAGIC) + _LAYOUT.size
        body = data[start : start + size]
        if len(body) != size or zlib.crc32(body) != crc:
            raise ValueError("configuration CRC error")
        (length,) = struct.unpack_from("<I", body)
        layers: list[DenseLayer] = []
        offset = 4 + length
        for entry in json.loads(body[4:offset])["layers"]:
            layer, offset = _decode_layer(entry, body, offset)
            layers.append(layer)
    except (struct.error, KeyError, TypeError) as error:
        raise ValueError(f"damaged network container: {error}") from error
    check_chain(layers)
    return tuple(layers)


def _decode_layer(entry: dict[str, Any], body: bytes, offset: int) -> tuple[DenseLayer, int]:
    rows, columns, scales = int(entry["in"]), int(entry["out"]), int(entry["scales"])
    scale = np.frombuffer(body, "<f4", scales, offset).astype(np.float32)
    offset += 4 * scales
    bias = np.frombuffer(body, "<i4", columns, offset).astype(np.int32)
    offset += 4 * columns
    weights = np.frombuffer(body, np.int8, rows * columns, offset).reshape(rows, columns)
    layer = DenseLayer(
        weights=weights,
        bias=bias,
        input_scale=float(entry["inputScale"]),
        weight_scale=scale,
        output_scale=float(entry["outputScale"]),
        input_zero_point=int(entry["inputZeroPoint"]),
        output_zero_point=int(entry["outputZeroPoint"]),
        relu=bool(entry["relu"]),
    )
    return layer, offset + rows * columns
