"""Containers from create to remove, their health and their ends, on two engines."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timedelta, timezone

import pytest
from engine_benches import SECONDS, deaf, listening, made, spec_of, unique, until, view
from engine_benches import bench as bench
from engine_benches import real as real
from engine_benches import runtime as runtime
from engine_fixture import HEALTHCHECK
from gatelet.agent.runtime.container import RuntimeFailed
from gatelet.agent.runtime.policy import DockerPolicy


async def test_a_container_lives_and_dies_and_every_step_can_be_repeated(bench, runtime):
    spec = await made(bench, runtime, start=False)
    await runtime.create(spec)
    created = await view(runtime, spec)
    assert (created.state, created.started_at, created.drift) == ("created", None, ())
    assert (created.name, created.spec, created.digest) == (
        spec.name,
        spec.fingerprint(),
        spec.digest,
    )

    before = datetime.now(timezone.utc) - timedelta(seconds=2)
    await runtime.start(spec.name)
    await runtime.start(spec.name)
    running = await view(runtime, spec)
    assert (running.state, running.health, running.drift) == ("running", "none", ())
    assert running.id == created.id
    assert before < running.started_at < datetime.now(timezone.utc) + timedelta(seconds=2)

    await listening(runtime, spec)
    await runtime.stop(spec.name)
    await runtime.stop(spec.name)
    stopped = await view(runtime, spec)
    assert (stopped.state, stopped.exit_code, stopped.oom_killed) == ("exited", 0, False)
    assert stopped.finished_at >= stopped.started_at

    await runtime.remove(spec.name)
    await runtime.remove(spec.name)
    await runtime.stop(spec.name)
    assert await view(runtime, spec) is None
    with pytest.raises(RuntimeFailed) as failed:
        await runtime.start(spec.name)
    assert not failed.value.retryable
    assert spec.name in str(failed.value)


async def test_a_leftover_is_replaced_and_one_of_the_same_kind_that_ran_as_well(bench, runtime):
    spec = await made(bench, runtime)
    first = await view(runtime, spec)
    await runtime.create(spec)
    second = await view(runtime, spec)
    assert second.id != first.id
    assert second.state == "created"
    other = spec_of(bench, spec.image, spec.digest, name=spec.module, env=[("A", "1")])
    assert other.fingerprint() != spec.fingerprint()
    await runtime.create(other)
    third = await view(runtime, other)
    assert third.id != second.id
    assert third.spec == other.fingerprint()


async def test_a_name_that_others_have_is_refused(bench, runtime):
    spec = await made(bench, runtime, start=False)
    foreign = unique("foreign")
    bench.create_foreign(foreign, spec.image)
    mine = spec_of(bench, spec.image, spec.digest, name=foreign)
    with pytest.raises(RuntimeFailed, match=f"docker rename {foreign}") as failed:
        await runtime.create(mine)
    assert not failed.value.retryable
    # The same module of another device on the same engine.
    other = bench.runtime("another")
    assert await other.containers() == ()
    with pytest.raises(RuntimeFailed):
        await other.create(
            spec_of(bench, spec.image, spec.digest, name=spec.name, device="another")
        )
    assert [found.name for found in await runtime.containers()] == [spec.name]


@pytest.mark.parametrize(
    ("command", "code", "oom"), [(["exit", "7"], 7, False), (["eat"], 137, True)]
)
async def test_exit_codes(bench, runtime, command, code, oom):
    limits = {"Memory": 16 << 20, "MemorySwap": 16 << 20}
    spec = await made(bench, runtime, Cmd=command, HostConfig=limits)
    # The engine hears of the kernel's kill from two sides, in any order.
    ended = await until(runtime, spec, lambda it: it.state == "exited" and it.oom_killed == oom)
    assert (ended.exit_code, ended.drift) == (code, ())


async def test_a_missing_program_is_no_trouble_of_the_engine(real):
    runtime = real.runtime()
    spec = await made(real, runtime, start=False, Entrypoint=["/nothing"])
    with pytest.raises(RuntimeFailed, match="correct Cmd and Entrypoint") as failed:
        await runtime.start(spec.name)
    assert not failed.value.retryable
    assert "no such file" in (await view(runtime, spec)).error


async def test_health_follows_the_check(bench, runtime):
    slow = {**HEALTHCHECK, "StartPeriod": 0}
    env = [("HEALTHY_AFTER_MS", "1500")]
    spec = await made(bench, runtime, env=env, Healthcheck=slow)
    assert (await view(runtime, spec)).health in ("starting", "unhealthy")
    healthy = await until(runtime, spec, lambda found: found.health == "healthy")
    assert healthy.health_log == "well"
    bench.signal(spec.name, "SIGUSR1")
    sick = await until(runtime, spec, lambda found: found.health == "unhealthy")
    assert (sick.health_log, sick.state) == ("sick", "running")
    bench.signal(spec.name, "SIGUSR2")
    await until(runtime, spec, lambda found: found.health == "healthy")


async def test_a_health_check_of_the_image_counts(bench, runtime):
    spec = await made(bench, runtime, name="checked:1", config={"Healthcheck": HEALTHCHECK})
    found = await until(runtime, spec, lambda found: found.health == "healthy")
    assert found.drift == ()


async def test_changes_wake_and_nothing_else_does(bench, runtime):
    spec = await made(bench, runtime, start=False)
    stream = runtime.events()
    await asyncio.wait_for(stream.__anext__(), SECONDS)

    async def woken():
        await asyncio.wait_for(stream.__anext__(), SECONDS)

    await runtime.start(spec.name)
    await woken()
    while (await view(runtime, spec)).state != "running":
        await woken()
    bench.update(spec.name, PidsLimit=50)
    while not (await view(runtime, spec)).drift:
        await woken()
    await runtime.remove(spec.name)
    while await view(runtime, spec) is not None:
        await woken()
    await stream.aclose()


async def test_events_of_health(bench, runtime):
    spec = await made(bench, runtime, Healthcheck=HEALTHCHECK)
    stream = runtime.events()
    while (await view(runtime, spec)).health != "healthy":
        await asyncio.wait_for(stream.__anext__(), SECONDS)
    bench.signal(spec.name, "SIGUSR1")
    while (await view(runtime, spec)).health != "unhealthy":
        await asyncio.wait_for(stream.__anext__(), SECONDS)
    await stream.aclose()


async def test_a_process_that_does_not_listen_is_killed(bench, runtime):
    spec = await made(bench, runtime, env=[("IGNORE_TERM", "1")])
    await runtime.stop(spec.name, timeout=1)
    assert (await view(runtime, spec)).exit_code == 137


async def test_a_stop_waits_as_long_as_the_container_asks(bench, runtime):
    soon = await deaf(bench, runtime, StopTimeout=1)
    late = await deaf(bench, runtime, StopTimeout=200)
    stopping = asyncio.ensure_future(runtime.stop(late.name))
    begin = time.monotonic()
    await runtime.stop(soon.name)
    assert time.monotonic() - begin > 0.9
    ended = await view(runtime, soon)
    assert (ended.state, ended.exit_code, ended.drift) == ("exited", 137, ())
    assert (await view(runtime, late)).state == "running"
    bench.signal(late.name, "SIGKILL")
    await asyncio.wait_for(stopping, SECONDS)


@pytest.mark.parametrize("asked", [60, -1])
async def test_no_container_is_waited_for_longer_than_the_policy_says(bench, asked):
    runtime = bench.runtime(policy=DockerPolicy(max_stop_seconds=1))
    spec = await deaf(bench, runtime, StopTimeout=asked)
    await runtime.stop(spec.name)
    ended = await view(runtime, spec)
    assert (ended.state, ended.exit_code) == ("exited", 137)
    assert (ended.finished_at - ended.started_at).total_seconds() < 50


@pytest.mark.parametrize("whose", ["container", "image"])
async def test_a_container_ends_by_the_signal_that_it_asks_for(bench, runtime, whose):
    config = {"StopSignal": "SIGINT"} if whose == "image" else None
    options = {} if config else {"StopSignal": "SIGINT"}
    name = f"{unique()}:1"
    spec = await deaf(bench, runtime, name=name, config=config, StopTimeout=60, **options)
    await runtime.stop(spec.name)
    ended = await view(runtime, spec)
    assert (ended.state, ended.exit_code, ended.drift) == ("exited", 0, ())


async def test_containers_that_take_their_time_to_end_keep_nobody_waiting(bench, runtime):
    # More than there are threads for calls.
    specs = [await deaf(bench, runtime, StopTimeout=200) for _ in range(6)]
    stops = [asyncio.ensure_future(runtime.stop(spec.name)) for spec in specs]
    other = await made(bench, runtime)
    assert {found.state for found in await runtime.containers()} == {"running"}
    await runtime.stop(other.name)
    assert (await view(runtime, other)).state == "exited"
    assert not any(stop.done() for stop in stops)
    # Neither does giving up the waiting.
    stops[0].cancel()
    await asyncio.wait({stops[0]}, timeout=SECONDS)
    assert stops[0].cancelled()
    for spec in specs:
        bench.signal(spec.name, "SIGKILL")
    await asyncio.wait_for(asyncio.gather(*stops[1:]), SECONDS)
