"""What a peer has time for on one connection."""

from __future__ import annotations

from time import monotonic
from typing import Any, Protocol

from .grpc_server import GrpcLimits
from .h2_call import Call
from .h2_core import Core
from .h2_frames import MAX_FRAME, ErrorCode
from .h2_grpc import DEADLINE, Failed
from .h2_sending import Stream
from .http_types import HttpLimits

# For a client to answer the question whether all its streams have come.
_RETIRING_SECONDS = 1.0


class Watched(Protocol):
    """The connection."""

    @property
    def core(self) -> Core[Any]: ...
    @property
    def closing(self) -> bool: ...
    def unsent(self) -> int: ...
    def fail(self, call: Call, failed: Failed, *, working: bool = False) -> None: ...
    def refuse(self, code: ErrorCode, text: str) -> None: ...
    def flush(self) -> None: ...
    def abort(self) -> None: ...


class Patience:
    """`since`: when the connection became idle, or began to linger; `heard`: when it last said
    anything; `written`: bytes that were sent or wait for the way to the peer."""

    def __init__(self, connection: Watched, http: HttpLimits, limits: GrpcLimits) -> None:
        self._connection = connection
        self._http = http
        self._limits = limits
        self.since = self.heard = monotonic()
        self.written = 0
        self.lingering = False
        self._pinged = 0.0
        self._retiring: float | None = None
        # Since when, and from which byte on, the way to the peer is full.
        self._full: tuple[float, int] | None = None

    def read_again(self, now: float) -> None:
        """What the peer could not send meanwhile is not its fault."""
        core = self._connection.core
        self.heard = now
        if core.partial_since is not None:
            core.partial_since = now
        for stream in core.streams.values():
            call: Call | None = stream.call
            if call is not None and call.incoming is not None and call.incoming.since is not None:
                call.incoming.since = now

    def sweep(self, now: float) -> None:
        """End what takes too long."""
        connection, core, limits = self._connection, self._connection.core, self._limits
        if self._is_stuck(now):
            connection.abort()
        elif self.lingering or connection.closing:
            if self._full is not None:
                # It still takes its last answers.
                self.since = now
            elif now - self.since > self._http.linger:
                connection.abort()
        elif self._full is not None:
            # It takes what was sent, and cannot answer meanwhile.
            self.heard = now
        elif not core.settled:
            if now - self.since > limits.handshake_timeout_ms / 1000:
                connection.refuse(ErrorCode.SETTINGS_TIMEOUT, "nothing was said in time")
        elif core.partial_since is not None and now - core.partial_since > (
            self._http.headers + MAX_FRAME / self._http.body_rate
        ):
            connection.refuse(ErrorCode.ENHANCE_YOUR_CALM, "a frame was not sent to its end")
        else:
            self._sweep_settled(now)
            connection.flush()

    def _sweep_settled(self, now: float) -> None:
        core, limits = self._connection.core, self._limits
        if core.retiring:
            self._retiring = self._retiring or now
            if now - self._retiring > _RETIRING_SECONDS:
                core.leave()
        if not core.streams:
            if now - self.since > limits.max_connection_idle_ms / 1000:
                core.leave()
            return
        if core.pinging:
            if now - self._pinged > limits.keepalive_timeout_ms / 1000:
                if self.heard < self._pinged:
                    self._connection.abort()
                core.pinging = False
        elif now - self.heard > limits.keepalive_time_ms / 1000:
            self._pinged = now
            core.ping()
        for stream in tuple(core.streams.values()):
            self._sweep_stream(stream, now)

    def _is_stuck(self, now: float) -> bool:
        """Whether the peer takes nothing of what was sent, or hardly anything."""
        unsent = self._connection.unsent()
        if not unsent:
            self._full = None
            return False
        taken = self.written - unsent
        if self._full is None:
            self._full = (now, taken)
        return self._is_slow(now - self._full[0], taken - self._full[1])

    def _is_slow(self, seconds: float, size: int) -> bool:
        return seconds > self._http.stalled + size / self._http.body_rate

    def _sweep_stream(self, stream: Stream, now: float) -> None:
        call: Call | None = stream.call
        connection, http = self._connection, self._http
        if stream.queue is not None:
            if stream.watched is None:
                stream.watched = (now, stream.sent)
            began, sent = stream.watched
            if self._is_slow(now - began, stream.sent - sent):
                connection.core.reset(stream, ErrorCode.CANCEL, told=True)
                return
        if call is None or not call.open:
            return
        if call.deadline is not None and now > call.deadline:
            connection.fail(call, Failed(DEADLINE, "the deadline passed"), working=call.working)
            return
        incoming = call.incoming
        since = call.started if incoming is None and not stream.remote_ended else None
        size = 0
        if incoming is not None:
            since, size = incoming.since, incoming.size
        if since is not None and now - since > http.body_grace + size / http.body_rate:
            text = f"the request comes with less than {http.body_rate} bytes a second"
            failed = Failed(DEADLINE, f"{text}; send faster")
            connection.fail(call, failed, working=call.working)
