"""Time that jumps: order, precision over long runs, and the documented limits."""

from __future__ import annotations

import asyncio
import socket
import time
from datetime import timedelta

import pytest
from gatelet.simulator.virtual_time import BEGINNING, Deadlock, VirtualClock, run


def test_a_thousand_hours_pass_at_once_and_to_the_millisecond() -> None:
    async def main(clock: VirtualClock) -> float:
        for _ in range(1000):
            await asyncio.sleep(3600)
        return clock.monotonic()

    began = time.monotonic()
    assert run(main) == pytest.approx(3.6e6, abs=1e-3)
    assert time.monotonic() - began < 15


def test_timers_fire_in_order_whatever_the_order_they_were_set_in() -> None:
    async def main(clock: VirtualClock) -> list[tuple[str, float]]:
        happened: list[tuple[str, float]] = []

        async def at(seconds: float, name: str) -> None:
            await asyncio.sleep(seconds)
            happened.append((name, round(clock.monotonic(), 6)))

        await asyncio.gather(at(86400 * 3, "c"), at(0.1, "a"), at(0.1, "b"), at(1e6, "d"))
        return happened

    assert run(main) == [("a", 0.1), ("b", 0.1), ("c", 259200.0), ("d", 1e6)]


def test_the_wall_clock_moves_with_time_and_jumps_without_it() -> None:
    async def main(clock: VirtualClock) -> None:
        await asyncio.sleep(60)
        assert clock.now() == BEGINNING + timedelta(seconds=60)
        clock.skew = timedelta(days=-3650)
        assert clock.now() == BEGINNING + timedelta(seconds=60, days=-3650)
        assert clock.monotonic() == pytest.approx(60)

    run(main)


def test_timeouts_and_threads_keep_their_meaning() -> None:
    async def main(clock: VirtualClock) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 3600)
        assert clock.monotonic() == pytest.approx(3600)
        assert await asyncio.to_thread(sum, [1, 2]) == 3
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)

    run(main)


def test_sockets_get_real_time_before_time_jumps() -> None:
    async def main(clock: VirtualClock) -> bytes:
        left, right = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=left)
        _, other = await asyncio.open_connection(sock=right)
        other.write(b"here")
        answer = await asyncio.wait_for(reader.readexactly(4), 1)
        for stream in (writer, other):
            stream.close()
            await stream.wait_closed()
        assert clock.monotonic() < 1
        return answer

    assert run(main) == b"here"


def test_a_loop_on_which_nothing_can_happen_says_so() -> None:
    async def main(clock: VirtualClock) -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="for ever"):
        run(main)


def test_what_is_left_running_is_cancelled() -> None:
    ended: list[str] = []

    async def left() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            ended.append("left")

    async def main(clock: VirtualClock) -> None:
        task = asyncio.ensure_future(left())
        await asyncio.sleep(1)
        assert not task.done()

    run(main)
    assert ended == ["left"]
