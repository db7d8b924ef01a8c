"""The core's registers, errors and limits, on two builds of the Verilog."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from gatelet.accelerators.errors import BackendUnavailable, InvalidTensor, LoadError
from gatelet.accelerators.rtl import PRESETS, CoreConfig, CoreDriver, Program, ProgramError, lower
from gatelet.accelerators.rtl.core import (
    REG_BUSY_CYCLES,
    REG_CONTROL,
    REG_ITEMS,
    REG_LAYERS,
    REG_STATUS,
)
from gatelet.accelerators.rtl.layers import Conv, Layer, Rescale, Window, dense
from gatelet.simulator.board.dma import AxiDma
from gatelet.simulator.board.faults import FaultFile
from gatelet.simulator.board.memory import ContiguousMemory
from gatelet.simulator.board.rtl_core import RtlCore, RtlEngine


@pytest.fixture(autouse=True)
def calm(engine: RtlEngine) -> Iterator[None]:
    engine.waits, engine.cycle_limit = (0, 0), 2_000_000
    yield
    engine.waits, engine.cycle_limit = (0, 0), 50_000_000


def layers(rng: Any, *widths: int, low: int = -128) -> list[Layer]:
    return [
        dense(
            f"d{index}",
            rng.integers(-128, 128, (before, after)).astype(np.int8),
            rng.integers(-999, 999, after).astype(np.int32),
            Rescale(rng.uniform(0.001, 0.004, after).astype(np.float32), 2, low),
            -3 if index == 0 else 2,
        )
        for index, (before, after) in enumerate(pairwise(widths))
    ]


def reference(chain: list[Layer], items: Any) -> Any:
    """The same arithmetic in numpy: float32 product, half to even, clamp."""
    for layer in chain:
        assert isinstance(layer, Conv)
        weights = layer.weights.reshape(len(layer.weights), -1).T.astype(np.int64)
        sums = (items.astype(np.int64) - layer.zero_in) @ weights + layer.bias
        scaled = np.rint(sums.astype(np.float32) * layer.rescale.multiplier) + layer.rescale.zero
        items = np.clip(scaled, layer.rescale.low, layer.rescale.high).astype(np.int8)
    return items


def program(config: CoreConfig, *widths: int) -> tuple[Program, list[Layer]]:
    chain = layers(np.random.default_rng(len(widths)), *widths)
    return lower(chain, (1, 1, widths[0]), config), chain


@pytest.mark.parametrize("waits", [(0, 0), (40, 0), (0, 90), (60, 60)])
def test_packets_of_many_tiles_keep_their_order(
    small_engine: RtlEngine, waits: tuple[int, int]
) -> None:
    driver = CoreDriver(small_engine)
    compiled, chain = program(driver.config, 37, 50, 19, 7)
    assert compiled.tile == 18
    driver.load(compiled)
    small_engine.waits = waits
    rng = np.random.default_rng(1)
    for count in (1, 17, 18, 19, 36, 100):
        items = rng.integers(-128, 128, (count, 37)).astype(np.int8)
        assert np.array_equal(driver.run(items), reference(chain, items))
    assert small_engine.read(REG_ITEMS) == 1 + 17 + 18 + 19 + 36 + 100
    assert small_engine.read(REG_BUSY_CYCLES) > 0
    assert small_engine.read(REG_STATUS) & 1


def test_relu_is_the_lower_clamp(engine: RtlEngine) -> None:
    rng = np.random.default_rng(6)
    driver = CoreDriver(engine)
    chain = layers(rng, 20, 20, low=2)
    driver.load(lower(chain, (1, 1, 20), driver.config))
    items = rng.integers(-128, 128, (50, 20)).astype(np.int8)
    given = driver.run(items)
    assert np.array_equal(given, reference(chain, items))
    assert given.min() == 2


@pytest.mark.parametrize("limit", [1024 + 8, 5000, 1 << 16])
def test_weights_arrive_in_packets_of_any_size(engine: RtlEngine, limit: int) -> None:
    driver = CoreDriver(engine)
    compiled, chain = program(driver.config, 70, 90, 11)
    packets = list(compiled.load_packets(limit))
    assert max(map(len, packets)) <= limit
    driver.load(compiled, limit)
    items = np.random.default_rng(2).integers(-128, 128, (9, 70)).astype(np.int8)
    assert np.array_equal(driver.run(items), reference(chain, items))


def test_a_packet_that_ends_inside_an_item_is_an_error_and_a_reset_heals_it(
    engine: RtlEngine,
) -> None:
    driver = CoreDriver(engine)
    compiled, chain = program(driver.config, 24, 9)
    driver.load(compiled)
    engine.cycle_limit = 20_000
    with pytest.raises(BackendUnavailable, match="no answer"):
        engine.exchange(bytes(24 + 5), 18)
    assert driver.failure() == "the input ended inside an item"
    driver.reset()
    assert driver.failure() is None
    items = np.random.default_rng(2).integers(-128, 128, (9, 24)).astype(np.int8)
    assert np.array_equal(driver.run(items), reference(chain, items))


def test_the_driver_resets_a_core_that_does_not_answer(engine: RtlEngine) -> None:
    driver = CoreDriver(engine)
    compiled, chain = program(driver.config, 24, 9)
    driver.load(compiled)
    items = np.random.default_rng(2).integers(-128, 128, (9, 24)).astype(np.int8)
    engine.cycle_limit = 50
    with pytest.raises(BackendUnavailable, match="core: no error"):
        driver.run(items)
    engine.cycle_limit = 2_000_000
    assert np.array_equal(driver.run(items), reference(chain, items))


def head(target: int, address: int, count: int) -> bytes:
    return (target | address << 8 | count << 32).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (head(0, 0, 1) + bytes(8), "header is damaged"),
        (head(4, 0, 1) + bytes(8), "header is damaged"),
        (head(1, 0, 0) + bytes(8), "header is damaged"),
        (head(1, 2048, 1) + bytes(8), "does not fit its memory"),
        (head(3, 0, 257) + bytes(8 * 257), "does not fit its memory"),
        (head(2, 0, 4) + bytes(8 * 3), "ended inside a section"),
        (head(2, 0, 4), "ended inside a section"),
    ],
)
def test_damaged_load_packets(engine: RtlEngine, packet: bytes, reason: str) -> None:
    driver = CoreDriver(engine)
    engine.write(REG_CONTROL, 4 | 2)
    engine.send(packet)
    assert reason in (driver.failure() or "")
    driver.reset()


def test_instructions_and_registers_that_are_none(engine: RtlEngine) -> None:
    driver = CoreDriver(engine)
    compiled, _ = program(driver.config, 8, 8)
    driver.load(compiled)
    engine.cycle_limit = 2000
    engine.write(REG_LAYERS, 0)
    with pytest.raises(BackendUnavailable, match="no program is loaded"):
        driver.run(np.zeros((1, 8), np.int8))
    driver.load(compiled)
    engine.write(REG_CONTROL, 4 | 2)
    engine.send(head(3, 0, 8) + bytes(64))
    engine.write(REG_CONTROL, 1)
    with pytest.raises(BackendUnavailable, match="unknown instruction"):
        driver.run(np.zeros((1, 8), np.int8))


def test_what_the_driver_refuses(engine: RtlEngine, small_engine: RtlEngine) -> None:
    driver = CoreDriver(engine)
    with pytest.raises(LoadError, match="no program"):
        driver.run(np.zeros((1, 8), np.int8))
    compiled, _ = program(driver.config, 8, 8)
    with pytest.raises(LoadError, match="compile it again"):
        CoreDriver(small_engine).load(compiled)
    driver.load(compiled)
    assert driver.run(np.zeros((0, 8), np.int8)).shape == (0, 8)
    for items in (np.zeros((1, 9), np.int8), np.zeros((1, 8), np.uint8), np.zeros(8, np.int8)):
        with pytest.raises(InvalidTensor, match=r"int8\[n, 8\]"):
            driver.run(items)

    class Nothing:
        def read(self, address: int) -> int:
            return 0

    with pytest.raises(LoadError, match="no gatelet core"):
        CoreDriver(Nothing())  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_before_it_reaches_the_core() -> None:
    core = PRESETS["pynq-z2"]
    rng = np.random.default_rng(0)
    with pytest.raises(ProgramError, match="weights need"):
        lower(layers(rng, 2000, 2000), (1, 1, 2000), core)
    with pytest.raises(ProgramError, match="1 to 32"):
        lower(layers(rng, *[8] * 40), (1, 1, 8), core)
    large = Conv(
        "c",
        Window((1, 1), (300, 300)),
        np.ones((8, 1, 1, 8), np.int8),
        np.zeros(8, np.int32),
        Rescale(np.ones(8, np.float32)),
    )
    with pytest.raises(ProgramError, match="activations"):
        lower([large], (300, 300, 8), core)
    wide = dense("w", np.full((8, 1), 127, np.int8), np.array([2**31 - 1], np.int32),
                 Rescale(np.ones(1, np.float32)))  # fmt: skip
    with pytest.raises(ProgramError, match="int32"):
        lower([wide], (1, 1, 8), core)
    for multiplier in (0.0, np.inf, np.nan, -1.0, 1e-42):
        layer = dense("m", np.ones((8, 1), np.int8), np.zeros(1, np.int32),
                      Rescale(np.full(1, multiplier, np.float32)))  # fmt: skip
        with pytest.raises(ProgramError, match="normal float32"):
            lower([layer], (1, 1, 8), core)
    for wrong in ({"simd": 12}, {"requantisers": 3}, {"pe": 20}, {"activation_words": 100}):
        with pytest.raises(ValueError, match=r"expected a power|must divide"):
            CoreConfig(**wrong)


def test_behind_the_registers_of_the_simulated_dma() -> None:
    compiled, chain = program(PRESETS["pynq-z2"], 24, 9)
    memory = ContiguousMemory(0x1000_0000, 1 << 16)
    dma = AxiDma(memory, RtlCore(compiled), 14, FaultFile())
    items = np.random.default_rng(3).integers(-128, 128, (30, 24)).astype(np.int8)
    memory.bus_write(0x1000_0000, items.tobytes())
    for control, value in ((0x30, 1), (0x00, 1)):
        dma.write(control, value)
    for register, value in ((0x48, 0x1000_8000), (0x58, 4096), (0x18, 0x1000_0000), (0x28, 720)):
        dma.write(register, value)
    assert dma.read(0x34) & 0x2
    assert dma.read(0x58) == 270
    given = np.frombuffer(memory.bus_read(0x1000_8000, 270), np.int8).reshape(30, 9)
    assert np.array_equal(given, reference(chain, items))
