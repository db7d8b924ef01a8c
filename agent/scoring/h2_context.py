"""A call of the HTTP/2 transport as gRPC's typed handlers see one, on threads of their own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, NoReturn

import grpc

from .h2_grpc import Failed

# Messages that a stream may send ahead of what is answered, before its window stays closed.
AHEAD = 8


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
    ) -> None:
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

    def failure(self) -> Failed | None:
        if self._code is None:
            return None
        return Failed(self._code.value[0], self.details, self.trailing)


class Inbox:
    """The requests of a stream, put in by the loop and taken by a handler's thread."""

    def __init__(self, parse: Callable[[bytes], Any], taken: Callable[[int], None]) -> None:
        """`taken` is told the size of each that is on its way to the handler."""
        self._parse = parse
        self._taken = taken
        self._messages: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._ended = self._broken = False

    def put(self, message: bytes) -> None:
        with self._changed:
            self._messages.append(message)
            self._changed.notify()

    def end(self, *, broken: bool = False) -> None:
        with self._changed:
            self._ended = True
            self._broken = self._broken or broken
            self._changed.notify()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with self._changed:
            while not self._messages and not self._ended:
                self._changed.wait()
            if self._broken:
                # What grpcio's own iterator raises.
                raise grpc.RpcError
            if not self._messages:
                raise StopIteration
            message = self._messages.popleft()
        self._taken(len(message))
        return self._parse(message)
