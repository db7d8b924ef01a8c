"""overlay.json: packages of kind "stream", and of kind "gatelet-rtl" for gatelet's own core.

A "stream" package is a directory with `overlay.json`, a bitstream and the hardware handoff (.hwh)
beside it. The network sits between the two channels of one AXI DMA: quantised items go in,
quantised items come out, one for one and in order. overlay.json::

    {"schema": 1, "kind": "stream", "name": "digits",
     "board": "pynq-z2", "part": "xc7z020clg400-1", "clockMhz": 100.0,
     "bitstream": "digits.bit", "handoff": "digits.hwh", "sha256": "<of the bitstream>",
     "dma": "axi_dma_0", "maxBatch": 32,
     "inputs":  [{"name": "x", "datatype": "FP32", "shape": [-1, 64],
                  "wire": {"dtype": "int8", "scale": 0.05, "zeroPoint": 0, "elements": 64}}],
     "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10], "wire": {...}}]}

`bitstream` and `handoff` share one stem, since PYNQ finds the handoff by the name. The bitstream
may be a .bin, and be compressed to digits.bit.gz or digits.bit.xz under the same entry. Kind
"gatelet-rtl" has `core` (the core's name in the handoff), `program` and `programSha256` (see
`rtl.package`), and tensors of datatype INT8 without "wire": they are what the core takes and gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import LoadError
from ...tensors import TensorSpec
from ..bitstream_file import COMPRESSIONS, FORMATS, stem_of
from ..elements import finn_element
from ..package import (
    DmaStream,
    Package,
    PackedWire,
    Partial,
    Port,
    RtlStream,
    Transport,
    WireFormat,
)
from .files import read_json

OVERLAY_JSON = "overlay.json"


def read_overlay_json(directory: Path) -> Package:
    """Read `directory / overlay.json`. Raises LoadError naming the field that is wrong."""
    path = directory / OVERLAY_JSON
    return _Reader(path, read_json(path)).package()


class _Reader:
    """Checks overlay.json field by field, so that a message can name the field."""

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self._path = path
        self._document = document

    def _wrong(self, where: str, why: str) -> LoadError:
        return LoadError(f"{self._path}: {where} {why}")

    def _text(self, source: Mapping[str, Any], key: str, where: str = "") -> str:
        value = source.get(key)
        if not isinstance(value, str) or not value:
            raise self._wrong(where + key, "must be a non-empty string")
        return value

    def _number(self, source: Mapping[str, Any], key: str, where: str = "") -> float:
        value = source.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(where + key, "must be a number")
        # As text first: a whole number may be larger than any float.
        number = float(str(value))
        if not (math.isfinite(number) and number > 0):
            raise self._wrong(where + key, f"must be positive and finite, not {number}")
        return number

    def _integer(
        self, source: Mapping[str, Any], key: str, low: int, high: int, where: str = ""
    ) -> int:
        value = source.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(where + key, f"must be a whole number from {low} to {high}")
        return value

    def _file(
        self, key: str, *suffixes: str, source: Mapping[str, Any] | None = None, where: str = ""
    ) -> Path:
        name = self._text(self._document if source is None else source, key, where)
        if Path(name).name != name or name.startswith(".") or not name.endswith(suffixes):
            raise self._wrong(
                where + key, f"must be the name of a {suffixes[0]} file in the package"
            )
        return self._path.parent / name

    def _bitstream(self, source: Mapping[str, Any] | None = None, where: str = "") -> Path:
        """The file named, or where that is missing the compressed one."""
        forms = (*FORMATS, *(form + pack for form in FORMATS for pack in COMPRESSIONS))
        named = self._file("bitstream", *forms, source=source, where=where)
        compressed = (named.with_name(named.name + c) for c in COMPRESSIONS)
        others = () if named.suffix in COMPRESSIONS or named.exists() else compressed
        return next((path for path in others if path.is_file()), named)

    def _hash(self, key: str, source: Mapping[str, Any] | None = None, where: str = "") -> str:
        value = self._text(self._document if source is None else source, key, where).lower()
        if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
            raise self._wrong(where + key, "must be 64 hexadecimal digits")
        return value

    def package(self) -> Package:
        document = self._document
        if document.get("schema") != 1:
            raise self._wrong("schema", f"is {document.get('schema')!r}, this version reads 1")
        kind = self._text(document, "kind")
        if kind not in ("stream", "gatelet-rtl"):
            raise self._wrong("kind", f"is {kind!r}, this version runs 'stream' and 'gatelet-rtl'")
        bit, hwh = self._bitstream(), self._file("handoff", ".hwh")
        if stem_of(bit) != hwh.stem:
            raise self._wrong("handoff", f"must be named {stem_of(bit)}.hwh, as the bitstream is")
        transport: Transport = DmaStream(self._text(document, "dma"))
        if kind == "gatelet-rtl":
            transport = RtlStream(
                self._text(document, "dma"),
                self._text(document, "core"),
                self._file("program", ".bin"),
                self._hash("programSha256"),
            )
        return Package(
            name=self._text(document, "name"),
            kind=kind,
            directory=self._path.parent,
            bit=bit,
            hwh=hwh,
            board=self._text(document, "board").lower(),
            part=self._text(document, "part"),
            clock_mhz=self._number(document, "clockMhz"),
            transport=transport,
            inputs=self._ports("inputs", kind),
            outputs=self._ports("outputs", kind),
            max_batch=self._integer(document, "maxBatch", 1, 65536),
            sha256=self._hash("sha256"),
            partial=self._partial(),
        )

    def _partial(self) -> Partial | None:
        described = self._document.get("partial")
        if described is None:
            return None
        if not isinstance(described, dict):
            raise self._wrong("partial", "must be an object")
        decouplers = described.get("decouplers")
        if decouplers is not None and not (
            isinstance(decouplers, list) and all(isinstance(name, str) for name in decouplers)
        ):
            raise self._wrong("partial.decouplers", "must list names of cores")
        return Partial(
            self._bitstream(described, "partial."),
            self._hash("sha256", described, "partial."),
            None if decouplers is None else tuple(decouplers),
        )

    def _ports(self, key: str, kind: str) -> tuple[Port, ...]:
        entries = self._document.get(key)
        if not isinstance(entries, list) or len(entries) != 1 or not isinstance(entries[0], dict):
            raise self._wrong(key, "must list exactly one tensor: the DMA has one stream each way")
        return (self._port(entries[0], f"{key}[0].", kind),)

    def _port(self, entry: Mapping[str, Any], where: str, kind: str) -> Port:
        datatype = self._text(entry, "datatype", where)
        expected = "FP32" if kind == "stream" else "INT8"
        if datatype != expected:
            raise self._wrong(where + "datatype", f"is {datatype}, only {expected} is supported")
        shape = entry.get("shape")
        if (
            not isinstance(shape, list)
            or len(shape) < 2
            or not all(type(size) is int for size in shape)
            or shape[0] != -1
            or any(size < 1 for size in shape[1:])
        ):
            raise self._wrong(where + "shape", "must be -1 followed by fixed sizes")
        spec = TensorSpec(self._text(entry, "name", where), datatype, tuple(shape))
        if kind != "stream":
            return Port(spec, PackedWire(finn_element("INT8"), 1, math.prod(shape[1:])))
        wire = entry.get("wire")
        if not isinstance(wire, dict):
            raise self._wrong(where + "wire", "must be an object")
        dtype = self._text(wire, "dtype", where + "wire.")
        if dtype != "int8":
            raise self._wrong(where + "wire.dtype", f"is {dtype}, only int8 is supported")
        elements = self._integer(wire, "elements", 1, 1 << 26, where + "wire.")
        if elements != math.prod(shape[1:]):
            raise self._wrong(
                where + "wire.elements", f"is {elements} but the shape has {math.prod(shape[1:])}"
            )
        return Port(
            spec,
            WireFormat(
                dtype=dtype,
                scale=self._number(wire, "scale", where + "wire."),
                zero_point=self._integer(wire, "zeroPoint", -128, 127, where + "wire."),
                elements=elements,
            ),
        )
