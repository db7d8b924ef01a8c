"""What gRPC says in HTTP/2's headers and data ("gRPC over HTTP2", grpc/doc/PROTOCOL-HTTP2.md)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .h2_headers import Pairs, literals

CONTENT_TYPE = b"application/grpc"
HEAD = b"\x88" + literals([(b"content-type", CONTENT_TYPE)])
"""Of every answer: status 200."""
OK_TRAILERS = literals([(b"grpc-status", b"0")])

OK, CANCELLED, INVALID, DEADLINE, EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = (
    *(0, 1, 3, 4, 8, 12, 13, 14),
)
TOO_MUCH = "too much is being received already; try again"
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_PLAIN = frozenset(range(0x20, 0x7F)) - {0x25}
_FORBIDDEN = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)
_NAME = re.compile(rb"[-!#$%&'*+.^_`|~0-9a-z]+").fullmatch
_CONTROL = re.compile(rb"[\0\r\n]").search
_LONGEST_TEXT = 4096
# Unpacked at a time, so that no more is taken than there is room for.
_PIECE = 1024 * 1024


class Failed(Exception):
    """A call that ends with a status of gRPC's own numbers."""

    def __init__(self, status: int, text: str, trailers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.trailers = trailers or {}


@dataclass(frozen=True, slots=True)
class Method:
    """One rpc: what serves it, and how its messages are read."""

    path: str
    behaviour: Callable[..., Any]
    parse: Callable[[bytes], Any]
    requests: bool
    answers: bool
    quick: bool = False


@dataclass(slots=True)
class Head:
    """The headers of a call. `http_status` other than 200, or `failed`: how it is refused;
    `malformed`: it is no request of HTTP/2 at all. `timeout` in seconds. Shared by the calls of a
    connection that say the same."""

    headers: dict[str, str] = field(default_factory=dict)
    method: Method | None = None
    timeout: float | None = None
    gzip: bool = False
    http_status: int = 200
    failed: Failed | None = None
    malformed: bool = False
    oversized: bool = False


def read_head(pairs: Pairs, methods: Mapping[str, Method], most_bytes: int) -> Head:
    head = Head()
    pseudo: dict[bytes, bytes] = {}
    size = 0
    for name, value in pairs:
        size += len(name) + len(value) + 32
        if name[:1] == b":":
            if head.headers or name in pseudo or name not in _PSEUDO:
                head.malformed = True
            if _CONTROL(value):
                head.malformed = True
            pseudo[name] = value
            continue
        if not _NAME(name) or _CONTROL(value) or name in _FORBIDDEN:
            head.malformed = True
        if name == b"te" and value != b"trailers":
            head.malformed = True
        head.headers[name.decode("latin-1")] = value.decode("latin-1")
    head.oversized = size > most_bytes
    if not all(pseudo.get(name) for name in _REQUIRED):
        head.malformed = True
    if head.malformed:
        return head
    if pseudo[b":method"] != b"POST":
        head.http_status = 405
        return head
    kind = head.headers.get("content-type", "")
    if kind != "application/grpc" and not kind.startswith(
        ("application/grpc+", "application/grpc;")
    ):
        head.http_status = 415
        return head
    try:
        if head.oversized:
            raise Failed(EXHAUSTED, f"the metadata exceeds {most_bytes} bytes; send less")
        _read_call(head, pseudo[b":path"].decode("latin-1"), methods)
    except Failed as failed:
        head.failed = failed
    return head


_REQUIRED = (b":method", b":scheme", b":path")
_PSEUDO = frozenset((*_REQUIRED, b":authority"))


def _read_call(head: Head, path: str, methods: Mapping[str, Method]) -> None:
    head.method = methods.get(path)
    if head.method is None:
        raise Failed(UNIMPLEMENTED, f"there is no method {path[:200]!r} here")
    encoding = head.headers.get("grpc-encoding", "identity")
    if encoding not in ("identity", "gzip"):
        raise Failed(
            UNIMPLEMENTED,
            f"messages in {encoding[:40]!r} cannot be read; use gzip or identity",
            {"grpc-accept-encoding": "identity, gzip"},
        )
    head.gzip = encoding == "gzip"
    timeout = head.headers.get("grpc-timeout")
    if timeout is not None:
        head.timeout = read_timeout(timeout)


def read_timeout(text: str) -> float:
    """Seconds. Raises Failed."""
    digits, unit = text[:-1], _UNITS.get(text[-1:])
    if unit is None or not (digits.isascii() and digits.isdigit() and len(digits) <= 8):
        raise Failed(
            INTERNAL, f"grpc-timeout must be up to 8 digits and a unit, found {text[:20]!r}"
        )
    return int(digits) * unit


def framed(message: bytes) -> bytes:
    """A message as it is sent, not compressed."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def check_size(size: int, most_bytes: int) -> None:
    """Raises Failed."""
    if size > most_bytes:
        raise Failed(
            EXHAUSTED,
            f"a message of {size} bytes is larger than the allowed {most_bytes}; send less",
        )


def unpack(message: bytes, most_bytes: int, reserve: Callable[[int], bool]) -> bytes:
    """A gzip message, without unpacking more than `most_bytes`, each piece of which is reserved
    before the next one. Raises Failed."""
    reader = zlib.decompressobj(31)
    pieces: list[bytes] = []
    size, left = 0, message
    while not reader.eof:
        try:
            piece = reader.decompress(left, _PIECE)
        except zlib.error as error:
            raise Failed(INTERNAL, f"the message is no gzip: {error}") from None
        left = reader.unconsumed_tail
        if not piece and not left and not reader.eof:
            break
        size += len(piece)
        if size > most_bytes:
            text = f"the message unpacks to more than the allowed {most_bytes} bytes"
            raise Failed(EXHAUSTED, text)
        if not reserve(len(piece)):
            raise Failed(UNAVAILABLE, TOO_MUCH)
        pieces.append(piece)
    if not reader.eof or reader.unused_data:
        raise Failed(INTERNAL, "the message is no whole gzip")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def check_compressed(flag: int, head: Head) -> None:
    """Raises Failed."""
    if flag != 1 or not head.gzip:
        raise Failed(INTERNAL, "the message is compressed, but no grpc-encoding says how")


def trailers(status: int, text: str, more: Mapping[str, str] | None = None) -> bytes:
    pairs = [(b"grpc-status", str(status).encode())]
    if text:
        pairs.append((b"grpc-message", percent_encoded(text)))
    for name, value in (more or {}).items():
        pairs.append((name.encode("latin-1"), value.encode("latin-1", "replace")))
    return literals(pairs)


def percent_encoded(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")[:_LONGEST_TEXT]
    return b"".join(bytes((c,)) if c in _PLAIN else b"%%%02X" % c for c in raw)
