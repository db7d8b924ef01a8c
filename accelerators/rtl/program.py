"""Layers -> instructions, weights and parameters of the core. Pure.

Activations lie in a buffer pixel by pixel, channels filled up to whole words of `simd` bytes;
weights lie in the order in which the address generator takes taps. Instruction layout and load
format: docs/rtl.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .config import CoreConfig
from .layers import Conv, GlobalSum, Layer, MaxPool, Rescale, Shape, Window, output_shape

OP_CONV, OP_MAX, OP_SUM = 1, 2, 3
TARGET_WEIGHTS, TARGET_PARAMETERS, TARGET_INSTRUCTIONS = 1, 2, 3
INSTRUCTION_WORDS = 8
_FIELDS = 32
_LIMIT16 = 65535


class ProgramError(ValueError):
    """The layers do not fit the core; the message names the layer and the limit."""


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Cycles per item as the core issues them, without the fixed start and end of a layer."""

    name: str
    cycles: int
    macs: int


@dataclass(frozen=True, eq=False)
class Program:
    """What one core runs: registers and memory contents.

    `instructions` uint64 [layers, 8]; `weights` uint8 [rows, pe, simd]; `parameters` uint64
    [rows, requantisers] (multiplier above bias). `tile` items are computed at once.
    """

    config: CoreConfig
    input: Shape
    output: Shape
    tile: int
    instructions: npt.NDArray[np.uint64]
    weights: npt.NDArray[np.uint8]
    parameters: npt.NDArray[np.uint64]
    costs: tuple[LayerCost, ...]

    @property
    def in_bytes(self) -> int:
        """int8 values per item, height x width x channels."""
        return math.prod(self.input)

    @property
    def out_bytes(self) -> int:
        return math.prod(self.output)

    def load_packets(self, limit: int = 1 << 14) -> Iterator[bytes]:
        """Packets that put everything into the core's memories, each of at most `limit` bytes."""
        simd = self.config.simd
        for target, rows in (
            (TARGET_WEIGHTS, self.weights.reshape(-1, self.config.pe * simd)),
            (TARGET_PARAMETERS, _widened(self.parameters, simd)),
            (TARGET_INSTRUCTIONS, _widened(self.instructions.reshape(-1, 1), simd)),
        ):
            if not len(rows):
                continue
            step = (limit - simd) // rows.shape[1]
            if step < 1:
                raise ProgramError(
                    f"a packet of {limit} bytes is too short for one row of {rows.shape[1]} bytes"
                )
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                head = target | start << 8 | (part.size // simd) << 32
                yield head.to_bytes(8, "little") + bytes(simd - 8) + part.tobytes()


def lower(layers: Sequence[Layer], input: Shape, config: CoreConfig) -> Program:
    """The program for `layers` on items of shape `input`.

    Raises ProgramError when a layer, the weights or one item's activations do not fit the core.
    """
    if not 1 <= len(layers) <= config.layers:
        raise ProgramError(f"{len(layers)} layers; this core runs 1 to {config.layers}")
    weights: list[npt.NDArray[np.uint8]] = []
    parameters: list[npt.NDArray[np.uint64]] = []
    instructions = []
    costs = []
    shape = input
    largest = [item_words(shape, config), 0]
    weight_rows = parameter_rows = 0
    for index, layer in enumerate(layers):
        after = output_shape(layer, shape)
        fields, rows, params, cycles, macs = _layer(layer, shape, config)
        fields["weight_base"] = weight_rows
        fields["param_base"] = parameter_rows
        weight_rows += len(rows)
        parameter_rows += len(params)
        weights.append(rows)
        parameters.append(params)
        instructions.append(_encode(layer.name, fields))
        costs.append(LayerCost(layer.name, cycles, macs))
        shape = after
        largest[(index + 1) % 2] = max(largest[(index + 1) % 2], item_words(shape, config))
    for what, need, have in (
        ("weights", weight_rows, config.weight_words),
        ("parameters", parameter_rows, config.parameter_rows),
        ("activations of one item", max(largest), config.activation_words),
    ):
        if need > have:
            raise ProgramError(f"{what} need {need} rows of memory, the core has {have}")
    for rows_, bytes_ in ((input[0] * input[1], input[2]), (shape[0] * shape[1], shape[2])):
        if rows_ > _LIMIT16 or bytes_ > _LIMIT16:
            raise ProgramError(f"an item of {rows_} x {bytes_} is larger than the streams can take")
    return Program(
        config=config,
        input=input,
        output=shape,
        tile=min(config.activation_words // max(largest), _LIMIT16),
        instructions=np.stack(instructions),
        weights=np.concatenate(weights),
        parameters=np.concatenate(parameters),
        costs=tuple(costs),
    )


def item_words(shape: Shape, config: CoreConfig) -> int:
    """Words of an activation buffer that one item takes."""
    return shape[0] * shape[1] * _up(shape[2], config.simd)


def layer_cycles(layer: Layer, shape: Shape, config: CoreConfig) -> int:
    """Cycles per item that `layer` is issued in."""
    height, width, channels = output_shape(layer, shape)
    words = _up(shape[2], config.simd)
    if isinstance(layer, GlobalSum):
        drain = config.simd // config.requantisers
        return words * max(shape[0] * shape[1], drain)
    kernel = math.prod(layer.window.kernel)
    if isinstance(layer, MaxPool):
        return height * width * words * kernel
    drain = config.pe // config.requantisers
    return height * width * _up(channels, config.pe) * max(kernel * words, drain)


def _layer(
    layer: Layer, shape: Shape, config: CoreConfig
) -> tuple[dict[str, int], npt.NDArray[np.uint8], npt.NDArray[np.uint64], int, int]:
    words = _up(shape[2], config.simd)
    after = output_shape(layer, shape)
    no_weights = np.zeros((0, config.pe, config.simd), np.uint8)
    no_parameters = np.zeros((0, config.requantisers), np.uint64)
    macs = 0
    if isinstance(layer, Conv):
        groups = _up(after[2], config.pe)
        fields = _window_fields(layer.window, shape, words, groups, words, 0)
        fields["op"] = OP_CONV
        fields["row_words"] = groups * (config.pe // config.simd)
        fields["row_steps"] = groups * (config.pe // config.requantisers)
        rows = _weight_rows(layer, words, groups, config)
        sums = layer.weights.astype(np.int64).sum(axis=(1, 2, 3))
        folded = layer.bias.astype(np.int64) - layer.zero_in * sums
        worst = np.abs(layer.weights.astype(np.int64)).sum(axis=(1, 2, 3)) * 255
        if int((worst + np.abs(layer.bias.astype(np.int64))).max()) >= 1 << 31:
            raise ProgramError(f"{layer.name}: sums could leave int32; the layer is too wide")
        params = _parameter_rows(layer.name, folded, layer.rescale, groups * config.pe, config)
        macs = math.prod(after) * math.prod(layer.window.kernel) * shape[2]
        _rescale_fields(fields, layer.rescale, layer.zero_in)
    else:
        whole = isinstance(layer, GlobalSum)
        window = Window(shape[:2], (1, 1)) if isinstance(layer, GlobalSum) else layer.window
        fields = _window_fields(window, shape, words, words, 1, 1)
        fields["op"] = OP_SUM if whole else OP_MAX
        fields["row_words"] = words
        fields["row_steps"] = words * (config.simd // config.requantisers)
        rows, params = no_weights, no_parameters
        if isinstance(layer, GlobalSum):
            count = shape[0] * shape[1]
            if count * 256 >= 1 << 31:
                raise ProgramError(f"{layer.name}: sums could leave int32")
            bias = np.full(shape[2], -layer.zero_in * count, np.int64)
            params = _parameter_rows(layer.name, bias, layer.rescale, words * config.simd, config)
            _rescale_fields(fields, layer.rescale, layer.zero_in)
    fields["out_words"] = _up(after[2], config.simd)
    return fields, rows, params, layer_cycles(layer, shape, config), macs


def _window_fields(
    window: Window, shape: Shape, words: int, groups: int, inner: int, step_group: int
) -> dict[str, int]:
    height, width, _ = shape
    line = width * words
    return {
        "in_h": height,
        "in_w": width,
        "out_h": window.output[0],
        "out_w": window.output[1],
        "groups": groups,
        "kernel_h": window.kernel[0],
        "kernel_w": window.kernel[1],
        "inner": inner,
        "stride_h": window.stride[0],
        "stride_w": window.stride[1],
        "pad_top": window.pad[0],
        "pad_left": window.pad[1],
        "dilation_h": window.dilation[0],
        "dilation_w": window.dilation[1],
        # Addresses wrap at 16 bits; only those inside of the input are used.
        "step_item": height * line & _LIMIT16,
        "step_oy": window.stride[0] * line & _LIMIT16,
        "step_ox": window.stride[1] * words & _LIMIT16,
        "step_g": step_group,
        "step_ky": window.dilation[0] * line & _LIMIT16,
        "step_kx": window.dilation[1] * words & _LIMIT16,
        "origin": -(window.pad[0] * line + window.pad[1] * words) & _LIMIT16,
    }


def _rescale_fields(fields: dict[str, int], rescale: Rescale, zero_in: int) -> None:
    for point in (zero_in, rescale.zero, rescale.low, rescale.high):
        if not -128 <= point <= 127:
            raise ProgramError(f"{point} does not fit int8")
    fields["zero"] = (zero_in & 255) | (rescale.zero & 255) << 8
    fields["clamp"] = (rescale.low & 255) | (rescale.high & 255) << 8


_ORDER = (
    "op", "in_h", "in_w", "out_h", "out_w", "groups", "kernel_h", "kernel_w", "inner",
    "stride_h", "stride_w", "pad_top", "pad_left", "dilation_h", "dilation_w",
    "step_item", "step_oy", "step_ox", "step_g", "step_ky", "step_kx",
    "origin", "weight_base", "param_base", "out_words", "zero", "clamp", "row_steps", "row_words",
)  # fmt: skip


def _encode(name: str, fields: dict[str, int]) -> npt.NDArray[np.uint64]:
    values = np.zeros(_FIELDS, "<u2")
    for index, field in enumerate(_ORDER):
        value = fields.get(field, 0)
        if not 0 <= value <= _LIMIT16:
            raise ProgramError(f"{name}: {field} is {value}, the core takes 0 to {_LIMIT16}")
        values[index] = value
    return values.view("<u8").astype(np.uint64)


def _weight_rows(layer: Conv, words: int, groups: int, config: CoreConfig) -> npt.NDArray[np.uint8]:
    out, kernel_h, kernel_w, channels = layer.weights.shape
    filled = np.zeros((groups * config.pe, kernel_h, kernel_w, words * config.simd), np.int8)
    filled[:out, :, :, :channels] = layer.weights
    taps = filled.reshape(groups, config.pe, kernel_h * kernel_w * words, config.simd)
    rows = taps.transpose(0, 2, 1, 3).reshape(-1, config.pe, config.simd)
    return np.ascontiguousarray(rows).view(np.uint8)


def _parameter_rows(
    name: str, bias: npt.NDArray[np.int64], rescale: Rescale, channels: int, config: CoreConfig
) -> npt.NDArray[np.uint64]:
    multiplier = np.broadcast_to(rescale.multiplier.astype(np.float32), bias.shape)
    tiny = np.finfo(np.float32).tiny
    if not np.all(np.isfinite(multiplier) & (multiplier >= tiny)):
        raise ProgramError(f"{name}: multipliers must be positive, finite and normal float32")
    packed = np.zeros(channels, np.uint64)
    bits = np.ascontiguousarray(multiplier).view(np.uint32).astype(np.uint64)
    # The core adds in 32 bits, so that only the low half of the folded bias matters.
    low = (bias & 0xFFFF_FFFF).astype(np.uint64)
    packed[: len(bias)] = bits << np.uint64(32) | low
    return packed.reshape(-1, config.requantisers)


def _widened(rows: npt.NDArray[np.uint64], simd: int) -> npt.NDArray[np.uint8]:
    """One stream word per value: the core takes its low 64 bits."""
    wide = np.zeros((*rows.shape, simd), np.uint8)
    wide[..., :8] = rows.astype("<u8")[..., None].view(np.uint8)
    return wide.reshape(len(rows), rows.shape[1] * simd)


def _up(count: int, unit: int) -> int:
    return -(-count // unit)
