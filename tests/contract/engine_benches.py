"""One bench for the simulated engine and one for a real dockerd, and containers on either."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid

import pytest
from distribution_server import PASSWORD, USER
from docker.errors import APIError
from gatelet.agent.module_spec import ModuleSpec
from gatelet.agent.runtime.container import LogFilter
from gatelet.agent.runtime.create_body import CreateFacts, create_body
from gatelet.agent.runtime.docker import DockerRuntime
from gatelet.agent.runtime.policy import DockerPolicy
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


@pytest.fixture
async def real(engine):
    bench = RealBench(engine)
    yield bench
    await bench.close()


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


async def deaf(bench, runtime, **options):
    """A container that does not hear SIGTERM, once it does not."""
    spec = await made(bench, runtime, env=[("IGNORE_TERM", "1")], **options)
    await listening(runtime, spec)
    return spec


async def listening(runtime, spec):
    """Until its process has said what it does at which signal: before, it hears none."""
    stream = runtime.logs(spec.name, LogFilter(), follow=True)
    assert (await asyncio.wait_for(stream.__anext__(), SECONDS)).text == "started"
    await stream.aclose()


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
