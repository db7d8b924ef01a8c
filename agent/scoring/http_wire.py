"""How HTTP/1.1 connections look from outside: their phases, names of headers, heads of answers."""

from __future__ import annotations

from enum import Enum
from typing import Any

from .http_types import PHRASES, HttpResponse

# As common clients write them.
_NAMES = {
    spelled.encode(): name.lower()
    for name in (
        "Accept",
        "Accept-Encoding",
        "Authorization",
        "Connection",
        "Content-Length",
        "Content-Type",
        "Host",
        "Inference-Header-Content-Length",
        "Traceparent",
        "User-Agent",
    )
    for spelled in (name, name.lower())
}


class Phase(Enum):
    """Where a connection is; `WAITING` is between requests, `ANSWERING` has one in work, and
    `LINGERING` only waits for the client to read why it was refused."""

    NEW = 0
    WAITING = 1
    HEADERS = 2
    BODY = 3
    ANSWERING = 4
    LINGERING = 5


def header_name(name: bytes) -> str:
    """In lower case."""
    return _NAMES.get(name) or name.decode("latin-1").lower()


def head_of(response: HttpResponse, *, close: bool) -> bytes:
    """Status line and headers of an answer, with the empty line after them."""
    status, body = response.status, response.body
    lines = [f"HTTP/1.1 {status} {PHRASES.get(status, '')}"]
    if body or status != 204:
        lines.append(f"Content-Type: {response.content_type}\r\nContent-Length: {len(body)}")
    lines += [f"{name}: {value}" for name, value in response.headers]
    if close:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")


def common_name(certificate: Any) -> str:
    """Of the subject of a peer's certificate, as the ssl module gives it; "" without one."""
    for part in certificate.get("subject", ()):
        for key, value in part:
            if key == "commonName":
                return str(value)
    return ""
