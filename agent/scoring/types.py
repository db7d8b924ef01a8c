"""What crosses the data plane, in no protocol's terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from ...accelerators.tensors import Array, TensorSpec

# Structs where there is one for every request: they are made in a fraction of the time.


class Tensor(msgspec.Struct, frozen=True, eq=False):
    """A named array; `array` has the dtype of `datatype` (BYTES: object array of `bytes`)."""

    name: str
    datatype: str
    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


class InferenceRequest(msgspec.Struct, frozen=True, eq=False):
    """`version` "": routing decides. `outputs` (): all. `deadline`: of `time.monotonic()`.

    `priority`: 1 (first) to 10, 0 for the default. `classes`: for outputs that are to be answered
    with their most probable classes, how many. `headers`: the transport's, names in lower case.
    """

    model: str
    inputs: tuple[Tensor, ...]
    version: str = ""
    id: str = ""
    outputs: tuple[str, ...] = ()
    deadline: float | None = None
    priority: int = 0
    classes: Mapping[str, int] = msgspec.field(default_factory=dict)
    headers: Mapping[str, str] = msgspec.field(default_factory=dict)


class InferenceResponse(msgspec.Struct, frozen=True, eq=False):
    """`version` is the one that answered."""

    model: str
    version: str
    outputs: tuple[Tensor, ...]
    id: str = ""


@dataclass(frozen=True, slots=True)
class ServerMetadata:
    name: str
    version: str
    extensions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """`versions` are those that the endpoint routes to, the default one first."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    properties: Mapping[str, str] = field(default_factory=dict)
