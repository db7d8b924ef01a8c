"""The real Verilog of gatelet's core behind the simulated streams, run by Verilator.

Needs `verilator` and a C++ compiler. A model is built once per set of sources and parameters and
kept in a cache directory; the environment variable GATELET_RTL_CACHE names another one.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...accelerators.errors import BackendUnavailable, LoadError
from ...accelerators.rtl.config import TOP, VERILOG, CoreConfig, verilog_sources
from ...accelerators.rtl.core import (
    CONTROL_LOAD,
    CONTROL_RUN,
    REG_CONTROL,
    REG_IN_BYTES,
    REG_IN_ROWS,
    REG_OUT_BYTES,
    REG_OUT_ROWS,
    CoreDriver,
)
from ...accelerators.rtl.program import Program

_BUILD_SECONDS = 300
_SEND_CYCLES_PER_BYTE = 64
_FAILURES = {
    -1: "no answer within its cycles",
    -2: "more bytes than expected",
    -3: "stream data changed before it was taken",
}


def missing_tools() -> str | None:
    """What is needed to build the model and not installed; None when nothing is missing."""
    missing = [tool for tool in ("verilator", "g++", "make") if shutil.which(tool) is None]
    return f"{', '.join(missing)} not installed" if missing else None


def build_engine(config: CoreConfig, cache: Path | None = None) -> Path:
    """The shared library with the Verilated core, built if it is not there yet.

    Raises LoadError with the compiler's last words when that fails.
    """
    if problem := missing_tools():
        raise LoadError(f"the RTL core cannot be simulated: {problem}; on Debian: apt install")
    harness = VERILOG / "harness.cpp"
    sources = (*verilog_sources(), harness)
    parameters = [f"-G{name}={value}" for name, value in config.verilog_parameters.items()]
    digest = hashlib.sha256(_version().encode() + json.dumps(parameters).encode())
    for source in sources:
        digest.update(source.read_bytes())
    folder = cache or _default_cache()
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{TOP}-{digest.hexdigest()[:24]}.so"
    # One builds, whoever else comes waits for it and finds the result.
    with open(library.with_suffix(".lock"), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(sources, parameters, library)
    return library


def _build(sources: tuple[Path, ...], parameters: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="gatelet-rtl-") as work:
        command = [
            "verilator", "--cc", "--exe", "--build", "-O3", "-Wno-WIDTH", *parameters,
            "-CFLAGS", "-fPIC -O1", "-LDFLAGS", "-shared", "--top-module", TOP,
            "-Mdir", work, "-o", library.name, *map(str, sources),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise LoadError(f"verilator did not finish within {_BUILD_SECONDS} s") from error
        if done.returncode != 0:
            raise LoadError(f"verilator failed: {(done.stderr or done.stdout).strip()[-2000:]}")
        # Complete or absent, even when this process is killed now.
        partial = library.with_suffix(".partial")
        shutil.copyfile(Path(work) / library.name, partial)
        os.replace(partial, library)


def _version() -> str:
    done = subprocess.run(
        ["verilator", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def _default_cache() -> Path:
    if named := os.environ.get("GATELET_RTL_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "gatelet" / "rtl"


class RtlEngine:
    """One simulated core: registers and streams (a `CorePort`), clock by clock.

    `waits` is in how many percent of the cycles the sender and the receiver pause, from `seed`.
    """

    def __init__(
        self, config: CoreConfig, waits: tuple[int, int] = (0, 0), cache: Path | None = None
    ) -> None:
        self.waits = waits
        self.seed = 1
        self.cycle_limit = 50_000_000
        library = ctypes.CDLL(str(build_engine(config, cache)))
        library.core_new.restype = ctypes.c_void_p
        library.core_delete.argtypes = [ctypes.c_void_p]
        library.core_cycles.argtypes = [ctypes.c_void_p]
        library.core_cycles.restype = ctypes.c_uint64
        library.core_read.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        library.core_read.restype = ctypes.c_uint32
        library.core_write.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32]
        library.core_transfer.argtypes = [
            ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64,
            ctypes.c_uint, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int64,
        ]  # fmt: skip
        library.core_transfer.restype = ctypes.c_int64
        self._library = library
        self._handle: int | None = library.core_new()

    def read(self, address: int) -> int:
        return int(self._library.core_read(self._open(), address))

    def write(self, address: int, value: int) -> None:
        self._library.core_write(self._open(), address, value)

    def send(self, packet: bytes) -> None:
        self._transfer(packet, 0, _SEND_CYCLES_PER_BYTE * len(packet) + 10_000)

    def exchange(self, packet: bytes, expected: int) -> bytes:
        return self._transfer(packet, expected, self.cycle_limit)

    @property
    def cycles(self) -> int:
        """Clock cycles since the core was made."""
        return int(self._library.core_cycles(self._open()))

    def close(self) -> None:
        """Free the core. Idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._library.core_delete(handle)

    def _open(self) -> int:
        if self._handle is None:
            raise BackendUnavailable("this simulated core is closed")
        return self._handle

    def _transfer(self, packet: bytes, expected: int, limit: int) -> bytes:
        answer = ctypes.create_string_buffer(max(1, expected))
        self.seed += 1
        moved = self._library.core_transfer(
            self._open(), packet, len(packet), answer, expected, *self.waits, self.seed, limit
        )
        if moved < 0:
            raise BackendUnavailable(f"the simulated core: {_FAILURES[moved]}")
        return answer.raw[:moved]


class RtlStreamCore:
    """The Verilated core of a simulated bitstream: registers, and the stream between a DMA.

    `engine` is {"core": name of the core in the design, "config": parameters of the build}.
    """

    def __init__(self, engine: Mapping[str, Any], cache: Path | None = None) -> None:
        self.name = str(engine["core"])
        try:
            self._engine = RtlEngine(CoreConfig(**engine["config"]), cache=cache)
        except LoadError as error:
            raise ValueError(str(error)) from error
        self._control = 0

    def read(self, offset: int) -> int:
        return self._engine.read(offset)

    def write(self, offset: int, value: int) -> None:
        if offset == REG_CONTROL:
            self._control = value
        self._engine.write(offset, value)

    def process(self, packet: bytes) -> bytes:
        """Load packets give nothing, others the results of whole items."""
        if self._control & CONTROL_LOAD or not self._control & CONTROL_RUN:
            self._engine.send(packet)
            return b""
        taken = self._engine.read(REG_IN_ROWS) * self._engine.read(REG_IN_BYTES)
        given = self._engine.read(REG_OUT_ROWS) * self._engine.read(REG_OUT_BYTES)
        items = len(packet) // taken if taken else 0
        try:
            return self._engine.exchange(packet, items * given)
        except BackendUnavailable:
            # As on the board: nothing comes out, and the core's status says why.
            return b""


class RtlCore:
    """A loaded core between the two streams of a DMA (a `StreamCore`): packet in, packet out."""

    def __init__(self, program: Program, cache: Path | None = None) -> None:
        self._width = program.in_bytes
        self._driver = CoreDriver(RtlEngine(program.config, cache=cache))
        self._driver.load(program)
        self._pending = b""

    def process(self, packet: bytes) -> bytes:
        stream = self._pending + packet
        whole = len(stream) // self._width * self._width
        self._pending = stream[whole:]
        items = np.frombuffer(stream[:whole], np.int8).reshape(-1, self._width)
        return self._driver.run(items).tobytes()
