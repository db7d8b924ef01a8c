"""Packages of FINN (driver/driver.py with `io_shape_dict`) and of FINN+ (settings.json).

driver.py is parsed, never run. Sources: FINN, transformation/fpgadataflow (make_pynq_driver) and
qnn-data/templates/driver; FINN+, make_driver.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import LoadError
from ...tensors import TensorSpec
from ..elements import finn_element
from ..handoff import Cell, Hardware
from ..package import (
    Package,
    PackedWire,
    Pointer,
    Port,
    Signature,
    StartedCore,
    StartedCores,
    WeightFile,
)
from ..packing import packed_size
from .files import Bitstream, read_bitstream, read_json, read_text, sha256_of
from .signature import apply_signature

_POINTER, _COUNT = 0x10, 0x1C
_TYPE = re.compile(r"DataType\[\s*['\"]?([^'\"\]]+)['\"]?\s*\]")
_DAT = re.compile(r"(\d{1,4})_(\d{1,4})_.*\.dat")
_TENSOR_LIMIT = 16
_RANK_LIMIT = 16
_ITEM_LIMIT = 1 << 28


def find_settings(files: list[Path]) -> Path | None:
    """FINN+'s settings.json."""
    return next((path for path in files if path.name == "settings.json"), None)


def find_driver(files: list[Path]) -> Path | None:
    """FINN's driver.py."""
    drivers = [path for path in files if path.name == "driver.py"]
    return next((path for path in drivers if "io_shape_dict" in read_text(path)), None)


def read_finn(directory: Path, files: list[Path], signature: Signature) -> Package:
    """Read a package of FINN or FINN+. Raises LoadError."""
    settings, driver = find_settings(files), find_driver(files)
    if settings is not None:
        information = read_json(settings).get("driver_information")
        if not isinstance(information, dict):
            raise LoadError(f"{settings}: no driver_information; not a package of FINN+")
        if (kind := information.get("driver_type")) != "FINNDMAOverlay":
            raise LoadError(f"{settings}: driver_type is {kind!r}, only FINNDMAOverlay can serve")
        shapes, source = information.get("io_shape_dict"), settings
    elif driver is not None:
        shapes, source = literal_assignment(driver, "io_shape_dict"), driver
        information = {}
    else:
        raise LoadError(
            f"{directory}: neither driver/driver.py with io_shape_dict nor settings.json; copy the "
            "whole deployment package of FINN"
        )
    if not isinstance(shapes, dict):
        raise LoadError(f"{source}: io_shape_dict is no dictionary")
    if (platform := information.get("platform", "zynq-iodma")) != "zynq-iodma":
        raise LoadError(f"{source}: built for platform {platform!r}, this device is zynq-iodma")
    if shapes.get("mlo_weight_config"):
        raise LoadError(f"{source}: weights streamed by a FINNLoop (MLO) are not supported")
    found = read_bitstream(directory, files, "finn-accel")
    inputs = _ports(shapes, "i", source)
    outputs = _ports(shapes, "o", source)
    transport = _transport(shapes, found, source, files, inputs, outputs)
    return found.package(
        "finn",
        directory,
        transport,
        apply_signature(inputs, signature.inputs, "input", str(directory)),
        apply_signature(outputs, signature.outputs, "output", str(directory)),
        clock_mhz=_clock(information.get("fclk_mhz"), source),
    )


def _clock(told: object, source: Path) -> float | None:
    if told is None:
        return None
    if isinstance(told, bool) or not isinstance(told, int | float) or not 1 <= told <= 2000:
        raise LoadError(f"{source}: fclk_mhz is {told!r}, expected MHz from 1 to 2000")
    return float(told)


def _ports(shapes: Mapping[str, Any], side: str, source: Path) -> tuple[Port, ...]:
    types = _listed(shapes, f"{side}dt", source)
    ports = []
    for index, text in enumerate(types):
        match = _TYPE.fullmatch(str(text).strip())
        element = finn_element(match[1] if match else str(text))
        normal, folded, packed = (
            _shape(shapes, f"{side}shape_{form}", index, source)
            for form in ("normal", "folded", "packed")
        )
        where = f"{source}: {'input' if side == 'i' else 'output'} {index}"
        if math.prod(normal) != math.prod(folded):
            raise LoadError(f"{where}: normal {normal} and folded {folded} hold unequal numbers")
        size = packed_size(folded[-1], element)
        rows = math.prod(folded[:-1])
        if packed[-1] != size or math.prod(packed[:-1]) != rows:
            raise LoadError(
                f"{where}: packed shape {packed} does not hold folded {folded} of {element.name} "
                f"({size} bytes per row)"
            )
        if rows * size > _ITEM_LIMIT:
            raise LoadError(f"{where}: one item has {rows * size} bytes")
        name = f"{'in' if side == 'i' else 'out'}{index}"
        spec = TensorSpec(name, element.datatype, (-1, *(normal[1:] or (1,))))
        ports.append(Port(spec, PackedWire(element, rows, folded[-1])))
    count = shapes.get(f"num_{'in' if side == 'i' else 'out'}puts", len(ports))
    if count != len(ports) or not ports:
        raise LoadError(f"{source}: {count} {side}-tensors announced, {len(ports)} described")
    return tuple(ports)


def _listed(shapes: Mapping[str, Any], key: str, source: Path) -> list[Any]:
    value = shapes.get(key)
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= _TENSOR_LIMIT:
        raise LoadError(f"{source}: io_shape_dict[{key!r}] must list 1 to {_TENSOR_LIMIT} entries")
    return list(value)


def _shape(shapes: Mapping[str, Any], key: str, index: int, source: Path) -> tuple[int, ...]:
    listed = _listed(shapes, key, source)
    shape = listed[index] if index < len(listed) else None
    if (
        not isinstance(shape, list | tuple)
        or not 1 <= len(shape) <= _RANK_LIMIT
        or not all(type(size) is int and 1 <= size <= _ITEM_LIMIT for size in shape)
        or shape[0] != 1
    ):
        raise LoadError(
            f"{source}: io_shape_dict[{key!r}][{index}] is {shape!r}, expected sizes with 1 first"
        )
    return tuple(shape)


def _transport(
    shapes: Mapping[str, Any], found: Bitstream, source: Path, files: list[Path],
    inputs: tuple[Port, ...], outputs: tuple[Port, ...],
) -> StartedCores:  # fmt: skip
    hardware = found.hardware
    in_names = _names(shapes, ("input_dma_name", "idma_names"), "idma0", len(inputs), source)
    out_names = _names(shapes, ("output_dma_name", "odma_names"), "odma0", len(outputs), source)
    weights, weight_cores = _weights(files, hardware, source)
    try:
        announced = int(shapes.get("number_of_external_weights", 0) or 0)
    except (TypeError, ValueError, OverflowError):
        announced = -1
    if announced != len(weight_cores):
        raise LoadError(
            f"{source}: {announced} external weights announced, {len(weight_cores)} .npy files "
            "with a DMA of their name found in runtime_weights"
        )
    if weight_cores and shapes.get("external_weights_input_shapes"):
        repeats = shapes["external_weights_input_shapes"]
        listed = repeats.values() if isinstance(repeats, dict) else [[0] * 4]
        if any(isinstance(shape, list) and len(shape) == 4 for shape in listed):
            raise LoadError(f"{source}: external weights of convolutions are not supported")
    cores = (
        *(_iodma(hardware, name, "weights", i) for i, name in enumerate(weight_cores)),
        # Whoever takes the results first, so that nothing waits inside of the network.
        *(_iodma(hardware, name, "out", i) for i, name in enumerate(out_names)),
        *(_iodma(hardware, name, "in", i) for i, name in enumerate(in_names)),
    )
    return StartedCores(cores, tuple(out_names), weights)


def _names(
    shapes: Mapping[str, Any], keys: tuple[str, ...], default: str, count: int, source: Path
) -> list[str]:
    names = next((shapes[key] for key in keys if key in shapes), [default])
    if (
        not isinstance(names, list | tuple)
        or len(names) != count
        or not all(isinstance(name, str) for name in names)
    ):
        raise LoadError(f"{source}: {keys[0]} must name {count} DMA cores, not {names!r}")
    return list(names)


def _iodma(hardware: Hardware, name: str, role: str, index: int) -> StartedCore:
    cell = hardware.addressed(name)
    pointer = next(
        (offset for reg, offset in cell.registers.items() if reg.endswith("_1")), _POINTER
    )
    return StartedCore(
        name, (Pointer(pointer, role, index),), cell.registers.get("numReps", _COUNT)
    )


def _weights(
    files: list[Path], hardware: Hardware, source: Path
) -> tuple[tuple[WeightFile, ...], list[str]]:
    """Weight files, and the cores that stream weights from memory, in the order of buffers."""
    words, buffers = [], []
    for path in files:
        if path.parent.name != "runtime_weights":
            continue
        if match := _DAT.fullmatch(path.name):
            name = f"StreamingDataflowPartition_{int(match[1])}"
            cell: Cell = hardware.addressed(name)
            words.append(WeightFile(cell.name, path, "words", sha256_of(path)))
        elif path.suffix == ".npy":
            name = path.name.split(".")[0]
            buffers.append(
                WeightFile(hardware.addressed(name).name, path, "buffer", sha256_of(path))
            )
        elif path.suffix == ".dat":
            raise LoadError(
                f"{path}: not named <partition>_<layer>_...dat, as FINN does ({source})"
            )
    return (*buffers, *words), [weight.core for weight in buffers]


def literal_assignment(path: Path, name: str) -> Any:
    """The literal that a Python file assigns to `name`, without running any of it.

    `DataType["UINT8"]` counts as the text DataType['UINT8']. Raises LoadError.
    """
    try:
        tree = ast.parse(read_text(path), str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise LoadError(f"{path}: not Python that can be parsed ({error})") from error
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            assert node.value is not None
            return _literal(node.value, path, 0)
    raise LoadError(f"{path}: assigns no {name}; not a driver that FINN generated")


def _literal(node: ast.expr, path: Path, depth: int) -> Any:
    if depth > 8:
        raise LoadError(f"{path}: line {node.lineno}: nested too deeply")
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        items = [_literal(item, path, depth + 1) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    if isinstance(node, ast.Dict):
        keys = [_literal(key, path, depth + 1) if key else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise LoadError(f"{path}: line {node.lineno}: a key that is no text")
        values = [_literal(value, path, depth + 1) for value in node.values]
        return dict(zip(keys, values, strict=True))
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inner = _literal(node.slice, path, depth + 1)
        return f"{node.value.id}['{inner}']"
    raise LoadError(
        f"{path}: line {node.lineno}: not a literal; drivers are read, never run, so that "
        "io_shape_dict must be written out as FINN does"
    )
