"""One contract of ContainerRuntime, for the simulated engine and for a real dockerd."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
import uuid
from datetime import datetime, timedelta, timezone

import pytest
from docker.errors import APIError
from engine_fixture import HEALTHCHECK, PASSWORD, USER
from gatelet.agent.module_spec import ModuleSpec
from gatelet.agent.runtime.container import LogFilter, RuntimeFailed
from gatelet.agent.runtime.create_body import CreateFacts, create_body
from gatelet.agent.runtime.docker import DockerRuntime
from gatelet.agent.runtime.drift import drift
from gatelet.agent.runtime.engine_own import EnginesOwn
from gatelet.agent.runtime.policy import DockerPolicy
from gatelet.modules.oci.client import RegistryClient
from gatelet.modules.oci.reference import ImageRef
from gatelet.modules.oci.transport import RegistrySettings
from gatelet.simulator.engine import SimulatedEngine

SECONDS = 20.0
NOBODY = "sha256:" + "0" * 64


class RealBench:
    def __init__(self, engine) -> None:
        self.engine = engine
        self.api = engine.client
        self.device = f"device-{uuid.uuid4().hex[:12]}"
        self.runtimes = []
        self.foreign = []

    def runtime(self, device=None, policy=None):
        runtime = DockerRuntime(
            self.engine.socket, device or self.device, policy=policy, timeout=30
        )
        self.runtimes.append(runtime)
        return runtime

    def publish(self, name, config=None, login=False):
        if not login:
            pushed = self.engine.push(name, config=config)
            return pushed.name, pushed.digest
        registry = self.engine.add_registry(login=True)
        settings = RegistrySettings(registry.address, username=USER, password=PASSWORD)
        pushed = self.engine.push(name, config=config, registry=settings)
        return pushed.name, pushed.digest

    def signal(self, name, number):
        self.api.kill(name, number)

    def update(self, name, **settings):
        self.api._post_json(self.api._url("/containers/{0}/update", name), settings).close()

    def rename(self, name, new):
        self.api.rename(name, new)

    def create_foreign(self, name, image):
        self.api.create_container_from_config({"Image": image}, name)
        self.foreign.append(name)

    def stop(self):
        self.engine.stop()

    def start(self):
        self.engine.start()

    async def close(self):
        for runtime in self.runtimes:
            await runtime.close()
        wanted = {"label": [f"io.gatelet.device={self.device}"]}
        names = [found["Id"] for found in self.api.containers(all=True, filters=wanted)]
        for name in [*names, *self.foreign]:
            with contextlib.suppress(APIError):
                self.api.remove_container(name, v=True, force=True)


class SimulatedBench:
    def __init__(self) -> None:
        self.engine = SimulatedEngine()
        self.device = "device-1"
        for name in ("signal", "update", "rename", "create_foreign", "stop", "start"):
            setattr(self, name, getattr(self.engine, name))

    def runtime(self, device=None, policy=None):
        return self.engine.runtime(device or self.device, policy)

    def publish(self, name, config=None, login=False):
        image = f"registry.test:5000/{name}"
        credentials = (USER, PASSWORD) if login else None
        return image, self.engine.publish(image, config=config, login=credentials)

    async def close(self):
        pass


@pytest.fixture(params=["simulated", "docker"])
async def bench(request):
    if request.param == "simulated":
        bench = SimulatedBench()
    else:
        bench = RealBench(request.getfixturevalue("engine"))
    yield bench
    await bench.close()


@pytest.fixture
def runtime(bench):
    return bench.runtime()


def unique(prefix="m"):
    return f"{prefix}-{uuid.uuid4().hex[:10]}"


def spec_of(bench, image, digest, *, name=None, env=(), device=None, **options):
    options = {**options, "HostConfig": {"NetworkMode": "none", **options.get("HostConfig", {})}}
    module = ModuleSpec(name or unique(), image, env=tuple(env), create_options=json.dumps(options))
    policy = DockerPolicy(allow_privileged=True)
    return create_body(module, device or bench.device, policy, CreateFacts(digest=digest))


async def made(bench, runtime, *, start=True, name="probe:1", config=None, **options):
    """A container, pulled, created and started; returns its spec."""
    image, digest = bench.publish(name, config)
    await runtime.pull(image, digest, (), lambda progress: None)
    spec = spec_of(bench, image, digest, **options)
    await runtime.create(spec)
    if start:
        await runtime.start(spec.name)
    return spec


async def view(runtime, spec):
    found = [view for view in await runtime.containers() if view.module == spec.module]
    assert len(found) <= 1
    return found[0] if found else None


async def until(runtime, spec, condition):
    deadline = time.monotonic() + SECONDS
    while not condition(last := await view(runtime, spec)):
        assert time.monotonic() < deadline, f"not reached: {last}"
        await asyncio.sleep(0.02)
    return last


async def lines(runtime, spec, follow=False, **wanted):
    return [line async for line in runtime.logs(spec.name, LogFilter(**wanted), follow=follow)]


async def exhausted(stream):
    async for _ in stream:
        pass


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


async def test_health_follows_the_check(bench, runtime):
    slow = {**HEALTHCHECK, "StartPeriod": 0}
    env = [("HEALTHY_AFTER_MS", "100")]
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


async def test_a_process_that_does_not_listen_is_killed(bench, runtime):
    spec = await made(bench, runtime, env=[("IGNORE_TERM", "1")])
    await runtime.stop(spec.name, timeout=1)
    assert (await view(runtime, spec)).exit_code == 137


async def deaf(bench, runtime, **options):
    """A container that does not hear SIGTERM, once it does not."""
    spec = await made(bench, runtime, env=[("IGNORE_TERM", "1")], **options)
    stream = runtime.logs(spec.name, LogFilter(), follow=True)
    assert (await asyncio.wait_for(stream.__anext__(), SECONDS)).text == "started"
    await stream.aclose()
    return spec


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
    spec = await made(bench, runtime, Cmd=["lines", "4", "150"])
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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"Memory": 64 << 20, "MemorySwap": 64 << 20}, "HostConfig.Memory"),
        ({"NanoCpus": 500_000_000}, "HostConfig.NanoCpus"),
        ({"PidsLimit": 50}, "HostConfig.PidsLimit"),
        ({"CpuShares": 100}, "HostConfig.CpuShares"),
        ({"RestartPolicy": {"Name": "always"}}, "HostConfig.RestartPolicy"),
    ],
)
async def test_settings_changed_by_others_are_seen(bench, runtime, change, named):
    limits = {"Memory": 32 << 20, "MemorySwap": 32 << 20, "PidsLimit": 100}
    spec = await made(bench, runtime, HostConfig=limits)
    assert (await view(runtime, spec)).drift == ()
    bench.update(spec.name, **change)
    assert named in (await view(runtime, spec)).drift
    # Also by an agent that did not create it.
    assert named in (await view(bench.runtime(), spec)).drift
    await runtime.create(spec)
    assert (await view(runtime, spec)).drift == ()


async def test_a_new_name_is_seen(bench, runtime):
    spec = await made(bench, runtime)
    bench.rename(spec.name, unique("renamed"))
    assert (await view(runtime, spec)).drift == ("Name",)


async def test_a_whole_body_does_not_drift(bench, runtime):
    options = {
        "Hostname": "camera",
        "User": "1000:1000",
        "WorkingDir": "/tmp",
        "Env": ["A=1", "B=two words"],
        "Labels": {"team": "vision"},
        "ExposedPorts": {"80/tcp": {}},
        "Volumes": {"/cache": {}},
        "StopSignal": "SIGTERM",
        "StopTimeout": 3,
        "Healthcheck": HEALTHCHECK,
        "HostConfig": {
            "Memory": 64 << 20,
            "MemoryReservation": 32 << 20,
            "NanoCpus": 500_000_000,
            "PidsLimit": 64,
            "CapDrop": ["ALL"],
            "CapAdd": ["net_bind_service", "CAP_CHOWN"],
            "Binds": ["/usr/share:/host:ro", "/etc/hosts:/h:ro"],
            "Mounts": [
                {"Type": "tmpfs", "Target": "/scratch", "TmpfsOptions": {"SizeBytes": 65536}}
            ],
            "Tmpfs": {"/run": "rw,mode=1777"},
            "ReadonlyRootfs": True,
            "Ulimits": [{"Name": "nofile", "Soft": 512, "Hard": 1024}],
            "PortBindings": {"80/tcp": [{"HostPort": "18080"}]},
            "ExtraHosts": ["db:10.0.0.1"],
            "Dns": ["10.0.0.2"],
            "GroupAdd": ["44"],
            "Devices": [{"PathOnHost": "/dev/zero", "PathInContainer": "/dev/nil"}],
            "Init": False,
            "OomScoreAdj": 100,
            "ShmSize": 1 << 20,
            "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m"}},
            "RestartPolicy": {"Name": "always"},
        },
    }
    env = [("B", "3"), ("C", "")]
    spec = await made(bench, runtime, env=env, name="checked:1", **options)
    await until(runtime, spec, lambda found: found.state == "running")
    # A runtime that did not create it knows nothing of the engine's own settings.
    for one in (runtime, bench.runtime()):
        assert (await view(one, spec)).drift == ()


async def test_pull_by_digest_with_progress(bench, runtime):
    image, digest = bench.publish(f"{unique()}:1", {"Labels": {"unique": uuid.uuid4().hex}})
    seen = []
    assert digest not in {d for found in await runtime.images() for d in found.digests}
    await runtime.pull(image, digest, (), seen.append)
    assert seen
    assert seen[-1].layers_done == seen[-1].layers_total
    assert all(one.bytes_done <= one.bytes_total for one in seen)
    [found] = [found for found in await runtime.images() if digest in found.digests]
    assert image in found.names
    assert "unique" in found.labels
    assert found.size > 0
    # Again: nothing is transferred, and a lost name comes back.
    await runtime.pull(image, digest, (), seen.append)
    await runtime.remove_image(digest)
    await runtime.remove_image(digest)
    assert digest not in {d for found in await runtime.images() for d in found.digests}


async def test_a_moved_tag_does_not_matter(bench, runtime):
    name = f"{unique()}:1"
    image, first = bench.publish(name, {"Labels": {"number": "1"}})
    _, second = bench.publish(name, {"Labels": {"number": "2"}})
    await runtime.pull(image, first, (), lambda progress: None)
    old = spec_of(bench, image, first)
    await runtime.create(old)
    await runtime.pull(image, second, (), lambda progress: None)
    # The name stands for the second image now, and the first one is still what is asked for.
    again = spec_of(bench, image, first, name=old.module, env=[("A", "1")])
    await runtime.create(again)
    assert (await view(runtime, again)).drift == ()
    for number, digest in (("1", first), ("2", second)):
        spec = spec_of(bench, image, digest)
        await runtime.create(spec)
        [found] = [one for one in await runtime.images() if digest in one.digests]
        assert found.labels["number"] == number
        assert (await view(runtime, spec)).drift == ()


async def test_an_unknown_digest(bench, runtime):
    image, _ = bench.publish(f"{unique()}:1")
    with pytest.raises(RuntimeFailed, match="push the image") as failed:
        await runtime.pull(image, NOBODY, (), lambda progress: None)
    assert failed.value.retryable
    with pytest.raises(RuntimeFailed, match="has to be pulled first") as failed:
        await runtime.create(spec_of(bench, image, NOBODY))
    assert failed.value.retryable


async def test_credentials(bench, runtime):
    image, digest = bench.publish(f"{unique()}:1", login=True)
    host = image.partition("/")[0]
    for wrong in ((), ((host, USER, "wrong"),), (("elsewhere:5000", USER, PASSWORD),)):
        with pytest.raises(RuntimeFailed, match=f"username and password for {host}") as failed:
            await runtime.pull(image, digest, wrong, lambda progress: None)
        assert PASSWORD not in str(failed.value)
    right = (("elsewhere:5000", "a", "b"), (host, USER, PASSWORD))
    await runtime.pull(image, digest, right, lambda progress: None)


async def test_an_image_in_use_stays(bench, runtime):
    image, digest = bench.publish(f"{unique()}:1", {"Labels": {"unique": uuid.uuid4().hex}})
    await runtime.pull(image, digest, (), lambda progress: None)
    spec = spec_of(bench, image, digest)
    await runtime.create(spec)
    with pytest.raises(RuntimeFailed, match=spec.name):
        await runtime.remove_image(digest)
    await runtime.remove(spec.name)
    await runtime.remove_image(digest)


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


# What only the real engine has


@pytest.fixture
async def real(engine):
    bench = RealBench(engine)
    yield bench
    await bench.close()


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


async def test_a_missing_program_is_no_trouble_of_the_engine(real):
    runtime = real.runtime()
    spec = await made(real, runtime, start=False, Entrypoint=["/nothing"])
    with pytest.raises(RuntimeFailed, match="correct Cmd and Entrypoint") as failed:
        await runtime.start(spec.name)
    assert not failed.value.retryable
    assert "no such file" in (await view(runtime, spec)).error


async def test_a_cancelled_pull_stops_the_transfer(real):
    """The registry's side of it: a pull through a door that is closed half way."""
    runtime = real.runtime()
    size = 16 << 20
    door = Door(real.engine.registry.address)
    await door.start()
    try:
        pushed = real.engine.push(f"{unique()}:1", files={"noise": os.urandom(size)})
        image = pushed.name.replace(real.engine.registry.address, door.address)
        door.limit = 2 << 20
        pull = asyncio.create_task(runtime.pull(image, pushed.digest, (), lambda progress: None))
        await asyncio.wait_for(door.full.wait(), SECONDS)
        assert door.open
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull
        # dockerd 20.10 looks at what was cancelled when the next bytes of the layer come.
        ended = asyncio.create_task(door.ended.wait())
        while not (await asyncio.wait([ended], timeout=0.2))[0]:
            assert door.limit < size, "the engine went on to the end of the layer"
            door.let(256 << 10)
        door.let(1 << 40)
        seen = []
        await asyncio.wait_for(runtime.pull(image, pushed.digest, (), seen.append), SECONDS)
        assert seen[-1].bytes_done >= size
    finally:
        await door.stop()


class Door:
    """A TCP proxy in front of a registry that lets `limit` bytes through per connection."""

    def __init__(self, target: str) -> None:
        self._target = target.rpartition(":")[::2]
        self.limit = 1 << 40
        self.full = asyncio.Event()
        self.ended = asyncio.Event()
        self.open: set[asyncio.StreamWriter] = set()
        self.tasks: set[asyncio.Task] = set()
        self._more = asyncio.Event()

    def let(self, more: int) -> None:
        self.limit += more
        self._more.set()

    async def start(self) -> None:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def serve(self, reader, writer) -> None:
        inner = await asyncio.open_connection(self._target[0], int(self._target[1]))
        self.open.add(writer)
        ways = [
            asyncio.create_task(self.copy(reader, inner[1], limited=False)),
            asyncio.create_task(self.copy(inner[0], writer, limited=True)),
        ]
        self.tasks.update(ways)
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for end in (inner[1], writer):
            end.close()
        self.open.discard(writer)
        if self.full.is_set() and not self.open:
            self.ended.set()

    async def copy(self, reader, writer, *, limited: bool) -> None:
        passed = 0
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(64 * 1024):
                passed += len(data)
                while limited and passed > self.limit:
                    self.full.set()
                    self._more.clear()
                    await self._more.wait()
                writer.write(data)
                await writer.drain()

    async def stop(self) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.server.wait_closed()


async def test_a_damaged_layer_is_never_run(real):
    runtime = real.runtime()
    pushed = real.engine.push(f"{unique()}:1", files={"noise": os.urandom(100_000)})
    settings = RegistrySettings(real.engine.registry.address)
    ref = ImageRef.parse(pushed.name)
    with RegistryClient(settings) as client:
        manifest = json.loads(client.get_manifest(ref.repository, pushed.digest).raw)
    file = real.engine.registry.blob_file(manifest["layers"][1]["digest"])
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(RuntimeFailed, match="push the image again") as failed:
        await runtime.pull(pushed.name, pushed.digest, (), lambda progress: None)
    assert failed.value.retryable
    file.write_bytes(whole)
    await runtime.pull(pushed.name, pushed.digest, (), lambda progress: None)


async def test_a_registry_that_is_away(real):
    runtime = real.runtime()
    registry = real.engine.add_registry()
    pushed = real.engine.push("away:1", registry=RegistrySettings(registry.address))
    registry.stop()
    with pytest.raises(RuntimeFailed, match=f"that {registry.address} runs") as failed:
        await runtime.pull(pushed.name, pushed.digest, (), lambda progress: None)
    assert failed.value.retryable
    registry.start()
    await runtime.pull(pushed.name, pushed.digest, (), lambda progress: None)


async def test_an_engine_that_hangs_is_given_up_in_time(real):
    runtime = DockerRuntime(real.engine.socket, real.device, timeout=1)
    real.runtimes.append(runtime)
    assert await runtime.containers() == ()
    real.engine.signal(signal.SIGSTOP)
    try:
        for call in (runtime.containers(), runtime.start("x"), runtime.info()):
            begin = time.monotonic()
            with pytest.raises(RuntimeFailed, match="stuck or very busy") as failed:
                await call
            assert failed.value.retryable
            assert time.monotonic() - begin < 5
    finally:
        real.engine.signal(signal.SIGCONT)
    assert await runtime.containers() == ()


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


async def test_a_log_that_cannot_be_read_says_how_to_have_one(real):
    runtime = real.runtime()
    spec = await made(real, runtime, HostConfig={"LogConfig": {"Type": "none"}})
    with pytest.raises(RuntimeFailed, match="LogConfig") as failed:
        await lines(runtime, spec)
    assert not failed.value.retryable


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


async def test_what_the_engine_makes_of_a_body_by_itself_is_known_after_a_restart(
    real, monkeypatch
):
    """An engine of a kind that no rule foresees: it changes every body in the same way."""

    def of_another_kind(*what):
        return (*drift(*what), "HostConfig.Quirk")

    monkeypatch.setattr("gatelet.agent.runtime.docker.drift", of_another_kind)
    saved = []
    own = EnginesOwn("", saved.append)
    runtime = DockerRuntime(real.engine.socket, real.device, engines_own=own)
    real.runtimes.append(runtime)
    spec = await made(real, runtime)
    assert (await view(runtime, spec)).drift == ()
    again = DockerRuntime(real.engine.socket, real.device, engines_own=EnginesOwn(saved[-1]))
    real.runtimes.append(again)
    assert (await view(again, spec)).drift == ()
    real.update(spec.name, PidsLimit=50)
    assert (await view(again, spec)).drift == ("HostConfig.PidsLimit",)
    assert (await view(real.runtime(), spec)).drift == ("HostConfig.PidsLimit", "HostConfig.Quirk")


async def test_a_link_on_the_host_must_be_permitted_too(real, tmp_path):
    image, digest = real.publish("probe:1")
    policy = DockerPolicy(mounts=(str(tmp_path),))
    runtime = DockerRuntime(real.engine.socket, real.device, policy=policy)
    real.runtimes.append(runtime)
    await runtime.pull(image, digest, (), lambda progress: None)
    (tmp_path / "inside").mkdir()
    (tmp_path / "good").symlink_to(tmp_path / "inside")
    (tmp_path / "bad").symlink_to("/etc")
    for name, good in (("inside", True), ("good", True), ("bad", False)):
        options = {"HostConfig": {"NetworkMode": "none", "Binds": [f"{tmp_path}/{name}:/d"]}}
        module = ModuleSpec(unique(), image, create_options=json.dumps(options))
        spec = create_body(module, real.device, policy, CreateFacts(digest=digest))
        if good:
            await runtime.create(spec)
        else:
            with pytest.raises(RuntimeFailed, match=r"is a link to /etc; /etc is not allowed"):
                await runtime.create(spec)


async def test_the_network_of_the_modules_is_made_when_it_is_missing(real):
    name = unique("net")
    runtime = DockerRuntime(real.engine.socket, real.device, network=name)
    real.runtimes.append(runtime)
    image, digest = real.publish("probe:1")
    await runtime.pull(image, digest, (), lambda progress: None)
    try:
        for module in (ModuleSpec(unique(), image), ModuleSpec(unique(), image)):
            facts = CreateFacts(digest=digest, network=name)
            spec = create_body(module, real.device, DockerPolicy(), facts)
            await runtime.create(spec)
            await runtime.start(spec.name)
            assert (await view(runtime, spec)).drift == ()
            networks = real.api.inspect_container(spec.name)["NetworkSettings"]["Networks"]
            assert spec.module in networks[name]["Aliases"]
        real.api.disconnect_container_from_network(spec.name, name)
        assert (await view(runtime, spec)).drift == ("Networks",)
        [found] = real.api.networks(names=[name])
        # One that nobody here asked for stays missing.
        other = {"HostConfig": {"NetworkMode": unique("other")}}
        module = ModuleSpec(unique(), image, create_options=json.dumps(other))
        facts = CreateFacts(digest=digest, network=name)
        spec = create_body(module, real.device, DockerPolicy(), facts)
        await runtime.create(spec)
        with pytest.raises(RuntimeFailed, match="make the network"):
            await runtime.start(spec.name)
    finally:
        for one in await runtime.containers():
            await runtime.remove(one.name)
        for found in real.api.networks(names=[name]):
            real.api.remove_network(found["Id"])
