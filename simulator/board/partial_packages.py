"""Packages that share one design and differ in what a region of it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from ...accelerators.fpga.package import Package
from ...accelerators.fpga.packages import probe
from ...accelerators.fpga.packages.overlay_json import OVERLAY_JSON
from ...accelerators.tensors import TensorSpec
from .bitstream import bit_file, stream_port
from .container import Container, encode_container
from .handoff import LiteCore, StreamDesign, encode_handoff
from .network import DenseLayer, encode_network

DECOUPLER = LiteCore("dfx_decoupler_0", "xilinx.com:ip:dfx_decoupler:1.0", 0x43C00000)


def write_partial_package(
    directory: Path,
    *,
    name: str,
    board: str,
    part: str,
    layers: Sequence[DenseLayer],
    static: str = "shell",
    clock_mhz: float = 100.0,
    decouplers: tuple[LiteCore, ...] = (DECOUPLER,),
    static_padding: int = 0,
    partial_padding: int = 0,
    max_batch: int = 32,
) -> Package:
    """A package of kind "stream": `static`.bit is equal for all of one design, `name`.bit goes
    into its region. Paddings make the bitstreams longer, as far as time is concerned.
    """
    directory.mkdir(parents=True, exist_ok=True)
    design = StreamDesign(static, part, clock_mhz, lite=decouplers)
    (directory / f"{static}.hwh").write_text(encode_handoff(design), "utf-8")
    first, last = layers[0], layers[-1]
    network = {"network": encode_network(layers)}
    hashes = []
    for stem, container, padding in (
        (static, Container({}, static=static), static_padding),
        (name, Container({"kind": "dense"}, (), network, static, True), partial_padding),
    ):
        data = encode_container(container) + bytes(padding - padding % 4)
        content = bit_file(stem, part, data)
        (directory / f"{stem}.bit").write_bytes(content)
        hashes.append(hashlib.sha256(content).hexdigest())
    manifest = {
        "schema": 1, "kind": "stream", "name": name, "board": board.lower(), "part": part,
        "clockMhz": clock_mhz, "bitstream": f"{static}.bit", "handoff": f"{static}.hwh",
        "sha256": hashes[0], "partial": {"bitstream": f"{name}.bit", "sha256": hashes[1]},
        "dma": design.dma, "maxBatch": max_batch,
        "inputs": [
            stream_port(TensorSpec("x", "FP32", (-1, first.weights.shape[0])), first.input_scale,
                        first.input_zero_point)
        ],
        "outputs": [
            stream_port(TensorSpec("y", "FP32", (-1, last.weights.shape[1])), last.output_scale,
                        last.output_zero_point)
        ],
    }  # fmt: skip
    (directory / OVERLAY_JSON).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    return probe(directory)
