"""Compressed bodies: gzip and deflate, never larger than allowed once unpacked."""

from __future__ import annotations

import zlib

from .http_types import Refusal

SMALLEST = 1024
"""Bytes from which on an answer is compressed for clients that take it."""

_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_FASTEST = 1
_WBITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


def decompress(body: bytes | bytearray, encoding: str, limit: int) -> bytes | bytearray:
    """Raises Refusal 415 for another encoding, 413 beyond `limit` bytes, 400 for broken data."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in ("gzip", "deflate"):
        raise Refusal(415, f"content encoding {encoding[:40]!r} is not served; use gzip or deflate")
    unpacker = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        unpacked = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise Refusal(400, f"the body is no {name} data: {error}") from None
    if len(unpacked) > limit:
        raise Refusal(413, f"the body exceeds {limit} bytes once unpacked; send less")
    if not unpacker.eof:
        raise Refusal(400, f"the body's {name} data ends too early")
    return unpacked


def accepted(header: str) -> str:
    """The encoding to answer in, "" for none. Source: RFC 9110, section 12.5.3."""
    best, weight = "", 0.0
    for part in header.split(","):
        name, _, parameters = part.partition(";")
        name = name.strip().lower()
        name = "gzip" if name == "*" else name
        if name not in _WBITS:
            continue
        quality = 1.0
        key, _, value = parameters.strip().partition("=")
        if key.strip() == "q":
            try:
                quality = float(value)
            except ValueError:
                quality = 0.0
        if quality > weight:
            best, weight = name, quality
    return best


def compress(body: bytes, encoding: str) -> bytes:
    packer = zlib.compressobj(_FASTEST, zlib.DEFLATED, _WBITS[encoding])
    return packer.compress(body) + packer.flush()
