"""The container a simulated bitstream carries, and the rules of its layers."""

from __future__ import annotations

import numpy as np
import pytest
from gatelet.simulator.board.cores import Configuration, EngineStream, LoopbackCore, StreamCore
from gatelet.simulator.board.faults import FaultFile
from gatelet.simulator.board.memory import ContiguousMemory
from gatelet.simulator.board.network import (
    DenseLayer,
    check_chain,
    decode_network,
    encode_network,
    run_network,
)

RNG = np.random.default_rng(7)


def layer(rows: int, columns: int, **options) -> DenseLayer:
    settings = {"input_scale": 0.05, "weight_scale": 0.01, "output_scale": 0.05} | options
    return DenseLayer(
        RNG.integers(-128, 128, (rows, columns), dtype=np.int8),
        RNG.integers(-500, 500, columns, dtype=np.int32),
        **settings,
    )


LAYERS = (
    layer(12, 9, relu=True, output_zero_point=-128),
    layer(9, 4, input_zero_point=-128, weight_scale=np.linspace(0.01, 0.04, 4, dtype=np.float32)),
)


def test_containers_round_trip() -> None:
    data = encode_network(LAYERS)
    assert len(data) % 4 == 0
    assert encode_network(LAYERS) == data
    decoded = decode_network(data)
    items = RNG.integers(-128, 128, (50, 12), dtype=np.int8)
    np.testing.assert_array_equal(run_network(decoded, items), run_network(LAYERS, items))
    for mine, theirs in zip(LAYERS, decoded, strict=True):
        np.testing.assert_array_equal(
            mine.multiplier, theirs.multiplier * np.ones_like(mine.multiplier)
        )


def test_every_damaged_byte_is_noticed() -> None:
    data = encode_network((layer(3, 2),))
    for index in range(len(data)):
        damaged = bytearray(data)
        damaged[index] ^= 0x40
        try:
            decoded = decode_network(bytes(damaged))
        except ValueError:
            continue
        # Only the padding behind the container may differ without notice.
        assert encode_network(decoded) == data


def test_layers_have_to_fit_each_other() -> None:
    with pytest.raises(ValueError, match="layer 1 takes"):
        check_chain([layer(4, 3), layer(4, 3)])
    with pytest.raises(ValueError, match="scale or zero point"):
        check_chain([layer(4, 3), layer(3, 3, input_scale=0.06)])
    with pytest.raises(ValueError, match="at least one"):
        check_chain([])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"weight_scale": 0.0}, "positive"),
        ({"weight_scale": np.ones(3, np.float32)}, "one per output"),
        ({"output_zero_point": 200}, "zero point"),
    ],
)
def test_a_layer_checks_itself(change: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        layer(4, 2, **change)


def test_a_bias_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="int32"):
        DenseLayer(np.ones((2, 1), np.int8), np.array([2**31 - 1], np.int32), 1.0, 1.0, 1.0)


def synthesise(data: bytes) -> StreamCore:
    return Configuration(data, ContiguousMemory(0, 4096), FaultFile()).stream()


def test_a_core_waits_for_whole_items() -> None:
    core = synthesise(encode_network(LAYERS))
    assert isinstance(core, EngineStream)
    items = RNG.integers(-128, 128, (3, 12), dtype=np.int8)
    stream = items.tobytes()
    assert core.process(stream[:5]) == b""
    rest = core.process(stream[5:])
    assert rest == run_network(LAYERS, items).tobytes()
    assert isinstance(synthesise(b"\xff" * 64), LoopbackCore)
