"""Overlays of BNN-PYNQ: one HLS core, its parameters in files named LAYER-UNIT-weights.bin.

The fully connected network lfcW1A1 takes 28 x 28 values by their sign, as bits in 832,
and give one bit per class in a word of 64. Sources: BNN-PYNQ, src/library/host/foldedmv-offload
and src/network/*/hw/config.h.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

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
from .files import read_bitstream, sha256_of
from .signature import apply_signature

_PARAMETERS = re.compile(r"(\d{1,2})-(\d{1,3})-(weights|thres)\.bin")
_IN, _OUT, _COUNT = 0x10, 0x1C, 0x5C
_PIXELS, _INPUT_BYTES, _CLASSES = 28 * 28, 832 // 8, 64


def find_core(hardware: Hardware) -> Cell | None:
    """The core of BNN-PYNQ in a design."""
    return next((c for c in hardware.cells.values() if "BlackBoxJam" in c.vlnv), None)


def is_bnn_pynq(files: list[Path]) -> bool:
    """Whether the parameter files of BNN-PYNQ are among `files`."""
    return any(_PARAMETERS.fullmatch(path.name) for path in files)


def read_bnn_pynq(directory: Path, files: list[Path], signature: Signature) -> Package:
    """Read an overlay of BNN-PYNQ with its parameters. Raises LoadError."""
    found = read_bitstream(directory, files)
    core = find_core(found.hardware)
    if core is None:
        raise LoadError(f"{found.hwh}: no BlackBoxJam core; not an overlay of BNN-PYNQ")
    found.hardware.addressed(core.name)
    if not found.bit.name.startswith("lfcW1A1"):
        raise LoadError(
            f"{found.bit}: of the networks of BNN-PYNQ only lfcW1A1 is supported; "
            "the others need encodings and thresholds that are not"
        )
    weights = []
    for path in files:
        if match := _PARAMETERS.fullmatch(path.name):
            memory = 2 * int(match[1]) + (match[3] == "thres")
            weights.append(
                WeightFile(core.name, path, "bnn", sha256_of(path), memory, int(match[2]))
            )
    if not weights:
        raise LoadError(
            f"{directory}: no LAYER-UNIT-weights.bin; copy the network's folder of bnn/params"
        )
    bipolar = replace(finn_element("BIPOLAR"), rounding="SIGN")
    binary = finn_element("BINARY")
    image = PackedWire(bipolar, 1, _PIXELS, _INPUT_BYTES - _PIXELS // 8)
    inputs = (Port(TensorSpec("in0", "INT8", (-1, _PIXELS)), image),)
    outputs = (Port(TensorSpec("out0", "UINT8", (-1, _CLASSES)), PackedWire(binary, 1, _CLASSES)),)
    registers = core.registers
    pointers = (
        Pointer(registers.get("in_V_1", _IN), "in", 0),
        Pointer(registers.get("out_V_1", _OUT), "out", 0),
    )
    return found.package(
        "bnn-pynq",
        directory,
        StartedCores(
            (StartedCore(core.name, pointers, registers.get("numReps", _COUNT)),),
            (core.name,),
            tuple(weights),
        ),
        apply_signature(inputs, signature.inputs, "input", str(directory)),
        apply_signature(outputs, signature.outputs, "output", str(directory)),
    )
