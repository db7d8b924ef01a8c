"""An HTTP request and its answer, as handlers see them, and what one client may do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

import msgspec

from .errors import Code, ScoringError

STATUS = {
    Code.NOT_FOUND: 404,
    Code.INVALID_ARGUMENT: 400,
    Code.UNAVAILABLE: 503,
    Code.DEADLINE_EXCEEDED: 504,
    Code.UNIMPLEMENTED: 501,
    Code.INTERNAL: 500,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.UNAUTHENTICATED: 401,
    Code.PERMISSION_DENIED: 403,
    Code.CANCELLED: 499,
}
"""What gRPC calls it -> what HTTP calls it; the pairs that Triton and KServe use."""

JSON = "application/json"
BINARY = "application/octet-stream"
PHRASES = {status.value: status.phrase for status in HTTPStatus}


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Sizes in bytes, times in seconds.

    `max_buffered_bytes`: of the bodies of all connections together, and of answers not yet taken.
    `first_request`, `headers`: for a connection to say something, and to say all headers. `idle`:
    between requests. A body comes with `body_rate` bytes a second at least, and an answer is taken
    without a pause longer than `stalled`. `linger`: for
    a client to read why its request was refused.
    """

    max_body_bytes: int = 64 * 1024 * 1024
    max_header_bytes: int = 16 * 1024
    max_buffered_bytes: int = 160 * 1024 * 1024
    max_connections: int = 512
    tls_handshake: float = 2.0
    first_request: float = 3.0
    headers: float = 3.0
    idle: float = 60.0
    body_grace: float = 5.0
    body_rate: int = 16 * 1024
    stalled: float = 5.0
    linger: float = 2.0


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """`headers` come beside Content-Type and Content-Length."""

    status: int = 200
    body: bytes = b""
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class HttpRequest:
    """`headers`: names in lower case, repeated ones joined by ", ". `path` is percent-encoded.

    `respond` is called once, from any thread. `client` is the address of the peer, `certificate`
    the common name of its verified certificate.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes | bytearray
    respond: Callable[[HttpResponse], None]
    client: str = ""
    certificate: str = ""
    received: float = 0.0


Handler = Callable[[HttpRequest], None]


class Refusal(Exception):
    """An answer other than success that is no ScoringError's, such as 405 or 413."""

    def __init__(
        self, status: int, message: str, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers


def retry_after(seconds: float) -> tuple[tuple[str, str], ...]:
    """HTTP knows whole seconds only."""
    return (("Retry-After", str(max(1, -int(-seconds // 1)))),)


def as_refusal(error: ScoringError) -> Refusal:
    hint = () if error.retry_after is None else retry_after(error.retry_after)
    if error.code is Code.UNAUTHENTICATED:
        hint = (("WWW-Authenticate", "Bearer"),)
    return Refusal(STATUS[error.code], error.message, hint)


def error_response(refusal: Refusal, key: str = "error") -> HttpResponse:
    """`{"error": "..."}`, as the Open Inference Protocol has it."""
    body = msgspec.json.encode({key: refusal.message})
    return HttpResponse(refusal.status, body, JSON, refusal.headers)
