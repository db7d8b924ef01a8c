"""The simulated engine on virtual time: days at once, the same every time, with faults."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest
from gatelet.agent.module_spec import ModuleSpec
from gatelet.agent.runtime.container import LogFilter, RuntimeFailed
from gatelet.agent.runtime.create_body import CreateFacts, create_body
from gatelet.agent.runtime.policy import DockerPolicy
from gatelet.simulator.engine import SimulatedEngine
from gatelet.simulator.virtual_time import VirtualClock, run

IMAGE = "registry.test/probe:1"
CHECK = {"Test": ["CMD", "/probe", "check"], "Interval": 30_000_000_000, "Retries": 1}


def simulate(work):
    """`work(engine, runtime)` on virtual time; its result and the seconds that passed."""
    clock = VirtualClock()

    async def main(clock):
        engine = SimulatedEngine(clock)
        loop = asyncio.get_running_loop()
        begin = loop.time()
        return await work(engine, engine.runtime("edge-1")), loop.time() - begin

    return run(main, clock=clock)


async def started(engine, runtime, name="cam", env=(), **options):
    digest = engine.publish(IMAGE)
    await runtime.pull(IMAGE, digest, (), lambda progress: None)
    module = ModuleSpec(name, IMAGE, env=tuple(env), create_options=json.dumps(options))
    spec = create_body(module, "edge-1", DockerPolicy(), CreateFacts(digest=digest))
    await runtime.create(spec)
    await runtime.start(spec.name)
    return spec


def test_two_days_of_a_module_that_falls_ill_and_ends_are_the_same_each_time():
    async def life(engine, runtime):
        env = [("HEALTHY_AFTER_MS", "60000"), ("SICK_AFTER_MS", "86400000")]
        env += [("EXIT_AFTER_MS", "172800000"), ("EXIT_CODE", "3")]
        await started(engine, runtime, env=env, Healthcheck=CHECK)
        seen = []
        async for _ in runtime.events():
            [view] = await runtime.containers()
            state = (view.state, view.health, view.exit_code)
            if not seen or seen[-1][1] != state:
                hours = asyncio.get_running_loop().time() / 3600
                seen.append((round(hours, 2), state))
            if view.state == "exited":
                return seen, [line.at for line in engine._named("cam").lines]
        raise AssertionError("unreachable")

    first, passed = simulate(life)
    assert simulate(life) == (first, passed)
    assert [state for _, state in first[0]] == [
        ("running", "starting", 0),
        ("running", "unhealthy", 0),
        ("running", "healthy", 0),
        ("running", "unhealthy", 0),
        ("exited", "unhealthy", 3),
    ]
    assert 47.9 < passed / 3600 < 48.1


def test_a_slow_pull_can_be_cancelled_and_an_engine_can_go_away_in_it():
    async def work(engine, runtime):
        digest = engine.publish(IMAGE, layers=(("a", 10), ("b", 20), ("c", 30)))
        engine.faults.pull_seconds = 3600
        seen = []
        pull = asyncio.create_task(runtime.pull(IMAGE, digest, (), seen.append))
        await asyncio.sleep(5400)
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull
        assert [progress.bytes_done for progress in seen] == [0, 10]
        assert await runtime.images() == ()
        pull = asyncio.create_task(runtime.pull(IMAGE, digest, (), seen.append))
        await asyncio.sleep(5400)
        engine.stop()
        with pytest.raises(RuntimeFailed, match="no answer") as failed:
            await pull
        assert failed.value.retryable
        engine.start()
        await runtime.pull(IMAGE, digest, (), seen.append)
        assert seen[-1].layers_done == 3
        assert engine.pulls == 3

    assert simulate(work)[1] >= 5 * 3600


def test_faults_come_as_they_are_asked_for():
    async def work(engine, runtime):
        spec = await started(engine, runtime)
        engine.faults.fail["start"] = [RuntimeFailed("once", retryable=True)]
        with pytest.raises(RuntimeFailed, match="once"):
            await runtime.start(spec.name)
        await runtime.start(spec.name)
        engine.faults.fail_always["stop"] = RuntimeFailed("always", retryable=False)
        for _ in range(2):
            with pytest.raises(RuntimeFailed, match="always"):
                await runtime.stop(spec.name)
        engine.faults.call_seconds = 2.0
        before = asyncio.get_running_loop().time()
        await runtime.containers()
        assert asyncio.get_running_loop().time() - before == pytest.approx(2.0)

    simulate(work)


def test_following_ends_with_the_runtime():
    async def work(engine, runtime):
        spec = await started(engine, runtime)
        logs = runtime.logs(spec.name, LogFilter(), follow=True)
        assert (await logs.__anext__()).text == "started"
        events = runtime.events()
        await events.__anext__()
        asyncio.get_running_loop().call_later(5, lambda: asyncio.ensure_future(runtime.close()))
        with pytest.raises(StopAsyncIteration):
            await logs.__anext__()
        with pytest.raises(RuntimeFailed):
            await events.__anext__()

    simulate(work)


def test_no_container_no_sdk():
    """What the agent imports before a container is deployed is not Docker's SDK."""
    program = (
        "import sys, gatelet.agent.config, gatelet.agent.runtime.docker as runtime; "
        "from pathlib import Path; runtime.DockerRuntime(Path('/none'), 'd'); "
        "print([name for name in ('docker', 'requests') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
