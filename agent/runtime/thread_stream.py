"""What a blocking reader finds, handed to the event loop with back-pressure."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

T = TypeVar("T")

_JOIN_SECONDS = 10.0


class _Stopped(Exception):
    """Nobody wants more."""


async def thread_stream(
    produce: Callable[[Callable[[T], None]], None],
    abort: Callable[[], None],
    *,
    capacity: int = 256,
) -> AsyncIterator[T]:
    """The items that `produce(put)` puts in a thread of its own, until it returns.

    `put` waits while `capacity` items are not taken yet. `abort` is called, from the loop, when the
    consumer stops early or is cancelled; it makes `produce` end. Raises what `produce` raises.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[T] | Exception | None] = asyncio.Queue()
    room = threading.Semaphore(capacity)
    stopped = threading.Event()

    def hand(item: tuple[T] | Exception | None) -> None:
        if stopped.is_set():
            raise _Stopped
        loop.call_soon_threadsafe(queue.put_nowait, item)

    def put(item: T) -> None:
        room.acquire()
        hand((item,))

    def run() -> None:
        try:
            try:
                produce(put)
            except _Stopped:
                return
            except Exception as error:  # noqa: BLE001 - the consumer raises it
                hand(error)
            else:
                hand(None)
        except _Stopped:
            return

    thread = threading.Thread(target=run, name="engine stream", daemon=True)
    thread.start()
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            room.release()
            yield item[0]
    finally:
        stopped.set()
        room.release()
        abort()
        # Shielded by being a thread: what it holds of the engine is given back before we go on.
        await asyncio.to_thread(thread.join, _JOIN_SECONDS)
