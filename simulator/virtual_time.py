"""An asyncio event loop whose time jumps: hours pass in the time it takes to compute them.

When nothing is ready to run, the loop's clock is set to the next timer instead of waiting for it.
Runs are deterministic: what is ready runs in the order in which it became ready, as in every
asyncio loop, and nothing depends on how fast the machine is.

    result = run(main, clock=VirtualClock())    # main(clock) is the coroutine function

Limits. Only code that tells time by the loop or by the Clock seam is virtual: `time.monotonic` and
`time.sleep` are not. Threads: `run_in_executor` and `asyncio.to_thread` run their function at once,
on the loop's own thread, so what waits there for the loop would wait for ever; threads started
otherwise race against the jumps. Sockets: while one is registered, the loop gives it `grace` real
seconds before each jump; a reply that takes longer comes late in virtual time. A loop on which
nothing can ever happen again (no timer, no socket) raises Deadlock instead of hanging.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

T = TypeVar("T")
BEGINNING = datetime(2030, 1, 1, tzinfo=timezone.utc)
# Near 1,000 hours a double still resolves a nanosecond; sums of delays need a little more.
_RESOLUTION = 1e-6


class Deadlock(RuntimeError):
    """Tasks wait, but no timer and no socket can ever wake them."""


class _Jumping(selectors.DefaultSelector):
    """Answers at once; when nothing is there, time has passed instead."""

    def __init__(self, grace: float) -> None:
        super().__init__()
        self._grace = grace
        self.time = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # One descriptor is the loop's own, by which other threads wake it.
        with_sockets = len(self.get_map()) > 1
        wait = self._grace if with_sockets and timeout != 0 else 0
        events = super().select(None if with_sockets and timeout is None else wait)
        if events or timeout == 0:
            return events
        if timeout is None:
            raise Deadlock("nothing is scheduled and nothing can arrive: the tasks wait for ever")
        self.time += timeout
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """See the module's text. `time()` starts at 0."""

    def __init__(self, grace: float = 0.01) -> None:
        self._jumping = _Jumping(grace)
        super().__init__(self._jumping)
        self._clock_resolution = _RESOLUTION

    def time(self) -> float:
        return self._jumping.time

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Runs `func` now, on this thread."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - as an executor does: it belongs to who awaits it
            future.set_exception(error)
        return future


class VirtualClock:
    """The Clock of the running VirtualTimeLoop. `skew` moves the wall clock only."""

    def __init__(self, beginning: datetime = BEGINNING) -> None:
        self.beginning = beginning
        self.skew = timedelta()

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    def now(self) -> datetime:
        return self.beginning + timedelta(seconds=self.monotonic()) + self.skew


def run(
    main: Callable[[VirtualClock], Coroutine[Any, Any, T]],
    clock: VirtualClock | None = None,
) -> T:
    """Run `main(clock)` to its end on a new loop; tasks it left behind are cancelled.

    Raises what `main` raises, and Deadlock.
    """
    loop = VirtualTimeLoop()
    try:
        asyncio.set_event_loop(loop)
        try:
            return loop.run_until_complete(main(clock or VirtualClock()))
        finally:
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        asyncio.set_event_loop(None)
        loop.close()
