"""Write overlay packages whose bitstream the simulated fabric can "configure" itself from.

The .bit file has a normal header; its configuration data is a network container instead of
frames, so a real FPGA refuses it (there is no sync word) and only the simulated one runs it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...accelerators.fpga.bitfile import Bitfile, encode_bitfile
from ...accelerators.fpga.package import Package
from ...accelerators.fpga.packages.overlay_json import OVERLAY_JSON, read_overlay_json
from ...accelerators.tensors import TensorSpec
from .handoff import StreamDesign, encode_handoff
from .network import DenseLayer, encode_network

__all__ = ["DenseLayer", "write_overlay_package"]

# A bitstream carries its build time; a fixed one keeps packages reproducible.
DATE, TIME = "2024/01/01", "00:00:00"


def write_overlay_package(
    directory: Path,
    *,
    name: str,
    board: str,
    part: str,
    clock_mhz: float,
    layers: Sequence[DenseLayer],
    input: TensorSpec,
    output: TensorSpec,
    max_batch: int = 32,
    dma_length_width: int = 14,
) -> Package:
    """Write overlay.json, `name`.bit and `name`.hwh into `directory` (made if missing).

    `input` and `output` are FP32, [-1, ...], with as many elements per item as the first layer
    takes and the last one gives; their wire scale and zero point are those of the layers. The
    same arguments give the same bytes. Raises ValueError when the arguments do not fit together.
    """
    first, last = layers[0], layers[-1]
    for spec, elements in ((input, first.weights.shape[0]), (output, last.weights.shape[1])):
        if math.prod(spec.shape[1:]) != elements:
            raise ValueError(f"{spec} does not have the {elements} values per item of its layer")
    directory.mkdir(parents=True, exist_ok=True)
    content = bit_file(name, part, encode_network(layers))
    (directory / f"{name}.bit").write_bytes(content)
    design = StreamDesign(
        name=name, part=part, clock_mhz=clock_mhz, dma_length_width=dma_length_width
    )
    (directory / f"{name}.hwh").write_text(encode_handoff(design), "utf-8")
    manifest = {
        "schema": 1,
        "kind": "stream",
        "name": name,
        "board": board.lower(),
        "part": part,
        "clockMhz": float(clock_mhz),
        "bitstream": f"{name}.bit",
        "handoff": f"{name}.hwh",
        "sha256": hashlib.sha256(content).hexdigest(),
        "dma": design.dma,
        "maxBatch": max_batch,
        "inputs": [stream_port(input, first.input_scale, first.input_zero_point)],
        "outputs": [stream_port(output, last.output_scale, last.output_zero_point)],
    }
    (directory / OVERLAY_JSON).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    return read_overlay_json(directory)


def stream_port(spec: TensorSpec, scale: float, zero_point: int) -> dict[str, Any]:
    """How overlay.json describes a tensor of int8 items."""
    return {
        "name": spec.name,
        "datatype": spec.datatype,
        "shape": list(spec.shape),
        "wire": {
            "dtype": "int8",
            "scale": float(np.float32(scale)),
            "zeroPoint": int(zero_point),
            "elements": math.prod(spec.shape[1:]),
        },
    }


def bit_file(design: str, part: str, data: bytes) -> bytes:
    """A .bit file of configuration data in whole words, as Vivado would have named it."""
    header = f"{design};UserID=0XFFFFFFFF;Version=2022.1"
    return encode_bitfile(Bitfile(header, header_part(part), DATE, TIME, data))


def header_part(part: str) -> str:
    """The part as Vivado writes it into a .bit header: short for the 7 series, full for later."""
    lower = part.lower()
    return lower[2:].rpartition("-")[0] if lower.startswith("xc7") else lower
