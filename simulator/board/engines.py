"""What computes behind the streams and memory accesses of simulated designs.

Items go in and out as the bytes on the bus. Their coding here is written bit by bit, apart from
the packing that the drivers use, so that one can prove the other.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...accelerators.fpga.elements import Element, finn_element
from .container import Container
from .network import DenseLayer, decode_network, run_network


class Engine(Protocol):
    """Computes items: bytes per input, all items one after the other -> bytes per output."""

    @property
    def item_bytes(self) -> tuple[int, ...]:
        """Bytes per item of each input."""

    def run(self, inputs: Sequence[bytes], parameters: Mapping[str, bytes]) -> list[bytes]:
        """`parameters` name -> what the host has written for it. Raises ValueError."""


@dataclass(frozen=True, slots=True)
class Coding:
    """How one item is written: `rows` of `inner` elements, `pad` bytes at the end, as `shape`."""

    element: Element
    shape: tuple[int, ...]
    inner: int
    pad: int = 0

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape)) // self.inner

    @property
    def row_bytes(self) -> int:
        return -(-self.inner * self.element.bits // 8)

    @property
    def item_bytes(self) -> int:
        return self.rows * self.row_bytes + self.pad

    def decode(self, raw: bytes) -> npt.NDArray[np.float32]:
        """Bytes of whole items -> numbers [n, *shape]."""
        items = np.frombuffer(raw, np.uint8).reshape(-1, self.item_bytes)
        items = items[:, : self.rows * self.row_bytes]
        bits = np.unpackbits(items.reshape(-1, self.row_bytes), axis=1, bitorder="little")
        bits = bits[:, : self.inner * self.element.bits].reshape(-1, self.element.bits)
        powers = np.power(2.0, np.arange(self.element.bits))
        if self.element.signed and self.element.kind == "integer":
            powers[-1] = -powers[-1]
        numbers: npt.NDArray[np.floating[Any]]
        if self.element.kind == "float":
            numbers = np.packbits(bits, axis=1, bitorder="little").view("<f4").astype(np.float64)
        else:
            numbers = bits @ powers * 2.0**-self.element.fraction
        if self.element.kind == "bipolar":
            numbers = 2 * numbers - 1
        return numbers.astype(np.float32).reshape(-1, *self.shape)

    def encode(self, numbers: npt.NDArray[np.generic]) -> bytes:
        """Numbers [n, *shape] -> bytes. Raises ValueError for one that is out of range."""
        element = self.element
        flat = np.asarray(numbers, np.float64).reshape(-1, self.inner)
        if element.kind == "float":
            raw = flat.astype("<f4").view(np.uint8).reshape(len(flat), -1)
        else:
            codes = np.rint(np.ldexp(flat, element.fraction)).astype(np.int64)
            if codes.size and (codes.min() < element.low or codes.max() > element.high):
                raise ValueError(f"the graph gives values outside of {element.name}")
            if element.kind == "bipolar":
                codes = (codes + 1) // 2
            places = np.arange(element.bits)
            bits = (codes[..., None] >> places & 1).astype(np.uint8)
            raw = np.packbits(bits.reshape(len(flat), -1), axis=1, bitorder="little")
        items = raw.reshape(-1, self.rows * self.row_bytes)
        return np.pad(items, ((0, 0), (0, self.pad))).tobytes()


def coding(described: Mapping[str, Any]) -> Coding:
    """{"element", "shape", "inner", "pad"} -> Coding."""
    return Coding(
        finn_element(str(described["element"])),
        tuple(int(size) for size in described["shape"]),
        int(described["inner"]),
        int(described.get("pad", 0)),
    )


class GraphEngine:
    """An ONNX or integer QONNX graph on onnx's reference evaluator, item by item exact.

    `parameters` of the engine: name of what the host writes -> [initializer, numpy dtype].
    """

    def __init__(self, container: Container) -> None:
        import onnx

        from .qonnx_ops import OPERATORS

        engine = container.engine
        self._inputs = [coding(one) for one in engine["inputs"]]
        self._outputs = [coding(one) for one in engine["outputs"]]
        self._parameters = dict(engine.get("parameters", {}))
        self._model = onnx.load_model_from_string(container.blobs["model"])
        self._operators = OPERATORS
        self._names = [value.name for value in self._model.graph.input]
        self._evaluators: dict[bytes, Any] = {}

    @property
    def item_bytes(self) -> tuple[int, ...]:
        return tuple(one.item_bytes for one in self._inputs)

    def run(self, inputs: Sequence[bytes], parameters: Mapping[str, bytes]) -> list[bytes]:
        feeds = {
            name: one.decode(raw)
            for name, one, raw in zip(self._names, self._inputs, inputs, strict=False)
        }
        results = self._evaluator(parameters).run(None, feeds)
        return [
            one.encode(np.asarray(result))
            for one, result in zip(self._outputs, results, strict=True)
        ]

    def _evaluator(self, parameters: Mapping[str, bytes]) -> Any:
        from onnx import ModelProto, numpy_helper
        from onnx.reference import ReferenceEvaluator

        used = {name: parameters.get(name, b"") for name in self._parameters}
        key = hashlib.sha256(repr(sorted(used.items())).encode()).digest()
        if key not in self._evaluators:
            model = ModelProto()
            model.CopyFrom(self._model)
            for name, raw in used.items():
                target, dtype = self._parameters[name]
                for initializer in model.graph.initializer:
                    if initializer.name == target:
                        old = numpy_helper.to_array(initializer)
                        values = np.frombuffer(raw, dtype)[: old.size]
                        new = values.reshape(old.shape).astype(old.dtype)
                        initializer.CopyFrom(numpy_helper.from_array(new, target))
            self._evaluators = {key: ReferenceEvaluator(model, new_ops=list(self._operators))}
        return self._evaluators[key]


class DenseEngine:
    """Dense layers with the bits of onnxruntime, one int8 per value."""

    def __init__(self, layers: tuple[DenseLayer, ...]) -> None:
        self._layers = layers

    @property
    def item_bytes(self) -> tuple[int, ...]:
        return (self._layers[0].weights.shape[0],)

    def run(self, inputs: Sequence[bytes], parameters: Mapping[str, bytes]) -> list[bytes]:
        items = np.frombuffer(inputs[0], np.int8).reshape(-1, self.item_bytes[0])
        return [run_network(self._layers, items).tobytes()]


class ReplayEngine:
    """Answers recorded items with what a board gave for them; refuses others."""

    def __init__(self, container: Container) -> None:
        with np.load(io.BytesIO(container.blobs["recording"]), allow_pickle=False) as recording:
            sides = [
                [recording[name] for name in sorted(recording.files) if name.startswith(side)]
                for side in ("in", "out")
            ]
        for array in (*sides[0], *sides[1]):
            if array.dtype != np.uint8 or array.ndim != 2 or len(array) != len(sides[0][0]):
                raise ValueError("a recording holds uint8 [items, bytes] of equal length")
        self._inputs, self._outputs = sides
        self._rows = {
            b"".join(array[row].tobytes() for array in self._inputs): row
            for row in range(len(self._inputs[0]))
        }

    @property
    def item_bytes(self) -> tuple[int, ...]:
        return tuple(array.shape[1] for array in self._inputs)

    def run(self, inputs: Sequence[bytes], parameters: Mapping[str, bytes]) -> list[bytes]:
        count = len(inputs[0]) // self.item_bytes[0]
        rows = []
        for item in range(count):
            key = b"".join(
                raw[item * size : (item + 1) * size]
                for raw, size in zip(inputs, self.item_bytes, strict=True)
            )
            if key not in self._rows:
                raise ValueError(f"item {item} is not in the recording of {len(self._rows)} items")
            rows.append(self._rows[key])
        return [array[rows].tobytes() for array in self._outputs]


def open_engine(container: Container) -> Engine:
    """The engine a container describes. Raises ValueError."""
    kind = container.engine.get("kind")
    try:
        if kind == "graph":
            return GraphEngine(container)
        if kind == "dense":
            return DenseEngine(decode_network(container.blobs["network"]))
        if kind == "replay":
            return ReplayEngine(container)
        if kind == "hls4ml":
            from .hls_engine import HlsEngine

            return HlsEngine(container.engine)
    except (KeyError, TypeError, OSError) as error:
        raise ValueError(f"engine {kind}: {error}") from error
    except ImportError as error:
        raise ValueError(f"engine {kind} needs gatelet[train] ({error})") from error
    raise ValueError(f"no engine {kind!r}")
