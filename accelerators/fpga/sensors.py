"""Temperatures and clocks of the board, as far as the kernel and pynq tell them.

The Zynq-7000's XADC and the UltraScale+'s AMS are devices of the kernel's industrial I/O:
millidegrees are (raw + offset) * scale (Documentation/ABI/testing/sysfs-bus-iio). Boards with
sensors of their own have hwmon (temp*_input in millidegrees, sysfs-class-hwmon).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FRESH_SECONDS = 1.0
"""How long what was read is told again: a conversion of the XADC takes its time."""
_DEVICES = ("bus/iio/devices", "class/hwmon")
_RAW = re.compile(r"(in_temp\d*(?:_\w+?)?)_raw")
_INPUT = re.compile(r"((?:in_)?temp\d*(?:_\w+?)?)_input")
_SENSOR_LIMIT = 64
_PLAUSIBLE = (-100.0, 300.0)


@dataclass(frozen=True, slots=True)
class Readings:
    """Degrees Celsius by sensor ("xadc temp0"), MHz by PL clock, state of the FPGA manager."""

    temperatures: dict[str, float] = field(default_factory=dict)
    clocks: dict[str, float] = field(default_factory=dict)
    manager: str | None = None


class Sensors:
    """Reads below `sysfs` (None: nothing is there) and the PL clocks. Used from several threads.

    `clocks` gives MHz by clock: it only reads, whatever is being done with the fabric.
    """

    def __init__(
        self,
        sysfs: Path | None,
        clocks: Callable[[], dict[str, float]],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sysfs = sysfs
        self._clocks = clocks
        self._monotonic = monotonic
        self._last: tuple[float, Readings] | None = None

    def read(self) -> Readings:
        """What there is to read now, or was a moment ago."""
        last = self._last
        now = self._monotonic()
        if last is not None and now - last[0] < FRESH_SECONDS:
            return last[1]
        readings = Readings(temperatures(self._sysfs), self._clocks(), manager_state(self._sysfs))
        self._last = (now, readings)
        return readings


def temperatures(sysfs: Path | None) -> dict[str, float]:
    """Every plausible temperature below `sysfs`, in degrees Celsius by device and channel."""
    found: dict[str, float] = {}
    if sysfs is None:
        return found
    for folder in _DEVICES:
        for device in _listed(sysfs / folder):
            name = _text(device / "name") or device.name
            for entry in _listed(device):
                if len(found) >= _SENSOR_LIMIT:
                    return found
                if (match := _RAW.fullmatch(entry.name)) is not None:
                    degrees = _converted(device, match[1])
                elif (match := _INPUT.fullmatch(entry.name)) is not None:
                    degrees = _number(entry)
                else:
                    continue
                if degrees is not None and _PLAUSIBLE[0] < degrees / 1000 < _PLAUSIBLE[1]:
                    label = _text(device / f"{match[1]}_label") or match[1].removeprefix("in_")
                    found[f"{name} {label}"] = round(degrees / 1000, 2)
    return found


def manager_state(sysfs: Path | None) -> str | None:
    """What the kernel's FPGA manager says of the fabric: "operating", "unknown", an error."""
    if sysfs is None:
        return None
    return _text(sysfs / "class/fpga_manager/fpga0/state") or None


def sysfs_of(device: Any) -> Path | None:
    """Where the sensors of pynq's device are; a simulated one brings its own, or None."""
    return device.sysfs if hasattr(device, "sysfs") else Path("/sys")


def pl_clocks() -> dict[str, float]:
    """MHz of the clocks that the processor gives to the fabric, by pynq."""
    from pynq import Clocks

    found = {}
    for index in range(4):
        name = f"fclk{index}"
        try:
            found[name] = round(float(getattr(Clocks, f"{name}_mhz")), 3)
        except (OSError, RuntimeError, ValueError, AttributeError, ZeroDivisionError):
            continue
    return found


def _converted(device: Path, channel: str) -> float | None:
    raw = _number(device / f"{channel}_raw")
    if raw is None:
        return None
    offset, scale = (
        next((n for n in map(_number, (device / f"{channel}_{what}", device / f"in_temp_{what}"))
              if n is not None), default)
        for what, default in (("offset", 0.0), ("scale", 1.0))
    )  # fmt: skip
    return (raw + offset) * scale


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(256).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None
