"""What computes behind the streams of the simulated fabric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .ap_core import ApCore, Dataflow
from .container import MAGIC as CONTAINER_MAGIC
from .container import Container, decode_container
from .engines import DenseEngine, Engine, open_engine
from .faults import FaultFile
from .memory import ContiguousMemory
from .network import MAGIC, decode_network
from .registers import RegisterBank, RegisterModel


class StreamCore(Protocol):
    """A core between the two streams of a DMA: takes a packet, gives a packet."""

    def process(self, packet: bytes) -> bytes:
        """The output for one input packet; empty when nothing comes out (yet)."""


class LoopbackCore:
    """Gives back what it takes."""

    def process(self, packet: bytes) -> bytes:
        return packet


class EngineStream:
    """An engine with one input and one output between the streams. Waits for whole items."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pending = b""

    def process(self, packet: bytes) -> bytes:
        stream = self._pending + packet
        (size,) = self._engine.item_bytes
        whole = len(stream) // size * size
        self._pending = stream[whole:]
        return self._engine.run([stream[:whole]], {})[0] if whole else b""


class StartedStream:
    """An engine between the streams that takes items after it was started, as many as it was told.

    Registers as in `ap_core`; `described`: {"name", "count", "chained"}.
    """

    def __init__(self, engine: Engine, described: Mapping[str, Any]) -> None:
        self._engine = engine
        self._count = int(described["count"])
        self._chained = bool(described.get("chained"))
        self._values: dict[int, int] = {}
        self._pending = b""
        self._running = self._done = False

    def process(self, packet: bytes) -> bytes:
        self._pending += packet
        (size,) = self._engine.item_bytes
        wanted = self._values.get(self._count, 0) * size
        if not self._running or not wanted or len(self._pending) < wanted:
            return b""
        taken, self._pending = self._pending[:wanted], self._pending[wanted:]
        self._running, self._done = False, True
        return self._engine.run([taken], {})[0]

    def read(self, offset: int) -> int:
        if offset:
            return self._values.get(offset, 0)
        idle = not self._running and not (self._chained and self._done)
        status = 1 * self._running | 2 * self._done | 4 * idle
        self._done = self._done and self._chained
        return status

    def write(self, offset: int, value: int) -> None:
        if offset:
            self._values[offset] = value
        elif value & 0x10 and self._chained:
            self._done = False
        elif value & 1 and not (self._chained and self._done):
            self._running = True


class DecoupledStream:
    """A core that is cut off while its decoupler says so: what comes meanwhile is lost."""

    def __init__(self, core: StreamCore, decouplers: Sequence[Decoupler]) -> None:
        self._core = core
        self._decouplers = decouplers

    def process(self, packet: bytes) -> bytes:
        cut = any(decoupler.decoupled for decoupler in self._decouplers)
        return b"" if cut else self._core.process(packet)


class Decoupler:
    """The DFX Decoupler and the DFX AXI Shutdown Manager (PG375, PG376): bit 0 at offset 0.

    The shutdown manager reads as 0xF once nothing is under way, the decoupler as what was written.
    A `deaf` one does nothing.
    """

    def __init__(self, shutdown: bool = False) -> None:
        self._shut = 0xF if shutdown else 1
        self.decoupled = self.deaf = False

    def read(self, offset: int) -> int:
        return self._shut if self.decoupled and offset == 0 else 0

    def write(self, offset: int, value: int) -> None:
        if offset == 0 and not self.deaf:
            self.decoupled = bool(value & 1)


class Configuration:
    """The fabric as configuration data makes it: a stream core, and registers by core name.

    A network container, a container with an engine, else a loopback. Raises ValueError when the
    data is damaged.
    """

    def __init__(self, data: bytes, memory: ContiguousMemory, faults: FaultFile) -> None:
        self._banks: dict[str, RegisterBank] = {}
        self._registers: dict[str, RegisterModel] = {}
        self._stream: StreamCore = LoopbackCore()
        self.static, self.partial = "", False
        if data.startswith(MAGIC):
            self._stream = EngineStream(DenseEngine(decode_network(data)))
        elif data.startswith(CONTAINER_MAGIC):
            self._open(decode_container(data), memory, faults)

    def stream(self) -> StreamCore:
        """What is between the channels of a DMA."""
        return self._stream

    def registers(self, name: str) -> RegisterModel:
        """The registers of the core called `name`; plain ones where nothing listens."""
        return self._registers.get(name) or self._banks.setdefault(name, RegisterBank())

    def _open(self, container: Container, memory: ContiguousMemory, faults: FaultFile) -> None:
        self.static, self.partial = container.static, container.partial
        if not container.engine:
            return
        if container.engine.get("kind") == "rtl":
            from .rtl_core import RtlStreamCore

            core = RtlStreamCore(container.engine)
            self._stream = core
            self._registers[core.name] = core
            return
        engine = open_engine(container)
        if not container.cores:
            self._stream = EngineStream(engine)
            return
        if container.cores[0].get("stream"):
            started = StartedStream(engine, container.cores[0])
            self._stream = started
            self._registers[str(container.cores[0]["name"])] = started
            return
        dataflow = Dataflow(engine, memory, faults, self._banks)
        for described in container.cores:
            self._registers[str(described["name"])] = ApCore(described, dataflow)
