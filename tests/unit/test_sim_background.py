"""The event loop in a thread: what goes wrong there is told here, and nothing is left."""

from __future__ import annotations

import asyncio
import threading

import pytest
from gatelet.simulator.background import BackgroundLoop


def test_results_errors_and_limits_cross_the_threads() -> None:
    ended = []

    async def never() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(threading.current_thread().name)

    async def fail() -> None:
        raise LookupError("there")

    before = threading.active_count()
    with BackgroundLoop() as loop:
        assert loop.call(lambda a, b: (a + b, threading.current_thread().name), 1, 2) == (
            3,
            "simulator",
        )
        with pytest.raises(LookupError, match="there"):
            loop.run(fail())
        # Long enough to begin on a busy machine: what never began has no end to be told of.
        with pytest.raises(TimeoutError, match=r"in 1\.5 s"):
            loop.run(never(), 1.5)
        with pytest.raises(RuntimeError, match="another thread"):
            loop.call(lambda: loop.call(print))
        loop.call(lambda: asyncio.ensure_future(never()))
    assert ended == ["simulator", "simulator"]
    assert threading.active_count() == before
