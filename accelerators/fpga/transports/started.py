"""HLS cores that fetch and store by themselves: FINN's IODMA, VitisUnified, BNN-PYNQ.

Control at offset 0: start 1, done 2 (cleared by reading), idle 4. Source: UG902, "AXI4-Lite
Slave Interface"; FINN, driver_base.py; BNN-PYNQ, foldedmv-offload.cpp.
"""

from __future__ import annotations

import io

import numpy as np

from ...errors import LoadError
from ..package import StartedCores, WeightFile
from ..packages.files import WEIGHTS_LIMIT, read_bytes
from ..protocol import FabricSick
from . import REGISTER_SECONDS, Workplace
from .registers import Registers

_CONTROL, _START, _DONE, _IDLE, _CONTINUE = 0x00, 0x1, 0x2, 0x4, 0x10
# BNN-PYNQ's window to the memories inside of the network.
_DO_INIT, _LAYER, _MEMORY, _INDEX, _THRESHOLD, _VALUE = 0x28, 0x30, 0x38, 0x40, 0x48, 0x50
_LOADING_SECONDS = 0.05


class StartedEngine:
    """Every core gets its addresses and the number of items, and is started. See `Engine`."""

    def __init__(self, place: Workplace, transport: StartedCores) -> None:
        self._place = place
        self._transport = transport
        self._registers = {core.core: place.registers(core.core) for core in transport.cores}
        self._weights: list[int] = []
        self._pending: set[str] = set()
        self._chained = {core.core for core in transport.cores if core.chained}
        # What is left of older weights in the streams between the cores goes out with one item.
        self.warm_up = any(weight.form == "words" for weight in transport.weights)

    def prepare(self) -> None:
        for weight in self._transport.weights:
            if weight.form == "buffer":
                self._weights.append(self._stored(weight))
            elif weight.form == "words":
                self._write_words(weight)
            else:
                self._write_memory(weight)

    def begin(self, count: int) -> None:
        place = self._place
        addresses = {
            "in": [slot.address for slot in place.sends],
            "out": [slot.address for slot in place.receives],
            "weights": self._weights,
        }
        for name in self._transport.awaited:
            if not self._registers[name].read(_CONTROL) & _IDLE:
                raise FabricSick(f"{place.package.name}: {name} is busy before it was started")
        self._pending = set(self._transport.awaited)
        for core in self._transport.cores:
            registers = self._registers[core.core]
            for pointer in core.pointers:
                registers.write_address(pointer.offset, addresses[pointer.role][pointer.index])
            if core.count is not None:
                registers.write(core.count, count)
            registers.write(_CONTROL, _START)

    def finished(self) -> bool:
        for name in tuple(self._pending):
            if self._registers[name].read(_CONTROL) & _DONE:
                self._pending.discard(name)
                if name in self._chained:
                    self._registers[name].write(_CONTROL, _CONTINUE)
        return not self._pending

    def check(self, count: int) -> None:
        """These cores do not tell how much they stored."""

    def drained(self) -> bool:
        return True

    def stop(self) -> bool:
        # There is no reset: they stop when the fabric is configured anew.
        return False

    def diagnosis(self) -> str:
        waiting = []
        for core in self._transport.cores:
            status = self._registers[core.core].read(_CONTROL)
            waiting.append(f"{core.core} {'idle' if status & _IDLE else 'busy'}")
        return ", ".join(waiting)

    def _stored(self, weight: WeightFile) -> int:
        try:
            array = np.load(io.BytesIO(read_bytes(weight.path, WEIGHTS_LIMIT)), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise LoadError(f"{weight.path}: not an .npy file ({error})") from error
        values = np.asarray(array)
        if values.dtype.kind not in "iuf" or values.size == 0:
            raise LoadError(f"{weight.path}: holds no numbers")
        packed = np.ascontiguousarray(values).astype(np.uint8).reshape(-1)
        buffer = self._place.allocate(packed.size)
        buffer[:] = packed
        buffer.flush()
        return int(buffer.device_address)

    def _write_words(self, weight: WeightFile) -> None:
        cell = self._place.hardware.addressed(weight.core)
        registers = self._place.registers(weight.core)
        try:
            words = [int(text, 16) for text in read_bytes(weight.path, WEIGHTS_LIMIT).split()]
        except ValueError as error:
            raise LoadError(f"{weight.path}: not hexadecimal words ({error})") from error
        if any(not 0 <= word < 1 << 32 for word in words) or 4 * len(words) > cell.size:
            raise LoadError(
                f"{weight.path}: {len(words)} words do not fit the {cell.size} bytes of "
                f"{weight.core}, or are wider than 32 bits"
            )
        for index, word in enumerate(words):
            registers.write(4 * index, word)
        for index, word in enumerate(words):
            if registers.read(4 * index) != word:
                raise FabricSick(f"{weight.core}: weight {index} does not read back")

    def _write_memory(self, weight: WeightFile) -> None:
        raw = read_bytes(weight.path, WEIGHTS_LIMIT)
        if not raw or len(raw) % (8 * weight.per_line):
            raise LoadError(
                f"{weight.path}: {len(raw)} bytes are not whole lines of {weight.per_line} words "
                "of 64 bits"
            )
        registers = self._registers[weight.core]
        registers.write(_DO_INIT, 1)
        registers.write(_LAYER, weight.layer)
        registers.write(_MEMORY, weight.unit)
        for place, value in enumerate(np.frombuffer(raw, "<u8").tolist()):
            index, threshold = divmod(place, weight.per_line)
            registers.write(_INDEX, index)
            registers.write(_THRESHOLD, threshold)
            registers.write(_VALUE, value & 0xFFFF_FFFF)
            registers.write(_VALUE + 4, value >> 32)
            self._run(registers, weight.core)
        registers.write(_DO_INIT, 0)

    def _run(self, registers: Registers, name: str) -> None:
        registers.write(_CONTROL, _START)
        self._place.until(
            lambda: bool(registers.read(_CONTROL) & _DONE),
            f"{name}: does not take its parameters",
            max(REGISTER_SECONDS, _LOADING_SECONDS),
        )
