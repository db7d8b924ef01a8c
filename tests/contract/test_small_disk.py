"""Pulls onto a disk that is really full, a small one of its own: models' and the engine's."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from container_world import Scoring, manifest
from engine_fixture import Engine
from gatelet.agent import image_housekeeping
from gatelet.agent.clock import SystemClock
from gatelet.agent.conditions import conditions
from gatelet.agent.config import AgentConfig, DeviceConfig, DockerConfig, RegistryConfig
from gatelet.agent.container_modules import DeviceContainers
from gatelet.agent.engine import Engine as Hold
from gatelet.agent.image_housekeeping import HostDisk, ImageHousekeeping
from gatelet.agent.image_retention import RetentionRules
from gatelet.agent.images import RegistryImages
from gatelet.agent.reconcile import Reconciler, ReconcileSettings
from gatelet.agent.runtime.docker import DockerRuntime
from gatelet.agent.seams import NoEngine
from gatelet.agent.snapshot import Snapshot
from gatelet.agent.steps import Executor
from gatelet.agent.store import StateStore
from gatelet.modules.oci.build import build_model_image
from gatelet.modules.oci.client import RegistryClient
from gatelet.modules.oci.layout import open_layout
from gatelet.modules.oci.push import push_image
from gatelet.modules.oci.reference import ImageRef
from gatelet.modules.oci.transport import RegistrySettings
from gatelet.simulator.registry import Registry
from required import SEARCHED, unavailable

MB = 1 << 20
SECONDS = 60.0
SETTINGS = ReconcileSettings(
    probation_seconds=0.1,
    retry_base_seconds=0.1,
    retry_cap_seconds=0.5,
    busy_poll_seconds=0.1,
    idle_poll_seconds=0.3,
)


class SmallDisk:
    """A file system in memory of `size` bytes at `path`."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "gatelet-test", path]
        made = subprocess.run(command, env={"PATH": SEARCHED}, capture_output=True, text=True)
        if made.returncode != 0:
            unavailable(f"needs to mount a file system: {made.stderr.strip()}")

    @property
    def free(self) -> int:
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def fill(self, left: int) -> None:
        """Until `left` bytes are free."""
        self.clear()
        with (self.path / "fill").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, self.free - left))

    def clear(self) -> None:
        (self.path / "fill").unlink(missing_ok=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", self.path], env={"PATH": SEARCHED}, check=False)


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[SmallDisk]:
    if os.geteuid() != 0:
        unavailable("needs root, to mount a small file system")
    path.mkdir(parents=True, exist_ok=True)
    disk = SmallDisk(path, size)
    try:
        yield disk
    finally:
        disk.unmount()


class SmallDevice:
    """The control loop in real time, its images on a small disk."""

    def __init__(self, folder: Path, images: Path, address: str, socket: Path | None) -> None:
        clock = SystemClock()
        self.store = StateStore(folder / "state.db", clock)
        self.scoring = Scoring()
        self.images = RegistryImages(images, (RegistryConfig(address, insecure=True),), None, None)
        self.snapshot = Snapshot()
        self.seen: list[Snapshot] = []
        self.hold: Hold | NoEngine = NoEngine()
        config = AgentConfig(
            device=DeviceConfig(id=folder.name, state_dir=folder, run_dir=folder / "run"),
            docker=DockerConfig(),
        )
        if socket is not None:
            runtime = DockerRuntime(socket, folder.name)
            self.hold = Hold(runtime, clock, lambda: self.reconciler.wake(), socket=socket)
        housekeeping = ImageHousekeeping(
            self.store, clock, RetentionRules(), HostDisk(), images.parent
        )
        self.reconciler = Reconciler(
            self.store,
            Executor(self.images, self.scoring, self.store.pin, self.hold, housekeeping.bringing),
            clock,
            SETTINGS,
            self._publish,
            maker=DeviceContainers(config),
            housekeeping=housekeeping,
        )

    def _publish(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    async def run(self) -> None:
        jobs = [self.reconciler.run()]
        if isinstance(self.hold, Hold):
            jobs.append(self.hold.run())
        await asyncio.gather(*jobs)

    def deploy(self, image: str) -> None:
        options = {"HostConfig": {"NetworkMode": "none"}}
        body = manifest(None, aa={"image": image, "options": options})
        assert self.reconciler.submit("local", 0, body, always=True).code == 200

    async def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, (self.phase(), self.condition())
            await asyncio.sleep(0.02)

    def phase(self) -> str:
        latest = self.store.latest()
        return "" if latest is None else latest.phase

    def condition(self) -> tuple[str, str, object]:
        (found,) = conditions(self.snapshot, {})
        return found.status, found.description, found.details.get("error")

    async def good(self, image: str) -> None:
        self.deploy(image)
        await self.until(lambda: self.phase() not in ("applying", "probation"))
        assert self.phase() == "good"

    def failed_with(self, pattern: str) -> bool:
        messages = [message for *_, message in self.store.journal_tail(1000)]
        return any(re.search(pattern, message) for message in messages)

    def disk_is_full(self) -> bool:
        return self.condition()[2] == "DISK_FULL"


@asynccontextmanager
async def running(device: SmallDevice) -> AsyncIterator[SmallDevice]:
    task = asyncio.ensure_future(device.run())
    try:
        yield device
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if isinstance(device.hold, Hold):
            await device.hold.close()
        device.store.close()


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_housekeeping, "LOOK_SECONDS", 0.05)


def model(folder: Path, version: int, size: int) -> Path:
    folder = folder / str(version)
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(random.Random(version).randbytes(size))
    (folder / "model.json").write_text(
        json.dumps(
            {
                "name": "digits",
                "version": str(version),
                "framework": "onnx",
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
                "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
                "variants": [{"kind": "onnx", "path": "model.onnx"}],
            }
        )
    )
    return folder


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    registry = Registry(tmp_path / "registry")
    await registry.start()
    yield registry
    await registry.stop()


async def test_the_disk_of_the_models_is_full(tmp_path: Path, registry: Registry) -> None:
    def push(version: int) -> tuple[str, str]:
        ref = ImageRef.parse(f"{registry.address}/models/digits:{version}")
        layout = tmp_path / "layouts" / str(version)
        build_model_image(model(tmp_path / "models", version, 8 * MB), layout)
        with RegistryClient(RegistrySettings(registry.address)) as client:
            pushed = push_image(client, ref, open_layout(layout))
        return str(ref), str(pushed.digest)

    pushed = [await asyncio.to_thread(push, version) for version in range(1, 6)]
    names, digests = zip(*pushed, strict=True)
    with small_disk(tmp_path / "disk", 128 * MB) as disk:
        device = SmallDevice(tmp_path, disk.path / "images", registry.address, None)
        async with running(device):
            await with_a_full_store(device, disk, names, digests)


async def with_a_full_store(
    device: SmallDevice, disk: SmallDisk, names: tuple[str, ...], digests: tuple[str, ...]
) -> None:
    async def stored() -> list[int]:
        found = await device.images.stored()
        return [number for number, digest in enumerate(digests) if digest in found]

    await device.good(names[0])
    routes = device.scoring.routes
    disk.fill(left=20 * MB)
    device.deploy(names[1])
    await device.until(device.disk_is_full)
    # What serves is whole, and serves; whatever is removed, that is not.
    assert await stored() == [0]
    assert device.scoring.routes == routes
    # Now it is filled by others in the midst of the transfer.
    refused = []

    def others_write(point: str) -> None:
        if not refused:
            refused.append(point)
            disk.fill(left=MB)

    device.images._store._fault = others_write
    disk.clear()
    await device.until(lambda: bool(refused) and device.failed_with("[Nn]o space left"))
    await device.until(device.disk_is_full)
    assert await stored() == [0]
    assert device.scoring.routes == routes
    assert device.phase() == "applying"
    disk.clear()
    await device.until(lambda: device.phase() == "good")
    assert device.scoring.routes != routes

    await device.good(names[2])
    assert await stored() == [0, 1, 2]
    # Half of a small disk is to be free. The longest unused go, what runs stays.
    disk.fill(left=60 * MB)
    await device.until(lambda: len(device.images.views()) == 2)
    assert await stored() == [1, 2]
    disk.fill(left=30 * MB)
    await device.until(lambda: len(device.images.views()) == 1)
    assert await stored() == [2]

    # The last good one and the one that arrives are both needed, however full it is.
    disk.fill(left=20 * MB)
    device.deploy(names[3])
    await device.until(device.disk_is_full)
    assert await stored() == [2]
    disk.fill(left=45 * MB)
    await device.until(lambda: device.phase() == "good")
    await device.until(lambda: len(device.images.views()) == 1)
    assert await stored() == [3]
    assert len(device.scoring.routes) == 1


async def test_the_disk_of_the_engine_is_full(tmp_path: Path, engine: Engine) -> None:
    other = Engine(Path(tempfile.mkdtemp(prefix="gatelet-small-")))
    disk = None
    try:
        with small_disk(other.folder / "data", 256 * MB) as disk:
            await asyncio.to_thread(other.make_sure)
            noise = [random.Random(number).randbytes(12 * MB) for number in range(4)]
            pushed = [
                await asyncio.to_thread(other.push, f"app:{number}", files={"noise": data})
                for number, data in enumerate(noise)
            ]
            device = SmallDevice(
                tmp_path, tmp_path / "images", other.registry.address, other.socket
            )
            async with running(device):
                await with_a_full_engine(device, other, disk, pushed)
    finally:
        await asyncio.to_thread(other.close)


async def with_a_full_engine(device, engine, disk, pushed) -> None:
    def container() -> tuple[str, bool]:
        found = engine.client.inspect_container("aa")
        return found["Id"], found["State"]["Running"]

    def here() -> set[str]:
        digests = {d for image in engine.client.images() for d in image["RepoDigests"] or ()}
        return {one.name for one in pushed if any(d.endswith(one.digest) for d in digests)}

    await device.good(pushed[0].name)
    first, _ = container()
    disk.fill(left=4 * MB)
    device.deploy(pushed[1].name)
    await device.until(device.disk_is_full)
    assert "free space" in device.condition()[1]
    assert container() == (first, True)
    assert pushed[0].name in here()
    disk.clear()
    await device.until(lambda: device.phase() == "good")
    second, running = container()
    assert running
    assert second != first

    # Somebody else's image is not touched.
    await asyncio.to_thread(engine.client.pull, pushed[2].name)
    assert {one.name for one in pushed[:3]} <= here()
    disk.fill(left=60 * MB)
    await device.until(lambda: pushed[0].name not in here())
    assert container() == (second, True)
    assert here() == {pushed[1].name, pushed[2].name}
    disk.fill(left=4 * MB)
    device.deploy(pushed[3].name)
    await device.until(device.disk_is_full)
    assert here() == {pushed[1].name, pushed[2].name}
    assert container() == (second, True)
    # Room enough for an engine that copies layers instead of laying them over each other.
    disk.fill(left=100 * MB)
    await device.until(lambda: device.phase() == "good")
    assert container()[1]
    assert pushed[3].name in here()
