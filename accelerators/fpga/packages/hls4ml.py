"""Packages of hls4ml: VivadoAccelerator (AXI stream) and VitisUnified (AXI master or stream).

The project's hls4ml_config.yml gives precisions, and in some versions shapes; in others they are
arguments of the generated driver and come from model.json. Sources: hls4ml 1.3,
backends/vivado_accelerator; hls4ml after 1.3, backends/vitis_unified (its registers are named
gmem_in0_ptr_NAME, gmem_out0_ptr_NAME and batch_size).
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from ...errors import LoadError
from ...tensors import TensorSpec
from ..elements import Element, hls4ml_element
from ..handoff import Cell, Hardware
from ..package import (
    DmaStream,
    Package,
    PackedWire,
    Pointer,
    Port,
    Signature,
    StartedCore,
    StartedCores,
    Transport,
)
from .files import read_bitstream, read_text
from .signature import check_spec
from .yaml_subset import Mapping, parse_mappings

CONFIG = "hls4ml_config.yml"
_SECTIONS = ("AcceleratorConfig", "VitisUnifiedConfig", "UnifiedConfig")
_PREFERRED_DMA = "hier_0/axi_dma_0"
_CONTROL = {"CTRL", "GIER", "GIE", "IP_IER", "IER", "IP_ISR", "ISR"}
_PORT = re.compile(r"gmem_(in|out)(\d{1,2})(?:_.*)?")
_STREAM_MODES, _MASTER_MODES = ("axi_stream", "axis"), ("axi_master", "axim", "")


def find_config(files: list[Path]) -> Path | None:
    return next((path for path in files if path.name == CONFIG), None)


def read_hls4ml(directory: Path, files: list[Path], signature: Signature) -> Package:
    """Read a package of hls4ml; without a signature it has no tensors yet. Raises LoadError."""
    config = find_config(files)
    if config is None:
        raise LoadError(f"{directory}: no {CONFIG}; copy it from the hls4ml project")
    settings = parse_mappings(read_text(config))
    backend = _text(settings, "Backend")
    accelerator = next(
        filter(None, (_mapping(settings, key) for key in _SECTIONS)), _mapping(settings, "")
    )
    precision = _mapping(accelerator, "Precision")
    found = read_bitstream(directory, files)
    elements = []
    for side in ("Input", "Output"):
        text = _text(precision, side) or _text(accelerator, f"{side}Dtype") or "float"
        elements.append(hls4ml_element(text))
    inputs = _ports(signature.inputs, _shapes(settings, "Input"), elements[0], "input", directory)
    outputs = _ports(
        signature.outputs, _shapes(settings, "Output"), elements[1], "output", directory
    )
    transport: Transport
    if backend == "VitisUnified":
        mode = _text(accelerator, "axi_mode")
        if mode in _STREAM_MODES:
            transport = DmaStream(_dma(found.hardware), _starter(found.hardware))
        elif mode in _MASTER_MODES:
            transport = _master(found.hardware)
        else:
            raise LoadError(
                f"{config}: axi_mode {mode} is not supported; axi_master and axi_stream are"
            )
    elif backend in ("VivadoAccelerator", ""):
        interface = _text(accelerator, "Interface") or "axi_stream"
        if interface != "axi_stream":
            raise LoadError(f"{config}: interface {interface} is not supported, axi_stream is")
        transport = DmaStream(_dma(found.hardware))
    else:
        raise LoadError(
            f"{config}: backend {backend} gives no overlay; VivadoAccelerator and VitisUnified do"
        )
    _fits(transport, inputs, outputs, directory)
    # On a platform of one's own the name of a board says nothing, the part does.
    own = _text(accelerator, "Platform") not in ("", "null", "None")
    board = None if own else _text(accelerator, "Board").lower() or None
    return found.package(
        "hls4ml",
        directory,
        transport,
        inputs,
        outputs,
        name=_text(settings, "ProjectName"),
        board=board,
    )


def _shapes(settings: Mapping, side: str) -> tuple[TensorSpec, ...]:
    """Tensors as newer versions of hls4ml note them in the configuration."""
    specs = []
    for name, sizes in _mapping(settings, f"{side}Shapes").items():
        if isinstance(sizes, list) and sizes and all(size.isdecimal() for size in sizes):
            specs.append(TensorSpec(name, "FP32", (-1, *map(int, sizes))))
    return tuple(specs)


def _ports(
    promised: tuple[TensorSpec, ...], noted: tuple[TensorSpec, ...], element: Element, what: str,
    directory: Path,
) -> tuple[Port, ...]:  # fmt: skip
    """Tensors in the order of the kernel's arguments, which is that of model.json."""
    if promised and noted and len(promised) != len(noted):
        raise LoadError(
            f"{directory}: {CONFIG} has {len(noted)} {what}s, model.json has {len(promised)}"
        )
    known: list[int | None] = [math.prod(spec.shape[1:]) for spec in noted]
    return tuple(
        Port(
            check_spec(spec, values, what, str(directory)),
            PackedWire(element, 1, math.prod(spec.shape[1:])),
        )
        for spec, values in zip(promised or noted, known or [None] * len(promised), strict=True)
    )


def _fits(
    transport: Transport, inputs: tuple[Port, ...], outputs: tuple[Port, ...], where: Path
) -> None:
    """Raise LoadError when the kernel has other tensors than are described."""
    roles = ["in", "out"]
    if isinstance(transport, StartedCores):
        roles = [pointer.role for core in transport.cores for pointer in core.pointers]
    for role, what, ports in (("in", "input", inputs), ("out", "output", outputs)):
        # Without a description there is nothing to compare yet.
        if ports and len(ports) != roles.count(role):
            raise LoadError(
                f"{where}: the kernel has {roles.count(role)} {what}s, {len(ports)} are described"
            )


def _dma(hardware: Hardware) -> str:
    names = [cell.name for cell in hardware.of_kind("axi_dma")]
    if _PREFERRED_DMA in names:
        return _PREFERRED_DMA
    if len(names) != 1:
        raise LoadError(
            f"{hardware.path}: {len(names)} AXI DMAs ({', '.join(names) or 'none'}); expected "
            f"{_PREFERRED_DMA}, as hls4ml builds it"
        )
    return names[0]


def _master(hardware: Hardware) -> StartedCores:
    for cell in hardware.cells.values():
        if "CTRL" not in cell.registers or cell.base is None:
            continue
        core = started_core(cell)
        roles = {pointer.role for pointer in core.pointers}
        if roles == {"in", "out"} and core.count is not None:
            return StartedCores((core,), (core.core,))
    raise LoadError(
        f"{hardware.path}: no core with control, pointers for inputs and outputs, and a count "
        "among its registers; expected the kernel of VitisUnified in AXI-master mode"
    )


def _starter(hardware: Hardware) -> StartedCore:
    found = [
        started_core(cell)
        for cell in hardware.cells.values()
        if cell.base is not None and "CTRL" in cell.registers and "batch_size" in cell.registers
    ]
    if len(found) != 1 or found[0].pointers or found[0].count is None:
        raise LoadError(
            f"{hardware.path}: {len(found)} cores with control and batch_size among their "
            "registers; expected the one kernel of VitisUnified in AXI-stream mode"
        )
    return found[0]


def started_core(cell: Cell) -> StartedCore:
    """An HLS kernel by its registers: `x_1`, `x_2` are halves of a pointer, the rest is a count.

    A pointer of 32 bits has one register, known by VitisUnified's names.
    """
    pointers: list[Pointer] = []
    counts = []
    for name, offset in sorted(cell.registers.items(), key=lambda entry: entry[1]):
        if name in _CONTROL or (name.endswith("_2") and f"{name[:-1]}1" in cell.registers):
            continue
        match = _PORT.fullmatch(name)
        if match is not None or name.endswith("_1"):
            if match is not None:
                role, place = match[1], int(match[2])
            else:
                role = "out" if "out" in name.lower() else "in"
                place = sum(pointer.role == role for pointer in pointers)
            pointers.append(Pointer(offset, role, place))
        else:
            counts.append(offset)
    for role in ("in", "out"):
        places = sorted(pointer.index for pointer in pointers if pointer.role == role)
        if places != list(range(len(places))):
            raise LoadError(f"{cell.name}: its {role}puts are numbered {places} in the handoff")
    count = counts[0] if len(counts) == 1 else None
    return StartedCore(cell.name, tuple(pointers), count, cell.chained)


def _mapping(settings: Mapping, key: str) -> Mapping:
    value = settings.get(key)
    return value if isinstance(value, dict) else {}


def _text(settings: Mapping, key: str) -> str:
    value = settings.get(key)
    return value if isinstance(value, str) else ""
