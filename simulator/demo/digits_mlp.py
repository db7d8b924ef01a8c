"""Training of the demo's classifiers, the same bits on every machine.

Floating-point sums depend on the order of their terms, so on the BLAS, the CPU and the thread
count, and training amplifies the last bit into another model. Here every operand of a matrix
product is rounded to a grid so coarse that float64 holds each sum exactly, whatever the order;
what remains (element-wise add, multiply, divide, square root) is correctly rounded by IEEE 754. The
loss is a squared hinge because `exp` differs between libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

PIXEL_MAX = 16.0
CLASSES = 10

# Fractional bits. The widest sum is of 128 products of 12 + 7 (activation) by 20 + 3 (weight) bits:
# 49 of float64's 53.
_WEIGHT_BITS = 20
_ACTIVATION_BITS = 12
_GRADIENT_BITS = 16
_GRADIENT_LIMIT = 16.0
_WEIGHT_LIMIT = 8.0
_ACTIVATION_LIMIT = 128.0

_LEARNING_RATE = 2e-3
_MOMENT, _SQUARE_MOMENT, _EPSILON = 0.9, 0.999, 1e-8
_BATCH = 64


@dataclass(frozen=True, eq=False)
class Dense:
    """One layer: `weights` float64 [in, out] and `bias` float64 [out], exact in float32."""

    weights: Floats
    bias: Floats


def forward(layers: Sequence[Dense], inputs: Floats, *, rounded: bool = True) -> list[Floats]:
    """Activations [n, width] per layer, the inputs first; Relu between layers, none at the end.

    `rounded` puts the activations between layers on their grid, which makes the sums exact.
    """
    activations = [inputs]
    for index, layer in enumerate(layers):
        values = activations[-1] @ layer.weights + layer.bias
        if index < len(layers) - 1:
            values = np.maximum(values, 0.0)
            if rounded:
                values = _grid(values, _ACTIVATION_BITS, _ACTIVATION_LIMIT)
        activations.append(values)
    return activations


def accuracy(scores: npt.NDArray[np.floating[Any]], labels: Labels) -> float:
    """Share of rows of `scores` [n, classes] whose largest value is at the label."""
    return float(np.mean(scores.argmax(axis=1) == labels))


def shifted(images: Floats) -> Floats:
    """Images [5n, 64]: `images` [n, 64], then each moved by one pixel down, up, right and left."""
    size = round(images.shape[1] ** 0.5)
    padded = np.pad(images.reshape(-1, size, size), ((0, 0), (1, 1), (1, 1)))
    corners = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
    moved = [padded[:, row : row + size, column : column + size] for row, column in corners]
    stacked: Floats = np.concatenate(moved)
    return stacked.reshape(-1, size * size)


def train(
    widths: Sequence[int], images: Floats, labels: Labels, *, epochs: int, seed: int
) -> list[Dense]:
    """Fit an MLP with layers of `widths` to `images` [n, 64] of pixels 0..16 by Adam.

    The layers take pixels as they are. The same arguments give the same bits.
    """
    # RandomState's stream is frozen by numpy; default_rng's may change between releases.
    random = np.random.RandomState(seed)
    inputs = images / PIXEL_MAX
    targets = np.where(labels[:, None] == np.arange(CLASSES), 1.0, -1.0)
    layers = [
        Dense(
            _grid(random.uniform(-1, 1, (rows, columns)) * np.sqrt(6.0 / rows), _WEIGHT_BITS),
            np.zeros(columns),
        )
        for rows, columns in pairwise(widths)
    ]
    adam = _Adam([array for layer in layers for array in (layer.weights, layer.bias)])
    steps_per_epoch = len(inputs) // _BATCH
    for epoch in range(epochs):
        order = random.permutation(len(inputs))
        rate = _LEARNING_RATE * (1.0 - epoch / epochs)
        for step in range(steps_per_epoch):
            rows = order[step * _BATCH : (step + 1) * _BATCH]
            gradients = _gradients(layers, inputs[rows], targets[rows])
            arrays = adam.step(gradients, rate)
            layers = [Dense(*arrays[i : i + 2]) for i in range(0, len(arrays), 2)]
    # PIXEL_MAX is a power of two: folding it into the weights changes no bit of a result.
    return [Dense(layers[0].weights / PIXEL_MAX, layers[0].bias), *layers[1:]]


def _gradients(layers: Sequence[Dense], inputs: Floats, targets: Floats) -> list[Floats]:
    activations = forward(layers, inputs)
    shortfall = np.maximum(1.0 - targets * activations[-1], 0.0)
    delta = _grid(-2.0 * targets * shortfall, _GRADIENT_BITS, _GRADIENT_LIMIT)
    gradients: list[Floats] = []
    for index in range(len(layers) - 1, -1, -1):
        gradients[:0] = [activations[index].T @ delta / _BATCH, delta.sum(axis=0) / _BATCH]
        if index:
            back = (delta @ layers[index].weights.T) * (activations[index] > 0)
            delta = _grid(back, _GRADIENT_BITS, _GRADIENT_LIMIT)
    return gradients


class _Adam:
    """Kingma and Ba's optimiser, with parameters kept on the weights' grid."""

    def __init__(self, arrays: list[Floats]) -> None:
        self._arrays = arrays
        self._first = [np.zeros_like(array) for array in arrays]
        self._second = [np.zeros_like(array) for array in arrays]
        self._first_decay = self._second_decay = 1.0

    def step(self, gradients: list[Floats], rate: float) -> list[Floats]:
        # Running products, since `**` goes through the C library's pow.
        self._first_decay *= _MOMENT
        self._second_decay *= _SQUARE_MOMENT
        for index, gradient in enumerate(gradients):
            first = _MOMENT * self._first[index] + (1.0 - _MOMENT) * gradient
            second = (
                _SQUARE_MOMENT * self._second[index] + (1.0 - _SQUARE_MOMENT) * gradient * gradient
            )
            self._first[index], self._second[index] = first, second
            scale = np.sqrt(second / (1.0 - self._second_decay)) + _EPSILON
            move = rate * (first / (1.0 - self._first_decay)) / scale
            self._arrays[index] = _grid(self._arrays[index] - move, _WEIGHT_BITS, _WEIGHT_LIMIT)
        return list(self._arrays)


def _grid(values: Floats, bits: int, limit: float = _WEIGHT_LIMIT) -> Floats:
    """`values` rounded to multiples of 2**-bits and clipped to +-limit."""
    unit = float(2**bits)
    rounded: Floats = np.rint(np.clip(values, -limit, limit) * unit) / unit
    return rounded
