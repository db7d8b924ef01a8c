"""Reads the part of an ONNX file that a small network needs, without protobuf or onnx.

Source: onnx.proto (ONNX IR version 3 to 13) and the protobuf wire format. Tensors are views of the
file's bytes wherever the format allows it, so that a file costs its own size and little more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np

from . import protobuf_wire as wire
from .errors import LoadError
from .tensors import NUMPY_DTYPES, Array

LARGEST_FILE = 256 * 1024 * 1024
"""Bytes; numpy is for small models."""
_MOST_NODES = 20_000
_MOST_DIMENSIONS = 32

# TensorProto.DataType to the protocol's names.
ELEMENTS = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    4: "UINT16",
    5: "INT16",
    6: "INT32",
    7: "INT64",
    8: "BYTES",
    9: "BOOL",
    10: "FP16",
    11: "FP64",
    12: "UINT32",
    13: "UINT64",
}
_NO_TENSORS = {4: "sequence", 5: "map", 8: "sparse tensor", 9: "optional"}

Attribute: TypeAlias = (
    "float | int | bytes | Array | tuple[float, ...] | tuple[int, ...] | tuple[bytes, ...]"
)


@dataclass(frozen=True, slots=True)
class Node:
    """One operator. `inputs` and `outputs`: names of values, "" for one that is left out.

    `domain` is "" for ONNX's own operators. `unread` names the attributes of a kind that is not
    read here: subgraphs and the like.
    """

    operator: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def __str__(self) -> str:
        operator = f"{self.domain}.{self.operator}" if self.domain else self.operator
        return f"{operator} ({self.name or 'gives ' + ', '.join(self.outputs)})"


@dataclass(frozen=True, slots=True)
class ValueInfo:
    """An input or output of the graph. `kind`: "tensor", or what it is instead. `datatype`: the
    protocol's name, or "" for an element type that it has none for. `shape`: None for a rank that
    the file leaves open; -1 for a free size."""

    name: str
    kind: str
    datatype: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Graph:
    """`opsets`: version per domain."""

    ir_version: int
    opsets: Mapping[str, int]
    nodes: tuple[Node, ...]
    constants: Mapping[str, Array]
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]


def read_onnx(path: Path) -> Graph:
    """The graph of a file. Raises LoadError."""
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise LoadError(
                f"{path.name} has {size >> 20} MiB; without onnxruntime at most "
                f"{LARGEST_FILE >> 20} MiB are run"
            )
        content = path.read_bytes()
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from error
    return parse_onnx(content, path.name)


def parse_onnx(content: bytes, name: str = "model.onnx") -> Graph:
    """The graph of a file's bytes; `name` is for messages. Raises LoadError, and nothing else."""
    try:
        return _model(memoryview(content))
    except wire.Malformed as error:
        raise LoadError(
            f"{name} is no ONNX model that can be read: {error}; it is damaged or cut short: "
            "export the model and package it again"
        ) from error
    except _Unreadable as error:
        raise LoadError(f"{name}: {error}") from error


class _Unreadable(Exception):
    """A file that is ONNX, but has something that is not read here."""


def _model(data: memoryview) -> Graph:
    ir_version, opsets, graph = 0, {}, None
    for one in wire.fields(data):
        if one[0] == 1:
            ir_version = wire.integer(one)
        elif one[0] == 7:
            graph = wire.message(one)
        elif one[0] == 8:
            domain, version = "", 1
            for part in wire.fields(wire.message(one)):
                if part[0] == 1:
                    domain = _domain(wire.text(part))
                elif part[0] == 2:
                    version = wire.integer(part)
            opsets[domain] = version
        elif one[0] == 25:
            raise _Unreadable(
                "it defines functions of its own, which only onnxruntime runs; "
                "inline them (onnx.inliner) or score it where onnxruntime is installed"
            )
    if graph is None:
        raise wire.Malformed("it holds no graph")
    return _graph(graph, ir_version, opsets)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _graph(data: memoryview, ir_version: int, opsets: Mapping[str, int]) -> Graph:
    nodes: list[Node] = []
    constants: dict[str, Array] = {}
    inputs: list[ValueInfo] = []
    outputs: list[ValueInfo] = []
    for one in wire.fields(data):
        number = one[0]
        if number == 1:
            nodes.append(_node(wire.message(one)))
            if len(nodes) > _MOST_NODES:
                raise _Unreadable(f"it has more than {_MOST_NODES} operators")
        elif number == 5:
            name, array = _tensor(wire.message(one))
            constants[name] = array
        elif number == 11:
            inputs.append(_value_info(wire.message(one)))
        elif number == 12:
            outputs.append(_value_info(wire.message(one)))
        elif number == 15:
            raise _Unreadable("it has sparse constants, which only onnxruntime runs")
    return Graph(ir_version, opsets, tuple(nodes), constants, tuple(inputs), tuple(outputs))


def _node(data: memoryview) -> Node:
    words = {3: "", 4: "", 7: ""}
    inputs: list[str] = []
    outputs: list[str] = []
    attributes: dict[str, Attribute] = {}
    unread: list[str] = []
    for one in wire.fields(data):
        if one[0] == 1:
            inputs.append(wire.text(one))
        elif one[0] == 2:
            outputs.append(wire.text(one))
        elif one[0] in words:
            words[one[0]] = wire.text(one)
        elif one[0] == 5:
            name, value = _attribute(wire.message(one))
            if value is None:
                unread.append(name)
            else:
                attributes[name] = value
    return Node(
        words[4],
        _domain(words[7]),
        words[3],
        tuple(inputs),
        tuple(outputs),
        attributes,
        tuple(unread),
    )


def _attribute(data: memoryview) -> tuple[str, Attribute | None]:
    """Name and value; None for a kind that is not read."""
    name, kind = "", 0
    single: dict[int, Attribute] = {}
    floats: list[float] = []
    integers: list[int] = []
    strings: list[bytes] = []
    for one in wire.fields(data):
        number = one[0]
        if number == 1:
            name = wire.text(one)
        elif number == 20:
            kind = wire.integer(one)
        elif number == 2:
            single[1] = wire.floats(one)[0] if one[1] == wire.FIXED32 else _wrong(number)
        elif number == 3:
            single[2] = wire.integer(one)
        elif number == 4:
            single[3] = bytes(wire.message(one))
        elif number == 5:
            single[4] = _tensor(wire.message(one))[1]
        elif number == 7:
            floats += wire.floats(one)
        elif number == 8:
            integers += wire.integers(one)
        elif number == 9:
            strings.append(bytes(wire.message(one)))
    lists: dict[int, Attribute] = {6: tuple(floats), 7: tuple(integers), 8: tuple(strings)}
    if kind == 0:
        # Files before IR version 2 leave the kind out.
        present = [*single, *(one for one, value in lists.items() if len(value))]  # type: ignore[arg-type]
        kind = present[0] if len(present) == 1 else 0
    if kind in lists:
        return name, lists[kind]
    # A scalar that has its default value may be left out of the bytes.
    defaults: dict[int, Attribute] = {1: 0.0, 2: 0, 3: b""}
    return name, single.get(kind, defaults.get(kind))


def _wrong(number: int) -> float:
    raise wire.Malformed(f"field {number} is no number")


def _tensor(data: memoryview) -> tuple[str, Array]:
    name, element, external = "", 0, False
    dims: list[int] = []
    raw: memoryview | None = None
    typed: dict[int, list[wire.Field]] = {}
    for one in wire.fields(data):
        number = one[0]
        if number == 1:
            dims += wire.integers(one)
        elif number == 2:
            element = wire.integer(one)
        elif number == 8:
            name = wire.text(one)
        elif number == 9:
            raw = wire.message(one)
        elif number in (4, 5, 6, 7, 10, 11):
            typed.setdefault(number, []).append(one)
        elif number == 13 or (number == 14 and wire.integer(one) == 1):
            external = True
    if external:
        raise _Unreadable(
            f"the constant {name!r} lies in another file; save the model as a single file "
            "(onnx.save without save_as_external_data)"
        )
    datatype = ELEMENTS.get(element)
    if datatype is None:
        raise _Unreadable(
            f"the constant {name!r} has ONNX's element type {element}, which numpy has not; "
            "score the model where onnxruntime is installed"
        )
    if len(dims) > _MOST_DIMENSIONS or any(size < 0 for size in dims):
        raise wire.Malformed(f"the constant {name!r} has the shape {dims[:_MOST_DIMENSIONS]}")
    flat = _elements(name, datatype, raw, typed)
    if math.prod(dims) != len(flat):
        raise wire.Malformed(f"the constant {name!r} has {len(flat)} elements for the shape {dims}")
    try:
        return name, flat.reshape(dims)
    except ValueError as error:
        raise wire.Malformed(f"the constant {name!r}: {error}") from None


def _elements(
    name: str, datatype: str, raw: memoryview | None, typed: Mapping[int, list[wire.Field]]
) -> Array:
    dtype = NUMPY_DTYPES[datatype]
    if datatype == "BYTES":
        strings = [bytes(wire.message(one)) for one in typed.get(6, ())]
        texts = np.empty(len(strings), np.object_)
        texts[:] = strings
        return texts
    if raw is not None:
        if len(raw) % dtype.itemsize:
            raise wire.Malformed(f"the constant {name!r} ends within an element")
        return np.frombuffer(raw, dtype)
    if datatype in ("FP32", "FP64"):
        number, letter = (4, "<f") if datatype == "FP32" else (10, "<d")
        size = wire.FIXED32 if datatype == "FP32" else wire.FIXED64
        return np.frombuffer(
            b"".join(wire.numbers(one, letter, size) for one in typed.get(number, ())), dtype
        )
    # UINT32 and UINT64 share a field, the smaller ones are in int32_data, FP16 by its bits.
    number = {"INT64": 7, "UINT32": 11, "UINT64": 11}.get(datatype, 5)
    values = [value for one in typed.get(number, ()) for value in wire.integers(one)]
    bits = dtype.itemsize * 8
    wrapped = [value & ((1 << bits) - 1) for value in values]
    if datatype == "BOOL":
        return np.array([value != 0 for value in values], np.bool_)
    return np.array(wrapped, f"<u{dtype.itemsize}").view(dtype)


def _value_info(data: memoryview) -> ValueInfo:
    name, kind, element = "", "value of unknown type", 0
    shape: tuple[int, ...] | None = None
    for one in wire.fields(data):
        if one[0] == 1:
            name = wire.text(one)
        elif one[0] == 2:
            for part in wire.fields(wire.message(one)):
                if part[0] == 1:
                    kind = "tensor"
                    element, shape = _tensor_type(wire.message(part))
                elif part[0] in _NO_TENSORS:
                    kind = _NO_TENSORS[part[0]]
    return ValueInfo(name, kind, ELEMENTS.get(element, ""), shape)


def _tensor_type(data: memoryview) -> tuple[int, tuple[int, ...] | None]:
    element, shape = 0, None
    for one in wire.fields(data):
        if one[0] == 1:
            element = wire.integer(one)
        elif one[0] == 2:
            dims = [wire.message(part) for part in wire.fields(wire.message(one)) if part[0] == 1]
            if len(dims) > _MOST_DIMENSIONS:
                raise wire.Malformed(f"a tensor has {len(dims)} dimensions")
            shape = tuple(_size(dim) for dim in dims)
    return element, shape


def _size(data: memoryview) -> int:
    size = -1
    for one in wire.fields(data):
        if one[0] == 1:
            size = wire.integer(one)
            if size < 0:
                size = -1
    return size
