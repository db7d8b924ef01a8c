"""An event loop in a thread of its own, for tests and programs that are not asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent import futures
from types import TracebackType
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class BackgroundLoop:
    """Runs from `with` to its end; `run` and `call` may be used from any other thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="simulator", daemon=True)

    def __enter__(self) -> BackgroundLoop:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, _Result], seconds: float | None = 60.0) -> _Result:
        """The result of a coroutine. Raises what it raises, or TimeoutError.

        On the loop's own thread, where it would wait for itself, RuntimeError.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("call this from another thread than the simulator's own")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except futures.TimeoutError as error:
            if future.done():
                raise
            # Before Python 3.11 this is not the built-in one.
            raise TimeoutError(f"the simulator did not answer in {seconds} s") from error
        finally:
            future.cancel()

    def call(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """The result of a plain function that must run on the loop."""

        async def work() -> _Result:
            return function(*arguments)

        return self.run(work())

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        if left:
            self._loop.run_until_complete(asyncio.wait(left))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
