"""An engine that goes, hangs or is killed, and a runtime that is closed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time

import pytest
from engine_benches import NOBODY, SECONDS, RealBench, deaf, lines, made, view
from engine_benches import bench as bench
from engine_benches import real as real
from engine_benches import runtime as runtime
from gatelet.agent.runtime.container import RuntimeFailed
from gatelet.agent.runtime.docker import DockerRuntime


async def exhausted(stream):
    async for _ in stream:
        pass


async def test_an_engine_that_goes_and_comes_back(bench, runtime):
    spec = await made(bench, runtime)
    assert (await runtime.info()).os == "linux"
    stream = runtime.events()
    await asyncio.wait_for(stream.__anext__(), SECONDS)
    await asyncio.to_thread(bench.stop) if isinstance(bench, RealBench) else bench.stop()
    try:
        with pytest.raises(RuntimeFailed) as ended:
            await asyncio.wait_for(exhausted(stream), SECONDS)
        assert ended.value.retryable
        for call in (
            runtime.containers(),
            runtime.start(spec.name),
            runtime.create(spec),
            runtime.pull(spec.image, NOBODY, (), lambda progress: None),
            lines(runtime, spec),
        ):
            with pytest.raises(RuntimeFailed, match="no answer from the engine") as failed:
                await call
            assert failed.value.retryable
    finally:
        await asyncio.to_thread(bench.start) if isinstance(bench, RealBench) else bench.start()
    stopped = await view(runtime, spec)
    assert (stopped.state, stopped.drift) == ("exited", ())
    await runtime.start(spec.name)
    assert (await view(runtime, spec)).state == "running"


async def test_an_engine_that_hangs_is_given_up_in_time(real):
    runtime = DockerRuntime(real.engine.socket, real.device, timeout=1)
    real.runtimes.append(runtime)

    async def answers():
        # On a busy machine a second may be too short for an engine that has nothing else to do.
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(RuntimeFailed):
                return await runtime.containers()
        return None

    assert await answers() == ()
    real.engine.signal(signal.SIGSTOP)
    try:
        for call in (runtime.containers(), runtime.start("x"), runtime.info()):
            begin = time.monotonic()
            with pytest.raises(RuntimeFailed, match="stuck or very busy") as failed:
                await call
            assert failed.value.retryable
            assert time.monotonic() - begin < 15
    finally:
        real.engine.signal(signal.SIGCONT)
    assert await answers() == ()


async def test_a_killed_engine(real):
    runtime = real.runtime()
    spec = await made(real, runtime)
    await asyncio.to_thread(real.engine.stop, signal.SIGKILL)
    await asyncio.to_thread(real.engine.start)
    found = await view(runtime, spec)
    # The new one ended what the old one left, kindly: the exit code is 0 and tells nothing.
    assert (found.state, found.exit_code, found.drift) == ("exited", 0, ())
    await runtime.start(spec.name)
    assert (await view(runtime, spec)).state == "running"


async def test_closing_ends_what_waits(real):
    runtime = real.runtime()
    stream = runtime.events()
    await asyncio.wait_for(stream.__anext__(), SECONDS)
    waiting = asyncio.ensure_future(stream.__anext__())
    await asyncio.sleep(0)
    await asyncio.wait_for(runtime.close(), SECONDS)
    with pytest.raises(RuntimeFailed):
        await asyncio.wait_for(waiting, SECONDS)
    with pytest.raises(RuntimeFailed):
        await runtime.containers()


async def test_closing_does_not_wait_for_a_container_to_end(real):
    runtime = real.runtime()
    spec = await deaf(real, runtime, StopTimeout=200)
    stream = real.runtime().events()
    await asyncio.wait_for(stream.__anext__(), SECONDS)
    stop = asyncio.ensure_future(runtime.stop(spec.name))
    # The engine has sent its signal: from now on it waits.
    await asyncio.wait_for(stream.__anext__(), SECONDS)
    await stream.aclose()
    await asyncio.wait_for(runtime.close(), SECONDS)
    with pytest.raises(RuntimeFailed):
        await asyncio.wait_for(stop, SECONDS)
    assert (await view(real.runtime(), spec)).state == "running"
