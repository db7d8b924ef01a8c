"""Between the tensors of clients and the bytes of the fabric, whatever the package. Pure."""

from __future__ import annotations

import numpy as np

from ..tensors import NUMPY_DTYPES, Array
from .elements import to_codes, to_values
from .package import PackedWire, Port, WireFormat
from .packing import Bytes, pack, unpack
from .wire import dequantise, quantise


def is_plain(port: Port) -> bool:
    """Whether a tensor of the port's spec has the very bytes that travel."""
    wire, dtype = port.wire, NUMPY_DTYPES[port.spec.datatype]
    if not isinstance(wire, PackedWire) or wire.padding or min(port.spec.shape[1:], default=0) < 0:
        return False
    element = wire.element
    return (
        element.kind in ("float", "integer")
        and not element.fraction
        and element.container == dtype
        and element.bits == 8 * dtype.itemsize
    )


def encode(tensor: Array, port: Port) -> Bytes:
    """A tensor of the port's spec -> uint8 [n, item_bytes]; maybe a view of `tensor`.

    Raises InvalidTensor for values that the wire cannot carry.
    """
    wire = port.wire
    count = len(tensor)
    if isinstance(wire, WireFormat):
        return quantise(tensor, wire).view(np.uint8)
    codes = to_codes(tensor, wire.element).reshape(count * wire.rows, wire.inner)
    packed = pack(codes, wire.element).reshape(count, -1)
    if wire.padding:
        return np.pad(packed, ((0, 0), (0, wire.padding)))
    return packed


def decode(items: Bytes, port: Port) -> Array:
    """uint8 [n, item_bytes] -> a tensor of the port's spec; maybe a view of `items`."""
    wire, spec = port.wire, port.spec
    count = len(items)
    if isinstance(wire, WireFormat):
        return dequantise(items.view(np.int8), wire, spec.shape)
    if wire.padding:
        items = items[:, : -wire.padding]
    codes = unpack(
        np.ascontiguousarray(items).reshape(count * wire.rows, -1), wire.inner, wire.element
    )
    values = to_values(codes, wire.element, NUMPY_DTYPES[spec.datatype])
    return values.reshape(count, *spec.shape[1:])
