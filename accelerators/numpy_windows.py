"""ONNX's convolution and pooling in numpy, over one or more spatial dimensions.

Source: ONNX operator documentation (Conv, MaxPool, AveragePool, GlobalAveragePool).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .errors import BackendError
from .numpy_operators import Call, Kernel, Value, bounded

# Columns of im2col are made for as many items at a time as stay within this.
_COLUMN_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Windows:
    """Where the windows lie, per spatial dimension. `surplus`: what ceil_mode reads beyond the
    padding at the end."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    surplus: tuple[int, ...]


def windows_of(call: Call, size: tuple[int, ...], kernel: tuple[int, ...]) -> Windows:
    """The windows over an input of spatial `size`. Raises BackendError."""
    rank = len(size)
    strides = call.integers("strides") or (1,) * rank
    dilations = call.integers("dilations") or (1,) * rank
    pads = call.integers("pads") or (0,) * (2 * rank)
    if not (rank == len(kernel) == len(strides) == len(dilations) == len(pads) / 2):
        raise BackendError(f"{rank} spatial dimensions do not fit the kernel {list(kernel)}")
    if min((*kernel, *strides, *dilations), default=0) < 1 or min(pads, default=0) < 0:
        raise BackendError("kernel, strides and dilations must be positive, pads not negative")
    extents = [(width - 1) * step + 1 for width, step in zip(kernel, dilations, strict=True)]
    begin, end = list(pads[:rank]), list(pads[rank:])
    auto = call.text("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        for at in range(rank):
            total = max((-(-size[at] // strides[at]) - 1) * strides[at] + extents[at] - size[at], 0)
            smaller, larger = total // 2, total - total // 2
            begin[at], end[at] = (smaller, larger) if auto == "SAME_UPPER" else (larger, smaller)
    elif auto == "VALID":
        begin, end = [0] * rank, [0] * rank
    surplus = [0] * rank
    for at in range(rank):
        room = size[at] + begin[at] + end[at] - extents[at]
        if room < 0:
            raise BackendError(f"the input {list(size)} is smaller than the kernel {list(kernel)}")
        if call.integer("ceil_mode", 0) and room % strides[at]:
            last = (room // strides[at] + 1) * strides[at]
            # A window that would begin in the padding at the end does not count.
            if last < size[at] + begin[at]:
                surplus[at] = last - room
    return Windows(kernel, strides, dilations, tuple(begin), tuple(end), tuple(surplus))


def view(x: Value, windows: Windows, fill: float) -> Value:
    """[n, c, *size] -> [n, c, *positions, *kernel], a view of the padded input."""
    ends = [a + b for a, b in zip(windows.end, windows.surplus, strict=True)]
    padding = [(0, 0), (0, 0), *zip(windows.begin, ends, strict=True)]
    if any(map(any, padding)):
        shape = tuple(n + sum(pad) for n, pad in zip(x.shape, padding, strict=True))
        bounded(shape, x.dtype.itemsize)
        padded = np.full(shape, fill, x.dtype)
        padded[tuple(slice(a, a + n) for n, (a, _) in zip(x.shape, padding, strict=True))] = x
        x = padded
    pairs = list(zip(windows.kernel, windows.dilations, strict=True))
    extents = tuple((width - 1) * step + 1 for width, step in pairs)
    spatial = tuple(range(2, x.ndim))
    view: Any = sliding_window_view  # its stubs differ from numpy 1 to 2
    seen: Value = view(x, extents, axis=spatial)
    steps = (slice(None), slice(None), *(slice(None, None, s) for s in windows.strides))
    index = (*steps, *(slice(None, None, d) for d in windows.dilations))
    return seen[index]


def convolve(call: Call, x: Value, weights: Value) -> Value:
    """[n, c, *size], [m, c / groups, *kernel] -> [n, m, *positions], without bias.

    In the dtype of `x`, which `weights` must have too.
    """
    if x.ndim < 3 or weights.ndim != x.ndim:
        raise BackendError(f"Conv over {list(x.shape)} with weights {list(weights.shape)}")
    groups = call.integer("group", 1)
    n, channels = x.shape[:2]
    outputs = weights.shape[0]
    if groups < 1 or channels != weights.shape[1] * groups or outputs % groups:
        raise BackendError(
            f"{channels} channels in {groups} groups do not fit weights {list(weights.shape)}"
        )
    seen = view(x, windows_of(call, x.shape[2:], weights.shape[2:]), 0)
    rank = x.ndim - 2
    positions = seen.shape[2 : 2 + rank]
    area, depth = math.prod(positions), math.prod(weights.shape[1:])
    bounded((n, outputs, area), x.dtype.itemsize)
    bounded((groups, depth, area), x.dtype.itemsize)
    rows = weights.reshape(groups, outputs // groups, depth)
    result = np.empty((n, groups, outputs // groups, area), x.dtype)
    # Kernel positions in front of spatial ones: [n, c, *kernel, *positions].
    order = (0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))
    columns = seen.transpose(order)
    items = max(1, _COLUMN_BYTES // max(1, groups * depth * area * x.dtype.itemsize))
    for first in range(0, n, items):
        some = columns[first : first + items]
        np.matmul(
            rows, some.reshape(len(some), groups, depth, area), out=result[first : first + items]
        )
    return result.reshape(n, outputs, *positions)


def _conv(call: Call, x: Value, weights: Value, bias: Value = None) -> Value:
    result = convolve(call, x, weights)
    return result if bias is None else result + bias.reshape(-1, *(1,) * (x.ndim - 2))


def _kernel_axes(x: Value) -> tuple[int, ...]:
    return tuple(range(-(x.ndim - 2), 0))


def _max_pool(call: Call, x: Value) -> Value:
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    windows = windows_of(call, x.shape[2:], call.integers("kernel_shape") or ())
    return view(x, windows, lowest).max(axis=_kernel_axes(x))


def _average_pool(call: Call, x: Value) -> Value:
    windows = windows_of(call, x.shape[2:], call.integers("kernel_shape") or ())
    sums = view(x, windows, 0).sum(axis=_kernel_axes(x), dtype=x.dtype)
    if call.integer("count_include_pad", 0) and call.opset < 19:
        # What ceil_mode reads beyond the padding counts, too: onnxruntime has kept it so.
        return sums / x.dtype.type(math.prod(windows.kernel))
    counted = np.ones((1, 1, *x.shape[2:]), x.dtype)
    if call.integer("count_include_pad", 0):
        padding = [(0, 0), (0, 0), *zip(windows.begin, windows.end, strict=True)]
        counted = np.pad(counted, padding, constant_values=1)
        zeros = (0,) * len(windows.begin)
        windows = Windows(
            windows.kernel, windows.strides, windows.dilations, zeros, zeros, windows.surplus
        )
    counts = view(counted, windows, 0).sum(axis=_kernel_axes(x), dtype=x.dtype)
    return sums / counts


def _global_average_pool(_: Call, x: Value) -> Value:
    return x.mean(axis=tuple(range(2, x.ndim)), keepdims=True, dtype=x.dtype)


KERNELS: Mapping[tuple[str, str], Kernel] = {
    ("", "AveragePool"): _average_pool,
    ("", "Conv"): _conv,
    ("", "GlobalAveragePool"): _global_average_pool,
    ("", "MaxPool"): _max_pool,
}
