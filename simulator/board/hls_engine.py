"""hls4ml's C simulation behind a simulated stream.

The library is what hls4ml's build_lib.sh makes; its `<project>_double` takes and gives doubles,
which hold every code of up to 32 bits exactly.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...accelerators.fpga.elements import Element, hls4ml_element

LIBRARIES_VARIABLE = "GATELET_SIM_ENGINES"


class HlsEngine:
    """See `engines.Engine`."""

    def __init__(self, engine: Mapping[str, Any]) -> None:
        library = ctypes.CDLL(str(library_path(str(engine["library"]))))
        self._function = getattr(library, f"{engine['project']}_double")
        pointer = ctypes.POINTER(ctypes.c_double)
        self._function.argtypes = [pointer, pointer]
        self._function.restype = None
        self._input = hls4ml_element(str(engine["input"]))
        self._output = hls4ml_element(str(engine["output"]))
        self._values = (int(engine["inputs"]), int(engine["outputs"]))

    @property
    def item_bytes(self) -> tuple[int, ...]:
        return (self._values[0] * self._input.bits // 8,)

    def run(self, inputs: Sequence[bytes], parameters: Mapping[str, bytes]) -> list[bytes]:
        taken, given = self._values
        numbers = _numbers(inputs[0], self._input).reshape(-1, taken)
        results = np.zeros((len(numbers), given))
        pointer = ctypes.POINTER(ctypes.c_double)
        for item, result in zip(numbers, results, strict=True):
            one = np.ascontiguousarray(item)
            self._function(one.ctypes.data_as(pointer), result.ctypes.data_as(pointer))
        return [_codes(results, self._output)]


def _numbers(raw: bytes, element: Element) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.ldexp(np.frombuffer(raw, element.container).astype(np.float64), -element.fraction)


def _codes(numbers: np.ndarray[Any, np.dtype[np.float64]], element: Element) -> bytes:
    raw: bytes
    if element.kind == "float":
        raw = numbers.astype(element.container).tobytes()
        return raw
    codes = np.ldexp(numbers, element.fraction)
    if not np.array_equal(codes, np.rint(codes)):
        raise ValueError(f"the simulation gives values that are not of {element.name}")
    raw = codes.astype(np.int64).astype(element.container).tobytes()
    return raw


def library_path(sha256: str) -> Path:
    """A simulation's shared library by its hash, from the folder that the environment names.

    Libraries are never taken from a package: who starts the simulator says which may run.
    Raises ValueError.
    """
    folder = os.environ.get(LIBRARIES_VARIABLE)
    if not folder:
        raise ValueError(f"needs a C simulation; name its folder in {LIBRARIES_VARIABLE}")
    for path in sorted(Path(folder).glob("*.so")):
        if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
            return path
    raise ValueError(f"no library with sha256 {sha256[:16]} in {folder}")
