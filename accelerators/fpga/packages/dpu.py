"""Packages of DPU-PYNQ: an overlay (.bit, .hwh, .xclbin) and a compiled .xmodel.

The graph is inside of the .xmodel, which only Vitis AI's own library reads: shapes come from
model.json.
"""

from __future__ import annotations

import math
from pathlib import Path

from ...errors import LoadError
from ..elements import finn_element
from ..package import Package, PackedWire, Port, Signature, VartRunner
from .files import BITSTREAM_LIMIT, read_bitstream, sha256_of
from .signature import check_spec


def find_xmodel(files: list[Path]) -> Path | None:
    return next((path for path in files if path.suffix == ".xmodel"), None)


def read_dpu(directory: Path, files: list[Path], signature: Signature) -> Package:
    """Read a DPU package. Raises LoadError."""
    xmodel = find_xmodel(files)
    if xmodel is None:
        raise LoadError(f"{directory}: no .xmodel; compile the network for this DPU with Vitis AI")
    found = read_bitstream(directory, files, "dpu.bit")
    if found.bit.with_suffix(".xclbin") not in files:
        raise LoadError(f"{found.bit}: {found.bit.stem}.xclbin is missing beside it")
    number = finn_element("FLOAT32")
    inputs, outputs = (
        tuple(
            Port(
                check_spec(spec, None, what, str(directory)),
                PackedWire(number, 1, math.prod(spec.shape[1:])),
            )
            for spec in specs
        )
        for what, specs in (("input", signature.inputs), ("output", signature.outputs))
    )
    return Package(
        kind="dpu",
        name=xmodel.stem,
        directory=directory,
        bit=found.bit,
        hwh=found.hwh,
        board=None,
        part=found.part,
        clock_mhz=found.hardware.clock_mhz or 100.0,
        transport=VartRunner(xmodel, sha256_of(xmodel, BITSTREAM_LIMIT)),
        inputs=inputs,
        outputs=outputs,
        max_batch=1,
        sha256=found.sha256,
        bitstream_bytes=found.size,
    )
