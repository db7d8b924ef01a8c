"""gRPC's messages from HTTP/2's data, no more of them at a time than there is room for."""

from __future__ import annotations

from .h2_call import CHUNK, Call, Calls, Host
from .h2_context import Inbox
from .h2_grpc import INTERNAL, TOO_MUCH, UNAVAILABLE, Failed, check_compressed, check_size


def whole(call: Call, calls: Calls, data: bytes | memoryview) -> None:
    """A call's one message, with what comes before it. Raises Failed."""
    length = int.from_bytes(data[1:5], "big")
    check_size(length, calls.limits.max_message_bytes)
    if length != len(data) - 5:
        raise Failed(INTERNAL, "the call takes one whole message")
    if data[0] == 0:
        call.working = True
        calls.serve(call, data[5:])
    else:
        check_compressed(data[0], call.head)
        call.working = True
        calls.unpack(call, bytes(data[5:]))


class OneMessage:
    """A unary call's request in several parts."""

    def __init__(self, call: Call, host: Host, calls: Calls) -> None:
        self._call = call
        self._host = host
        self._calls = calls
        self._buffer = bytearray()
        self.since: float | None = call.started

    @property
    def size(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes, ended: bool, now: float) -> int:
        buffer, call = self._buffer, self._call
        buffer += data
        size = len(buffer)
        if size >= 5:
            length = int.from_bytes(buffer[1:5], "big")
            check_size(length, self._calls.limits.max_message_bytes)
            if size > length + 5:
                raise Failed(INTERNAL, "the call takes one message; send no more")
        hold(call, self._host, size if size > CHUNK else 0)
        if ended:
            self.since = None
            small = size <= CHUNK
            self._buffer = bytearray()
            whole(call, self._calls, bytes(buffer) if small else memoryview(buffer))
        return len(data)


class ManyMessages:
    """The requests of a stream. Those that the handler has not come to wait in its inbox, as far
    as that has room, and behind it as bytes, as far as the stream's window goes."""

    def __init__(self, call: Call, inbox: Inbox, host: Host, most_bytes: int) -> None:
        self._call = call
        self._inbox = inbox
        self._host = host
        self._most = most_bytes
        self._buffer = bytearray()
        self._credit = 0
        self._ended = False
        self.since: float | None = None

    @property
    def size(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes, ended: bool, now: float) -> int:
        self._buffer += data
        self._credit += len(data)
        self._ended = ended
        return self.advance(now)

    def advance(self, now: float) -> int:
        """`feed` once the inbox has room again."""
        buffer, inbox = self._buffer, self._inbox
        while (room := inbox.has_room()) and len(buffer) >= 5:
            length = int.from_bytes(buffer[1:5], "big")
            check_size(length, self._most)
            if len(buffer) < 5 + length:
                break
            if buffer[0]:
                check_compressed(buffer[0], self._call.head)
            inbox.put(buffer[0], bytes(memoryview(buffer)[5 : 5 + length]))
            del buffer[: 5 + length]
            self.since = None
        held = len(buffer) + inbox.size
        hold(self._call, self._host, held if held > CHUNK else 0)
        if not room:
            self.since = None
            return 0
        if buffer and self.since is None:
            self.since = now
        if self._ended:
            if buffer:
                raise Failed(INTERNAL, "the last message is not whole")
            inbox.end()
        credit, self._credit = self._credit, 0
        return credit


def hold(call: Call, host: Host, size: int) -> None:
    """Change how much of the host's memory the call has. Raises Failed."""
    if size > call.held and not host.reserve(size - call.held):
        raise Failed(UNAVAILABLE, TOO_MUCH)
    if size < call.held:
        host.release(call.held - size)
    call.held = size
