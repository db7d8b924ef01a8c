"""HLS cores with ap_ctrl_hs that fetch and store by themselves: FINN's IODMA and its like.

Control at 0: start 1, done 2 (cleared by reading), idle 4. Source: UG902, "AXI4-Lite Slave
Interface". One with ap_ctrl_chain stays done, and does not start again, until continue (16) is
written (UG1399, "Block-Level Control Protocols"). All cores of a design drive one engine: it runs
when each has been started.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from .engines import Engine
from .faults import Fault, FaultFile, spoil
from .memory import ContiguousMemory
from .registers import RegisterBank

_START, _DONE, _IDLE, _CONTINUE = 0x1, 0x2, 0x4, 0x10
# BNN-PYNQ's window to the memories of the network.
_DO_INIT, _PLACE, _VALUE = 0x28, (0x30, 0x38, 0x40, 0x48), 0x50


class Dataflow:
    """The engine between the cores, and the cores' memory. Bus addresses are physical."""

    def __init__(
        self,
        engine: Engine,
        memory: ContiguousMemory,
        faults: FaultFile,
        words: Mapping[str, RegisterBank],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.memory = memory
        self.words = words
        self.cores: list[ApCore] = []
        self._faults = faults
        self._monotonic = monotonic
        self._wedged = False
        self._ready_at: float | None = None
        self._fault = Fault()

    def started(self) -> None:
        """A core was started: run when it was the last."""
        if self._wedged or not all(core.running for core in self.cores):
            return
        self._fault = self._faults.next()
        if self._fault.kind in ("hang", "stuck"):
            self._wedged = True
        elif self._fault.kind == "slow":
            self._ready_at = self._monotonic() + self._fault.seconds
        else:
            self._run()

    def advance(self) -> None:
        if self._ready_at is not None and self._monotonic() >= self._ready_at:
            self._ready_at = None
            self._run()

    def _run(self) -> None:
        counts = {core.count for core in self.cores}
        if len(counts) != 1:
            # One side waits for items that the other never moves.
            self._wedged = True
            return
        (count,) = counts
        places = {
            (role, index): core.address(offset)
            for core in self.cores
            for offset, role, index in core.pointers
        }
        inputs = [
            self.memory.bus_read(places["in", index], count * size)
            for index, size in enumerate(self.engine.item_bytes)
        ]
        parameters = {name: bank.content() for name, bank in self.words.items()}
        for core in self.cores:
            for offset, role, index in core.pointers:
                if role == "weights":
                    size = core.weight_bytes
                    parameters[f"weights{index}"] = self.memory.bus_read(core.address(offset), size)
        outputs = self.engine.run(inputs, parameters)
        for index, output in enumerate(outputs):
            self.memory.bus_write(places["out", index], spoil(output, self._fault))
        for core in self.cores:
            core.finish()


class ApCore:
    """One core's registers."""

    def __init__(self, described: Mapping[str, Any], dataflow: Dataflow) -> None:
        self.pointers = [(int(o), str(role), int(i)) for o, role, i in described["pointers"]]
        self.weight_bytes = int(described.get("weightBytes", 0))
        self.written: dict[tuple[int, ...], int] = {}
        """BNN-PYNQ: (layer, unit, index, threshold) -> value."""
        self._count = described.get("count")
        self._window = bool(described.get("window"))
        self._chained = bool(described.get("chained"))
        self._values: dict[int, int] = {}
        self._dataflow = dataflow
        self._done = False
        self.running = False
        dataflow.cores.append(self)

    @property
    def count(self) -> int:
        return 1 if self._count is None else self._values.get(int(self._count), 0)

    def address(self, offset: int) -> int:
        return self._values.get(offset + 4, 0) << 32 | self._values.get(offset, 0)

    def finish(self) -> None:
        self.running, self._done = False, True

    def read(self, offset: int) -> int:
        if offset:
            return self._values.get(offset, 0)
        self._dataflow.advance()
        if self._chained:
            waits = self.running or self._done
            return (_START if self.running else 0 if waits else _IDLE) | _DONE * self._done
        done, self._done = self._done, False
        return (_START if self.running else _IDLE) | (_DONE if done else 0)

    def write(self, offset: int, value: int) -> None:
        if offset:
            self._values[offset] = value
        elif value & _CONTINUE and self._chained:
            self._done = False
        elif value & _START and not self.running and not (self._chained and self._done):
            if self._window and self._values.get(_DO_INIT):
                place = tuple(self._values.get(part, 0) for part in _PLACE)
                self.written[place] = self.address(_VALUE)
                self._done = True
                return
            self.running = True
            self._dataflow.started()
