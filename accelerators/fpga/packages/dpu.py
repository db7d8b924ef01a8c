"""Packages of DPU-PYNQ: an overlay (.bit, .hwh, .xclbin) and a compiled .xmodel.

The graph is inside of the .xmodel, which only Vitis AI's own library reads: shapes come from
model.json.
"""

from __future__ import annotations

import math
from pathlib import Path

from ...errors import LoadError
from ..bitstream_file import BITSTREAM_LIMIT
from ..elements import finn_element
from ..package import Package, PackedWire, Port, Signature, VartRunner
from .files import read_bitstream, sha256_of
from .signature import check_spec


def find_xmodel(files: list[Path]) -> Path | None:
    return next((path for path in files if path.suffix == ".xmodel"), None)


def read_dpu(directory: Path, files: list[Path], signature: Signature) -> Package:
    """Read a DPU package. Raises LoadError."""
    xmodel = find_xmodel(files)
    if xmodel is None:
        raise LoadError(f"{directory}: no .xmodel; compile the network for this DPU with Vitis AI")
    found = read_bitstream(directory, files, "dpu")
    if found.hwh.with_suffix(".xclbin") not in files:
        raise LoadError(f"{found.bit}: {found.stem}.xclbin is missing beside it")
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
    return found.package(
        "dpu",
        directory,
        VartRunner(xmodel, sha256_of(xmodel, BITSTREAM_LIMIT)),
        inputs,
        outputs,
        name=xmodel.stem,
        max_batch=1,
    )
