"""Bodies of `/score` as users of Azure ML's deployments send them, to and from tensors.

`{"data": [[...]]}`, `{"input_data": {"columns": [...], "index": [...], "data": [[...]]}}`,
`{"Inputs": ...}` or the model's inputs by their names. Rows may be records, as pandas writes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import msgspec
import numpy as np

from ...accelerators.tensors import Array, TensorSpec
from .errors import Code, ScoringError
from .json_arrays import check_size, decode, json_values, parse_array
from .types import InferenceResponse, Tensor

FORMS = ("data", "input_data", "Inputs")
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_RECORDS = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_ROWS = msgspec.json.Decoder(list[list[msgspec.Raw]])
_NAMES = msgspec.json.Decoder(list[str | int])


@dataclass(frozen=True, slots=True)
class Score:
    """`results`: whether the answer is to be wrapped as `{"Results": ...}`."""

    tensors: tuple[Tensor, ...]
    results: bool = False


def decode_score(body: bytes | bytearray, inputs: Sequence[TensorSpec]) -> Score:
    """Raises ScoringError INVALID_ARGUMENT."""
    if not bytes(body[:64]).strip():
        raise _invalid("the body is empty; send a JSON object, " + _forms(inputs))
    check_size(body)
    fields = decode(_OBJECT, body, "the body")
    for form in FORMS:
        if form in fields:
            return Score(_tensors(fields[form], form, inputs), form == "Inputs")
    if fields and set(fields) <= {spec.name for spec in inputs}:
        return Score(_named(fields, inputs))
    raise _invalid("the body is none of what is understood; send " + _forms(inputs))


def decode_query(query: str) -> bytes:
    """The parameters of a query as a JSON object: JSON where they are it, text elsewhere; one that
    comes several times becomes a list."""
    made: dict[str, Any] = {}
    for key, text in parse_qsl(query, keep_blank_values=True, max_num_fields=1000):
        value: Any = text
        try:
            value = msgspec.Raw(text.encode())
            msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            value = text
        made.setdefault(key, []).append(value)
    return msgspec.json.encode(
        {key: values[0] if len(values) == 1 else values for key, values in made.items()}
    )


def encode_score(response: InferenceResponse, *, results: bool) -> bytes:
    """The only output as nested lists, or several by their names. Raises ScoringError."""
    outputs = {tensor.name: json_values(tensor).tolist() for tensor in response.outputs}
    answer: Any = outputs if len(outputs) != 1 else next(iter(outputs.values()))
    return msgspec.json.encode({"Results": answer} if results else answer)


def _tensors(value: msgspec.Raw, form: str, inputs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    begin = bytes(value)[:4096].lstrip()
    if begin[:1] == b"{":
        fields = decode(_OBJECT, value, form)
        if "columns" in fields and "data" in fields:
            columns = [str(name) for name in decode(_NAMES, fields["columns"], f"{form}.columns")]
            return _table(columns, decode(_ROWS, fields["data"], f"{form}.data"), inputs)
        if fields and set(fields) <= {spec.name for spec in inputs}:
            return _named(fields, inputs)
        if len(fields) == 1:
            # Azure ML's designer puts the rows below a name of its own, such as "input1".
            return _tensors(next(iter(fields.values())), form, inputs[:1] if inputs else inputs)
        raise _invalid(f"{form}: {_names(fields)} are not the inputs of the model; {_has(inputs)}")
    if begin[:1] == b"[" and begin[1:].lstrip()[:1] == b"{":
        records = decode(_RECORDS, value, form)
        columns = list(records[0])
        if any(record.keys() != records[0].keys() for record in records):
            raise _invalid(f"{form}: every record needs the fields {_names(columns)}")
        rows = [[record[name] for name in columns] for record in records]
        return _table(columns, rows, inputs)
    if len(inputs) != 1:
        raise _invalid(f"{form}: the model has {len(inputs)} inputs; name them: {_has(inputs)}")
    spec = inputs[0]
    return (_tensor(spec, parse_array(spec.name, spec.datatype, value, len(spec.shape))),)


def _named(fields: Mapping[str, msgspec.Raw], inputs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    return tuple(
        _tensor(spec, parse_array(spec.name, spec.datatype, fields[spec.name], len(spec.shape)))
        for spec in inputs
        if spec.name in fields
    )


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[msgspec.Raw]], inputs: Sequence[TensorSpec]
) -> tuple[Tensor, ...]:
    if any(len(row) != len(columns) for row in rows):
        raise _invalid(f"every row needs {len(columns)} values, one per column")
    by_name = {spec.name: spec for spec in inputs}
    if set(columns) <= by_name.keys() and len(set(columns)) == len(columns):
        return tuple(
            _column(by_name[name], [row[place] for row in rows])
            for place, name in enumerate(columns)
        )
    if len(inputs) != 1:
        raise _invalid(f"the columns {_names(columns)} are not the model's inputs; {_has(inputs)}")
    spec = inputs[0]
    matrix = b"[" + b",".join(b"[" + b",".join(map(bytes, row)) + b"]" for row in rows) + b"]"
    return (_tensor(spec, parse_array(spec.name, spec.datatype, matrix, len(spec.shape))),)


def _column(spec: TensorSpec, cells: Sequence[msgspec.Raw]) -> Tensor:
    values = b"[" + b",".join(map(bytes, cells)) + b"]"
    array = parse_array(spec.name, spec.datatype, values, len(spec.shape))
    if array.ndim == 1 and len(spec.shape) == 2:
        # One value per row, for an input that takes rows.
        array = array.reshape(-1, 1)
    return _tensor(spec, array)


def _tensor(spec: TensorSpec, array: Array) -> Tensor:
    return Tensor(spec.name, spec.datatype, np.ascontiguousarray(array).reshape(array.shape))


def _forms(inputs: Sequence[TensorSpec]) -> str:
    return f'{{"data": [...]}} or {{"input_data": ...}}; {_has(inputs)}'


def _has(inputs: Sequence[TensorSpec]) -> str:
    return f"the model takes {', '.join(map(str, inputs))}"


def _names(names: Any) -> str:
    return ", ".join(repr(name) for name in list(names)[:10])


def _invalid(message: str) -> ScoringError:
    return ScoringError(Code.INVALID_ARGUMENT, message)
