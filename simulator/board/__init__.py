"""Simulated FPGA boards as pynq devices.

Importing this package needs no pynq and changes nothing; `install` puts the board in.
"""

from __future__ import annotations

from .boards import simulated_board
from .faults import FaultFile
from .sysfs import SimulatedSysfs


def install(board: str) -> None:
    """Make the simulated `board` pynq's active device in this process.

    Faults come from the file named by GATELET_SIM_FAULTS (see `faults`); its temperature is told
    below the folder named by GATELET_SIM_SYSFS (see `sysfs`). Raises ValueError for an unknown
    board and ImportError when pynq is missing.
    """
    found = simulated_board(board)
    # pynq registers a device class when it is defined, so that must not happen on import.
    from .device import activate

    activate(found, FaultFile.from_environment(), sysfs=SimulatedSysfs.from_environment(found))
