"""Overlays of BNN-PYNQ: one HLS core, its parameters in files named LAYER-UNIT-weights.bin.

Fully connected networks (lfcW1A1, lfcW1A2) take 28 x 28 values by their sign, as bits in 832, and
give one bit per class in a word of 64. Convolutional ones (cnvW1A1, cnvW1A2, cnvW2A2) take 32 x 32
pixels of 3 channels from -1 to 1 and give a sum of 16 bits per class. Networks with activations of
two bits have two thresholds per line; the last layer of the fully connected ones has one, that of
the convolutional ones none. Sources: BNN-PYNQ, src/library/host/foldedmv-offload and
src/network/*/{hw/config.h,hw/top.cpp,sw/main_python.cpp}.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import LoadError
from ...tensors import TensorSpec
from ..elements import finn_element, hls4ml_element
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
_NETWORK = re.compile(r"(lfc|cnv)W[12]A([12])(?![0-9])")
_IN, _OUT, _COUNT = 0x10, 0x1C, 0x5C
_CLASSES = 64
# The fully connected networks see signs, padded to words of 64 bits; the convolutional ones see
# pixels as 8-bit fixed point with the channels of a pixel side by side.
_DIGIT, _DIGIT_BYTES = (28 * 28,), 832 // 8
_IMAGE, _PIXEL = (32, 32, 3), "ap_fixed<8,1,AP_RND,AP_SAT>"


@dataclass(frozen=True, slots=True)
class _Network:
    """`thresholds` per line of a layer's memory; layers from `last` on have one or none."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    thresholds: int
    last: int
    last_thresholds: int

    def per_line(self, layer: int) -> int:
        return self.thresholds if layer < self.last else self.last_thresholds


def _network(name: str) -> _Network | None:
    match = _NETWORK.match(name)
    if match is None:
        return None
    activation_bits = int(match[2])
    if match[1] == "lfc":
        bipolar = replace(finn_element("BIPOLAR"), rounding="SIGN")
        pixels = _DIGIT[0]
        digit = PackedWire(bipolar, 1, pixels, _DIGIT_BYTES - pixels // 8)
        classes = PackedWire(finn_element("BINARY"), 1, _CLASSES)
        return _Network(
            (Port(TensorSpec("in0", "INT8", (-1, *_DIGIT)), digit),),
            (Port(TensorSpec("out0", "UINT8", (-1, _CLASSES)), classes),),
            activation_bits, 3, 1,
        )  # fmt: skip
    image = PackedWire(hls4ml_element(_PIXEL), 1, math.prod(_IMAGE))
    sums = PackedWire(finn_element("INT16"), 1, _CLASSES)
    return _Network(
        (Port(TensorSpec("in0", "FP32", (-1, *_IMAGE)), image),),
        (Port(TensorSpec("out0", "INT16", (-1, _CLASSES)), sums),),
        activation_bits, 8, 0,
    )  # fmt: skip


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
    network = _network(found.stem)
    if network is None:
        raise LoadError(
            f"{found.bit}: of BNN-PYNQ's networks lfcW1A1, lfcW1A2, cnvW1A1, cnvW1A2 and cnvW2A2 "
            "are known, by the name of the bitstream; name it as BNN-PYNQ does"
        )
    weights = []
    for path in files:
        if match := _PARAMETERS.fullmatch(path.name):
            layer, is_threshold = int(match[1]), match[3] == "thres"
            per_line = network.per_line(layer) if is_threshold else 1
            if per_line:
                memory = 2 * layer + is_threshold
                weights.append(
                    WeightFile(
                        core.name, path, "bnn", sha256_of(path), memory, int(match[2]), per_line
                    )
                )
    if not weights:
        raise LoadError(
            f"{directory}: no LAYER-UNIT-weights.bin; copy the network's folder of bnn/params"
        )
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
        apply_signature(network.inputs, signature.inputs, "input", str(directory)),
        apply_signature(network.outputs, signature.outputs, "output", str(directory)),
    )
