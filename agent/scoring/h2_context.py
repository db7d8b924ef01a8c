"""A call of the HTTP/2 transport as gRPC's typed handlers see one, on threads of their own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf.message import DecodeError

from .h2_grpc import INTERNAL, TOO_MUCH, UNAVAILABLE, Failed

# What a stream's handler finds ready before the stream has to wait.
AHEAD = 8
AHEAD_BYTES = 64 * 1024


class Aborted(Exception):
    """What `CallContext.abort` raises."""


class CallContext:
    """The part of grpc.ServicerContext that the handlers use. Thread-safe."""

    def __init__(
        self,
        headers: dict[str, str],
        peer: str,
        certificate: str,
        deadline: float | None,
        cancel: Callable[[], None],
        inbox: Inbox | None = None,
    ) -> None:
        self._inbox = inbox
        self._headers = headers
        self._peer = peer
        self._certificate = certificate
        self._deadline = deadline
        self._cancel = cancel
        self._gone = threading.Event()
        self._code: grpc.StatusCode | None = None
        self.details = ""
        self.trailing: dict[str, str] = {}
        self.writable = threading.Event()
        self.writable.set()

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple(item for item in self._headers.items() if not item[0].endswith("-bin"))

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> dict[str, list[bytes]]:
        if not self._certificate:
            return {}
        return {"x509_common_name": [self._certificate.encode()]}

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - monotonic())

    def is_active(self) -> bool:
        return not self._gone.is_set()

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def set_trailing_metadata(self, pairs: tuple[tuple[str, str], ...]) -> None:
        self.trailing.update(pairs)

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        self._code, self.details = code, details
        raise Aborted

    def cancel(self) -> None:
        """As a server does it: the client is told CANCELLED."""
        self._cancel()

    def end(self) -> None:
        """Nobody waits for an answer any more."""
        self._gone.set()
        self.writable.set()
        if self._inbox is not None:
            self._inbox.end(broken=True)

    def failure(self) -> Failed | None:
        if self._code is None:
            return None
        return Failed(self._code.value[0], self.details, self.trailing)


class Memory(Protocol):
    """What large messages take of the memory of all of them; from any thread."""

    def reserve(self, size: int) -> bool: ...
    def release(self, size: int) -> None: ...


class Inbox:
    """The requests of a stream, put in by the loop and taken by a handler's thread."""

    def __init__(
        self,
        parse: Callable[[bytes], Any],
        unpack: Callable[[bytes, Callable[[int], bool]], bytes],
        memory: Memory,
        wanted: Callable[[], None],
        failed: Callable[[Failed], None],
    ) -> None:
        """`wanted` is called when there is room again after `has_room` said no, `failed` when a
        message cannot be read; both by the taker."""
        self._parse = parse
        self._unpack = unpack
        self._memory = memory
        self._wanted = wanted
        self._failed = failed
        self._messages: deque[tuple[int, bytes]] = deque()
        self._changed = threading.Condition()
        self._ended = self._broken = self._short = False
        self.size = 0
        # Of the host's memory, for the message that the handler has now.
        self._held = 0

    def has_room(self) -> bool:
        with self._changed:
            room = len(self._messages) < AHEAD and self.size < AHEAD_BYTES
            self._short = self._short or not room
            return room

    def put(self, flag: int, message: bytes) -> None:
        """`flag`: whether it is compressed."""
        with self._changed:
            self._messages.append((flag, message))
            self.size += len(message)
            self._changed.notify()

    def end(self, *, broken: bool = False) -> None:
        with self._changed:
            self._ended = True
            if broken:
                self._broken = True
                self._messages.clear()
                self.size = 0
            self._changed.notify()

    def close(self) -> None:
        """The handler has ended."""
        self.end(broken=True)
        self._let_go()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._let_go()
        with self._changed:
            while not self._messages and not self._ended:
                self._changed.wait()
            if self._broken:
                # What grpcio's own iterator raises.
                raise grpc.RpcError
            if not self._messages:
                raise StopIteration
            flag, message = self._messages.popleft()
            self.size -= len(message)
            wanted, self._short = self._short, False
        if wanted:
            self._wanted()
        try:
            self._hold(len(message))
            return self._parse(self._unpack(message, self._more) if flag else message)
        except Failed as failed:
            self._failed(failed)
        except DecodeError:
            self._failed(Failed(INTERNAL, "the message is not the method's request"))
        raise grpc.RpcError

    def _hold(self, size: int) -> None:
        if size > AHEAD_BYTES and not self._more(size):
            raise Failed(UNAVAILABLE, TOO_MUCH)

    def _more(self, size: int) -> bool:
        if not self._memory.reserve(size):
            return False
        self._held += size
        return True

    def _let_go(self) -> None:
        held, self._held = self._held, 0
        if held:
            self._memory.release(held)
