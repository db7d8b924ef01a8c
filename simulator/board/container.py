"""What a simulated bitstream carries besides dense networks: an engine, its cores and its data.

Layout: magic, size and CRC-32 of the rest, size of a JSON header, the header, and blobs one after
the other, whose names and sizes the header lists. A real FPGA refuses it, as it has no sync word.
Native code is never among the blobs: a bitstream may come from anywhere.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAGIC = b"GTLTSIM1"
_LAYOUT = struct.Struct("<III")


@dataclass(frozen=True, slots=True)
class Container:
    """`engine` says what computes (see `engines.open_engine`), `cores` what starts it.

    Each of `cores` is a started core: {"name", "pointers": [[offset, role, index]], "count"}; with
    "window" it has BNN-PYNQ's window to its memories. `static` names the design that a `partial`
    configuration goes into, or that a full one is.
    """

    engine: Mapping[str, Any]
    cores: tuple[Mapping[str, Any], ...] = ()
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    static: str = ""
    partial: bool = False


def encode_container(container: Container) -> bytes:
    """Configuration data, in whole 32-bit words; the same container gives the same bytes."""
    header = {
        "engine": dict(container.engine),
        "cores": [dict(core) for core in container.cores],
        "blobs": [[name, len(blob)] for name, blob in container.blobs.items()],
        **({"static": container.static, "partial": container.partial} if container.static else {}),
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    body = text + b"".join(container.blobs.values())
    packed = MAGIC + _LAYOUT.pack(len(body), zlib.crc32(body), len(text)) + body
    return packed + bytes(-len(packed) % 4)


def decode_container(data: bytes) -> Container:
    """Raises ValueError when `data` is damaged or no container."""
    if not data.startswith(MAGIC):
        raise ValueError("holds no container for the simulated fabric")
    try:
        size, crc, length = _LAYOUT.unpack_from(data, len(MAGIC))
        start = len(MAGIC) + _LAYOUT.size
        body = data[start : start + size]
        if len(body) != size or zlib.crc32(body) != crc:
            raise ValueError("configuration CRC error")
        header = json.loads(body[:length])
        blobs = {}
        for name, count in header["blobs"]:
            blobs[str(name)] = body[length : length + count]
            length += count
        static, partial = str(header.get("static", "")), bool(header.get("partial"))
        return Container(header["engine"], tuple(header["cores"]), blobs, static, partial)
    except (struct.error, KeyError, TypeError) as error:
        raise ValueError(f"damaged container: {error}") from error
