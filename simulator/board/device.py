"""A simulated board as a pynq Device: unmodified pynq runs against it.

Importing this module imports pynq and registers the device class with it.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pynq.ps
from pynq.buffer import PynqBuffer
from pynq.metadata.runtime_metadata_parser import RuntimeMetadataParser
from pynq.pl_server.device import Device
from pynq.pl_server.hwh_parser import HWH
from pynq.ps import Clocks
from pynqmetadata.frontends import Metadata

from ...accelerators.fpga.bitfile import parse_bitfile
from ...accelerators.fpga.board import same_part
from ...accelerators.fpga.handoff import read_hardware
from .boards import SimulatedBoard
from .cores import Configuration, DecoupledStream, Decoupler
from .design import Design, read_design
from .dma import AxiDma
from .faults import FaultFile
from .memory import ContiguousMemory
from .registers import Bus, zynq7_clocks, zynqmp_clocks
from .sysfs import SimulatedSysfs

_CLOCK_WINDOW = 0x1000
# A Z7020's 4,045,564 bytes take about 30 ms through the PCAP.
_CONFIGURATION_SECONDS_PER_BYTE = 7.4e-9
# A clock may exceed what timing was closed for by the rounding of its dividers, not more.
_CLOCK_TOLERANCE = 1.01


class SimulatedDevice(Device):  # type: ignore[misc]
    """One board: bus, clocks, contiguous memory, and a fabric that a bitstream configures."""

    _probe_priority_ = 61
    _installed: list[SimulatedDevice] = []  # noqa: RUF012 - shared by design, as pynq probes once

    @classmethod
    def _probe_(cls) -> list[SimulatedDevice]:
        return list(cls._installed)

    def __init__(
        self,
        board: SimulatedBoard,
        faults: FaultFile | None = None,
        state_file: Path | None = None,
        sleep: Callable[[float], object] = time.sleep,
        firmware: Path | None = None,
        sysfs: SimulatedSysfs | None = None,
    ) -> None:
        super().__init__(f"simulated-{board.name}")
        self.board = board
        self.name = board.name
        self.arch = board.arch
        self.capabilities = {"REGISTER_RW": True, "MEMORY_MAPPED": False, "CALLABLE": False}
        self.memory = ContiguousMemory(board.memory_base, board.memory_size)
        self.faults = faults or FaultFile()
        self.design: Design | None = None
        self.fabric: Configuration | None = None
        self.state_file = state_file
        self._sleep = sleep
        self.firmware = firmware
        self._sysfs = sysfs
        self._preload: dict[str, tuple[bytes, str]] = {}
        self.downloads = self.partial_downloads = 0
        self.static = ""
        self._dmas: list[AxiDma] = []
        self._decouplers: dict[str, Decoupler] = {}
        self._clocks = zynq7_clocks() if board.arch == "armv7l" else zynqmp_clocks()
        self._bus = self._empty_bus()

    @property
    def sysfs(self) -> Path | None:
        """Where this board's /sys is; None where nothing is told."""
        return self._sysfs.root if self._sysfs is not None else None

    def read_registers(self, address: int, length: int) -> bytes:
        return self._bus.read(address, length)

    def write_registers(self, address: int, data: bytes) -> None:
        self._bus.write(address, bytes(data))

    def get_bitfile_metadata(self, bitfile_name: str, partial: bool = False) -> Any:
        handoff = Path(bitfile_name).with_suffix(".hwh")
        if not handoff.exists():
            raise RuntimeError(f"no {handoff.name} beside {bitfile_name}")
        if partial:
            return HWH(hwh_data=handoff.read_text("utf-8"))
        parser = RuntimeMetadataParser(Metadata(input=str(handoff)))
        fill_clock_frequencies(parser)
        parser.refresh_hierarchy_dict()
        return parser

    def download(self, bitstream: Any, parser: Any = None) -> None:
        try:
            self._configure(bitstream, parser)
        except OSError:
            self._tell("write error")
            raise
        self._tell("operating")

    def _tell(self, state: str) -> None:
        if self._sysfs is not None:
            self._sysfs.set_state(state)

    def _configure(self, bitstream: Any, parser: Any) -> None:
        if parser is None and not bitstream.partial:
            parser = self.get_bitfile_metadata(bitstream.bitfile_name)
        data, part = self._preloaded(bitstream)
        if not same_part(part, self.board.part):
            raise OSError(
                errno.EIO,
                f"configuration failed, INIT_B low: bitstream for {part}, "
                f"device is {self.board.part}",
            )
        if not bitstream.partial:
            self._check_clock(parser)
        self._sleep(len(data) * _CONFIGURATION_SECONDS_PER_BYTE)
        try:
            fabric = Configuration(data, self.memory, self.faults)
        except ValueError as error:
            raise OSError(errno.EIO, f"configuration failed: {error}") from error
        if fabric.partial != bitstream.partial:
            kinds = ("full", "partial")
            raise OSError(
                errno.EIO,
                f"configuration failed: a {kinds[fabric.partial]} bitstream was given as a "
                f"{kinds[bitstream.partial]} one",
            )
        if bitstream.partial:
            self._exchange(fabric)
        else:
            self._replace(fabric, read_design(parser))
            self._note(str(bitstream.bitfile_name))
        self.post_download(bitstream, parser, self.name)

    def _replace(self, fabric: Configuration, design: Design) -> None:
        self._decouplers = {name: Decoupler(shutdown) for name, shutdown in design.decouplers}
        stream = DecoupledStream(fabric.stream(), tuple(self._decouplers.values()))
        self._dmas = [
            AxiDma(self.memory, stream, cell.length_width, self.faults) for cell in design.dmas
        ]
        self.fabric, self.design = fabric, design
        self.static = fabric.static
        self._attach(fabric, design)
        self.downloads += 1

    def _exchange(self, fabric: Configuration) -> None:
        """What was between the streams goes; on a board, a wrong design may damage the part."""
        if self.design is None or not self.static or self.static != fabric.static:
            raise OSError(
                errno.EIO,
                f"configuration failed: a part of {fabric.static or 'no design'} into "
                f"{self.static or 'no design'}",
            )
        decouplers = tuple(self._decouplers.values())
        clean = all(decoupler.decoupled for decoupler in decouplers)
        for dma in self._dmas:
            dma.exchange(DecoupledStream(fabric.stream(), decouplers), clean=clean)
        self.fabric = fabric
        self._attach(fabric, self.design)
        self.partial_downloads += 1

    def _attach(self, fabric: Configuration, design: Design) -> None:
        bus = self._empty_bus()
        for cell, dma in zip(design.dmas, self._dmas, strict=True):
            bus.attach(cell.base, cell.size, dma)
        for name, base, size in design.others:
            model = self._decouplers.get(name)
            bus.attach(base, size, fabric.registers(name) if model is None else model)
        self._bus = bus

    def _preloaded(self, bitstream: Any) -> tuple[bytes, str]:
        """Configuration data from where pynq has put it, once per overlay, under the file's name.

        On a board that is /lib/firmware, from where the kernel takes it.
        """
        if not bitstream.binfile_name:
            bitstream.binfile_name = Path(bitstream.bitfile_name).stem + ".bin"
            found = _configuration(Path(bitstream.bitfile_name))
            self._preload[bitstream.binfile_name] = found
            if self.firmware is not None:
                bitstream.firmware_path = self.firmware / bitstream.binfile_name
                bitstream.firmware_path.write_bytes(found[0])
        try:
            return self._preload[bitstream.binfile_name]
        except KeyError:
            raise OSError(
                errno.ENOENT, f"direct firmware load for {bitstream.binfile_name} failed"
            ) from None

    def clear_firmware(self) -> None:
        """What somebody else may do on a board: /lib/firmware is empty."""
        self._preload.clear()

    def configure_elsewhere(self) -> None:
        """What another process does to this one: the fabric holds a design nobody here knows."""
        self._bus = self._empty_bus()
        self.design = self.fabric = None
        self.static = ""
        self._note("another process")

    def _note(self, what: str) -> None:
        if self.state_file is not None:
            # A new file each time, as its identity is what others compare.
            beside = self.state_file.with_name(self.state_file.name + ".new")
            beside.write_text(f'{{"bitfile_name": "{what}", "downloads": {self.downloads}}}')
            beside.replace(self.state_file)

    def allocate(self, shape: Any, dtype: Any = "u4", **_: Any) -> PynqBuffer:
        sizes = shape if isinstance(shape, tuple | list) else (shape,)
        nbytes = math.prod(sizes) * np.dtype(dtype).itemsize
        try:
            offset = self.memory.allocate(nbytes)
        except MemoryError as error:
            raise RuntimeError(f"Allocate failed: {error}") from error
        buffer = PynqBuffer(
            tuple(sizes),
            dtype,
            buffer=self.memory.cpu(offset, nbytes),
            device=self,
            device_address=self.memory.base + offset,
            bo=offset,
            coherent=False,
        )
        buffer.memory = self.memory
        # A pointer is returned once; with `freed` set a second free is nothing instead of munmap.
        buffer.pointer = (offset,)
        buffer.return_to = self
        buffer.freed = True
        return buffer

    def return_pointer(self, pointer: tuple[int]) -> None:
        self.memory.free(pointer[0])

    def flush(self, bo: int, offset: int, _vaddr: int, nbytes: int) -> None:
        self.memory.flush(bo + offset, nbytes)

    def invalidate(self, bo: int, offset: int, _vaddr: int, nbytes: int) -> None:
        self.memory.invalidate(bo + offset, nbytes)

    def get_memory(self, _description: Any) -> SimulatedDevice:
        return self

    def _empty_bus(self) -> Bus:
        bus = Bus()
        for base, bank in self._clocks.items():
            bus.attach(base, _CLOCK_WINDOW, bank)
        return bus

    def _check_clock(self, parser: Any) -> None:
        clock = parser.clock_dict.get(0, {})
        closed = clock.get("frequency")
        if not (clock.get("enable") and closed):
            return
        _use_clocks_of(self)
        runs = Clocks.fclk0_mhz
        if runs > closed * _CLOCK_TOLERANCE:
            raise OSError(
                errno.EINVAL, f"PL clock 0 runs at {runs} MHz, timing was closed for {closed} MHz"
            )


def _configuration(path: Path) -> tuple[bytes, str]:
    """Configuration data in the order of a .bit, and the part it is for.

    A .bin is what the kernel's FPGA manager takes: without a header, bytes of each word swapped.
    On a board the silicon knows its part; here the handoff says it.
    """
    content = path.read_bytes()
    if path.suffix == ".bin":
        words = np.frombuffer(content, "<u4").byteswap()
        return words.tobytes(), read_hardware(path.with_suffix(".hwh")).part or ""
    bitfile = parse_bitfile(content, str(path))
    return bitfile.data, bitfile.part


def fill_clock_frequencies(parser: Any) -> None:
    """Put the achieved frequency into `parser.clock_dict` where it is missing.

    pynqmetadata 0.2.0 looks for the names of Zynq UltraScale+ only; pynq 4.0.0 then fails on
    every Zynq-7000 design.
    """
    parameters = parser.ip_dict.get(parser.ps_name, {}).get("parameters", {})
    for index, clock in parser.clock_dict.items():
        name = f"PCW_ACT_FPGA{index}_PERIPHERAL_FREQMHZ"
        if clock.get("frequency") is None and name in parameters:
            clock["frequency"] = float(parameters[name])


def activate(
    board: SimulatedBoard,
    faults: FaultFile | None = None,
    state_file: Path | None = None,
    sleep: Callable[[float], object] = time.sleep,
    firmware: Path | None = None,
    sysfs: SimulatedSysfs | None = None,
) -> SimulatedDevice:
    """A new simulated board as pynq's active device, in place of the one before.

    `state_file` is where it notes what it was configured with, as pynq does on a board. `sleep`
    lets the time of a configuration pass, which goes with the size of the bitstream. `firmware` is
    its /lib/firmware (None: kept in memory), `sysfs` its /sys (None: it has none).
    """
    device = SimulatedDevice(board, faults, state_file, sleep, firmware, sysfs)
    SimulatedDevice._installed[:] = [device]
    Device.active_device = device
    # pynq keeps the clocks of the first device it ever saw.
    if hasattr(Clocks, "_real_instance"):
        del Clocks._real_instance
    _use_clocks_of(device)
    return device


def _use_clocks_of(device: SimulatedDevice) -> None:
    if hasattr(Clocks, "set_device"):
        Clocks.set_device(device)
    else:
        # pynq 3.0 asks no device but the machine which registers its clocks have.
        pynq.ps.CPU_ARCH = device.arch
