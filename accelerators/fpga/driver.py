"""Moves items through an overlay with unmodified pynq; every wait has an end.

Runs in the fabric process, on one thread. Not tried on a board: the registers and their order
are those of PG021 and of pynq's own DMA class.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..errors import BackendUnavailable, DeadlineExceeded, LoadError
from .package import CLOCK_TOLERANCE, OverlayPackage, preflight
from .protocol import FabricSick

_LOG = logging.getLogger(__name__)

Items = npt.NDArray[np.int8]

_SEND, _RECEIVE = 0x00, 0x30
_CONTROL, _STATUS, _LENGTH = 0x00, 0x04, 0x28
_RUN, _RESET = 0x1, 0x4
_HALTED, _IDLE = 0x1, 0x2
_ERRORS = {
    0x10: "internal error (length zero, or a packet longer than the buffer)",
    0x20: "slave error (memory answered with an error)",
    0x40: "decode error (address outside memory)",
}
_REGISTER_SECONDS = 0.1
_SPIN_SECONDS = 0.0003
_NAP_SECONDS = 0.0001
# What pynq and the kernel drivers below it raise when a design does not fit or loading fails.
_PYNQ_ERRORS = (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)


def decode_errors(status: int) -> str | None:
    """The names of the error bits in a DMASR value, None when there are none."""
    return ", ".join(name for bit, name in _ERRORS.items() if status & bit) or None


@dataclass(slots=True)
class _Active:
    """The overlay in the fabric, and the buffers that belong to it."""

    package: OverlayPackage
    dma: Any
    registers: Any
    chunk: int
    send: Any
    receive: Any


@dataclass(frozen=True, slots=True)
class FabricCounters:
    """Since the fabric was opened."""

    reconfigurations: int = 0
    transfers: int = 0
    dma_errors: int = 0
    hangs: int = 0


class FabricDriver:
    """The fabric of this machine, held by flock so that two processes never share it.

    `part` is the board's (None: unknown, not checked). A transfer that takes longer than
    `hang_after` seconds is given up: the DMA is reset and the bitstream downloaded again.
    """

    def __init__(
        self,
        lock: Path,
        part: str | None,
        *,
        hang_after: float = 0.5,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lock_path = lock
        self._part = part
        self._hang_after = hang_after
        self._monotonic = monotonic
        self._lock: IO[str] | None = None
        self._device: Any = None
        self._overlays: dict[tuple[object, ...], Any] = {}
        self._limits: dict[tuple[object, ...], int] = {}
        self._active: _Active | None = None
        self._unfinished: float | None = None
        self._broken = False
        self._reconfigurations = self._transfers = self._dma_errors = self._hangs = 0

    @property
    def counters(self) -> FabricCounters:
        return FabricCounters(
            self._reconfigurations, self._transfers, self._dma_errors, self._hangs
        )

    @property
    def loaded(self) -> str | None:
        """Name of the overlay in the fabric."""
        return self._active.package.name if self._active else None

    def open(self) -> None:
        """Take the lock and find pynq's device.

        Raises BackendUnavailable when another process has the fabric, LoadError when pynq or a
        device is missing.
        """
        self._lock = take_lock(self._lock_path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from pynq.pl_server.device import Device

                self._device = Device.active_device
        except ImportError as error:
            self.close()
            raise LoadError(
                f"pynq cannot be imported ({error}); install gatelet[fpga] into the Python "
                "environment of the board"
            ) from error
        except RuntimeError as error:
            self.close()
            raise LoadError(
                f"pynq finds no FPGA on this machine ({error}); run on a board as root, or use "
                "a simulated one with --device"
            ) from error

    def close(self) -> None:
        """Free the buffers and let the lock go. Idempotent."""
        self._leave()
        self._overlays.clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def load(self, package: OverlayPackage) -> None:
        """Check the package and put it into the fabric once. Raises LoadError or FabricSick."""
        self._settle()
        self._limits[package.identity] = preflight(package, self._part)
        self._activate(package)

    def unload(self, package: OverlayPackage) -> None:
        """Forget what is kept for the package."""
        self._overlays.pop(package.identity, None)
        self._limits.pop(package.identity, None)
        if self._active and self._active.package.identity == package.identity:
            self._leave()

    def infer(self, package: OverlayPackage, items: Items, deadline: float | None) -> Items:
        """Send int8 [n, in elements], get int8 [n, out elements]; `deadline` is monotonic.

        Raises DeadlineExceeded at the deadline, FabricSick when the DMA reports an error or a
        transfer hangs; either way the fabric is set right before the next transfer, or by
        `recover`. The package must have been loaded.
        """
        self._settle()
        active = self._in_fabric(package)
        wire = package.outputs[0].wire
        results = np.empty((len(items), wire.elements), np.int8)
        for start in range(0, len(items), active.chunk):
            stop = min(start + active.chunk, len(items))
            self._transfer(active, items[start:stop], results[start:stop], deadline)
        return results

    def recover(self) -> None:
        """Bring the fabric back after a failed transfer. Raises FabricSick when that fails."""
        package = self._active.package if self._active else None
        self._settle()
        if package is not None:
            self._in_fabric(package)

    def _in_fabric(self, package: OverlayPackage) -> _Active:
        try:
            return self._activate(package)
        except LoadError as error:
            raise FabricSick(str(error)) from error

    def _transfer(
        self, active: _Active, items: Items, results: Items, deadline: float | None
    ) -> None:
        if deadline is not None and self._monotonic() >= deadline:
            raise DeadlineExceeded("the deadline passed before the transfer started")
        started = self._monotonic()
        send, receive = active.send, active.receive
        send[: items.size] = items.reshape(-1)
        try:
            # Receive first: the core may answer before the send call returns.
            active.dma.recvchannel.transfer(receive, nbytes=results.size)
            active.dma.sendchannel.transfer(send, nbytes=items.size)
        except _PYNQ_ERRORS as error:
            self._broken = True
            raise FabricSick(f"{active.package.dma}: transfer refused ({error})") from error
        self._unfinished = started
        self._wait(active, started, deadline)
        moved = active.registers.read(_RECEIVE + _LENGTH)
        if moved != results.size:
            self._broken = True
            raise FabricSick(
                f"{active.package.name}: the core gave {moved} bytes, {results.size} were "
                "expected; the package does not describe this bitstream"
            )
        self._unfinished = None
        self._transfers += 1
        receive.invalidate()
        results.reshape(-1)[:] = receive[: results.size]

    def _wait(self, active: _Active, started: float, deadline: float | None) -> None:
        while not self._finished(active):
            now = self._monotonic()
            if now - started >= self._hang_after:
                self._hangs += 1
                self._broken = True
                raise FabricSick(
                    f"{active.package.name}: no end of the transfer after {self._hang_after} s; "
                    "the fabric is being reset"
                )
            if deadline is not None and now >= deadline:
                raise DeadlineExceeded(
                    f"{active.package.name}: the deadline passed during the transfer"
                )
            if now - started > _SPIN_SECONDS:
                time.sleep(_NAP_SECONDS)

    def _finished(self, active: _Active) -> bool:
        status = [active.registers.read(base + _STATUS) for base in (_SEND, _RECEIVE)]
        for direction, value in zip(("send", "receive"), status, strict=True):
            if names := decode_errors(value):
                self._dma_errors += 1
                self._broken = True
                raise FabricSick(f"{active.package.dma} ({direction}): {names}")
        return all(value & _IDLE for value in status)

    def _settle(self) -> None:
        """Wait for an abandoned transfer as long as it may take, then empty what still hangs.

        Whatever is used next is downloaded, since a reset of the DMA does not reach the core.
        """
        active, started = self._active, self._unfinished
        if active is not None and started is not None and not self._broken:
            try:
                self._wait(active, started, None)
            except FabricSick as error:
                _LOG.warning("%s", error)
        broken, self._broken, self._unfinished = self._broken, False, None
        if active is not None and broken:
            try:
                # The DMA must not write into buffers that are about to be given back.
                self._reset(active.registers)
            except FabricSick as error:
                _LOG.warning("%s", error)
            self._leave()

    def _leave(self) -> None:
        active, self._active = self._active, None
        if active is not None:
            active.send.freebuffer()
            active.receive.freebuffer()

    def _activate(self, package: OverlayPackage) -> _Active:
        if self._active is not None and self._active.package.identity == package.identity:
            return self._active
        limit = self._limits.get(package.identity)
        if limit is None:
            raise LoadError(f"{package.name} is not loaded")
        self._leave()
        try:
            self._active = self._download(package, limit)
        except _PYNQ_ERRORS as error:
            self._overlays.pop(package.identity, None)
            raise LoadError(f"{package.bit}: the fabric did not take it ({error})") from error
        return self._active

    def _download(self, package: OverlayPackage, limit: int) -> _Active:
        from pynq import MMIO, Overlay, allocate

        overlay = self._overlays.get(package.identity)
        if overlay is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                overlay = Overlay(str(package.bit), download=False, device=self._device)
            self._overlays[package.identity] = overlay
        set_frequencies(overlay.clock_dict, package.clock_mhz)
        overlay.download()
        self._reconfigurations += 1
        self._check_clock(package)
        cell = overlay.ip_dict[package.dma]
        registers = MMIO(cell["phys_addr"], 0x1000, device=self._device)
        # pynq's channel start spins until the DMA runs: make sure that it does before it looks.
        self._reset(registers)
        self._run(registers)
        dma = overlay
        for name in package.dma.split("/"):
            dma = getattr(dma, name)
        dma.sendchannel.start()
        dma.recvchannel.start()
        item_in, item_out = package.inputs[0].wire.item_bytes, package.outputs[0].wire.item_bytes
        chunk = min(package.max_batch, limit // max(item_in, item_out))
        send = allocate((chunk * item_in,), dtype=np.int8, target=self._device)
        receive = allocate((chunk * item_out,), dtype=np.int8, target=self._device)
        return _Active(package, dma, registers, chunk, send, receive)

    def _check_clock(self, package: OverlayPackage) -> None:
        from pynq import Clocks

        if abs(Clocks.fclk0_mhz - package.clock_mhz) > CLOCK_TOLERANCE * package.clock_mhz:
            Clocks.fclk0_mhz = package.clock_mhz
        runs = Clocks.fclk0_mhz
        if runs > (1 + CLOCK_TOLERANCE) * package.clock_mhz:
            raise ValueError(
                f"PL clock 0 runs at {runs} MHz, the overlay is for {package.clock_mhz} MHz"
            )

    def _reset(self, registers: Any) -> None:
        registers.write(_SEND + _CONTROL, _RESET)
        self._until(
            lambda: not registers.read(_SEND + _CONTROL) & _RESET, "the DMA does not end its reset"
        )

    def _run(self, registers: Any) -> None:
        for base in (_SEND, _RECEIVE):
            registers.write(base + _CONTROL, _RUN)
        self._until(
            lambda: not any(registers.read(b + _STATUS) & _HALTED for b in (_SEND, _RECEIVE)),
            "the DMA does not start",
        )

    def _until(self, condition: Callable[[], bool], otherwise: str) -> None:
        end = self._monotonic() + _REGISTER_SECONDS
        while not condition():
            if self._monotonic() >= end:
                raise FabricSick(otherwise)


def set_frequencies(clocks: dict[int, dict[str, Any]], clock_mhz: float) -> None:
    """Fill in what pynq programs PL clocks with; clock 0 drives the network.

    pynqmetadata 0.2.0 leaves "frequency" empty for the Zynq-7000, and pynq 4.0.0 fails on that.
    """
    for index, clock in clocks.items():
        if index == 0:
            clock["frequency"] = clock_mhz
        elif clock.get("frequency") is None:
            # Nothing of a stream package hangs on the other clocks; pynq's default does.
            clock["frequency"] = 100.0


def take_lock(path: Path) -> IO[str]:
    """An open file with an exclusive flock. Raises BackendUnavailable naming who has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read(32).strip() or "unknown"
        file.close()
        raise BackendUnavailable(
            f"the fabric belongs to process {holder} ({path} is locked); end that one first"
        ) from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
