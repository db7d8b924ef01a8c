"""What the kernel of a simulated board tells of it: temperature, and the state of the fabric.

Files as below /sys of a board: an industrial I/O device (the Zynq-7000's XADC, the UltraScale+'s
AMS) and the FPGA manager. Offsets and scales are those of the kernel's drivers.
"""

from __future__ import annotations

import os
from pathlib import Path

from .boards import SimulatedBoard

SYSFS_VARIABLE = "GATELET_SIM_SYSFS"
AMBIENT = 41.0
"""Degrees Celsius of a board that has just been switched on."""
# 12 bits over 503.975 K, and 16 bits over 509.314 K.
_XADC = ("xadc", {"in_temp0": (-2219, 123.040771484)})
_AMS = (
    "ams",
    {"in_temp0_ps_temp": (-36058, 7.771514892), "in_temp20_pl_temp": (-36058, 7.771514892)},
)


class SimulatedSysfs:
    """The files below `root`, made when the board is switched on."""

    def __init__(self, root: Path, board: SimulatedBoard) -> None:
        self.root = root
        name, self._channels = _XADC if board.arch == "armv7l" else _AMS
        self._device = root / "bus/iio/devices/iio:device0"
        self._device.mkdir(parents=True, exist_ok=True)
        self._manager = root / "class/fpga_manager/fpga0"
        self._manager.mkdir(parents=True, exist_ok=True)
        _write(self._device / "name", name)
        for channel, (offset, scale) in self._channels.items():
            _write(self._device / f"{channel}_offset", str(offset))
            _write(self._device / f"{channel}_scale", f"{scale:.9f}")
        self.set_temperature(AMBIENT)
        self.set_state("unknown")

    @classmethod
    def from_environment(cls, board: SimulatedBoard) -> SimulatedSysfs | None:
        """Where GATELET_SIM_SYSFS names a folder, that one."""
        value = os.environ.get(SYSFS_VARIABLE)
        return cls(Path(value), board) if value else None

    def set_temperature(self, degrees: float) -> None:
        """What the sensors measure from now on, in degrees Celsius, as near as they can tell."""
        for channel, (offset, scale) in self._channels.items():
            _write(self._device / f"{channel}_raw", str(round(degrees * 1000 / scale - offset)))

    def set_state(self, state: str) -> None:
        """What the FPGA manager says: "unknown", "operating", "write error"."""
        _write(self._manager / "state", state)


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text + "\n", "ascii")
    beside.replace(path)
