"""Threads of their own for calls that may take long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

T = TypeVar("T")


class _OwnThreads(Executor):
    """Begins a daemon thread for each call."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 (raised where the result is awaited)
                future.set_exception(error)
            else:
                future.set_result(result)

        threading.Thread(target=run, daemon=True).start()
        return future


_OWN_THREADS = _OwnThreads()


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """Like asyncio.to_thread, but neither a cancellation nor the process's end waits for it, and it
    takes no other call's place: the few threads of to_thread are for what ends soon. For calls that
    end by their own time-outs."""
    # Through the loop: one of virtual time runs it at once.
    return await asyncio.get_running_loop().run_in_executor(_OWN_THREADS, work)
