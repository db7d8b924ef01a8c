"""Shared memory between the scoring process and the fabric process, one segment per connection.

The client makes a segment (memfd) and passes its descriptor. Sealed against any change of size, so
that the privileged side can never touch a page that is gone; who lays out what in it is computed
on both sides by `lay_out`, so that there are no offsets to be forged. Bytes may change under the
server's hands: they are tensors and nothing else.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..errors import BackendUnavailable
from ..tensors import Array
from .packing import Bytes
from .protocol import PAYLOAD_LIMIT, ProtocolError

SEGMENT_LIMIT = 4 * PAYLOAD_LIMIT
"""Bytes of a segment: inputs and outputs of the largest request, rounded up."""
_LEAST = 64 << 10
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of uint8 [items, item_bytes] lies."""

    offset: int
    items: int
    item_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.items * self.item_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """Places that do not overlap, and the bytes they take together."""

    inputs: tuple[Place, ...]
    outputs: tuple[Place, ...]
    nbytes: int


@lru_cache(64)
def lay_out(inputs: tuple[int, ...], outputs: tuple[int, ...], items: int) -> Layout | None:
    """Inputs, then outputs, one after the other on cache lines; None over `PAYLOAD_LIMIT`.

    `inputs` and `outputs` are bytes per item of each tensor.
    """
    if items < 0 or items * max(sum(inputs), sum(outputs)) > PAYLOAD_LIMIT:
        return None
    places = []
    offset = 0
    for size in (*inputs, *outputs):
        places.append(Place(offset, items, size))
        offset += -(-items * size // _ALIGNMENT) * _ALIGNMENT
    split = len(inputs)
    return Layout(tuple(places[:split]), tuple(places[split:]), offset)


class Segment:
    """A mapped segment. Its memory goes when the last view of it does."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self._bytes: Bytes = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)

    def view(self, place: Place) -> Bytes:
        """uint8 [items, item_bytes], not a copy."""
        return self._bytes[place.offset : place.end].reshape(place.items, place.item_bytes)

    def tensor(self, place: Place, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Array:
        """The same memory as `dtype` [items, *shape], whose items have as many bytes."""
        flat = self._bytes[place.offset : place.end].view(dtype)
        return flat.reshape(place.items, *shape)


def make_segment(nbytes: int) -> tuple[Segment, int]:
    """A sealed segment of at least `nbytes`, and its descriptor, which is the caller's to close.

    Raises BackendUnavailable where the system has no memfd or no memory.
    """
    size = max(_LEAST, 1 << (nbytes - 1).bit_length()) if nbytes else _LEAST
    try:
        descriptor = os.memfd_create("gatelet-fabric", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError) as error:
        raise BackendUnavailable(
            f"no shared memory for the fabric ({error}); it takes Linux with memfd_create"
        ) from error
    try:
        # Not ftruncate: the pages are to be this process's, and missing ones to show here.
        os.posix_fallocate(descriptor, 0, size)
        fcntl.fcntl(
            descriptor,
            fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
        )
        return Segment(descriptor, size), descriptor
    except (OSError, ValueError) as error:
        os.close(descriptor)
        raise BackendUnavailable(
            f"no {size} bytes of shared memory for the fabric ({error}); send smaller batches"
        ) from error


def open_segment(descriptor: int) -> Segment:
    """Map a segment that came from a client. Raises ProtocolError; closes nothing."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        size = os.fstat(descriptor).st_size
        block = os.fstatvfs(descriptor).f_bsize
    except OSError as error:
        raise ProtocolError(f"the descriptor is no shared memory ({error.strerror})") from error
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    # Huge pages can run out at the moment they are touched, which would kill this process.
    if seals & wanted != wanted or block != mmap.PAGESIZE:
        raise ProtocolError("the shared memory is not sealed against a change of size")
    if seals & fcntl.F_SEAL_WRITE or not 0 < size <= SEGMENT_LIMIT:
        raise ProtocolError(f"shared memory of {size} bytes is of no use")
    try:
        return Segment(descriptor, size)
    except (OSError, ValueError) as error:
        raise ProtocolError(f"the shared memory cannot be mapped ({error})") from error
