"""Engines of the simulated fabric: containers, coding, operators of QONNX, replay."""

from __future__ import annotations

import io

import numpy as np
import pytest
from gatelet.accelerators.fpga.elements import finn_element
from gatelet.accelerators.fpga.packing import pack, unpack
from gatelet.simulator.board.container import Container, decode_container, encode_container
from gatelet.simulator.board.engines import Coding, ReplayEngine, open_engine
from gatelet.simulator.board.hls_engine import LIBRARIES_VARIABLE, library_path
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

DOMAIN = "qonnx.custom_op.general"


@given(
    st.dictionaries(st.text(max_size=5), st.binary(max_size=30), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=3),
)
def test_containers_round_trip(blobs: dict[str, bytes], engine: dict[str, int]) -> None:
    container = Container(engine, ({"name": "c"},), blobs)
    data = encode_container(container)
    assert len(data) % 4 == 0
    assert decode_container(data + b"\xff" * 8) == container


@given(st.data())
def test_damaged_containers_are_refused(data: st.DataObject) -> None:
    whole = bytearray(encode_container(Container({"kind": "graph"}, (), {"model": b"abcdefg"})))
    place = data.draw(st.integers(0, len(whole) - 5))
    whole[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError):
        decode_container(bytes(whole))


@pytest.mark.parametrize("name", ["BIPOLAR", "UINT3", "INT5", "INT12", "FIXED<9,4>", "FLOAT32"])
def test_two_ways_of_coding_agree(name: str) -> None:
    element = finn_element(name)
    coding = Coding(element, (4, 6), 3)
    rng = np.random.default_rng(1)
    if element.kind == "bipolar":
        codes = rng.choice(np.array([-1, 1], np.int8), (24, 3))
    elif element.kind == "float":
        codes = rng.normal(size=(24, 3)).astype(np.float32)
    else:
        codes = rng.integers(element.low, element.high, (24, 3)).astype(element.container)
    raw = pack(codes, element)
    numbers = coding.decode(raw.tobytes())
    assert numbers.shape == (3, 4, 6)
    np.testing.assert_array_equal(
        numbers.reshape(24, 3).astype(np.float64), np.ldexp(codes.astype(float), -element.fraction)
    )
    again = np.frombuffer(coding.encode(numbers), np.uint8).reshape(24, -1)
    np.testing.assert_array_equal(unpack(again, 3, element), codes)
    if element.kind == "integer":
        with pytest.raises(ValueError, match="outside"):
            coding.encode(np.full((1, 4, 6), 1e6))


def evaluate(operator: str, inputs: list[np.ndarray], **attributes: object) -> np.ndarray:
    from gatelet.simulator.board.qonnx_ops import OPERATORS

    names = [f"i{index}" for index in range(len(inputs))]
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["y"], domain=DOMAIN, **attributes)],
        "one",
        [helper.make_tensor_value_info(names[0], TensorProto.FLOAT, inputs[0].shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, n) for n, value in zip(names[1:], inputs[1:], strict=True)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return ReferenceEvaluator(model, new_ops=list(OPERATORS)).run(None, {names[0]: inputs[0]})[0]


def test_operators_of_qonnx() -> None:
    x = np.array([[-1.6, -0.5, 0.5, 1.5, 9.0]], np.float32)
    one, zero, bits = (np.array(v, np.float32) for v in (0.5, 0, 3))
    signed = evaluate("Quant", [x, one, zero, bits], signed=1, narrow=0, rounding_mode="ROUND")
    np.testing.assert_array_equal(signed, [[-1.5, -0.5, 0.5, 1.5, 1.5]])
    narrow = evaluate("Quant", [x * 2, one, zero, bits], signed=1, narrow=1, rounding_mode="FLOOR")
    np.testing.assert_array_equal(narrow, [[-1.5, -1.0, 1.0, 1.5, 1.5]])
    unsigned = evaluate("Quant", [x, one, zero, bits], signed=0, narrow=0, rounding_mode="CEIL")
    np.testing.assert_array_equal(unsigned, [[0, 0, 0.5, 1.5, 3.5]])
    bipolar = evaluate("BipolarQuant", [x, np.array(2.0, np.float32)])
    np.testing.assert_array_equal(bipolar, [[-2, -2, 2, 2, 2]])
    steps = np.array([[0, 1], [0, 1], [0, 1], [2, 3], [0, 20]], np.float32)
    counts = evaluate("MultiThreshold", [x, steps], out_scale=2.0, out_bias=-1.0)
    np.testing.assert_array_equal(counts, [[-1, -1, 1, -1, 1]])
    a = np.array([[1, 0, 1, 1]], np.float32)
    b = np.array([[1, 0], [0, 1], [0, 1], [1, 1]], np.float32)
    np.testing.assert_array_equal(evaluate("XnorPopcountMatMul", [a, b]), [[3, 2]])


def test_replay_gives_what_was_recorded_and_refuses_the_rest() -> None:
    rng = np.random.default_rng(2)
    inputs = rng.integers(0, 256, (5, 8), dtype=np.uint8)
    outputs = rng.integers(0, 256, (5, 3), dtype=np.uint8)
    file = io.BytesIO()
    np.savez(file, in0=inputs, out0=outputs)
    engine = open_engine(Container({"kind": "replay"}, (), {"recording": file.getvalue()}))
    assert isinstance(engine, ReplayEngine)
    asked = [3, 0, 0, 4]
    assert engine.run([inputs[asked].tobytes()], {}) == [outputs[asked].tobytes()]
    with pytest.raises(ValueError, match="item 1 is not in the recording of 5"):
        engine.run([inputs[:1].tobytes() + bytes(8)], {})


def test_what_is_no_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in ({"kind": "magic"}, {"kind": "graph"}, {"kind": "hls4ml"}, {}):
        with pytest.raises(ValueError, match="engine"):
            open_engine(Container(engine))
    monkeypatch.delenv(LIBRARIES_VARIABLE, raising=False)
    with pytest.raises(ValueError, match=LIBRARIES_VARIABLE):
        library_path("0" * 64)
