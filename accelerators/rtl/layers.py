"""The integer layers the core computes: int8 in, int8 out, height x width x channels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Shape = tuple[int, int, int]
"""Height, width, channels."""


@dataclass(frozen=True, eq=False)
class Window:
    """How a kernel moves over its input. Pairs are (vertical, horizontal); output is (h, w)."""

    kernel: tuple[int, int]
    output: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    """Rows above and columns to the left; those below and to the right follow from `output`."""


@dataclass(frozen=True, eq=False)
class Rescale:
    """int32 -> int8: float32(sum) * multiplier, half to even, plus `zero`, clamped.

    `multiplier` float32 [channels], positive and normal.
    """

    multiplier: npt.NDArray[np.float32]
    zero: int = 0
    low: int = -128
    high: int = 127


@dataclass(frozen=True, eq=False)
class Conv:
    """Convolution; a dense layer is one of 1 x 1 pixel.

    `weights` int8 [out, kernel height, kernel width, in]; `bias` int32 [out]. What is outside of
    the input counts as `zero_in`, the input's zero point.
    """

    name: str
    window: Window
    weights: npt.NDArray[np.int8]
    bias: npt.NDArray[np.int32]
    rescale: Rescale
    zero_in: int = 0


@dataclass(frozen=True, eq=False)
class MaxPool:
    """Maximum per channel; what is outside of the input never wins."""

    name: str
    window: Window


@dataclass(frozen=True, eq=False)
class GlobalSum:
    """Average per channel over the whole input: the division is part of `rescale`."""

    name: str
    rescale: Rescale
    zero_in: int = 0


Layer = Conv | MaxPool | GlobalSum


def output_shape(layer: Layer, shape: Shape) -> Shape:
    """What `layer` makes of an input of `shape`. Raises ValueError when it does not fit."""
    if isinstance(layer, Conv):
        if layer.weights.shape[3] != shape[2]:
            raise ValueError(
                f"{layer.name}: takes {layer.weights.shape[3]} channels but is given {shape[2]}"
            )
        return (*layer.window.output, layer.weights.shape[0])
    if isinstance(layer, MaxPool):
        return (*layer.window.output, shape[2])
    return (1, 1, shape[2])


def multiply_accumulates(layer: Layer, shape: Shape) -> int:
    """Products per item, without those a group or a word is filled up with."""
    height, width, channels = output_shape(layer, shape)
    if not isinstance(layer, Conv):
        return 0
    kernel_h, kernel_w = layer.window.kernel
    return height * width * channels * kernel_h * kernel_w * shape[2]


def dense(
    name: str,
    weights: npt.NDArray[np.int8],
    bias: npt.NDArray[np.int32],
    rescale: Rescale,
    zero_in: int = 0,
    over: Shape | None = None,
) -> Conv:
    """A fully connected layer: `weights` int8 [in, out].

    `over` is the shape of the input when it was flattened from channels x height x width, as ONNX
    does: the kernel then covers all of it.
    """
    if over is None or over[:2] == (1, 1):
        kernel, arranged = (1, 1), weights.T[:, None, None, :]
    else:
        height, width, channels = over
        kernel = (height, width)
        arranged = weights.T.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    return Conv(
        name, Window(kernel, (1, 1)), np.ascontiguousarray(arranged), bias, rescale, zero_in
    )
