"""One Verilated core per set of parameters, shared by all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gatelet.accelerators.rtl import PRESETS, CoreConfig
from gatelet.simulator.board.rtl_core import RtlEngine, missing_tools
from required import unavailable

SMALL = CoreConfig(
    pe=8,
    simd=8,
    requantisers=2,
    activation_words=128,
    weight_words=64,
    parameter_rows=64,
    layers=4,
)


def _engine(config: CoreConfig) -> Iterator[RtlEngine]:
    problem = missing_tools()
    if problem:
        unavailable(problem)
    engine = RtlEngine(config)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def engine() -> Iterator[RtlEngine]:
    """The core for the PYNQ-Z2."""
    yield from _engine(PRESETS["pynq-z2"])


@pytest.fixture(scope="session")
def small_engine() -> Iterator[RtlEngine]:
    """Other proportions, and memories that are soon full."""
    yield from _engine(SMALL)
