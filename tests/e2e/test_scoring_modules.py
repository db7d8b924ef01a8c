"""A container that serves a model, deployed through the hub and scored at the device's endpoint."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gatelet.agent
import numpy as np
import pytest
import pytest_asyncio
from engine_fixture import Engine
from gatelet.agent.scoring.client import ScoringClient
from gatelet.agent.scoring.errors import Code, ScoringError
from running_device import RunningDevice

from ..bench import onnx_models

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

X = {"x": np.ones((1, 4), np.float32)}
SECONDS = 40.0

# What a container would have as its program: models behind the socket it is told.
SERVER = """
import os, signal, sys
from pathlib import Path
import grpc
from gatelet.accelerators.cpu import CpuBackend
from gatelet.agent.scoring.control_service import ControlService
from gatelet.agent.scoring.dataplane import DataPlane
from gatelet.agent.scoring.grpc_server import GrpcServer
from gatelet.agent.scoring.process import ControlServer
from gatelet.protos import control_pb2 as pb
from gatelet.protos.services import ScoringStub

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
plane = DataPlane("1")
service = ControlService(plane, {"cpu": CpuBackend()})
control = ControlServer(service, Path("/tmp/control.sock"))
control.start()
server = GrpcServer(plane, "unix:" + os.environ["GATELET_SCORING_SOCKET"])
server.start()
with grpc.insecure_channel("unix:/tmp/control.sock") as channel:
    stub = ScoringStub(channel)
    stub.load(pb.LoadRequest(instance="m", directory=os.environ["MODEL"]), 20)
    stub.probe(pb.ProbeRequest(instance="m"), 20)
    target = pb.RouteTarget(instance="m", default=True)
    # Two models: only the label of the image says which one is meant.
    routes = [pb.Route(endpoint=name, targets=[target]) for name in ("inner", "spare")]
    stub.switch(pb.SwitchRequest(routes=routes), 20)
print("serving", os.environ["MODEL"], flush=True)
signal.sigwait([signal.SIGTERM])
"""


class ScoringHost(RunningDevice):
    def __init__(self, folder: Path, engine: Engine) -> None:
        super().__init__(folder, "none")
        self.engine = engine
        self.image = engine.push("scorer:1", config={"Labels": {"io.gatelet.scoring": "inner"}})
        self.models = folder / "models"
        for factor in (2, 3):
            onnx_models.scale_folder(self.models / str(factor), factor, version=str(factor))
        (self.models / "server.py").write_text(SERVER)
        project = str(Path(gatelet.agent.__file__).parents[1])
        found = ["/usr", "/lib", "/lib64", sys.prefix, sys.base_prefix, project]
        every = [one for one in dict.fromkeys(found) if Path(one).exists()]
        self.mounts = [
            *(one for one in every if not any(one.startswith(f"{other}/") for other in every)),
            str(self.models),
        ]

    async def start(self) -> None:
        await self.site.start()
        config = self.folder / "agent.toml"
        mounts = ", ".join(f'"{one}:ro"' for one in self.mounts)
        numbers = "probation-seconds = 1.0\n"
        text = config.read_text().replace(numbers, f"{numbers}restart-base-seconds = 0.2\n")
        config.write_text(
            f'{text}\n[docker]\nenabled = true\nsocket = "{self.engine.socket}"\n'
            f"[docker.policy]\nmounts = [{mounts}]\n"
            "[images]\nmin-free-percent = 0\nmin-free-bytes = 0\n"
        )
        await self.start_agent()

    async def stop(self) -> None:
        await super().stop()
        client = self.engine.client
        for container in await asyncio.to_thread(client.containers, all=True):
            await asyncio.to_thread(client.remove_container, container["Id"], force=True)

    def deploy(self, model: str, **options: Any) -> int:
        created = {
            "Entrypoint": [sys.executable, f"{self.models}/server.py"],
            "HostConfig": {
                "NetworkMode": "none",
                "Binds": [f"{one}:{one}:ro" for one in self.mounts],
                "Tmpfs": {"/tmp": ""},
                **options,
            },
        }
        module = {
            "type": "docker",
            "status": "running",
            "restartPolicy": "always",
            "settings": {"image": self.image.name, "createOptions": json.dumps(created)},
            "env": {"MODEL": {"value": f"{self.models}/{model}"}},
        }
        return self.desire_modules({"scorer": module})

    def desire_modules(self, modules: dict[str, Any]) -> int:
        desired = {
            "schemaVersion": "1.1",
            "runtime": {"type": "docker", "settings": {}},
            "systemModules": {"edgeAgent": {"type": "docker", "settings": {"image": "gatelet"}}},
            "modules": modules,
        }
        return self.desire({"modulesContent": {"$edgeAgent": {"properties.desired": desired}}})

    async def until_scored(self, factor: int) -> None:
        deadline = time.monotonic() + SECONDS
        last: Any = None
        while last != [[4.0 * factor]]:
            assert time.monotonic() < deadline, last
            try:
                last = await asyncio.to_thread(self.total)
            except ScoringError as error:
                last = str(error)
            await asyncio.sleep(0.02)

    async def running(self) -> tuple[str, str, int]:
        """The container, since when it runs, and how often it was restarted."""
        found = await asyncio.to_thread(self.engine.client.inspect_container, "scorer")
        return found["Id"], found["State"]["StartedAt"], found["RestartCount"]

    def total(self) -> Any:
        with ScoringClient(self.grpc_address) as client:
            return client.infer("scorer", X)["total"].tolist()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host(
    tmp_path_factory: pytest.TempPathFactory, engine: Engine
) -> AsyncIterator[ScoringHost]:
    host = ScoringHost(tmp_path_factory.mktemp("h"), engine)
    try:
        await host.start()
        yield host
    finally:
        await host.stop()


async def test_deployed_scored_and_updated(host: ScoringHost) -> None:
    reported = await host.until_good(host.deploy("2"))
    assert reported["modules"]["scorer"]["runtimeStatus"] == "running"
    assert host.total() == [[8.0]]
    with ScoringClient(host.grpc_address) as client:
        assert client.request("scorer", X).version == "2"
    await host.until_good(host.deploy("3"))
    assert host.total() == [[12.0]]


async def test_what_dies_is_restarted_and_answers_again(host: ScoringHost) -> None:
    await host.until_good(host.deploy("2"))
    await asyncio.to_thread(host.engine.client.kill, "scorer")
    await host.until_scored(2)
    # A crash of the process before it leaves the container as it is, and with it the model.
    before = await host.running()
    await host.kill("scoring")
    await host.until_scored(2)
    assert await host.running() == before


async def test_what_the_policy_does_not_permit_is_refused_by_its_path(host: ScoringHost) -> None:
    await host.until_good(host.deploy("2"))
    version = host.deploy("3", Privileged=True)
    reported = await host.until_reported(
        lambda r: r.get("lastDesiredVersion") == version and r["lastDesiredStatus"]["code"] != 200
    )
    said = reported["lastDesiredStatus"]["description"]
    assert "HostConfig.Privileged" in said
    assert "allow-privileged" in said
    await host.until_scored(2)


async def test_what_is_removed_is_not_served(host: ScoringHost) -> None:
    await host.until_good(host.deploy("2"))
    await host.until_good(host.desire_modules({}))
    with pytest.raises(ScoringError) as failed:
        host.total()
    assert failed.value.code is Code.NOT_FOUND
