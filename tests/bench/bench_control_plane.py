"""What the control plane costs: its start, its memory and CPU at rest, and a container's way in.

    python tests/bench/bench_control_plane.py [--idle SECONDS]

The agent on a simulated site, with a container engine of its own: alone for its start, beside the
scoring process for the rest. "deployed" is the time from the change of the twin in the hub until
the container runs and the hub has the report of it; the engine's own create and start of the same
container is measured in turns. Memory is PSS (proc(5), smaps_rollup) of the agent's process, the
median over the idle time, in which it has a deployment without modules and follows its engine. PSS
counts a page that several processes have in parts: on a machine where other Python programs run it
is up to 7 MiB less than on one where none does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from engine_fixture import Engine
from gatelet.agent.cli.agent_client import AgentClient
from gatelet.simulator.background import BackgroundLoop
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.site import EDGE_AGENT, Site, SiteSettings

DEVICE = "edge-1"
STARTS, ROUNDS = 5, 10
SYSTEM = {"type": "docker", "settings": {"image": "gatelet", "createOptions": ""}}


class Device:
    """The agent's process, on a site of its own."""

    def __init__(self, folder: Path, loop: BackgroundLoop, engine: Engine, links: str) -> None:
        self._loop, self._engine = loop, engine
        self._site = Site(SiteSettings(folder, DEVICE, "none"))
        loop.run(self._site.start())
        self.config = folder / "agent.toml"
        text = self.config.read_text()
        if links != "both":
            text = _without(text, "mqtt" if links == "iothub" else "iothub")
        self.config.write_text(f'{text}\n[docker]\nsocket = "{engine.socket}"\n')
        found = re.search(r'^run-dir = "(.+)"', text, re.MULTILINE)
        assert found is not None
        self._socket = Path(found[1]) / "agent.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *role: str) -> float:
        """Seconds until the agent answers on its socket."""
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "gatelet.agent.main", "run", *role),
                *("--config", str(self.config)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _until(lambda: _connects(self._socket))
        return time.perf_counter() - began

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)
            self.process = None

    def pid(self) -> int:
        """The agent's, under `gatelet run`."""
        processes = json.loads((self._socket.parent / "processes.json").read_bytes())
        return int(processes["agent"]["pid"])

    def close(self) -> None:
        self.stop()
        self._loop.run(self._site.stop())

    def reported(self) -> dict[str, Any]:
        client = ClientId(DEVICE, EDGE_AGENT)
        twin = self._loop.call(lambda: self._site.hub.core.twin(client).device_view())
        reported: dict[str, Any] = twin["reported"]
        return reported

    def deploy(self, modules: dict[str, Any]) -> float:
        """Seconds until the hub has the report that `modules` run as desired."""
        began = time.perf_counter()
        core = self._site.hub.core
        self._loop.call(core.apply_configuration, DEVICE, manifest(modules))
        client = ClientId(DEVICE, EDGE_AGENT)
        version = self._loop.call(lambda: core.twin(client).device_view()["desired"]["$version"])

        def done() -> bool:
            reported = self.reported()
            found = reported.get("modules", {})
            states = {name: module["runtimeStatus"] for name, module in found.items()}
            return (
                reported.get("lastDesiredVersion") == version
                and reported["lastDesiredStatus"]["code"] == 200
                and states == dict.fromkeys(modules, "running")
            )

        _until(done)
        seconds = time.perf_counter() - began
        running = self._running()
        if not modules:
            _until(lambda: not self._running())
        for name, module in modules.items():
            (wanted,) = (f"{key}={entry['value']}" for key, entry in module["env"].items())
            env = self._engine.client.inspect_container(running[name])["Config"]["Env"]
            assert wanted in env, f"reported as running, but it has {env} and not {wanted}"
        return seconds

    def _running(self) -> dict[str, str]:
        """Container name -> id."""
        return {
            container["Names"][0].removeprefix("/"): container["Id"]
            for container in self._engine.client.containers()
        }

    def rest(self) -> None:
        """Deploy nothing; returns when that is good and all links are connected."""
        with AgentClient(self._socket) as agent:
            agent.apply(json.dumps(manifest({})).encode())

            def done() -> bool:
                status = agent.status()
                connected = all(link["connected"] for link in status["links"])
                return connected and status["deployment"]["outcome"] == "good"

            _until(done)


def manifest(modules: dict[str, Any]) -> dict[str, Any]:
    desired = {
        "schemaVersion": "1.1",
        "runtime": {"type": "docker", "settings": {"minDockerVersion": "v1.25"}},
        "systemModules": {
            "edgeAgent": SYSTEM,
            "edgeHub": {**SYSTEM, "status": "running", "restartPolicy": "always"},
        },
        "modules": modules,
    }
    return {"modulesContent": {"$edgeAgent": {"properties.desired": desired}}}


def module(image: str, number: int) -> dict[str, Any]:
    return {
        "type": "docker",
        "status": "running",
        "restartPolicy": "always",
        "settings": {"image": image, "createOptions": '{"HostConfig":{"NetworkMode":"none"}}'},
        "env": {"NUMBER": {"value": str(number)}},
    }


def pss(pid: int) -> float:
    """MiB."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    assert found is not None
    return int(found[1]) / 1024


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def at_rest(pid: int, seconds: float) -> tuple[float, float]:
    """Median PSS in MiB, and percent of one CPU."""
    before, began = cpu_seconds(pid), time.perf_counter()
    found = []
    while time.perf_counter() - began < seconds:
        found.append(pss(pid))
        time.sleep(1.0)
    percent = 100 * (cpu_seconds(pid) - before) / (time.perf_counter() - began)
    return statistics.median(found), percent


def engines_own(engine: Engine, image: str, number: int) -> float:
    """Seconds for create and start by the engine itself, through the same SDK."""
    body = {
        "Image": image,
        "Env": [f"NUMBER={number}"],
        "HostConfig": {"NetworkMode": "none", "LogConfig": {"Type": "json-file"}},
    }
    name = f"bench-{number}"
    began = time.perf_counter()
    engine.client.create_container_from_config(body, name)
    engine.client.start(name)
    seconds = time.perf_counter() - began
    engine.client.remove_container(name, force=True)
    return seconds


@contextmanager
def device(loop: BackgroundLoop, engine: Engine, links: str) -> Iterator[Device]:
    with tempfile.TemporaryDirectory(prefix="gatelet-bench-") as folder:
        made = Device(Path(folder), loop, engine, links)
        try:
            yield made
        finally:
            made.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--idle", type=float, default=30.0, metavar="SECONDS")
    idle = parser.parse_args().idle
    engine = Engine(Path(tempfile.mkdtemp(prefix="gatelet-engine-")))
    try:
        engine.make_sure()
        image = engine.push("bench:1").name
        with BackgroundLoop() as loop:
            for links in ("iothub", "mqtt"):
                with device(loop, engine, links) as one:
                    starts = []
                    for _ in range(STARTS):
                        one.stop()
                        starts.append(one.start("--role", "agent"))
                    one.stop()
                    one.start()
                    one.rest()
                    memory, cpu = at_rest(one.pid(), idle)
                print(
                    f"{links}: start {statistics.median(starts):.2f} s (median of {STARTS}); "
                    f"at rest for {idle:g} s: PSS {memory:.1f} MiB, {cpu:.2f} % of a CPU"
                )
            with device(loop, engine, "iothub") as one:
                one.start()
                rounds(one, engine, image, idle)
    finally:
        engine.close()


def rounds(one: Device, engine: Engine, image: str, idle: float) -> None:
    one.deploy({"probe": module(image, 0)})
    installs, updates, own = [], [], []
    for number in range(1, ROUNDS + 1):
        one.deploy({})
        own.append(engines_own(engine, image, number))
        installs.append(one.deploy({"probe": module(image, 2 * number)}))
        updates.append(one.deploy({"probe": module(image, 2 * number + 1)}))
    memory, cpu = at_rest(one.pid(), idle)
    engine_own = statistics.median(own)
    print(f"engine's own create and start: {engine_own * 1000:.0f} ms (median of {ROUNDS})")
    for what, found in (("install", installs), ("update", updates)):
        median = statistics.median(found)
        ratio, more = median / engine_own, 1000 * (median - engine_own)
        print(
            f"{what} deployed: {1000 * median:.0f} ms, {ratio:.1f} x the engine's, {more:+.0f} ms"
        )
    print(f"with one container, at rest: PSS {memory:.1f} MiB, {cpu:.2f} % of a CPU")


def _without(text: str, section: str) -> str:
    """TOML `text` without a section and what is below it."""
    parts = re.split(r"^(?=\[)", text, flags=re.MULTILINE)
    return "".join(p for p in parts if not re.match(rf"\[+{section}[.\]]", p))


def _until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("the agent did not get there in time")
        time.sleep(0.002)


def _connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


if __name__ == "__main__":
    main()
