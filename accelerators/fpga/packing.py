"""Codes to bytes and back: the innermost dimension as one little-endian integer.

Element 0 takes the lowest bits, and the last byte of a row is filled up with zeros. That is what
FINN calls `finnpy_to_packed_bytearray(reverse_endian=True, reverse_inner=True)`. Pure.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..tensors import Array
from .elements import Element

Bytes = npt.NDArray[np.uint8]


def packed_size(inner: int, element: Element) -> int:
    """Bytes that `inner` elements take."""
    return -(-inner * element.bits // 8)


def pack(codes: Array, element: Element) -> Bytes:
    """Codes [rows, inner] in the element's container -> uint8 [rows, packed_size(inner)].

    A view, without a copy, where the container has exactly the element's bits.
    """
    rows, inner = codes.shape
    bits = element.bits
    if bits == 8 * codes.dtype.itemsize:
        return np.ascontiguousarray(codes).view(np.uint8).reshape(rows, inner * bits // 8)
    if element.kind == "bipolar":
        return np.packbits(np.greater(codes, 0), axis=-1, bitorder="little")
    if bits == 1:
        return np.packbits(codes.view(np.uint8), axis=-1, bitorder="little")
    group, size, groups = _grouping(bits, inner)
    word = _word(group * bits)
    mask = (1 << bits) - 1
    unsigned = np.zeros((rows, groups * group), _word(bits) if word is None else word)
    unsigned[:, :inner] = codes
    unsigned &= unsigned.dtype.type(mask)
    lanes = unsigned.reshape(rows, groups, group)
    if word is not None:
        packed = lanes[..., 0].copy()
        for lane in range(1, group):
            packed |= lanes[..., lane] << packed.dtype.type(lane * bits)
        raw = packed.view(np.uint8).reshape(rows, groups, word.itemsize)[..., :size]
    else:
        raw = np.zeros((rows, groups, size), np.uint8)
        for lane in range(group):
            start, shift = divmod(lane * bits, 8)
            moved = lanes[..., lane].astype(np.uint64) << np.uint64(shift)
            for byte in range(-(-(shift + bits) // 8)):
                raw[..., start + byte] |= (moved >> np.uint64(8 * byte)).astype(np.uint8)
    return np.ascontiguousarray(raw.reshape(rows, groups * size)[:, : packed_size(inner, element)])


def unpack(raw: Bytes, inner: int, element: Element) -> Array:
    """uint8 [rows, packed_size(inner)] -> codes [rows, inner] in the element's container."""
    rows = len(raw)
    bits, container = element.bits, element.container
    if bits == 8 * container.itemsize:
        return np.ascontiguousarray(raw).view(container).reshape(rows, inner)
    if bits == 1:
        single = np.unpackbits(raw, axis=-1, count=inner, bitorder="little")
        if element.kind == "bipolar":
            return (single.view(np.int8) << 1) - np.int8(1)
        return single
    group, size, groups = _grouping(bits, inner)
    word = _word(group * bits)
    filled = np.zeros((rows, groups, size), np.uint8)
    filled.reshape(rows, groups * size)[:, : raw.shape[1]] = raw
    codes = np.empty((rows, groups * group), container)
    # Not one broadcast over the lanes: numpy is slow where the last dimension is short.
    lanes = codes.view(f"<u{container.itemsize}").reshape(rows, groups, group)
    if word is not None:
        padded = filled
        if word.itemsize != size:
            padded = np.zeros((rows, groups, word.itemsize), np.uint8)
            padded[..., :size] = filled
        packed = padded.view(word)[..., 0]
        for lane in range(group):
            lanes[..., lane] = (packed >> word.type(lane * bits)) & word.type((1 << bits) - 1)
    else:
        for lane in range(group):
            start, shift = divmod(lane * bits, 8)
            total = np.zeros((rows, groups), np.uint64)
            for byte in range(-(-(shift + bits) // 8)):
                total |= filled[..., start + byte].astype(np.uint64) << np.uint64(8 * byte)
            lanes[..., lane] = (total >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
    if element.signed:
        # Shifting left and back again copies the sign bit upwards.
        away = 8 * container.itemsize - bits
        np.left_shift(codes, away, out=codes)
        np.right_shift(codes, away, out=codes)
    return np.ascontiguousarray(codes[:, :inner])


def _grouping(bits: int, inner: int) -> tuple[int, int, int]:
    """Elements that end on a byte together, their bytes, and how many such groups there are."""
    group = 8 // math.gcd(bits, 8)
    return group, group * bits // 8, -(-inner // group)


def _word(bits: int) -> np.dtype[np.unsignedinteger[npt.NBitBase]] | None:
    return next((np.dtype(f"<u{size}") for size in (1, 2, 4, 8) if bits <= 8 * size), None)
