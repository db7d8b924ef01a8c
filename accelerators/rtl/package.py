"""A compiled model for gatelet's core, as the files of an overlay package.

`program.bin` is what the core runs; `offload.json` and the ONNX files beside it are what the host
does before and after. program.bin: magic, a JSON header (size as 32 bits, little-endian) and the
raw little-endian arrays of `Program`.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import LoadError
from .config import CoreConfig
from .layers import Window
from .offload import Offload, Patches
from .program import INSTRUCTION_WORDS, LayerCost, Program

MAGIC = b"GTLTPRG1"
PROGRAM_FILE, OFFLOAD_FILE, OVERLAY_FILE = "program.bin", "offload.json", "overlay.json"
BEFORE_FILE, AFTER_FILE = "before.onnx", "after.onnx"
_LIMIT = 64 << 20


def encode_program(program: Program) -> bytes:
    """The content of program.bin; the same program gives the same bytes."""
    header = {
        "config": asdict(program.config),
        "input": list(program.input),
        "output": list(program.output),
        "tile": program.tile,
        "rows": [len(program.instructions), len(program.weights), len(program.parameters)],
        "costs": [[cost.name, cost.cycles, cost.macs] for cost in program.costs],
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    arrays = (program.instructions.astype("<u8"), program.weights, program.parameters.astype("<u8"))
    return b"".join((MAGIC, struct.pack("<I", len(text)), text, *(a.tobytes() for a in arrays)))


def read_program(path: Path, sha256: str | None = None) -> Program:
    """Read program.bin; `sha256` is what it has to have. Raises LoadError."""
    raw = _read(path)
    if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
        raise LoadError(f"{path}: is not the program overlay.json names; build the package again")
    if not raw.startswith(MAGIC):
        raise LoadError(f"{path}: not a program for gatelet's core")
    try:
        (length,) = struct.unpack_from("<I", raw, len(MAGIC))
        start = len(MAGIC) + 4
        header = json.loads(raw[start : start + length])
        config = CoreConfig(**header["config"])
        layers, weights, parameters = (int(count) for count in header["rows"])
        if not (
            0 < layers <= config.layers
            and 0 <= weights <= config.weight_words
            and 0 <= parameters <= config.parameter_rows
        ):
            raise ValueError("more rows than the core has memory")
        shapes = (
            (layers, INSTRUCTION_WORDS),
            (weights, config.pe, config.simd),
            (parameters, config.requantisers),
        )
        arrays: list[npt.NDArray[Any]] = []
        offset = start + length
        for shape, dtype in zip(shapes, ("<u8", "u1", "<u8"), strict=True):
            count = math.prod(shape)
            arrays.append(np.frombuffer(raw, dtype, count, offset).reshape(shape))
            offset += arrays[-1].nbytes
        if offset != len(raw):
            raise ValueError(f"{len(raw) - offset} bytes too many")
        tile = int(header["tile"])
        costs = tuple(LayerCost(str(n), int(c), int(m)) for n, c, m in header["costs"])
        return Program(
            config, _shape(header["input"]), _shape(header["output"]), tile,
            arrays[0], arrays[1], arrays[2], costs,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, struct.error, RecursionError) as error:
        raise LoadError(f"{path}: damaged program ({error}); build the package again") from error


def _shape(value: Any) -> tuple[int, int, int]:
    height, width, channels = (int(size) for size in value)
    if min(height, width, channels) < 1 or max(height, width, channels) > 65535:
        raise ValueError(f"bad shape {value}")
    return height, width, channels


@dataclass(frozen=True, slots=True)
class Halves:
    """What the host does around the core: ONNX files, and their tensors at the cut."""

    offload: Offload
    before: Path | None
    after: Path | None


def write_offload(directory: Path, offload: Offload) -> str:
    """Write program.bin, offload.json and the ONNX files; gives the sha256 of program.bin."""
    directory.mkdir(parents=True, exist_ok=True)
    content = encode_program(offload.program)
    (directory / PROGRAM_FILE).write_bytes(content)
    patches = None
    if offload.patches is not None:
        patches = {"zero": offload.patches.zero, **asdict(offload.patches.window)}
    document = {
        "source": offload.source,
        "target": offload.target,
        "sourceShape": list(offload.source_shape),
        "targetShape": list(offload.target_shape),
        "before": BEFORE_FILE if offload.before is not None else None,
        "after": AFTER_FILE if offload.after is not None else None,
        "patches": patches,
        "coreUs": round(offload.core_us, 3),
        "cpuUs": round(offload.cpu_us, 3),
    }
    (directory / OFFLOAD_FILE).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    for name, part in ((BEFORE_FILE, offload.before), (AFTER_FILE, offload.after)):
        if part is not None:
            (directory / name).write_bytes(part)
    return hashlib.sha256(content).hexdigest()


def write_package(
    directory: Path, offload: Offload, *, name: str, board: str, part: str, clock_mhz: float,
    dma: str = "axi_dma_0", core: str = "core", max_batch: int = 64,
) -> None:  # fmt: skip
    """Describe `offload` beside `directory`/`name`.bit and .hwh, as the Vivado script makes them.

    Writes overlay.json and what `write_offload` does. Raises OSError without the bitstream.
    """
    bitstream = (directory / f"{name}.bit").read_bytes()
    program_sha256 = write_offload(directory, offload)

    def port(tensor: str, size: int) -> dict[str, Any]:
        return {"name": tensor, "datatype": "INT8", "shape": [-1, size]}

    manifest = {
        "schema": 1,
        "kind": "gatelet-rtl",
        "name": name,
        "board": board.lower(),
        "part": part,
        "clockMhz": clock_mhz,
        "bitstream": f"{name}.bit",
        "handoff": f"{name}.hwh",
        "sha256": hashlib.sha256(bitstream).hexdigest(),
        "dma": dma,
        "core": core,
        "program": PROGRAM_FILE,
        "programSha256": program_sha256,
        "maxBatch": max_batch,
        "inputs": [port(offload.source, offload.program.in_bytes)],
        "outputs": [port(offload.target, offload.program.out_bytes)],
    }
    (directory / OVERLAY_FILE).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")


def read_offload(directory: Path) -> Halves:
    """Read what `write_offload` wrote. Raises LoadError."""
    path = directory / OFFLOAD_FILE
    program = read_program(directory / PROGRAM_FILE)
    try:
        document = json.loads(_read(path))
        patches = None
        if (described := document["patches"]) is not None:
            window = Window(
                **{
                    name: (int(described[name][0]), int(described[name][1]))
                    for name in ("kernel", "output", "stride", "dilation", "pad")
                }
            )
            patches = Patches(window, int(described["zero"]))
        offload = Offload(
            program=program,
            source=str(document["source"]),
            target=str(document["target"]),
            source_shape=tuple(int(size) for size in document["sourceShape"]),
            target_shape=tuple(int(size) for size in document["targetShape"]),
            before=None,
            after=None,
            core_us=float(document["coreUs"]),
            cpu_us=float(document["cpuUs"]),
            patches=patches,
        )
        names = (document["before"], document["after"])
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise LoadError(f"{path}: damaged ({error}); build the package again") from error
    if names[0] not in (None, BEFORE_FILE) or names[1] not in (None, AFTER_FILE):
        raise LoadError(f"{path}: names other files than {BEFORE_FILE} and {AFTER_FILE}")
    before, after = (directory / name if name else None for name in names)
    return Halves(offload, before, after)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_LIMIT + 1)
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror or error}; the package is incomplete") from error
    if len(content) > _LIMIT:
        raise LoadError(f"{path}: larger than {_LIMIT} bytes")
    return content
