"""Threads of their own for gRPC calls that stay open."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

T = TypeVar("T", bound=Message)


class StreamPool:
    """Threads for calls that stay open, so that these leave the others their threads."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.stopping = threading.Event()
        # One more, to turn away whoever is too many.
        self.threads = ThreadPoolExecutor(most + 1, thread_name_prefix="grpc-stream")
        self._lock = threading.Lock()
        self._open = 0
        self._idle: set[Any] = set()

    def served(self, behaviour: Callable[..., Iterator[T]]) -> Callable[..., Iterator[T]]:
        """`behaviour` on these threads, refused with RESOURCE_EXHAUSTED when all are taken."""

        def serve(request: Any, context: grpc.ServicerContext) -> Iterator[T]:
            with self._lock:
                full = self._open >= self.most
                self._open += not full
            if full:
                context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"{self.most} streams are open already; close some",
                )
            try:
                yield from behaviour(request, context)
            finally:
                with self._lock:
                    self._open -= 1

        # grpcio looks for this name on what it calls.
        serve.experimental_thread_pool = self.threads  # type: ignore[attr-defined]
        return serve

    def next(self, requests: Iterator[T], context: grpc.ServicerContext) -> T | None:
        """The next request of a stream; None at its end, or when the server stops before it."""
        with self._lock:
            self._idle.add(context)
        if self.stopping.is_set():
            context.cancel()  # type: ignore[no-untyped-call]
        try:
            return next(requests, None)
        except grpc.RpcError:
            return None
        finally:
            with self._lock:
                self._idle.discard(context)

    def stop(self) -> None:
        """End the streams that wait for a request, and the others after their current one."""
        self.stopping.set()
        with self._lock:
            idle = tuple(self._idle)
        for context in idle:
            context.cancel()

    def shutdown(self) -> None:
        self.threads.shutdown()
