"""JSON bodies: whatever comes in is a tensor or a ScoringError, and tensors survive the way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gatelet.accelerators.tensors import NUMPY_DTYPES, TensorSpec
from gatelet.agent.scoring.errors import Code, ScoringError
from gatelet.agent.scoring.http_encoding import accepted, compress, decompress
from gatelet.agent.scoring.http_routes import ROUTES, match
from gatelet.agent.scoring.http_types import STATUS, Refusal
from gatelet.agent.scoring.oip_json import decode_json, decode_only_tensor, encode_json
from gatelet.agent.scoring.score_json import decode_query, decode_score
from gatelet.agent.scoring.types import InferenceResponse, Tensor
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

SPECS = (TensorSpec("x", "FP32", (-1, 4)), TensorSpec("t", "BYTES", (-1,)))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
WORDS = [
    "inputs",
    "name",
    "shape",
    "datatype",
    "data",
    "parameters",
    "outputs",
    "id",
    "x",
    "t",
    "binary_data_size",
    "columns",
    "index",
    "shared_memory_region",
    "classification",
    "timeout",
    "input_data",
    "Inputs",
    "priority",
    "binary_data_output",
]
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5)
    ),
    max_leaves=25,
)
SIZES = st.integers(-2, 5) | st.sampled_from([2**31, 2**62, 2**63, 2**70])
DATATYPES = st.sampled_from([*NUMPY_DTYPES, "BF16", "FP31"])
INPUTS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["x", "t"]),
        "shape": st.lists(SIZES, max_size=4),
        "datatype": DATATYPES,
    },
    optional={
        "data": ANYTHING | st.lists(SCALARS, max_size=6),
        "parameters": st.fixed_dictionaries(
            {}, optional={"binary_data_size": SIZES, "shared_memory_region": st.just("r")}
        ),
    },
)
REQUESTS = st.fixed_dictionaries({"inputs": st.lists(INPUTS, max_size=3)})
SCORES = st.fixed_dictionaries(
    {},
    optional={
        name: ANYTHING
        | st.fixed_dictionaries({"columns": st.lists(SCALARS), "data": ANYTHING})
        | st.lists(st.dictionaries(st.sampled_from("xtab"), SCALARS, max_size=4), max_size=3)
        for name in ("data", "input_data", "Inputs", "x", "t")
    },
)
WRONG = {None, Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED}


def code_of(work: Callable[[], object]) -> Code | None:
    """The code of the ScoringError that `work` raises; None when it does not."""
    try:
        work()
    except ScoringError as error:
        return error.code
    return None


@given(ANYTHING | REQUESTS, st.binary(max_size=20), st.booleans())
def test_any_json_is_a_request_or_an_error(value: Any, rest: bytes, binary: bool) -> None:
    text = json.dumps(value).encode()
    length = len(text) if binary else None
    assert code_of(lambda: decode_json(text + rest, length, "m", "")) in WRONG


@pytest.mark.parametrize("shape", [[0, 2**70], [2**70, 0], [0, 2**62, 2**62]])
@pytest.mark.parametrize("contents", [{"data": []}, {"parameters": {"binary_data_size": 0}}])
def test_shapes_that_no_array_can_have(shape: list[int], contents: Any) -> None:
    entry = {"name": "x", "shape": shape, "datatype": "FP32", **contents}
    text = json.dumps({"inputs": [entry]}).encode()
    with pytest.raises(ScoringError, match="too large"):
        decode_json(text, len(text), "m", "")


@given(st.binary(max_size=200), st.none() | st.integers(0, 200))
def test_any_bytes_are_a_request_or_an_error(body: bytes, length: int | None) -> None:
    for work in (
        lambda: decode_json(body, length, "m", ""),
        lambda: decode_score(body, SPECS),
        lambda: decode_only_tensor(body, SPECS[0], "m", ""),
        lambda: decode_only_tensor(body, SPECS[1], "m", ""),
    ):
        assert code_of(work) in WRONG


@given(ANYTHING | SCORES, st.sampled_from([SPECS, SPECS[:1], SPECS[1:], ()]))
def test_any_json_is_a_score_or_an_error(value: Any, specs: Any) -> None:
    assert code_of(lambda: decode_score(json.dumps(value).encode(), specs)) in WRONG


@given(st.text(max_size=60))
def test_any_query_is_an_object(query: str) -> None:
    try:
        made = decode_query(query)
    except ValueError:
        pytest.fail("a query must not end in anything but JSON")
    assert isinstance(json.loads(made), dict)


NUMBERS = [name for name in NUMPY_DTYPES if name != "BYTES"]


@given(st.data(), st.sampled_from(NUMBERS), st.booleans(), st.booleans())
def test_tensors_survive(data: Any, datatype: str, binary: bool, nested: bool) -> None:
    dtype = NUMPY_DTYPES[datatype]
    shapes = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)
    array = data.draw(arrays.arrays(dtype, shapes))
    tensor = Tensor("x", datatype, array)
    response = InferenceResponse("m", "1", (tensor,), "")
    asked = json.dumps({"inputs": [], "parameters": {"binary_data_output": binary}}).encode()
    body, length = encode_json(response, decode_json(asked, None, "m", ""))
    answer = json.loads(body[:length])
    (output,) = answer["outputs"]
    if not binary and dtype.kind == "f" and not np.isfinite(array).all():
        assert None in output["data"]
        return
    if nested and not binary and array.size:
        output["data"] = array.tolist()
    whole = json.dumps({"inputs": [output]}).encode()
    if binary:
        decoded = decode_json(whole + body[length:], len(whole), "m", "")
    else:
        decoded = decode_json(whole, None, "m", "")
    (back,) = decoded.request.inputs
    assert (back.datatype, back.array.shape, back.array.dtype) == (datatype, array.shape, dtype)
    np.testing.assert_array_equal(back.array, array)
    assert back.array.flags.aligned


@given(st.binary(max_size=3000), st.sampled_from(["gzip", "deflate"]))
def test_packing(body: bytes, encoding: str) -> None:
    packed = compress(body, encoding)
    assert decompress(packed, encoding, 3000) == body
    if body:
        with pytest.raises(Refusal) as caught:
            decompress(packed, encoding, len(body) - 1)
        assert caught.value.status == 413
        with pytest.raises(Refusal):
            decompress(packed[:-5], encoding, 3000)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("gzip", "gzip"),
        ("GZIP;q=0.1, deflate;q=0.9", "deflate"),
        ("*", "gzip"),
        ("gzip;q=0", ""),
        ("gzip;q=x", ""),
        ("br, zstd", ""),
        ("", ""),
    ],
)
def test_which_encoding_is_accepted(header: str, expected: str) -> None:
    assert accepted(header) == expected


@given(st.text(max_size=40))
def test_any_path_matches_or_not(path: str) -> None:
    found = match("/" + path)
    assert found is None or found.template in ROUTES


@pytest.mark.parametrize(
    ("path", "template", "params"),
    [
        ("/", "/", {}),
        ("/v2", "/v2", {}),
        ("/v2/", "/v2", {}),
        ("/v2/models/stats", "/v2/models/stats", {}),
        ("/v2/models/a%2Fb", "/v2/models/{model}", {"model": "a/b"}),
        (
            "/v2/models/m/versions/1/infer",
            "/v2/models/{model}/versions/{version}/infer",
            {"model": "m", "version": "1"},
        ),
        ("/score/e", "/score/{endpoint}", {"endpoint": "e"}),
    ],
)
def test_paths(path: str, template: str, params: dict[str, str]) -> None:
    found = match(path)
    assert found is not None
    assert (found.template, found.params) == (template, params)


@pytest.mark.parametrize(
    "path", ["", "/v1", "/v2/models", "/v2/models//infer", "/V2", "/score/a/b"]
)
def test_paths_that_are_not_served(path: str) -> None:
    assert match(path) is None


def test_every_code_has_a_status() -> None:
    assert set(STATUS) == set(Code)
    assert math.prod(status >= 400 for status in STATUS.values())
