from __future__ import annotations

import numpy as np
import pytest
from gatelet.accelerators.tensors import TensorSpec
from gatelet.agent.scoring.errors import Code, ScoringError
from gatelet.agent.scoring.types import InferenceRequest, Tensor
from gatelet.agent.scoring.validation import check_contents, check_request

INPUTS = (TensorSpec("x", "FP32", (-1, 4)), TensorSpec("k", "INT64", (1,)))
OUTPUTS = (TensorSpec("y", "FP32", (-1, 2)), TensorSpec("z", "FP32", (-1,)))
X = Tensor("x", "FP32", np.zeros((3, 4), np.float32))
K = Tensor("k", "INT64", np.zeros(1, np.int64))


def check(*inputs: Tensor, outputs: tuple[str, ...] = ()) -> tuple[str, ...]:
    return check_request(InferenceRequest("m", inputs, outputs=outputs), INPUTS, OUTPUTS)


def test_outputs_default_to_all_and_keep_the_order_asked_for() -> None:
    assert check(X, K) == ("y", "z")
    assert check(K, X, outputs=("z", "y")) == ("z", "y")
    assert check(X, K, outputs=("z",)) == ("z",)


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ((X,), (), r"needs 2 inputs, found 1; missing: 'k'"),
        ((), (), r"needs 2 inputs, found 0; missing: 'x', 'k'"),
        ((X, K, X), (), "input 'x' is given twice"),
        ((X, K, Tensor("q", "FP32", X.array)), (), "has no input 'q', it has 'x', 'k'"),
        ((Tensor("x", "FP64", X.array), K), (), "input 'x': datatype FP64, expected FP32"),
        (
            (Tensor("x", "FP32", np.zeros((3, 5), np.float32)), K),
            (),
            r"input 'x': shape \[3, 5\], expected \[-1, 4\] where -1 stands for any size",
        ),
        (
            (X, Tensor("k", "INT64", np.zeros((1, 1), np.int64))),
            (),
            r"input 'k': shape \[1, 1\], expected \[1\]$",
        ),
        ((X, K), ("w",), "has no output 'w', it has 'y', 'z'"),
        ((X, K), ("y", "y"), "output 'y' is requested twice"),
    ],
)
def test_what_does_not_fit_is_named(
    inputs: tuple[Tensor, ...], outputs: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ScoringError, match=message) as caught:
        check(*inputs, outputs=outputs)
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_raw_and_typed_contents_do_not_mix() -> None:
    assert check_contents(["x", "k"], [False, False], 2) is True
    assert check_contents(["x", "k"], [True, True], 0) is False
    assert check_contents([], [], 0) is False
    with pytest.raises(ScoringError, match="tensor 'k': has typed contents although raw"):
        check_contents(["x", "k"], [False, True], 2)
    with pytest.raises(ScoringError, match=r"1 raw contents for 2 tensors \('x', 'k'\)"):
        check_contents(["x", "k"], [False, False], 1)
