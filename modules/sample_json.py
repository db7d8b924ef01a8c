"""`sample.json`: example inputs of a model, and the outputs expected for them.

`{"inputs": [{"name", "datatype", "shape", "data"}], "outputs": [...]}` as in a request and a
response of the Open Inference Protocol v2 over HTTP; `data` is flat or nested, row-major.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..accelerators.tensors import NUMPY_DTYPES, Array, TensorSpec, shape_matches
from .errors import InvalidModel
from .model_json import MAX_RANK, Model, read_json

MAX_SAMPLE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Sample:
    """Arrays by tensor name, in the dtype and shape the sample states (BYTES: objects of `bytes`).

    `outputs` is empty when the packager gave none to compare with.
    """

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]


class _Tensor(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any]


class _Document(msgspec.Struct, frozen=True):
    inputs: tuple[_Tensor, ...]
    outputs: tuple[_Tensor, ...] = ()


def parse_sample(raw: bytes, model: Model) -> Sample:
    """The sample in `raw`, checked against the model's signature. Raises InvalidModel."""
    what = model.sample or "sample.json"
    document = read_json(raw, what, MAX_SAMPLE_BYTES, MAX_RANK + 6)
    try:
        parsed = msgspec.convert(document, type=_Document)
    except msgspec.ValidationError as error:
        raise InvalidModel(f"{what}: {str(error).replace('`', '')}") from None
    inputs = _tensors(what, "$.inputs", parsed.inputs, model.inputs)
    missing = [spec.name for spec in model.inputs if spec.name not in inputs]
    if missing:
        raise InvalidModel(f"{what}: $.inputs: no data for {', '.join(missing)}")
    return Sample(inputs, _tensors(what, "$.outputs", parsed.outputs, model.outputs))


def load_sample(directory: Path, model: Model) -> Sample | None:
    """The sample of the model in `directory`, None when it has none. Raises InvalidModel."""
    if model.sample is None:
        return None
    path = directory / model.sample
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_SAMPLE_BYTES + 1)
    except OSError as error:
        raise InvalidModel(
            f"{path} cannot be read ({error.strerror}), but $.sample in model.json names it"
        ) from None
    return parse_sample(raw, model)


def _tensors(
    what: str, path: str, tensors: Sequence[_Tensor], specs: Sequence[TensorSpec]
) -> dict[str, Array]:
    known = {spec.name: spec for spec in specs}
    arrays: dict[str, Array] = {}
    for index, tensor in enumerate(tensors):
        here = f"{what}: {path}[{index}]"
        spec = known.get(tensor.name)
        if spec is None or tensor.name in arrays:
            raise InvalidModel(
                f"{here}.name: found {tensor.name!r}, expected each of {', '.join(known)} once"
            )
        if tensor.datatype != spec.datatype:
            raise InvalidModel(
                f"{here}.datatype: found {tensor.datatype!r}, expected {spec.datatype} "
                "as in model.json"
            )
        if min(tensor.shape, default=0) < 0 or not shape_matches(spec.shape, tensor.shape):
            raise InvalidModel(
                f"{here}.shape: found {list(tensor.shape)}, expected {list(spec.shape)} "
                "where -1 stands for any size"
            )
        arrays[tensor.name] = _array(f"{here}.data", tensor)
    return arrays


def _array(where: str, tensor: _Tensor) -> Array:
    values = list(_flatten(tensor.data))
    if len(values) != math.prod(tensor.shape):
        raise InvalidModel(
            f"{where}: found {len(values)} values, expected {math.prod(tensor.shape)} "
            f"for shape {list(tensor.shape)}"
        )
    dtype = NUMPY_DTYPES[tensor.datatype]
    kinds: tuple[type, ...] = {"b": (bool,), "O": (str,), "f": (int, float)}.get(dtype.kind, (int,))
    for value in values:
        # bool is an int to isinstance, not to a reader of the file.
        if not isinstance(value, kinds) or (isinstance(value, bool) and dtype.kind != "b"):
            raise InvalidModel(f"{where}: found {value!r}, expected values of {tensor.datatype}")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)  # type: ignore[type-var]
        for value in values:
            if not limits.min <= value <= limits.max:
                raise InvalidModel(
                    f"{where}: found {value}, expected {limits.min} to {limits.max} "
                    f"for {tensor.datatype}"
                )
    if dtype.kind == "f":
        kind: Any = dtype
        largest = float(np.finfo(kind).max)
        for value in values:
            if not -largest <= value <= largest:
                raise InvalidModel(f"{where}: found {value}, too large for {tensor.datatype}")
    array: Array = np.empty(len(values), dtype)
    array[:] = [value.encode() for value in values] if dtype.kind == "O" else values
    return array.reshape(tensor.shape)


def _flatten(data: Sequence[Any]) -> Any:
    for item in data:
        if isinstance(item, list):
            yield from _flatten(item)
        else:
            yield item
