"""Packages as FINN, BNN-PYNQ, hls4ml and our own build leave them, for simulated boards.

The files have the layout and the declarations of the real tools; the bitstream carries an engine
for the simulated fabric instead of frames.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...accelerators.fpga.elements import finn_element
from ...accelerators.fpga.package import Package
from ...accelerators.fpga.packages import probe
from ...accelerators.rtl.offload import Offload
from ...accelerators.rtl.package import write_package
from .bitstream import bit_file
from .container import Container, encode_container
from .handoff import LiteCore, StreamDesign, encode_handoff

_CONTROL = (("CTRL", 0x00), ("GIER", 0x04), ("IP_IER", 0x08), ("IP_ISR", 0x0C))
_BASE = 0x43C00000


@dataclass(frozen=True, slots=True)
class FinnTensor:
    """An input or output of a FINN network, with 1 as the first size of both shapes.

    `datatype` is QONNX's name; `folded` ends with what is packed together.
    """

    datatype: str
    normal: tuple[int, ...]
    folded: tuple[int, ...]

    @property
    def packed(self) -> tuple[int, ...]:
        bits = finn_element(self.datatype).bits
        return (*self.folded[:-1], -(-self.folded[-1] * bits // 8))

    def coding(self) -> dict[str, Any]:
        return {
            "element": self.datatype,
            "shape": list(self.normal[1:]),
            "inner": self.folded[-1],
        }


def write_bitstream(
    path: Path, part: str, container: Container, design: StreamDesign, padding: int = 0
) -> None:
    """`path` (.bit) and the .hwh beside it. `padding` bytes make the file longer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = encode_container(container) + bytes(padding - padding % 4)
    path.write_bytes(bit_file(design.name, part, content))
    path.with_suffix(".hwh").write_text(encode_handoff(design), "utf-8")


def write_finn_package(
    directory: Path,
    model: bytes,
    inputs: Sequence[FinnTensor],
    outputs: Sequence[FinnTensor],
    *,
    part: str,
    clock_mhz: float = 100.0,
    plus: bool = False,
    runtime_weights: Mapping[str, tuple[str, str, str]] | None = None,
    external_weights: Mapping[str, tuple[bytes, str, str]] | None = None,
) -> Package:
    """A deployment package of FINN, or with `plus` of FINN+.

    `model` is the ONNX or QONNX graph behind the IODMAs. `runtime_weights`: file name in
    driver/runtime_weights -> (its text, initializer of `model`, numpy dtype of the words).
    `external_weights`: name of the DMA -> (content of the .npy, initializer, numpy dtype).
    """
    external = dict(external_weights or {})
    names = {
        "in": [f"idma{index}" for index in range(len(inputs))],
        "out": [f"odma{index}" for index in range(len(outputs))],
        "weights": list(external),
    }
    parameters: dict[str, list[str]] = {}
    lite: list[LiteCore] = []
    cores = []
    for role, role_names in names.items():
        pointer = "out_V_1" if role == "out" else "in0_V_1"
        for index, name in enumerate(role_names):
            lite.append(
                LiteCore(
                    name,
                    f"xilinx_finn:finn:StreamingDataflowPartition_{len(lite)}:1.0",
                    _BASE + len(lite) * 0x10000,
                    (*_CONTROL, (pointer, 0x10), (pointer[:-1] + "2", 0x14), ("numReps", 0x1C)),
                    masters_memory=True,
                )
            )
            core = {"name": name, "pointers": [[0x10, role, index]], "count": 0x1C}
            if role == "weights":
                content, initializer, dtype = external[name]
                parameters[f"weights{index}"] = [initializer, dtype]
                # An .npy of bytes ends with them.
                core["weightBytes"] = len(content) - _npy_header(content)
            cores.append(core)
    folder = directory / "driver" / "runtime_weights"
    for file, (text, initializer, dtype) in (runtime_weights or {}).items():
        name = f"StreamingDataflowPartition_{int(file.split('_')[0])}"
        lite.append(LiteCore(name, f"xilinx_finn:finn:{name}:1.0", _BASE + len(lite) * 0x10000))
        parameters[name] = [initializer, dtype]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text, "ascii")
    for name, (content, _, _) in external.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.npy").write_bytes(content)
    engine = {
        "kind": "graph",
        "inputs": [tensor.coding() for tensor in inputs],
        "outputs": [tensor.coding() for tensor in outputs],
        "parameters": parameters,
    }
    design = StreamDesign("finn_zynq_link", part, clock_mhz, dma=None, lite=tuple(lite))
    container = Container(engine, tuple(cores), {"model": model})
    write_bitstream(directory / "bitfile" / "finn-accel.bit", part, container, design)
    shapes: dict[str, Any] = {
        "num_inputs": len(inputs),
        "num_outputs": len(outputs),
        "number_of_external_weights": len(external),
    }
    for side, tensors in (("i", inputs), ("o", outputs)):
        shapes[f"{side}dt"] = [f"DataType['{tensor.datatype}']" for tensor in tensors]
        for form in ("normal", "folded", "packed"):
            shapes[f"{side}shape_{form}"] = [getattr(tensor, form) for tensor in tensors]
    driver = directory / "driver"
    driver.mkdir(parents=True, exist_ok=True)
    if plus:
        shapes |= {"idma_names": names["in"], "odma_names": names["out"]}
        information = {
            "driver_type": "FINNDMAOverlay",
            "platform": "zynq-iodma",
            "fclk_mhz": clock_mhz,
            "io_shape_dict": shapes,
        }
        text = json.dumps({"driver_information": information}, indent=2)
        (driver / "settings.json").write_text(text, "utf-8")
    else:
        shapes |= {"input_dma_name": names["in"], "output_dma_name": names["out"]}
        (driver / "driver.py").write_text(_driver(shapes), "utf-8")
    return probe(directory)


def _npy_header(content: bytes) -> int:
    return 10 + int.from_bytes(content[8:10], "little")


def _driver(shapes: Mapping[str, Any]) -> str:
    lines = []
    for key, value in shapes.items():
        # FINN writes types as DataType['...'], which is no literal.
        shown = f"[{', '.join(value)}]" if key in ("idt", "odt") else repr(value)
        lines.append(f'    "{key}" : {shown},')
    body = "\n".join(lines)
    return (
        'raise SystemExit("the driver of a package was run")\n\n'
        f"io_shape_dict = {{\n    # written as FINN does\n{body}\n}}\n"
    )


def write_bnn_pynq_package(
    directory: Path,
    model: bytes,
    part: str,
    parameters: Mapping[str, bytes],
    network: str = "lfcW1A1",
) -> Package:
    """An overlay like BNN-PYNQ's `network`; `parameters` file name -> content.

    `model` takes [n, 784] of -1 and 1 and gives [n, 64] bits, or for the convolutional networks
    takes [n, 32, 32, 3] and gives [n, 64] of 16 bits.
    """
    core = LiteCore(
        "BlackBoxJam_0",
        "xilinx.com:hls:BlackBoxJam:1.0",
        _BASE,
        (
            *_CONTROL, ("in_V_1", 0x10), ("in_V_2", 0x14), ("out_V_1", 0x1C), ("out_V_2", 0x20),
            ("doInit", 0x28), ("targetLayer", 0x30), ("targetMem", 0x38), ("targetInd", 0x40),
            ("targetThresh", 0x48), ("val_V_1", 0x50), ("val_V_2", 0x54), ("numReps", 0x5C),
        ),
        masters_memory=True,
    )  # fmt: skip
    engine = {
        "kind": "graph",
        "inputs": [{"element": "BIPOLAR", "shape": [784], "inner": 784, "pad": 6}],
        "outputs": [{"element": "BINARY", "shape": [64], "inner": 64}],
    }
    if network.startswith("cnv"):
        engine |= {
            "inputs": [{"element": "FIXED<8,1>", "shape": [32, 32, 3], "inner": 3072}],
            "outputs": [{"element": "INT16", "shape": [64], "inner": 64}],
        }
    described = {
        "name": core.name,
        "pointers": [[0x10, "in", 0], [0x1C, "out", 0]],
        "count": 0x5C,
        "window": True,
    }
    design = StreamDesign("procsys", part, 100.0, dma=None, lite=(core,))
    path = directory / f"{network}-pynqZ1-Z2.bit"
    write_bitstream(path, part, Container(engine, (described,), {"model": model}), design)
    for name, content in parameters.items():
        (directory / name).write_bytes(content)
    return probe(directory)


def write_hls4ml_bitstream(
    directory: Path,
    project: str,
    library: Path,
    *,
    part: str,
    input: tuple[str, int],
    output: tuple[str, int],
    dma_length_width: int = 26,
) -> None:
    """The .bit and .hwh that would lie beside hls4ml_config.yml.

    `input` and `output` are precision and values per item; `library` is the compiled C simulation,
    which the simulated board looks up by its hash.
    """
    engine = {
        "kind": "hls4ml",
        "library": hashlib.sha256(library.read_bytes()).hexdigest(),
        "project": project,
        "input": input[0],
        "inputs": input[1],
        "output": output[0],
        "outputs": output[1],
    }
    design = StreamDesign(
        "design_1",
        part,
        100.0,
        dma_length_width,
        dma="hier_0/axi_dma_0",
        core=f"hier_0/{project}_axi_0",
        core_vlnv=f"xilinx.com:hls:{project}_axi:1.0",
    )
    write_bitstream(directory / "hls4ml_nn.bit", part, Container(engine), design)


def write_rtl_package(
    directory: Path,
    offload: Offload,
    *,
    name: str,
    board: str,
    part: str,
    clock_mhz: float = 100.0,
    max_batch: int = 64,
) -> Package:
    """A package of gatelet's own core with the program of `offload`."""
    program = offload.program
    engine = {"kind": "rtl", "core": "core", "config": asdict(program.config)}
    design = StreamDesign(
        "gatelet",
        part,
        clock_mhz,
        23,
        core="core",
        core_vlnv="gatelet:rtl:gatelet_core:1.0",
        lite=(LiteCore("core", "gatelet:rtl:gatelet_core:1.0", _BASE, size=0x1000),),
    )
    write_bitstream(directory / f"{name}.bit", part, Container(engine), design)
    write_package(
        directory, offload, name=name, board=board, part=part, clock_mhz=clock_mhz,
        max_batch=max_batch,
    )  # fmt: skip
    return probe(directory)
