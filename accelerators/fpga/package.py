"""Overlay packages of kind "stream", read and checked without touching the fabric.

A package is a directory with `overlay.json`, a bitstream and the hardware handoff (.hwh) beside
it. The network sits between the two channels of one AXI DMA: quantised items go in, quantised
items come out, one for one and in order. overlay.json::

    {"schema": 1, "kind": "stream", "name": "digits",
     "board": "pynq-z2", "part": "xc7z020clg400-1", "clockMhz": 100.0,
     "bitstream": "digits.bit", "handoff": "digits.hwh", "sha256": "<of the bitstream>",
     "dma": "axi_dma_0", "maxBatch": 32,
     "inputs":  [{"name": "x", "datatype": "FP32", "shape": [-1, 64],
                  "wire": {"dtype": "int8", "scale": 0.05, "zeroPoint": 0, "elements": 64}}],
     "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 10], "wire": {...}}]}

`bitstream` and `handoff` share one stem, since PYNQ finds the handoff by the name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..errors import LoadError
from ..tensors import TensorSpec
from .bitfile import parse_bitfile
from .board import same_part

OVERLAY_JSON = "overlay.json"
MANIFEST_LIMIT = 1 << 20
HANDOFF_LIMIT = 64 << 20
BITSTREAM_LIMIT = 256 << 20
DEFAULT_LENGTH_WIDTH = 26
"""Bits of the AXI DMA's length register where the handoff does not say (as pynq assumes)."""
CLOCK_TOLERANCE = 0.01
"""How far, relatively, dividers may leave a clock from what was asked for."""
_CLOCK_PARAMETERS = {
    "processing_system7": "pcw_act_fpga0_peripheral_freqmhz",
    "zynq_ultra_ps_e": "psu__crl_apb__pl0_ref_ctrl__act_freqmhz",
}


@dataclass(frozen=True, slots=True)
class WireFormat:
    """How one item of a tensor travels: `elements` values of `dtype`, quantised affinely.

    real = (wire - zero_point) * scale, as in ONNX QuantizeLinear / DequantizeLinear.
    """

    dtype: str
    scale: float
    zero_point: int
    elements: int

    @property
    def item_bytes(self) -> int:
        return self.elements


@dataclass(frozen=True, slots=True)
class Port:
    """A tensor as clients see it, and as the fabric does."""

    spec: TensorSpec
    wire: WireFormat


@dataclass(frozen=True, slots=True)
class OverlayPackage:
    """What overlay.json declares. `bit` and `hwh` are paths inside `directory`."""

    name: str
    kind: str
    directory: Path
    bit: Path
    hwh: Path
    board: str
    part: str
    clock_mhz: float
    dma: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    max_batch: int
    sha256: str

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for packages that can take each other's place in the fabric, wherever they are."""
        return (
            self.sha256, self.dma, self.clock_mhz, self.max_batch, self.inputs, self.outputs
        )  # fmt: skip


def read_package(directory: Path) -> OverlayPackage:
    """Read `directory / overlay.json`. Raises LoadError naming the field that is wrong."""
    path = directory / OVERLAY_JSON
    raw = _read(path, MANIFEST_LIMIT)
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(document, dict):
        raise LoadError(f"{path}: holds no JSON object")
    return _Reader(path, document).package()


def preflight(package: OverlayPackage, part: str | None) -> int:
    """Check files against each other and against the board's `part` (None: not known here).

    Returns the DMA's limit, in bytes per transfer. Raises LoadError naming both sides of what
    does not fit: hash, part, clock, or an item larger than one transfer.
    """
    content = _read(package.bit, BITSTREAM_LIMIT)
    digest = hashlib.sha256(content).hexdigest()
    if digest != package.sha256:
        raise LoadError(
            f"{package.bit}: sha256 is {digest} but {OVERLAY_JSON} says {package.sha256}; "
            "the package is damaged or was changed, build it again"
        )
    header = parse_bitfile(content, str(package.bit))
    if not same_part(header.part, package.part):
        raise LoadError(
            f"{package.bit}: built for part {header.part} but {OVERLAY_JSON} says "
            f"{package.part}; build the package again for one part"
        )
    if part is not None and not same_part(header.part, part):
        raise LoadError(
            f"{package.bit}: built for part {header.part} but this board carries {part}; "
            "use the package for this board"
        )
    handoff = read_handoff(package)
    closed = handoff.clock_mhz
    if closed is not None and package.clock_mhz > closed * (1 + CLOCK_TOLERANCE):
        raise LoadError(
            f"{package.name}: {OVERLAY_JSON} asks for a clock of {package.clock_mhz} MHz but "
            f"{package.hwh.name} was built for {closed} MHz"
        )
    limit = handoff.dma_limit
    for port in (*package.inputs, *package.outputs):
        if port.wire.item_bytes > limit:
            raise LoadError(
                f"{package.name}: one item of {port.spec.name} is {port.wire.item_bytes} bytes but "
                f"{package.dma} moves at most {limit} bytes at once (c_sg_length_width in "
                f"{package.hwh.name}); build the overlay with a wider length register"
            )
    return limit


@dataclass(frozen=True, slots=True)
class Handoff:
    """What the .hwh says: longest transfer of the DMA in bytes, and PL clock 0 where given."""

    dma_limit: int
    clock_mhz: float | None


def read_handoff(package: OverlayPackage) -> Handoff:
    """Read the handoff. The longest transfer is 2 ** c_sg_length_width - 1 bytes.

    Source: PG021, "Buffer Length Register width". Raises LoadError when the handoff has no such
    DMA, or one that only does scatter-gather.
    """
    raw = _read(package.hwh, HANDOFF_LIMIT)
    if b"<!DOCTYPE" in raw:
        raise LoadError(f"{package.hwh}: a handoff file has no DOCTYPE")
    try:
        root = ElementTree.fromstring(raw)
    except ElementTree.ParseError as error:
        raise LoadError(f"{package.hwh}: not valid XML ({error})") from error
    cells = {module.get("FULLNAME", "").lstrip("/"): module for module in root.iter("MODULE")}
    cell = cells.get(package.dma)
    if cell is None or cell.get("MODTYPE") != "axi_dma":
        dmas = sorted(name for name, m in cells.items() if m.get("MODTYPE") == "axi_dma")
        raise LoadError(
            f"{package.hwh}: no AXI DMA named {package.dma}; it has {', '.join(dmas) or 'none'}"
        )
    parameters = _parameters(cell)
    if parameters.get("c_include_sg") == "1":
        raise LoadError(
            f"{package.hwh}: {package.dma} is in scatter-gather mode; build it in simple mode"
        )
    width = parameters.get("c_sg_length_width", str(DEFAULT_LENGTH_WIDTH))
    if not width.isdecimal() or not 8 <= int(width) <= DEFAULT_LENGTH_WIDTH:
        raise LoadError(
            f"{package.hwh}: c_sg_length_width of {package.dma} is {width!r}, "
            f"expected 8 to {DEFAULT_LENGTH_WIDTH}"
        )
    clock = None
    for module in cells.values():
        if module.get("MODTYPE") in _CLOCK_PARAMETERS:
            text = _parameters(module).get(_CLOCK_PARAMETERS[module.get("MODTYPE", "")], "")
            with contextlib.suppress(ValueError):
                clock = float(text)
    return Handoff((1 << int(width)) - 1, clock)


def _parameters(module: ElementTree.Element) -> dict[str, str]:
    return {p.get("NAME", "").lower(): p.get("VALUE", "") for p in module.iter("PARAMETER")}


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror or error}; the package is incomplete") from error
    if len(content) > limit:
        raise LoadError(f"{path}: larger than {limit} bytes")
    return content


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
        if not (math.isfinite(value) and value > 0):
            raise self._wrong(where + key, f"must be positive, not {value}")
        return float(value)

    def _integer(
        self, source: Mapping[str, Any], key: str, low: int, high: int, where: str = ""
    ) -> int:
        value = source.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._wrong(where + key, f"must be a whole number from {low} to {high}")
        return value

    def _file(self, key: str, suffix: str) -> Path:
        name = self._text(self._document, key)
        if Path(name).name != name or name.startswith(".") or not name.endswith(suffix):
            raise self._wrong(key, f"must be the name of a {suffix} file in the package")
        return self._path.parent / name

    def package(self) -> OverlayPackage:
        document = self._document
        if document.get("schema") != 1:
            raise self._wrong("schema", f"is {document.get('schema')!r}, this version reads 1")
        kind = self._text(document, "kind")
        if kind != "stream":
            raise self._wrong("kind", f"is {kind!r}, this version runs 'stream'")
        sha256 = self._text(document, "sha256").lower()
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise self._wrong("sha256", "must be 64 hexadecimal digits")
        bit, hwh = self._file("bitstream", ".bit"), self._file("handoff", ".hwh")
        if bit.stem != hwh.stem:
            raise self._wrong("handoff", f"must be named {bit.stem}.hwh, as the bitstream is")
        return OverlayPackage(
            name=self._text(document, "name"),
            kind=kind,
            directory=self._path.parent,
            bit=bit,
            hwh=hwh,
            board=self._text(document, "board").lower(),
            part=self._text(document, "part"),
            clock_mhz=self._number(document, "clockMhz"),
            dma=self._text(document, "dma"),
            inputs=self._ports("inputs"),
            outputs=self._ports("outputs"),
            max_batch=self._integer(document, "maxBatch", 1, 65536),
            sha256=sha256,
        )

    def _ports(self, key: str) -> tuple[Port, ...]:
        entries = self._document.get(key)
        if not isinstance(entries, list) or len(entries) != 1 or not isinstance(entries[0], dict):
            raise self._wrong(key, "must list exactly one tensor: the DMA has one stream each way")
        return (self._port(entries[0], f"{key}[0]."),)

    def _port(self, entry: Mapping[str, Any], where: str) -> Port:
        datatype = self._text(entry, "datatype", where)
        if datatype != "FP32":
            raise self._wrong(where + "datatype", f"is {datatype}, only FP32 is supported")
        shape = entry.get("shape")
        if (
            not isinstance(shape, list)
            or len(shape) < 2
            or not all(type(size) is int for size in shape)
            or shape[0] != -1
            or any(size < 1 for size in shape[1:])
        ):
            raise self._wrong(where + "shape", "must be -1 followed by fixed sizes")
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
            TensorSpec(self._text(entry, "name", where), datatype, tuple(shape)),
            WireFormat(
                dtype=dtype,
                scale=self._number(wire, "scale", where + "wire."),
                zero_point=self._integer(wire, "zeroPoint", -128, 127, where + "wire."),
                elements=elements,
            ),
        )
