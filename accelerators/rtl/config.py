"""Sizes a core is built with, and where its Verilog is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

VERILOG = Path(__file__).parent / "verilog"
TOP = "gatelet_core"


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """Parameters of one build. Raises ValueError when they do not fit together.

    `pe` outputs are computed at once, from `simd` products each per cycle; `requantisers` results
    leave per cycle. `activation_words` (two buffers) and `weight_words` (per output) count words
    of `simd` bytes, `parameter_rows` channels per requantiser.
    """

    pe: int = 16
    simd: int = 8
    requantisers: int = 4
    activation_words: int = 4096
    weight_words: int = 2048
    parameter_rows: int = 512
    layers: int = 32

    def __post_init__(self) -> None:
        if not 8 <= self.simd <= 64 or self.simd & (self.simd - 1):
            raise ValueError(f"simd is {self.simd}, expected a power of two from 8 to 64")
        if self.simd % self.requantisers or self.pe % self.simd or self.pe > 128:
            raise ValueError(
                f"requantisers ({self.requantisers}) must divide simd ({self.simd}), and simd "
                f"must divide pe ({self.pe}, at most 128)"
            )
        for name, depth in (
            ("activation_words", self.activation_words),
            ("weight_words", self.weight_words),
            ("parameter_rows", self.parameter_rows),
            ("layers", self.layers),
        ):
            if not 2 <= depth <= 65536 or depth & (depth - 1):
                raise ValueError(f"{name} is {depth}, expected a power of two from 2 to 65536")

    @property
    def macs_per_cycle(self) -> int:
        return self.pe * self.simd

    @property
    def verilog_parameters(self) -> dict[str, int]:
        """Name in the Verilog -> value."""
        return {
            "PE": self.pe,
            "SIMD": self.simd,
            "RQ": self.requantisers,
            "ACT_DEPTH": self.activation_words,
            "WEIGHT_DEPTH": self.weight_words,
            "PARAM_DEPTH": self.parameter_rows,
            "LAYERS": self.layers,
        }


PRESETS: dict[str, CoreConfig] = {
    "pynq-z2": CoreConfig(),
    "zcu104": CoreConfig(pe=32, simd=16, requantisers=8, weight_words=1024),
}
"""Board -> a core that fits it with room to spare; see the resource report in docs/rtl.md."""


def verilog_sources() -> tuple[Path, ...]:
    """The files of the core, in a fixed order."""
    return tuple(sorted(VERILOG.glob("*.v")))
