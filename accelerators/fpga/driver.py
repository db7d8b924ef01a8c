"""Moves items through overlays; every wait has an end.

Runs in the fabric process, on one thread at a time, on pynq's Overlay, MMIO and buffers. Not tried
on a board; the register maps are those in `transports`.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import BackendUnavailable, DeadlineExceeded, LoadError
from .active import Active, arrange
from .configuring import Configurator
from .job import Job, Transfer
from .machine import cma_bytes, take_lock
from .package import Package
from .packing import Bytes
from .preflight import preflight
from .protocol import FabricSick
from .sensors import Readings, Sensors, pl_clocks, sysfs_of
from .shelf import Shelf
from .transports import require_runtime

_LOG = logging.getLogger(__name__)

_SPIN_SECONDS = 0.0003
_NAP_SECONDS = 0.0001
# What pynq and the kernel drivers below it raise when a design does not fit or loading fails.
_PYNQ_ERRORS = (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True, slots=True)
class FabricCounters:
    """Since the fabric was opened. `replaced`: found configured by another process.

    `resets` of cores and DMAs after failures; `configuring` is in seconds; `partial` configurations
    come on top of the full ones in `reconfigurations`.
    """

    reconfigurations: int = 0
    transfers: int = 0
    dma_errors: int = 0
    hangs: int = 0
    replaced: int = 0
    resets: int = 0
    configuring: float = 0.0
    partial: int = 0


class FabricDriver:
    """The fabric of this machine, held by flock so that two processes never share it.

    `part` is the board's (None: unknown, not checked). A transfer that takes longer than
    `hang_after` seconds is given up: the cores are reset and the bitstream downloaded again.
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
        self._fabric: Configurator | None = None
        self._limits: dict[tuple[object, ...], int] = {}
        self._active: Active | None = None
        # Buffers that cores may still write to, until the fabric is configured anew.
        self._parked: list[Any] = []
        self._unfinished: float | None = None
        # All results of the last transfer are there; whether its inputs were read, nobody asked.
        self._draining = False
        self._broken = False
        self._transfers = self._dma_errors = self._hangs = self._resets = 0
        self._trouble: str | None = None
        self._sensors: Sensors | None = None

    @property
    def counters(self) -> FabricCounters:
        fabric = self._fabric
        full, partial, replaced, seconds = (
            (fabric.full, fabric.partial, fabric.replaced, fabric.seconds)
            if fabric is not None
            else (0, 0, 0, 0.0)
        )
        return FabricCounters(
            full, self._transfers, self._dma_errors, self._hangs, replaced, self._resets,
            round(seconds, 6), partial,
        )  # fmt: skip

    @property
    def trouble(self) -> str | None:
        """What the last transfer failed of, until one succeeds again."""
        return self._trouble

    def readings(self) -> Readings:
        """Temperatures and clocks of the board. For any thread; no need to have the fabric."""
        return self._sensors.read() if self._sensors is not None else Readings()

    @property
    def loaded(self) -> str | None:
        """Name of the overlay in the fabric."""
        return self._active.package.name if self._active else None

    @property
    def active(self) -> Package | None:
        """The package in the fabric."""
        return self._active.package if self._active else None

    def open(self) -> None:
        """Take the lock and find pynq's device.

        Raises BackendUnavailable when another process has the fabric, LoadError when pynq or a
        device is missing.
        """
        self._lock = take_lock(self._lock_path)
        shelf = Shelf(self._lock_path.with_name(self._lock_path.name + ".bitstreams"))
        shelf.clear()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from pynq.pl_server.device import Device

                self._device = Device.active_device
                self._fabric = Configurator(self._device, shelf, self._monotonic)
                self._sensors = Sensors(sysfs_of(self._device), pl_clocks)
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
        self._settle()
        self._leave()
        self._free_parked()
        fabric, self._fabric = self._fabric, None
        if fabric is not None:
            fabric.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def load(self, package: Package) -> None:
        """Check the package and put it into the fabric once. Raises LoadError or FabricSick."""
        self._settle()
        require_runtime(package)
        self._limits[package.identity] = preflight(package, self._part, cma_bytes())
        self._activate(package)

    def unload(self, package: Package) -> None:
        """Forget what is kept for the package."""
        if self._fabric is not None:
            self._fabric.forget(package)
        self._limits.pop(package.identity, None)
        if self._active and self._active.package.identity == package.identity:
            self._settle()
            self._leave()

    def infer(
        self,
        package: Package,
        items: Sequence[Bytes],
        deadline: float | None,
        results: Sequence[Bytes] | None = None,
    ) -> Sequence[Bytes]:
        """Send uint8 [n, item_bytes] per input, get the same per output; `deadline` is monotonic.

        `results` are filled where given. Nothing waits for `items` or `results` once this returns.

        Raises DeadlineExceeded at the deadline, FabricSick when a core reports an error or a
        transfer hangs; either way the fabric is set right before the next transfer, or by
        `recover`. The package must have been loaded.
        """
        if results is None:
            results = [
                np.empty((len(items[0]), port.wire.item_bytes), np.uint8)
                for port in package.outputs
            ]
        self.run(Job(package, items, results), deadline)
        return results

    def run(self, job: Job, deadline: float | None) -> None:
        """Do a job; see `infer`. What `finish` does is left to the next one."""
        active, fabric = self._active, self._fabric
        if (
            active is None
            or active.package is not job.package
            or self._draining
            or self._broken
            or self._unfinished is not None
            or (fabric is not None and fabric.changed())
        ):
            self._settle()
            active = self._in_fabric(job.package)
        if job.owner is not active:
            job.cut(active, active.sends, active.receives, active.chunk)
        for transfer in job.transfers:
            self._transfer(active, transfer, deadline)

    def finish(self) -> bool:
        """After a job, what its results need not wait for; False when `recover` has work to do."""
        if self._draining and self._active is not None and not self._broken:
            try:
                self._draining = not self._ask(self._active.engine.drained)
            except FabricSick as error:
                _LOG.warning("%s", error)
        return not self._broken

    def configure(self, package: Package) -> None:
        """Put a loaded package into the fabric ahead of `infer`. Raises FabricSick."""
        self._settle()
        self._in_fabric(package)

    def recover(self) -> None:
        """Bring the fabric back after a failed transfer. Raises FabricSick when that fails."""
        package = self._active.package if self._active else None
        self._settle()
        if package is not None:
            self._in_fabric(package)

    def _in_fabric(self, package: Package) -> Active:
        try:
            return self._activate(package)
        except LoadError as error:
            raise FabricSick(str(error)) from error

    def _transfer(self, active: Active, transfer: Transfer, deadline: float | None) -> None:
        started = self._monotonic()
        if deadline is not None and started >= deadline:
            raise DeadlineExceeded("the deadline passed before the transfer started")
        engine = active.engine
        if self._draining:
            try:
                self._wait(active, engine.drained, started, deadline)
            except (FabricSick, *_PYNQ_ERRORS) as error:
                raise self._failure(active, error) from error
            self._draining = False
        for copy in transfer.sends:
            copy.buffer[:] = copy.client
            copy.slot.flush(copy.nbytes)
        try:
            engine.begin(transfer.items)
            self._unfinished = started
            if not self._ask(engine.finished):
                self._wait(active, engine.finished, started, deadline)
            engine.check(transfer.items)
        except (FabricSick, *_PYNQ_ERRORS) as error:
            raise self._failure(active, error) from error
        self._unfinished = self._trouble = None
        self._draining = True
        self._transfers += 1
        for copy in transfer.receives:
            copy.slot.invalidate(copy.nbytes)
            copy.client[:] = copy.buffer

    def _failure(self, active: Active, error: Exception) -> FabricSick:
        self._broken = True
        if not isinstance(error, FabricSick):
            error = FabricSick(f"{active.package.name}: transfer refused ({error})")
        self._trouble = str(error)
        return error

    def _wait(
        self, active: Active, done: Callable[[], bool], started: float, deadline: float | None
    ) -> None:
        while True:
            # Before the core is asked: it is not to blame for a pause of this process in between.
            now = self._monotonic()
            if self._ask(done):
                return
            if now - started >= self._hang_after:
                self._hangs += 1
                self._broken = True
                detail = active.engine.diagnosis()
                raise FabricSick(
                    f"{active.package.name}: no end of the transfer after {self._hang_after} s"
                    f"{f' ({detail})' if detail else ''}; the fabric is being reset"
                )
            if deadline is not None and now >= deadline:
                raise DeadlineExceeded(
                    f"{active.package.name}: the deadline passed during the transfer"
                )
            if now - started > _SPIN_SECONDS:
                time.sleep(_NAP_SECONDS)

    def _ask(self, done: Callable[[], bool]) -> bool:
        try:
            return done()
        except FabricSick:
            self._dma_errors += 1
            self._broken = True
            raise

    def _settle(self) -> None:
        """Wait for an abandoned transfer as long as it may take, then empty what still hangs.

        Whatever is used next is downloaded, since a reset of the DMA does not reach the core.
        """
        active, started = self._active, self._unfinished
        if active is not None and self._fabric is not None and self._fabric.foreign():
            # Not even the reset: there may be nothing at these addresses any more.
            self._fabric.distrust()
            self._leave()
        elif active is not None and not self._broken:
            try:
                if started is not None:
                    self._wait(active, active.engine.finished, started, None)
                    self._draining = True
                if self._draining:
                    self._wait(active, active.engine.drained, self._monotonic(), None)
            except FabricSick as error:
                _LOG.warning("%s", error)
        broken, self._broken = self._broken, False
        self._unfinished, self._draining = None, False
        if self._active is not None and broken:
            # A core must not write into buffers that are about to be given back.
            self._resets += 1
            if self._fabric is not None:
                self._fabric.distrust()
            try:
                quiet = self._active.engine.stop()
            except (FabricSick, BackendUnavailable, *_PYNQ_ERRORS) as error:
                _LOG.warning("%s", error)
                quiet = False
            self._leave(quiet)

    def _leave(self, quiet: bool = True) -> None:
        active, self._active = self._active, None
        if active is not None:
            self._parked += active.buffers
            # Views keep nothing alive: pynq gives memory back when it is told to.
            active.sends = active.receives = ()
            if quiet:
                self._free_parked()

    def _free_parked(self) -> None:
        parked, self._parked = self._parked, []
        for buffer in parked:
            buffer.freebuffer()

    def _activate(self, package: Package) -> Active:
        active = self._active
        if active is not None and (
            active.package is package or active.package.identity == package.identity
        ):
            return active
        limit = self._limits.get(package.identity)
        if limit is None:
            raise LoadError(f"{package.name} is not loaded")
        self._leave()
        try:
            self._active = self._download(package, limit)
        except FabricSick:
            # What does not come to rest may lie outside of the part that was exchanged.
            if self._fabric is not None:
                self._fabric.distrust()
            raise
        except _PYNQ_ERRORS as error:
            if self._fabric is not None:
                self._fabric.forget(package)
            raise LoadError(f"{package.bit}: the fabric did not take it ({error})") from error
        if self._active.engine.warm_up:
            self._discard_one(self._active)
        return self._active

    def _discard_one(self, active: Active) -> None:
        package = active.package
        job = Job(
            package,
            [np.zeros((1, port.wire.item_bytes), np.uint8) for port in package.inputs],
            [np.empty((1, port.wire.item_bytes), np.uint8) for port in package.outputs],
        )
        job.cut(active, active.sends, active.receives, active.chunk)
        self._transfer(active, job.transfers[0], None)

    def _download(self, package: Package, limit: int) -> Active:
        assert self._fabric is not None
        hardware = self._fabric.configure(package)
        # Whatever ran in the fabric before is gone, and with it who could write there.
        self._free_parked()
        return arrange(self._device, package, hardware, limit, self._monotonic)
