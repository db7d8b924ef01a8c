"""Packages of hls4ml: VivadoAccelerator (AXI stream) and VitisUnified (AXI master).

The project's hls4ml_config.yml gives precisions, and in newer versions shapes; in older ones they
are arguments of the generated driver and come from model.json. Source: hls4ml 1.3,
backends/vivado_accelerator.
"""

from __future__ import annotations

import math
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
_PREFERRED_DMA = "hier_0/axi_dma_0"
_CONTROL = {"CTRL", "GIER", "GIE", "IP_IER", "IER", "IP_ISR", "ISR"}


def find_config(files: list[Path]) -> Path | None:
    return next((path for path in files if path.name == CONFIG), None)


def read_hls4ml(directory: Path, files: list[Path], signature: Signature) -> Package:
    """Read a package of hls4ml; without a signature it has no tensors yet. Raises LoadError."""
    config = find_config(files)
    if config is None:
        raise LoadError(f"{directory}: no {CONFIG}; copy it from the hls4ml project")
    settings = parse_mappings(read_text(config))
    backend = _text(settings, "Backend")
    accelerator = _mapping(settings, "AcceleratorConfig") or _mapping(settings, "UnifiedConfig")
    precision = _mapping(accelerator, "Precision")
    found = read_bitstream(directory, files)
    elements = []
    for side in ("Input", "Output"):
        text = _text(precision, side) or _text(accelerator, f"{side.lower()}_type") or "float"
        elements.append(hls4ml_element(text))
    inputs = _ports(signature.inputs, _shapes(settings, "Input"), elements[0], "input", directory)
    outputs = _ports(
        signature.outputs, _shapes(settings, "Output"), elements[1], "output", directory
    )
    transport: Transport
    if backend == "VitisUnified":
        transport = _master(found.hardware)
    elif backend in ("VivadoAccelerator", ""):
        interface = _text(accelerator, "Interface") or "axi_stream"
        if interface != "axi_stream":
            raise LoadError(f"{config}: interface {interface} is not supported, axi_stream is")
        transport = DmaStream(_dma(found.hardware))
    else:
        raise LoadError(
            f"{config}: backend {backend} gives no overlay; VivadoAccelerator and VitisUnified do"
        )
    board = _text(accelerator, "Board").lower() or None
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
    if max(len(promised), len(noted)) > 1:
        raise LoadError(f"{directory}: hls4ml's overlays have one {what}, this one has several")
    elements = math.prod(noted[0].shape[1:]) if noted else None
    return tuple(
        Port(
            check_spec(spec, elements, what, str(directory)),
            PackedWire(element, 1, math.prod(spec.shape[1:])),
        )
        for spec in promised or noted
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
        roles = [pointer.role for pointer in core.pointers]
        if roles.count("in") == 1 and roles.count("out") == 1 and core.count is not None:
            return StartedCores((core,), (core.core,))
    raise LoadError(
        f"{hardware.path}: no core with control, one input pointer, one output pointer and a "
        "count among its registers; expected the kernel of VitisUnified in AXI-master mode"
    )


def started_core(cell: Cell) -> StartedCore:
    """An HLS kernel by its registers: `x_1`, `x_2` are halves of a pointer, the rest is a count."""
    pointers: list[Pointer] = []
    counts = []
    for name, offset in sorted(cell.registers.items(), key=lambda entry: entry[1]):
        if name in _CONTROL or name.endswith("_2"):
            continue
        if name.endswith("_1"):
            role = "out" if "out" in name.lower() else "in"
            place = sum(pointer.role == role for pointer in pointers)
            pointers.append(Pointer(offset, role, place))
        else:
            counts.append(offset)
    return StartedCore(cell.name, tuple(pointers), counts[0] if len(counts) == 1 else None)


def _mapping(settings: Mapping, key: str) -> Mapping:
    value = settings.get(key)
    return value if isinstance(value, dict) else {}


def _text(settings: Mapping, key: str) -> str:
    value = settings.get(key)
    return value if isinstance(value, str) else ""
