"""Driving one core: register map, loading a program, running items. Register map: docs/rtl.md.

The same driver runs on a board (registers through MMIO, packets through an AXI DMA) and on the
Verilated core: both are a `CorePort`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import BackendUnavailable, InvalidTensor, LoadError
from .config import CoreConfig
from .program import Program

IDENTITY, VERSION = 0x47544C54, 0x0001_0000
REG_ID, REG_VERSION, REG_ARRAY, REG_ACTIVATIONS = 0x00, 0x04, 0x08, 0x0C
REG_WEIGHTS, REG_PARAMETERS, REG_MAX_LAYERS = 0x10, 0x14, 0x18
REG_CONTROL, REG_STATUS = 0x20, 0x24
REG_LAYERS, REG_TILE, REG_IN_ROWS, REG_IN_BYTES = 0x28, 0x2C, 0x30, 0x34
REG_OUT_ROWS, REG_OUT_BYTES = 0x38, 0x3C
REG_ITEMS, REG_BUSY_CYCLES, REG_LAYER_SELECT, REG_LAYER_CYCLES = 0x40, 0x44, 0x48, 0x4C
CONTROL_RUN, CONTROL_LOAD, CONTROL_RESET = 1, 2, 4
STATUS_IDLE, STATUS_BUSY, STATUS_FAILED = 1, 2, 4

ERRORS = {
    1: "the input ended inside an item",
    2: "a load header is damaged",
    3: "a load section does not fit its memory",
    4: "unknown instruction",
    5: "no program is loaded",
    6: "a load packet ended inside a section",
}
"""Error code (STATUS bits 15..8) -> meaning."""


class CorePort(Protocol):
    """How registers and packets reach a core."""

    def read(self, address: int) -> int:
        """A 32-bit register."""

    def write(self, address: int, value: int) -> None: ...

    def send(self, packet: bytes) -> None:
        """One packet that nothing comes back for. Raises BackendUnavailable when it gets stuck."""

    def exchange(self, packet: bytes, expected: int) -> bytes:
        """One packet out and one of `expected` bytes back, both within the port's own deadline.

        Raises BackendUnavailable when that does not happen.
        """


class CoreDriver:
    """One core with at most one program in it. Not thread-safe.

    Raises LoadError when there is no core of a known version behind `port`.
    """

    def __init__(self, port: CorePort) -> None:
        self._port = port
        identity, version = port.read(REG_ID), port.read(REG_VERSION)
        if identity != IDENTITY or version >> 16 != VERSION >> 16:
            raise LoadError(
                f"no gatelet core of version {VERSION >> 16}.x answers (id 0x{identity:08X}, "
                f"version 0x{version:08X}); check the address and the bitstream"
            )
        self._program: Program | None = None

    @property
    def config(self) -> CoreConfig:
        """The parameters the core in the fabric was built with."""
        array = self._port.read(REG_ARRAY)
        return CoreConfig(
            pe=array & 255,
            simd=array >> 8 & 255,
            requantisers=array >> 16 & 255,
            activation_words=self._port.read(REG_ACTIVATIONS),
            weight_words=self._port.read(REG_WEIGHTS),
            parameter_rows=self._port.read(REG_PARAMETERS),
            layers=self._port.read(REG_MAX_LAYERS),
        )

    def load(self, program: Program, packet_limit: int = 1 << 13) -> None:
        """Put `program` into the core, in packets of at most `packet_limit` bytes.

        Raises LoadError when it was compiled for another core or the core refuses it.
        """
        if program.config != self.config:
            raise LoadError(
                f"the program is for {program.config} but the fabric holds {self.config}; "
                "compile it again for this core"
            )
        self._program = None
        self._port.write(REG_CONTROL, CONTROL_RESET | CONTROL_LOAD)
        for packet in program.load_packets(packet_limit):
            self._port.send(packet)
        if reason := self.failure():
            self.reset()
            raise LoadError(f"the core refused the program: {reason}")
        height, width, channels = program.input
        out_height, out_width, out_channels = program.output
        for register, value in (
            (REG_LAYERS, len(program.instructions)),
            (REG_TILE, program.tile),
            (REG_IN_ROWS, height * width),
            (REG_IN_BYTES, channels),
            (REG_OUT_ROWS, out_height * out_width),
            (REG_OUT_BYTES, out_channels),
            (REG_CONTROL, CONTROL_RUN),
        ):
            self._port.write(register, value)
        self._program = program

    def run(self, items: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
        """int8 [n, height * width * channels] -> int8 [n, height * width * channels].

        Raises InvalidTensor for another shape, LoadError without a program and
        BackendUnavailable when the core does not answer; the core is reset then.
        """
        program = self._program
        if program is None:
            raise LoadError("no program is loaded into the core; load one first")
        if items.dtype != np.int8 or items.ndim != 2 or items.shape[1] != program.in_bytes:
            raise InvalidTensor(
                f"the core takes int8[n, {program.in_bytes}], not {items.dtype}{list(items.shape)}"
            )
        if not len(items):
            return np.zeros((0, program.out_bytes), np.int8)
        expected = len(items) * program.out_bytes
        try:
            answer = self._port.exchange(np.ascontiguousarray(items).tobytes(), expected)
        except BackendUnavailable as error:
            reason = self.failure()
            self.reset()
            raise BackendUnavailable(f"{error}; core: {reason or 'no error'}") from error
        if len(answer) != expected:
            self.reset()
            raise BackendUnavailable(f"the core gave {len(answer)} bytes instead of {expected}")
        return np.frombuffer(answer, np.int8).reshape(len(items), program.out_bytes)

    def failure(self) -> str | None:
        """What the core reports as its error, None when there is none."""
        status = self._port.read(REG_STATUS)
        if not status & STATUS_FAILED:
            return None
        code = status >> 8 & 255
        return ERRORS.get(code, f"error {code}")

    def reset(self) -> None:
        """Stop whatever the core does; memories and the loaded program stay."""
        control = CONTROL_RUN if self._program is not None else 0
        self._port.write(REG_CONTROL, CONTROL_RESET | control)

    def layer_cycles(self) -> tuple[int, ...]:
        """Clock cycles of each layer in the last tile, with its start and end."""
        if self._program is None:
            return ()
        cycles = []
        for layer in range(len(self._program.instructions)):
            self._port.write(REG_LAYER_SELECT, layer)
            cycles.append(self._port.read(REG_LAYER_CYCLES))
        return tuple(cycles)
