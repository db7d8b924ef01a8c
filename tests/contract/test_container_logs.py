"""Log lines of containers, of the simulated engine and of a real dockerd."""

from __future__ import annotations

import asyncio
from datetime import timezone

import pytest
from engine_benches import SECONDS, lines, made, spec_of, until
from engine_benches import bench as bench
from engine_benches import real as real
from engine_benches import runtime as runtime
from gatelet.agent.runtime.container import LogFilter, RuntimeFailed


async def test_logs_by_line_and_stream(bench, runtime):
    spec = await made(bench, runtime, Cmd=["lines", "6"])
    await until(runtime, spec, lambda found: found.state == "exited")
    found = await lines(runtime, spec)
    assert sorted(line.text for line in found) == [f"line {n}" for n in range(6)]
    assert {line.text for line in found if line.stream == "stderr"} == {
        "line 1",
        "line 3",
        "line 5",
    }
    assert all(line.at is not None and line.at.tzinfo == timezone.utc for line in found)
    assert await lines(runtime, spec, tail=2) == found[-2:]
    assert await lines(runtime, spec, tail=0) == []
    assert await lines(runtime, spec, tail=100) == found
    with pytest.raises(RuntimeFailed, match="no such container"):
        await lines(runtime, spec_of(bench, spec.image, spec.digest))


async def test_logs_of_a_time(bench, runtime):
    spec = await made(bench, runtime, Cmd=["lines", "4", "400"])
    await until(runtime, spec, lambda found: found.state == "exited")
    found = await lines(runtime, spec)
    assert [line.text for line in found] == [f"line {n}" for n in range(4)]
    middle = found[1].at + (found[2].at - found[1].at) / 2
    assert await lines(runtime, spec, since=middle) == found[2:]
    assert await lines(runtime, spec, until=middle) == found[:2]
    assert await lines(runtime, spec, since=found[1].at, until=middle) == found[1:2]


async def test_following_goes_on_over_a_restart_and_ends_with_the_container(bench, runtime):
    spec = await made(bench, runtime)
    seen = []
    changed = asyncio.Event()

    async def follow():
        async for line in runtime.logs(spec.name, LogFilter(), follow=True):
            seen.append(line.text)
            changed.set()

    async def until_seen(*texts):
        while seen != list(texts):
            changed.clear()
            await asyncio.wait_for(changed.wait(), SECONDS)

    task = asyncio.create_task(follow())
    await until_seen("started")
    await runtime.stop(spec.name)
    await until_seen("started", "ended")
    await runtime.start(spec.name)
    await until_seen("started", "ended", "started")
    await runtime.remove(spec.name)
    await asyncio.wait_for(task, SECONDS)


async def test_following_can_be_given_up(bench, runtime):
    spec = await made(bench, runtime)
    stream = runtime.logs(spec.name, LogFilter(), follow=True)
    assert (await stream.__anext__()).text == "started"
    waiting = asyncio.ensure_future(stream.__anext__())
    await asyncio.sleep(0)
    waiting.cancel()
    done, _ = await asyncio.wait([waiting], timeout=5)
    assert done


async def test_a_long_line_and_a_terminal(real):
    runtime = real.runtime()
    long = "x" * 40_000
    spec = await made(real, runtime, Cmd=["env"], env=[("LONG", long)])
    await until(runtime, spec, lambda found: found.state == "exited")
    assert f"LONG={long}" in [line.text for line in await lines(runtime, spec)]
    terminal = await made(real, runtime, Cmd=["lines", "3"], Tty=True)
    await until(runtime, terminal, lambda found: found.state == "exited")
    found = await lines(runtime, terminal)
    assert [(line.stream, line.text) for line in found] == [
        ("stdout", f"line {number}") for number in range(3)
    ]
    assert all(line.at is not None for line in found)


async def test_a_log_that_cannot_be_read_says_how_to_have_one(real):
    runtime = real.runtime()
    spec = await made(real, runtime, HostConfig={"LogConfig": {"Type": "none"}})
    with pytest.raises(RuntimeFailed, match="LogConfig") as failed:
        await lines(runtime, spec)
    assert not failed.value.retryable
