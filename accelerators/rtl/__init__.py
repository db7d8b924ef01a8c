"""gatelet's int8 core for FPGAs: its Verilog, the compiler to its instructions, and its driver."""

from __future__ import annotations

from .config import PRESETS, CoreConfig
from .core import CoreDriver, CorePort
from .layers import Conv, GlobalSum, Layer, MaxPool
from .program import Program, ProgramError, lower

__all__ = [
    "PRESETS",
    "Conv",
    "CoreConfig",
    "CoreDriver",
    "CorePort",
    "GlobalSum",
    "Layer",
    "MaxPool",
    "Program",
    "ProgramError",
    "lower",
]
