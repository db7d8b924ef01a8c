"""The signature of a model in the terms of the Open Inference Protocol, without any array.

Apart from `tensors` because the control plane reads signatures too, and should not pay for numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

DATATYPE_NAMES = (
    *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
    *("FP16", "FP32", "FP64", "BYTES"),
)
"""Open Inference Protocol v2, "Tensor Data Types": those that a model may declare."""


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
    # Nearly all models leave the batch free and nothing else.
    if spec[1:] == actual[1:] and (spec[:1] in ((-1,), actual[:1])):
        return True
    # A plain loop: this is run for every tensor of every request.
    for want, have in zip(spec, actual):  # noqa: B905, SIM110
        if want != have and want != -1:
            return False
    return True
