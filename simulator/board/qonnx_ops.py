"""Operators of QONNX and FINN for onnx's reference evaluator, in their integer form.

Source: QONNX, custom_op/general (multithreshold, xnorpopcount, quant, bipolar_quant).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

_MODES: dict[str, Any] = {
    "FLOOR": np.floor,
    "CEIL": np.ceil,
    "ROUND_TO_ZERO": np.trunc,
    "DOWN": np.trunc,
}
_Floats = np.ndarray[Any, np.dtype[np.float32]]


class MultiThreshold(OpRun):
    """How many thresholds of its channel a value reaches: v [n, c, ...], thresholds [c or 1, t]."""

    op_domain = "qonnx.custom_op.general"

    def _run(
        self,
        v: _Floats,
        thresholds: _Floats,
        out_scale: float | None = None,
        out_bias: float | None = None,
        out_dtype: str | None = None,
        data_layout: str | None = None,
    ) -> tuple[_Floats]:
        last = (data_layout or "").upper() in ("NHWC", "NWC", "NC")
        values = v if last else np.moveaxis(v, 1, -1)
        counts = np.sum(values[..., None] >= thresholds, axis=-1)
        scaled = counts * (1.0 if out_scale is None else out_scale) + (out_bias or 0.0)
        return ((scaled if last else np.moveaxis(scaled, -1, 1)).astype(np.float32),)


class XnorPopcountMatMul(OpRun):
    """Agreements of bits: a [..., k] and b [k, n] of 0 and 1."""

    op_domain = "qonnx.custom_op.general"

    def _run(self, a: _Floats, b: _Floats) -> tuple[_Floats]:
        return ((a @ b + (1 - a) @ (1 - b)).astype(np.float32),)


class Quant(OpRun):
    """Uniform quantisation to `bits`, and back: what it gives is a multiple of `scale`."""

    op_domain = "qonnx.custom_op.general"

    def _run(
        self,
        x: _Floats,
        scale: _Floats,
        zero: _Floats,
        bits: _Floats,
        signed: int | None = None,
        narrow: int | None = None,
        rounding_mode: str | None = None,
    ) -> tuple[_Floats]:
        width = float(np.asarray(bits).reshape(-1)[0])
        high = 2 ** (width - 1) - 1 if signed else 2**width - 1 - bool(narrow)
        low = -(2 ** (width - 1)) + bool(narrow) if signed else 0.0
        codes = np.clip(x / scale + zero, low, high)
        modes: dict[str, Any] = {
            "FLOOR": np.floor,
            "CEIL": np.ceil,
            "ROUND_TO_ZERO": np.trunc,
            "DOWN": np.trunc,
        }
        rounded = modes.get((rounding_mode or "ROUND").upper(), np.rint)(codes)
        return (((rounded - zero) * scale).astype(np.float32),)


class BipolarQuant(OpRun):
    """Signs, times `scale`."""

    op_domain = "qonnx.custom_op.general"

    def _run(self, x: _Floats, scale: _Floats) -> tuple[_Floats]:
        return ((np.where(x >= 0, 1.0, -1.0) * scale).astype(np.float32),)


OPERATORS = (MultiThreshold, XnorPopcountMatMul, Quant, BipolarQuant)
