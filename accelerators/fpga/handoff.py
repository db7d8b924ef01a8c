"""Hardware handoff (.hwh) files, as far as a driver needs them: cells, addresses, clock.

Parsed as a stream with expat: a document type (and with it every entity), deep nesting and
oversized files are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from xml.parsers import expat

from ..errors import LoadError

HANDOFF_LIMIT = 64 << 20
_DEPTH_LIMIT = 64
DEFAULT_LENGTH_WIDTH = 26
"""Bits of the AXI DMA's length register where the handoff does not say (as pynq assumes)."""
_CLOCK_PARAMETERS = {
    "processing_system7": "pcw_act_fpga0_peripheral_freqmhz",
    "zynq_ultra_ps_e": "psu__crl_apb__pl0_ref_ctrl__act_freqmhz",
}
SHUTDOWN_MANAGERS = ("pr_axi_shutdown_manager", "dfx_axi_shutdown_manager")


@dataclass(frozen=True, slots=True)
class Cell:
    """A core of the design: `name` with its hierarchy ("hier_0/axi_dma_0"), `kind` its type.

    `parameters` with names in lower case; `registers` name -> offset; `base` None without any;
    `chained`: its control register has the bit of ap_ctrl_chain (UG1399).
    """

    name: str
    kind: str
    vlnv: str
    parameters: Mapping[str, str]
    registers: Mapping[str, int]
    base: int | None = None
    size: int = 0
    chained: bool = False


@dataclass(frozen=True, slots=True)
class Hardware:
    """A design. `clock_mhz` is PL clock 0 as it was built.

    That and `part` ("7z020clg400-1") are None where the file does not say.
    """

    path: Path
    cells: Mapping[str, Cell]
    clock_mhz: float | None = None
    part: str | None = None

    def of_kind(self, *kinds: str) -> list[Cell]:
        return [cell for cell in self.cells.values() if cell.kind in kinds]

    @property
    def shutdown_managers(self) -> tuple[str, ...]:
        """Cores that stop transfers of the fabric before it is configured anew."""
        return tuple(cell.name for cell in self.of_kind(*SHUTDOWN_MANAGERS))

    def addressed(self, name: str) -> Cell:
        """The cell called `name`, which has registers. Raises LoadError."""
        cell = self.cells.get(name)
        if cell is None or cell.base is None:
            near = ", ".join(c.name for c in self.cells.values() if c.base is not None)
            raise LoadError(
                f"{self.path}: no core {name} with registers; it has {near or 'none at all'}"
            )
        return cell

    def dma_limit(self, name: str) -> int:
        """Longest transfer of an AXI DMA in bytes: 2 ** c_sg_length_width - 1, or in micro mode
        one burst.

        Source: PG021, "Width of Buffer Length Register" and "Enable Micro DMA". Raises LoadError
        when there is no such DMA, one that only does scatter-gather, or one of one direction.
        """
        cell = self.cells.get(name)
        if cell is None or cell.kind != "axi_dma":
            near = ", ".join(c.name for c in self.of_kind("axi_dma")) or "none"
            raise LoadError(f"{self.path}: no AXI DMA named {name}; it has {near}")
        if cell.parameters.get("c_include_sg", "0") == "1":
            raise LoadError(
                f"{self.path}: {name} is in scatter-gather mode, where it takes no addresses, only "
                'chains of descriptors; clear "Enable Scatter Gather Engine" and build it again'
            )
        for channel, direction in (("mm2s", "to"), ("s2mm", "from")):
            if cell.parameters.get(f"c_include_{channel}", "1") == "0":
                raise LoadError(
                    f"{self.path}: {name} has no channel {direction} the network "
                    f"(c_include_{channel} is 0); build it with both"
                )
        width = cell.parameters.get("c_sg_length_width", str(DEFAULT_LENGTH_WIDTH))
        if not width.isdecimal() or not 8 <= int(width) <= DEFAULT_LENGTH_WIDTH:
            raise LoadError(
                f"{self.path}: c_sg_length_width of {name} is {width!r}, "
                f"expected 8 to {DEFAULT_LENGTH_WIDTH}"
            )
        longest = (1 << int(width)) - 1
        if cell.parameters.get("c_micro_dma", "0") == "1":
            longest = min(longest, *(self._burst(cell, channel) for channel in ("mm2s", "s2mm")))
        return longest

    def _burst(self, cell: Cell, channel: str) -> int:
        bits = cell.parameters.get(f"c_m_axi_{channel}_data_width", "32")
        beats = cell.parameters.get(f"c_{channel}_burst_size", "16")
        if not (bits.isdecimal() and beats.isdecimal() and int(bits) >= 8 and int(beats)):
            raise LoadError(f"{self.path}: {cell.name} has bursts of {beats!r} x {bits!r} bits")
        return int(bits) // 8 * int(beats)


def read_hardware(path: Path) -> Hardware:
    """Read a .hwh file. Raises LoadError."""
    try:
        with path.open("rb") as file:
            raw = file.read(HANDOFF_LIMIT + 1)
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror or error}; the package is incomplete") from error
    except ValueError as error:
        raise LoadError(f"{str(path)!r}: no name of a file ({error})") from error
    if len(raw) > HANDOFF_LIMIT:
        raise LoadError(f"{path}: larger than {HANDOFF_LIMIT} bytes")
    reader = _Reader(path)
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = reader.doctype
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    try:
        parser.Parse(raw, True)
    except (expat.ExpatError, LookupError, ValueError) as error:
        # The latter two for an encoding that Python does not know, or has no table for.
        raise LoadError(f"{path}: not valid XML ({error})") from error
    return reader.hardware()


@dataclass(slots=True)
class _Open:
    name: str
    kind: str
    vlnv: str
    parameters: dict[str, str] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    chained: bool = False


class _Reader:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._depth = 0
        self._cells: dict[str, _Open] = {}
        self._instances: dict[str, str] = {}
        self._ranges: dict[str, tuple[int, int]] = {}
        self._cell: _Open | None = None
        self._register: str | None = None
        self._in_field = False
        self._part: str | None = None

    def doctype(self, *_: object) -> None:
        raise LoadError(f"{self._path}: a handoff file has no DOCTYPE")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > _DEPTH_LIMIT:
            raise LoadError(f"{self._path}: nested deeper than {_DEPTH_LIMIT} elements")
        get = attributes.get
        if tag == "MODULE":
            name = get("FULLNAME", "").strip("/")
            self._cell = _Open(name, get("MODTYPE", ""), get("VLNV", ""))
            self._cells[name] = self._cell
            self._instances[get("INSTANCE", "")] = name
        elif tag == "SYSTEMINFO":
            self._part = _part(get("DEVICE", ""), get("PACKAGE", ""), get("SPEEDGRADE", ""))
        elif self._cell is None:
            return
        elif tag == "PARAMETER":
            self._cell.parameters.setdefault(get("NAME", "").lower(), get("VALUE", ""))
        elif tag == "REGISTER":
            self._register = get("NAME", "")
        elif tag == "FIELD":
            self._in_field = True
            if self._register is not None and get("NAME") == "AP_CONTINUE":
                self._cell.chained = True
        elif tag == "PROPERTY":
            offset = _number(get("VALUE", ""))
            wanted = self._register is not None and not self._in_field
            if wanted and get("NAME") == "ADDRESS_OFFSET" and offset is not None:
                self._cell.registers[self._register or ""] = offset
        elif tag == "MEMRANGE" and get("MEMTYPE") == "REGISTER":
            base, high = _number(get("BASEVALUE", "")), _number(get("HIGHVALUE", ""))
            if base is not None and high is not None and high >= base:
                self._ranges.setdefault(get("INSTANCE", ""), (base, high - base + 1))

    def end(self, tag: str) -> None:
        self._depth -= 1
        if tag == "MODULE":
            self._cell = None
        elif tag == "REGISTER":
            self._register = None
        elif tag == "FIELD":
            self._in_field = False

    def hardware(self) -> Hardware:
        ranges = {
            self._instances[instance]: where
            for instance, where in self._ranges.items()
            if instance in self._instances
        }
        cells = {}
        clock = None
        for name, cell in self._cells.items():
            base, size = ranges.get(name, (None, 0))
            cells[name] = Cell(
                name, cell.kind, cell.vlnv, MappingProxyType(cell.parameters),
                MappingProxyType(cell.registers), base, size, cell.chained,
            )  # fmt: skip
            if cell.kind in _CLOCK_PARAMETERS:
                try:
                    clock = float(cell.parameters.get(_CLOCK_PARAMETERS[cell.kind], ""))
                except ValueError:
                    clock = None
        return Hardware(self._path, MappingProxyType(cells), clock, self._part)


def _part(device: str, package: str, grade: str) -> str | None:
    if not (device and package):
        return None
    joint = "" if device.lower().removeprefix("xc").startswith("7") else "-"
    return f"{device}{joint}{package}{grade}".lower()


def _number(text: str) -> int | None:
    try:
        return int(text, 0)
    except ValueError:
        return None
