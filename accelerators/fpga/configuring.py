"""How a package gets into the fabric: its bitstream, or the part of it that differs.

All through pynq: `Overlay.download`, and for partial bitstreams `Bitstream(partial=True)`, which is
what `Overlay.pr_download` ends in. That one would read the partial design's handoff again at every
swap, which takes longer than the swap.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .decoupling import couple, decouple, decouplers
from .handoff import Hardware, read_hardware
from .machine import mark_of, noted, state_file
from .package import Package
from .preflight import CLOCK_TOLERANCE
from .shelf import Key, Shelf

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Known:
    """What pynq has of a package: its overlay, and its partial bitstream where it has one."""

    overlay: Any
    partial: Any
    hardware: Hardware


class Configurator:
    """Configures pynq's `device`, and knows what is in it as long as nobody else does."""

    def __init__(
        self, device: Any, shelf: Shelf, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._device = device
        self._shelf = shelf
        self._monotonic = monotonic
        self._state: Path | None = state_file(device)
        self._mark: tuple[int, int] | None = None
        if (other := noted(self._state)) is not None:
            _LOG.info("the fabric was configured with %s; the first package replaces it", other)
        self._known: dict[Key, _Known] = {}
        # The full configuration that is in the fabric, where partial ones of it may follow.
        self._static: Key | None = None
        self.full = self.partial = self.replaced = 0
        """Configurations since the start; `replaced` counts those of others that were found."""
        self.seconds = 0.0

    def configure(self, package: Package) -> Hardware:
        """Put `package` into the fabric, whatever is in it now.

        Raises LoadError, FabricSick, and what pynq does when the fabric does not take it.
        """
        known = self._known.get(package.identity) or self._open(package)
        static = package.static
        started = self._monotonic()
        try:
            if self._static is None or self._static != static or self.foreign():
                self._static = None
                self._download(known.overlay, package)
            if known.partial is not None:
                self._static = None
                self._exchange(known, package)
            self._static = static
        finally:
            self.seconds += self._monotonic() - started
        return known.hardware

    def foreign(self) -> bool:
        """Whether another process has configured the fabric since we did; counts and logs it."""
        if not self.changed():
            return False
        self.replaced += 1
        _LOG.warning("another process has configured the fabric; ours is downloaded again")
        return True

    def changed(self) -> bool:
        """Whether pynq's note says that somebody else has configured the fabric since we did."""
        return self._state is not None and self._mark != mark_of(self._state)

    def distrust(self) -> None:
        """Take nothing that is in the fabric for granted: all of it comes anew the next time."""
        self._static = None

    def forget(self, package: Package) -> None:
        """Give back what is kept for the package."""
        known = self._known.pop(package.identity, None)
        self._shelf.drop(package.identity, getattr(known and known.overlay, "firmware_path", ""))
        self._shelf.drop(
            _partial_key(package), getattr(known and known.partial, "firmware_path", "")
        )

    def close(self) -> None:
        """Give back everything."""
        self._known.clear()
        self._shelf.clear()

    def _open(self, package: Package) -> _Known:
        from pynq import Bitstream, Overlay

        bit = self._shelf.path(package.identity, package.bit, package.sha256, package.part)
        partial = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            overlay = Overlay(str(bit), download=False, device=self._device)
            if package.partial is not None:
                found = package.partial
                bit = self._shelf.path(_partial_key(package), found.bit, found.sha256, package.part)
                partial = Bitstream(str(bit), None, partial=True, device=self._device)
        known = _Known(overlay, partial, read_hardware(package.hwh))
        self._known[package.identity] = known
        return known

    def _download(self, overlay: Any, package: Package) -> None:
        set_frequencies(overlay.clock_dict, package.clock_mhz)
        overlay.download()
        self.full += 1
        self._mark = mark_of(self._state)
        check_clock(package)

    def _exchange(self, known: _Known, package: Package) -> None:
        """The partial bitstream into its region, which is cut off from the rest meanwhile."""
        assert package.partial is not None
        cells = decouplers(known.hardware, package.partial.decouplers)
        decouple(self._device, cells, self._monotonic)
        known.partial.download()
        self.partial += 1
        couple(self._device, cells, self._monotonic)


def _partial_key(package: Package) -> Key:
    return ("partial", *package.identity)


def set_frequencies(clocks: dict[int, dict[str, Any]], clock_mhz: float) -> None:
    """Fill in what pynq programs PL clocks with; clock 0 drives the network.

    pynqmetadata 0.2.0 leaves "frequency" empty for the Zynq-7000, and pynq 4.0.0 fails on that.
    """
    for index, clock in clocks.items():
        if index == 0:
            clock["frequency"] = clock_mhz
        elif clock.get("frequency") is None:
            # Nothing of a package hangs on the other clocks; pynq's default does.
            clock["frequency"] = 100.0


def check_clock(package: Package) -> None:
    """Set PL clock 0 where pynq has not. Raises ValueError when it runs too fast all the same."""
    from pynq import Clocks

    if abs(Clocks.fclk0_mhz - package.clock_mhz) > CLOCK_TOLERANCE * package.clock_mhz:
        Clocks.fclk0_mhz = package.clock_mhz
    runs = Clocks.fclk0_mhz
    if runs > (1 + CLOCK_TOLERANCE) * package.clock_mhz:
        raise ValueError(
            f"PL clock 0 runs at {runs} MHz, the overlay is for {package.clock_mhz} MHz"
        )
