"""The machine that a profile was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from .report import Device


def this_device(board: str) -> Device:
    """`board`: of its FPGA, "" for none."""
    return Device(
        name=platform.node() or "this device",
        machine=platform.machine(),
        processor=_processor(),
        cores=os.cpu_count() or 1,
        memory_in_gb=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        board=board,
    )


def _processor() -> str:
    """The CPU's name (proc(5), cpuinfo: "model name" on x86, "Model" on some ARM boards)."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()
