"""A call of the HTTP/2 transport, and what its connection needs of the server around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Protocol

from .batching_job import Job
from .grpc_server import GrpcLimits
from .h2_context import CallContext, Inbox
from .h2_grpc import Failed, Head, Method
from .h2_sending import Stream
from .http_types import HttpLimits
from .instances import Instance

CHUNK = 64 * 1024
"""Bytes from which on a request or an answer counts against the memory of all of them; smaller
ones are bounded by the number of calls."""


class Host(Protocol):
    """What a connection needs of its server. `reserve` and `release` may be called from any
    thread, as may `post`, which does the work on the loop."""

    limits: HttpLimits
    stopping: bool

    def joined(self, connection: Any) -> bool: ...
    def left(self, connection: Any) -> None: ...
    def reserve(self, size: int) -> bool: ...
    def release(self, size: int) -> None: ...
    def post(self, work: Callable[[], None]) -> None: ...


class Calls(Protocol):
    """Where calls go."""

    limits: GrpcLimits

    @property
    def methods(self) -> Mapping[str, Method]: ...
    def begin(self) -> bool:
        """Whether one more call may be under way, until `end`."""

    def end(self) -> None: ...
    def serve(self, call: Call, message: bytes | memoryview) -> None:
        """Answer a call of one request."""

    def unpack(self, call: Call, message: bytes) -> None:
        """`serve` what is compressed."""

    def open(self, call: Call, inbox: Inbox) -> None:
        """Answer a call of many requests, which come through `inbox`."""

    def changed(self, connection: Connection) -> None:
        """It has something to send."""


class Connection(Protocol):
    """Where a call came from and its answers go; but for `cancel` on the loop only. `client`,
    `certificate` and `peer`: who is there, "" for no certificate. `dirty`: it is among those to be
    flushed."""

    client: str
    certificate: str
    peer: str
    dirty: bool

    def flush(self) -> None: ...
    def answer(self, call: Call, data: bytes, more: Mapping[str, str] | None = None) -> None: ...
    def send(self, call: Call, message: bytes) -> None: ...
    def fail(self, call: Call, failed: Failed, *, working: bool = False) -> None: ...
    def cancel(self, call: Call) -> None: ...


class Incoming(Protocol):
    """What comes of a call's requests. `since`: when the message began that has not come to its
    end, None for none."""

    since: float | None

    @property
    def size(self) -> int: ...
    def feed(self, data: bytes, ended: bool, now: float) -> int:
        """How many bytes more the peer may send for these. Raises Failed."""


class Call:
    """One call. It is over when it is no longer `open` to an answer, nobody is `working` on it, and
    nothing of its answer waits; until then it counts, and its memory with it.

    `held`: bytes of the host's. `begun`: some answers were sent. `pending`: what the data plane
    gave for it. On the loop only, but for what `context` has.
    """

    __slots__ = (
        "begun",
        "connection",
        "context",
        "deadline",
        "head",
        "held",
        "incoming",
        "method",
        "open",
        "over",
        "pending",
        "started",
        "stream",
        "working",
    )

    def __init__(self, connection: Connection, stream: Stream, head: Head, method: Method) -> None:
        self.connection = connection
        self.stream = stream
        self.head = head
        self.method = method
        self.started = monotonic()
        self.deadline = None if head.timeout is None else self.started + head.timeout
        self.incoming: Incoming | None = None
        self.held = 0
        self.open = True
        self.working = self.over = self.begun = False
        self.context: CallContext | None = None
        self.pending: tuple[Instance, Job] | None = None
