"""Container modules on a real engine, deployed through the simulated IoT Hub's twin."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gatelet.agent
import grpc
import numpy as np
import pytest
import pytest_asyncio
from gatelet.agent.identity.sources import parse_connection_string
from gatelet.agent.main import main
from gatelet.agent.scoring.client import ScoringClient
from gatelet.protos.services import ScoringStub
from running_device import DEVICE, RunningDevice

from ..bench import onnx_models
from ..bench.scoring_site import Site

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

SETTINGS = """
[docker]
enabled = true
socket = "{socket}"

[docker.policy]
mounts = {mounts}

[images]
min-free-percent = 0
min-free-bytes = 0
"""
NUMBERS = """probation-seconds = 1.5
restart-base-seconds = 0.2
healthy-deadline-seconds = 20.0
"""
PLAIN = {"HostConfig": {"NetworkMode": "none"}}
HEALTH = {
    "Test": ["CMD", "/probe", "check"],
    "Interval": 200_000_000,
    "Timeout": 5_000_000_000,
    "Retries": 1,
}


def host_folders() -> list[str]:
    """What a Python of this machine needs to run in a container without files of its own."""
    project = str(Path(gatelet.agent.__file__).parents[1])
    found = ["/usr", "/lib", "/lib64", sys.prefix, sys.base_prefix, project]
    folders = [folder for folder in dict.fromkeys(found) if Path(folder).exists()]
    return [
        one
        for one in folders
        if not any(one.startswith(f"{other}/") for other in folders if other != one)
    ]


class ContainerDevice(RunningDevice):
    """A device with an engine; `settle` waits for what the hub is told."""

    def __init__(self, folder: Path, engine: Any) -> None:
        super().__init__(folder, "none")
        self.engine = engine

    async def start(self) -> None:
        await self.site.start()
        config = self.folder / "agent.toml"
        text = config.read_text().replace("probation-seconds = 1.0\n", NUMBERS)
        mounts = json.dumps([f"{one}:ro" for one in (*host_folders(), self.folder / "scale")])
        config.write_text(text + SETTINGS.format(socket=self.engine.socket, mounts=mounts))
        await self.start_agent()

    async def stop(self) -> None:
        await super().stop()
        await asyncio.to_thread(self.clean)

    def clean(self) -> None:
        for container in self.engine.client.containers(all=True):
            self.engine.client.remove_container(container["Id"], force=True, v=True)

    def inspect(self, name: str) -> dict[str, Any]:
        return self.engine.client.inspect_container(name)

    def ids(self) -> dict[str, str]:
        found = self.engine.client.containers(all=True)
        return {name.lstrip("/"): c["Id"] for c in found for name in c["Names"]}

    def names(self) -> set[str]:
        return set(self.ids())

    async def until_failed(self, version: int) -> dict[str, Any]:
        return await self.until_reported(
            lambda r: (
                r.get("lastDesiredVersion") == version
                and r["lastDesiredStatus"]["code"] == 500
                and r["gatelet"]["deployment"]["outcome"] == "rolledBack"
                and all(m["runtimeStatus"] == "running" for m in r["modules"].values())
            )
        )


def content(**modules: Any) -> dict[str, Any]:
    entries = {}
    for name, given in modules.items():
        entry = {"image": given} if isinstance(given, str) else dict(given)
        options = {**PLAIN, **entry.pop("options", {})}
        entries[name] = {
            "type": "docker",
            "status": "running",
            "restartPolicy": "always",
            "settings": {"image": entry.pop("image"), "createOptions": json.dumps(options)},
            "env": {key: {"value": value} for key, value in entry.pop("env", {}).items()},
            **entry,
        }
    desired = {
        "schemaVersion": "1.1",
        "runtime": {"type": "docker", "settings": {"minDockerVersion": "v1.25"}},
        "systemModules": {"edgeAgent": {"type": "docker", "settings": {"image": "gatelet:1"}}},
        "modules": entries,
    }
    return {"modulesContent": {"$edgeAgent": {"properties.desired": desired}}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host(
    tmp_path_factory: pytest.TempPathFactory, engine: Any
) -> AsyncIterator[ContainerDevice]:
    device = ContainerDevice(tmp_path_factory.mktemp("host"), engine)
    try:
        await device.start()
        yield device
    finally:
        await device.stop()


def other(before: str, host: ContainerDevice, name: str) -> Callable[[], bool]:
    return lambda: host.ids().get(name, before) != before


async def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if await asyncio.to_thread(condition):
            return
        await asyncio.sleep(0.025)
    pytest.fail(f"never: {what}")


async def test_a_container_is_deployed_updated_and_removed(host: ContainerDevice) -> None:
    first, second = host.engine.push("web:1"), host.engine.push("web:2", files={"two": b"2"})
    reported = await host.until_good(host.desire(content(web=first.name, side=first.name)))
    entry = reported["modules"]["web"]
    assert entry["settings"]["image"] == first.name
    assert entry["settings"]["imageHash"] == first.digest
    assert json.loads(entry["settings"]["createOptions"]) == PLAIN
    assert entry["restartCount"] == 0
    assert entry["lastStartTimeUtc"] > "2020"
    web = host.inspect("web")
    assert web["State"]["Running"]
    environment = dict(entry.split("=", 1) for entry in web["Config"]["Env"])
    told = {name[8:]: value for name, value in environment.items() if name.startswith("IOTEDGE_")}
    identity = parse_connection_string(host.site.hub.connection_string(DEVICE))
    assert told == {
        "IOTHUBHOSTNAME": identity.host,
        "DEVICEID": identity.device,
        "MODULEID": "web",
    }
    side = host.inspect("side")
    reported = await host.until_good(host.desire(content(web=second.name, side=first.name)))
    assert reported["modules"]["web"]["settings"]["imageHash"] == second.digest
    assert host.inspect("side")["State"]["StartedAt"] == side["State"]["StartedAt"]
    await host.until_good(host.desire(content(side=first.name)))
    assert host.names() == {"side"}


async def test_a_crash_loop_is_rolled_back_and_told(host: ContainerDevice) -> None:
    image = host.engine.push("web:1")
    await host.until_good(host.desire(content(web=image.name)))
    crash = {"image": image.name, "env": {"EXIT_AFTER_MS": "50", "EXIT_CODE": "7"}}
    version = host.desire(content(web=crash, more=image.name))
    reported = await host.until_failed(version)
    said = reported["lastDesiredStatus"]["description"]
    assert "web: it ended by itself 3 times, the last time with exit code 7" in said
    assert "rolled back" in said
    assert host.names() == {"web"}
    assert set(reported["modules"]) == {"web"}


async def test_an_unhealthy_update_is_rolled_back_and_a_sick_module_restarted(
    host: ContainerDevice,
) -> None:
    image = host.engine.push("well:1", config={"Healthcheck": HEALTH})
    await host.until_good(
        host.desire(content(web={"image": image.name, "restartPolicy": "on-unhealthy"}))
    )
    sick = {"image": image.name, "env": {"SICK_AFTER_MS": "300"}}
    reported = await host.until_failed(host.desire(content(web=sick)))
    assert "health check failed" in reported["lastDesiredStatus"]["description"]
    before = host.inspect("web")["State"]["StartedAt"]
    await asyncio.to_thread(host.engine.client.kill, "web", "SIGUSR1")
    await eventually(
        lambda: (
            host.inspect("web")["State"]["StartedAt"] != before
            and host.inspect("web")["State"]["Health"]["Status"] == "healthy"
        ),
        "restarted because it was unhealthy",
    )
    reported = await host.until_reported(
        lambda r: (
            r["modules"]["web"]["restartCount"] == 1
            and r["modules"]["web"]["runtimeStatus"] == "running"
        )
    )
    assert reported["modules"]["web"]["lastRestartTimeUtc"] > "2020"


async def test_what_somebody_changes_on_the_engine_is_put_right(host: ContainerDevice) -> None:
    image = host.engine.push("web:1")
    await host.until_good(host.desire(content(web=image.name)))
    before = host.inspect("web")["Id"]
    await asyncio.to_thread(host.engine.client.update_container, "web", cpu_shares=512)
    await eventually(other(before, host, "web"), "made anew after docker update")
    await host.until(lambda s: s["modules"] and s["modules"][0]["status"] == "running")
    before = host.inspect("web")["Id"]
    await asyncio.to_thread(host.engine.client.remove_container, "web", force=True)
    await eventually(other(before, host, "web"), "made anew after docker rm")
    await host.until(lambda s: s["modules"] and s["modules"][0]["status"] == "running")


async def test_a_module_that_ends_is_restarted_and_one_asked_for_too(host: ContainerDevice) -> None:
    image = host.engine.push("web:1")
    await host.until_good(host.desire(content(web=image.name)))
    before = host.inspect("web")["State"]["StartedAt"]
    await asyncio.to_thread(host.engine.client.kill, "web", "SIGKILL")
    await eventually(
        lambda: (
            host.inspect("web")["State"]["StartedAt"] != before
            and host.inspect("web")["State"]["Running"]
        ),
        "restarted after a kill",
    )


async def test_after_a_reboot_without_network_the_last_good_deployment_runs(
    host: ContainerDevice,
) -> None:
    image = host.engine.push("web:1")
    await host.until_good(host.desire(content(web=image.name, two=image.name)))
    assert host.process is not None
    host.process.kill()
    await asyncio.to_thread(host.process.wait)
    host.engine.registry.stop()
    await host.site.hub.pause()
    try:
        with_engine = host.engine.stopped()
        await asyncio.to_thread(with_engine.__enter__)
        await asyncio.to_thread(with_engine.__exit__, None, None, None)
        await host.start_agent(
            lambda s: [m["status"] for m in s["modules"]] == ["running", "running"]
        )
        assert host.inspect("web")["State"]["Running"]
        assert host.inspect("two")["State"]["Running"]
    finally:
        host.engine.registry.start()
        await host.site.hub.resume()


async def test_an_engine_that_goes_away_is_said_and_comes_back(host: ContainerDevice) -> None:
    image = host.engine.push("web:1")
    await host.until_good(host.desire(content(web=image.name)))
    with_engine = host.engine.stopped()
    await asyncio.to_thread(with_engine.__enter__)
    status = await host.until(lambda s: s["modules"] and s["modules"][0]["status"] == "backoff")
    assert "engine does not answer" in status["modules"][0]["description"]
    await asyncio.to_thread(with_engine.__exit__, None, None, None)
    await host.until(lambda s: s["modules"] and s["modules"][0]["status"] == "running")
    assert host.inspect("web")["State"]["Running"]


async def test_a_scoring_container_is_scored_through_the_gateway(host: ContainerDevice) -> None:
    folder = onnx_models.scale_folder(host.folder / "scale", 2, name="scaler", version="7")
    image = host.engine.push("scorer:1", config={"Labels": {"io.gatelet.scoring": "inner"}})
    binds = [*(f"{one}:{one}:ro" for one in host_folders()), f"{folder}:/model:ro"]
    options = {
        "Entrypoint": [sys.executable, "-m", "gatelet.agent.scoring.process"],
        "Cmd": [
            *("--control-socket", "/run/gatelet/control.sock", "--http-address", ""),
            *("--metrics-address", "", "--grpc-address", "unix:/run/gatelet/scoring.sock"),
        ],
        "HostConfig": {"NetworkMode": "none", "Binds": binds, "Tmpfs": {"/tmp": ""}},
    }
    version = host.desire(content(scorer={"image": image.name, "options": options}))
    control = host.folder / "run" / "modules" / "scorer" / "control.sock"
    await eventually(control.exists, "the process in the container listens")

    def work() -> None:
        with grpc.insecure_channel(f"unix:{control}") as channel:
            Site("", ScoringStub(channel)).deploy({"inner": Path("/model")})

    await asyncio.to_thread(work)
    reported = await host.until_good(version)
    assert reported["modules"]["scorer"]["gatelet"]["model"] == "inner"

    def score() -> list[list[float]]:
        with ScoringClient(host.grpc_address) as client:
            return client.infer("scorer", {"x": np.ones((1, 4), np.float32)})["total"].tolist()

    assert await asyncio.to_thread(score) == [[8.0]]
    await host.until_good(host.desire(content()))
    assert host.names() == set()
    await host.until(lambda s: not s["endpoints"])


async def test_an_engine_pulls_what_is_signed_and_nothing_else(host: ContainerDevice) -> None:
    image = host.engine.push("signed/web:1", files={"signed": b"1"})
    key, public = host.folder / "release.key", host.folder / "release.pub"
    for words in (
        ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key)],
        ["ec", "-in", str(key), "-pubout", "-out", str(public)],
    ):
        await asyncio.to_thread(
            subprocess.run, ["openssl", *words], check=True, capture_output=True
        )
    await host.stop_agent()
    config = host.folder / "agent.toml"
    registry = image.name.partition("/")[0]
    config.write_text(
        f"{config.read_text()}\n[trust]\nkeys = [{{id = 'release', file = '{public}'}}]\n"
        f"images = [{{prefix = '{registry}/signed'}}]\n"
    )
    await host.start_agent()
    version = host.desire(content(web=image.name))
    reported = await host.until_reported(
        lambda r: (
            r.get("lastDesiredVersion") == version
            and r["modules"].get("web", {}).get("runtimeStatus") == "backoff"
        )
    )
    assert "is not signed" in reported["modules"]["web"]["statusDescription"]
    held = await asyncio.to_thread(host.engine.client.images)
    assert not any(image.digest in str(one.get("RepoDigests")) for one in held)
    sign = ["image", "sign", image.name, "--key", str(key)]
    assert await asyncio.to_thread(main, sign) == 0
    reported = await host.until_good(version)
    assert reported["modules"]["web"]["settings"]["imageHash"] == image.digest
