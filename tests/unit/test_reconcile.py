"""The control loop against doubles of its two seams, on real time with short settings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from gatelet.agent.clock import SystemClock
from gatelet.agent.image_housekeeping import DiskUsage, ImageHousekeeping
from gatelet.agent.image_retention import Disk, RetentionRules
from gatelet.agent.plan import InstanceView, Route, WantedEndpoint
from gatelet.agent.plan_types import UNTOLD
from gatelet.agent.reconcile import Reconciler, ReconcileSettings
from gatelet.agent.scoring_env import ScoringOptions
from gatelet.agent.seams import LoadedModel, Progress, Resolved, ScoringView, StepFailed, StoredView
from gatelet.agent.snapshot import Snapshot
from gatelet.agent.status import desired_status
from gatelet.agent.steps import Executor
from gatelet.agent.store import StateStore

SETTINGS = ReconcileSettings(probation_seconds=0.1, retry_base_seconds=0.01, retry_cap_seconds=0.02)


def digest(image: str) -> str:
    return "sha256:" + image.rpartition(":")[2] * 8


@dataclass
class ImagesDouble:
    """A registry and store in memory. `errors` fail the pulls of an image, one after the other."""

    images: set[str] = field(default_factory=set)
    errors: dict[str, list[StepFailed]] = field(default_factory=dict)
    held: dict[str, asyncio.Event] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    unreachable: bool = False

    async def stored(self) -> frozenset[str]:
        return frozenset(self.images)

    async def resolve(self, image: str, credentials: tuple[tuple[str, str, str], ...]) -> Resolved:
        if self.unreachable:
            raise StepFailed("registry is down", retryable=True, unreachable=True)
        return Resolved(digest(image), self.kinds.get(image, "model"))

    async def pull(
        self,
        image: str,
        pinned: str,
        credentials: tuple[tuple[str, str, str], ...],
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.pulls.append(image)
        if image in self.held:
            on_progress(Progress("layers", 1, 4, 0, 1))
            try:
                await self.held[image].wait()
            except asyncio.CancelledError:
                self.cancelled.append(image)
                raise
        if self.errors.get(image):
            raise self.errors[image].pop(0)
        self.images.add(pinned)

    def views(self) -> tuple[StoredView, ...]:
        return tuple(StoredView(digest, "", 1) for digest in sorted(self.images))

    async def find(self, image: str) -> str | None:
        return digest(image) if digest(image) in self.images else None

    async def model_directory(self, digest: str) -> Path:
        return Path("/images") / digest

    async def remove(self, digest: str) -> None:
        self.images.discard(digest)


@dataclass
class ScoringDouble:
    """A scoring process in memory. `broken` digests do not load; `crash()` is a restart."""

    boot: int = 1
    up: bool = True
    states: dict[str, str] = field(default_factory=dict)
    routes: tuple[Route, ...] = ()
    announced: tuple[WantedEndpoint, ...] = UNTOLD
    broken: set[str] = field(default_factory=set)
    deadly: set[str] = field(default_factory=set)
    forgetful: bool = False
    probes: int = 0

    def crash(self) -> None:
        self.boot += 1
        self.states.clear()
        self.routes = ()
        self.announced = UNTOLD

    async def status(self) -> ScoringView:
        if not self.up:
            raise StepFailed("away", retryable=True)
        models = tuple(
            LoadedModel(InstanceView(name, state), "m", "1", (), ())
            for name, state in self.states.items()
        )
        return ScoringView(f"boot-{self.boot}", 1, models, self.routes, (), self.announced)

    async def load(self, instance: str, directory: Path, options: ScoringOptions) -> None:
        if directory.name in self.broken:
            raise StepFailed(f"{directory.name} is not a model", retryable=False)
        if directory.name in self.deadly:
            self.crash()
            raise StepFailed("the scoring process does not answer", retryable=True)
        self.states[instance] = "loaded"

    async def attach(self, instance: str, socket: str, options: ScoringOptions) -> None:
        self.states[instance] = "loaded"

    async def probe(self, instance: str) -> None:
        self.probes += 1
        if not self.forgetful:
            self.states[instance] = "ready"

    async def announce(self, endpoints: tuple[WantedEndpoint, ...]) -> None:
        self.announced = endpoints

    async def switch(self, routes: tuple[Route, ...]) -> None:
        self.routes = routes

    async def unload(self, instance: str) -> None:
        self.states.pop(instance, None)

    def serving(self) -> dict[str, str]:
        """Endpoint -> the digest behind its default target."""
        return {r.endpoint: r.targets[0].instance.split("@")[1][:8] for r in self.routes}


def manifest(**images: str) -> bytes:
    modules = {
        name: {
            "type": "docker",
            "status": "running",
            "restartPolicy": "always",
            "version": "1.0",
            "settings": {"image": image, "createOptions": ""},
        }
        for name, image in images.items()
    }
    return json.dumps(
        {
            "schemaVersion": "1.1",
            "runtime": {"type": "docker", "settings": {"minDockerVersion": "v1.25"}},
            "systemModules": {
                "edgeAgent": {"type": "docker", "settings": {"image": "gatelet:1"}},
            },
            "modules": modules,
        }
    ).encode()


class FreeDisk:
    def usage(self, path: Path) -> Disk:
        return Disk(1000, 1000)


class Device:
    """A reconciler with its store and doubles, and a way to wait for what it publishes."""

    def __init__(
        self,
        path: Path,
        images: ImagesDouble,
        scoring: ScoringDouble,
        settings: ReconcileSettings = SETTINGS,
        disk: DiskUsage | None = None,
    ) -> None:
        self.images = images
        self.scoring = scoring
        self.store = StateStore(path / "state.db", SystemClock())
        housekeeping = ImageHousekeeping(
            self.store, SystemClock(), RetentionRules(min_free_bytes=100), disk or FreeDisk(), path
        )
        self.snapshot = Snapshot()
        self._published = asyncio.Event()
        self.reconciler = Reconciler(
            self.store,
            Executor(images, scoring, self.store.pin, bringing=housekeeping.bringing),
            SystemClock(),
            settings,
            self._publish,
            housekeeping=housekeeping,
        )
        self._task = asyncio.ensure_future(self.reconciler.run())

    def _publish(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._published.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async def wait() -> None:
            while not condition():
                if self._task.done():
                    self._task.result()
                self._published.clear()
                self.reconciler.wake()
                await self._published.wait()

        await asyncio.wait_for(wait(), 30)

    def phase(self) -> str:
        latest = self.store.latest()
        return "" if latest is None else latest.phase

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.store.close()


@pytest.fixture
async def device(tmp_path: Path) -> AsyncIterator[Device]:
    device = Device(tmp_path, ImagesDouble(), ScoringDouble())
    yield device
    await device.stop()


def short(image: str) -> str:
    return digest(image).removeprefix("sha256:")[:8]


async def deploy_good(device: Device, **images: str) -> None:
    verdict = device.reconciler.submit("local", 0, manifest(**images), always=True)
    assert verdict.code == 200
    await device.until(lambda: device.phase() == "good")


async def test_a_deployment_is_pulled_loaded_probed_routed_and_becomes_good(
    device: Device,
) -> None:
    await deploy_good(device, digits="r/digits:v1", words="r/words:w1")
    assert device.scoring.serving() == {
        "digits": short("r/digits:v1"),
        "words": short("r/words:w1"),
    }
    outcomes = [(step, outcome) for _, _, step, outcome, _ in device.store.journal_tail()]
    assert ("pull r/digits:v1 for digits", "done") in outcomes


async def test_a_retryable_failure_is_tried_again_until_it_works(device: Device) -> None:
    down = [StepFailed("registry is down", retryable=True) for _ in range(3)]
    device.images.errors["r/digits:v1"] = down
    await deploy_good(device, digits="r/digits:v1")
    assert device.images.pulls == ["r/digits:v1"] * 4


async def test_a_broken_model_fails_the_deployment_and_the_old_one_goes_on(
    device: Device,
) -> None:
    await deploy_good(device, digits="r/digits:v1")
    device.scoring.broken.add(digest("r/digits:v2"))
    device.reconciler.submit("iothub", 2, manifest(digits="r/digits:v2"))
    served = []

    def failed() -> bool:
        served.append(device.scoring.serving())
        return device.phase() == "failed"

    await device.until(failed)
    await device.until(lambda: device.snapshot.plan is not None and device.snapshot.plan.settled)
    assert all(routes == {"digits": short("r/digits:v1")} for routes in served)
    assert device.scoring.serving() == {"digits": short("r/digits:v1")}
    latest, good = device.store.latest(), device.store.last_good()
    (seen,) = [s for s in device.store.seen() if s.source == "iothub"]
    version, code, description = desired_status("iothub", seen, latest, good)
    assert (version, code) == (2, 500)
    assert "is not a model" in description
    assert "rolled back to deployment 1" in description
    _, _, description = desired_status("iothub", seen, latest, good, back=False)
    assert "rolling back to deployment 1" in description


async def test_a_model_that_kills_the_scoring_process_is_given_up(device: Device) -> None:
    await deploy_good(device, digits="r/digits:v1")
    device.scoring.deadly.add(digest("r/digits:v2"))
    device.reconciler.submit("iothub", 2, manifest(digits="r/digits:v2"))
    await device.until(lambda: device.phase() == "failed")
    latest = device.store.latest()
    assert latest is not None
    assert "died 3 times" in latest.description
    await device.until(lambda: device.scoring.serving() == {"digits": short("r/digits:v1")})


async def test_after_a_restart_of_the_scoring_process_everything_is_loaded_again(
    device: Device,
) -> None:
    await deploy_good(device, digits="r/digits:v1")
    device.scoring.crash()
    await device.until(lambda: device.scoring.serving() == {"digits": short("r/digits:v1")})
    assert device.phase() == "good"
    assert device.images.pulls == ["r/digits:v1"]


async def test_a_restarted_agent_finds_its_deployment_without_any_source(
    device: Device, tmp_path: Path
) -> None:
    await deploy_good(device, digits="r/digits:v1")
    await device.stop()
    again = Device(tmp_path, device.images, ScoringDouble())
    try:
        await again.until(lambda: again.scoring.serving() == {"digits": short("r/digits:v1")})
        assert again.phase() == "good"
        assert again.images.pulls == ["r/digits:v1"]
    finally:
        await again.stop()


async def test_a_newer_deployment_stops_the_pull_of_an_older_one(device: Device) -> None:
    device.images.held["r/digits:v1"] = asyncio.Event()
    device.reconciler.submit("iothub", 1, manifest(digits="r/digits:v1"))
    await device.until(lambda: bool(device.snapshot.progress))
    await deploy_good(device, digits="r/digits:v2")
    assert device.images.cancelled == ["r/digits:v1"]


async def test_a_slow_pull_does_not_hold_another_module_back(device: Device) -> None:
    device.images.held["r/big:b"] = asyncio.Event()
    device.reconciler.submit("iothub", 1, manifest(big="r/big:b", small="r/small:s"))
    await device.until(lambda: device.scoring.serving() == {"small": short("r/small:s")})
    assert device.phase() == "applying"
    device.images.held["r/big:b"].set()
    await device.until(lambda: device.phase() == "good")


async def test_a_module_that_must_not_be_pulled_is_refused_when_its_image_is_missing(
    device: Device,
) -> None:
    body = json.loads(manifest(digits="r/digits:v1"))
    body["modules"]["digits"]["imagePullPolicy"] = "never"
    device.reconciler.submit("local", 0, json.dumps(body).encode())
    await device.until(lambda: device.phase() == "failed")
    assert device.images.pulls == []
    latest = device.store.latest()
    assert latest is not None
    assert "imagePullPolicy is never" in latest.description
    device.images.images.add(digest("r/digits:v1"))
    device.reconciler.submit("local", 0, json.dumps(body).encode(), always=True)
    await device.until(lambda: device.phase() == "good")
    assert device.images.pulls == []


async def test_an_unchanged_module_keeps_its_pin_and_is_not_pulled_again(device: Device) -> None:
    await deploy_good(device, digits="r/digits:v1")
    await deploy_good(device, digits="r/digits:v1", words="r/words:w1")
    assert device.images.pulls == ["r/digits:v1", "r/words:w1"]


async def test_the_same_document_again_changes_nothing_but_its_version(device: Device) -> None:
    body = manifest(digits="r/digits:v1")
    first = device.reconciler.submit("iothub", 1, body)
    again = device.reconciler.submit("iothub", 2, body)
    assert (first.code, again.code) == (200, 200)
    assert [(s.version, s.code) for s in device.store.seen()] == [(2, 200)]
    assert len(device.store.deployments()) == 1


async def test_a_refused_manifest_leaves_the_running_one_alone(device: Device) -> None:
    await deploy_good(device, digits="r/digits:v1")
    verdict = device.reconciler.submit("iothub", 9, b"{")
    assert verdict.code == 400
    assert device.reconciler.submit("iothub", 9, b"{") == verdict
    (seen,) = [s for s in device.store.seen() if s.source == "iothub"]
    assert desired_status("iothub", seen, device.store.latest(), None)[:2] == (9, 400)
    assert device.scoring.serving() == {"digits": short("r/digits:v1")}
    assert device.phase() == "good"


class FullDisk:
    def usage(self, path: Path) -> Disk:
        return Disk(1000, 0)


async def test_on_a_full_disk_only_the_images_of_deployments_worth_keeping_stay(
    tmp_path: Path,
) -> None:
    device = Device(tmp_path, ImagesDouble(), ScoringDouble(), disk=FullDisk())
    try:
        await deploy_good(device, digits="r/digits:v1")
        await deploy_good(device, digits="r/digits:v2")
        await device.until(lambda: device.images.images == {digest("r/digits:v2")})
        device.scoring.broken.add(digest("r/digits:v3"))
        device.reconciler.submit("local", 0, manifest(digits="r/digits:v3"), always=True)
        await device.until(lambda: device.phase() == "failed")
        assert digest("r/digits:v2") in device.images.images
    finally:
        await device.stop()


async def test_an_image_that_is_not_needed_stays_for_a_while(device: Device) -> None:
    await deploy_good(device, digits="r/digits:v1")
    await deploy_good(device, digits="r/digits:v2")
    assert device.images.images == {digest("r/digits:v1"), digest("r/digits:v2")}


async def test_a_scoring_process_that_is_away_delays_but_does_not_fail(device: Device) -> None:
    device.scoring.up = False
    device.reconciler.submit("local", 0, manifest(digits="r/digits:v1"))
    await device.until(lambda: bool(device.images.images))
    assert device.phase() == "applying"
    device.scoring.up = True
    await device.until(lambda: device.phase() == "good")


async def test_a_deadly_first_deployment_is_left_alone_and_its_healthy_module_serves(
    device: Device,
) -> None:
    device.scoring.deadly.add(digest("r/deadly:d"))
    device.reconciler.submit("local", 0, manifest(deadly="r/deadly:d", good="r/good:g"))
    await device.until(lambda: device.phase() == "failed")
    await device.until(lambda: device.scoring.serving() == {"good": short("r/good:g")})
    boots = device.scoring.boot
    passes = []

    def many_passes() -> bool:
        passes.append(device.scoring.boot)
        return len(passes) > 200

    await device.until(many_passes)
    assert device.scoring.boot <= boots + 1
    assert device.scoring.serving() == {"good": short("r/good:g")}


async def test_deaths_of_the_scoring_process_before_any_model_was_loaded_are_not_its_fault(
    device: Device,
) -> None:
    device.images.held["r/digits:v1"] = asyncio.Event()
    device.reconciler.submit("iothub", 1, manifest(digits="r/digits:v1"))
    await device.until(lambda: bool(device.snapshot.progress))
    for _ in range(5):
        device.scoring.crash()
        boot = f"boot-{device.scoring.boot}"
        await device.until(
            lambda boot=boot: (
                device.snapshot.scoring is not None and device.snapshot.scoring.boot_id == boot
            )
        )
    assert device.phase() == "applying"
    device.images.held["r/digits:v1"].set()
    await device.until(lambda: device.phase() == "good")


async def test_a_step_that_is_done_without_effect_does_not_spin(tmp_path: Path) -> None:
    slow = ReconcileSettings(probation_seconds=0.1, retry_base_seconds=60, retry_cap_seconds=60)
    device = Device(tmp_path, ImagesDouble(), ScoringDouble(forgetful=True), slow)
    try:
        device.reconciler.submit("local", 0, manifest(digits="r/digits:v1"))
        passes = []

        def many_passes() -> bool:
            passes.append(device.scoring.probes)
            return len(passes) > 100

        await device.until(many_passes)
        assert device.scoring.probes == 1
    finally:
        await device.stop()


async def test_a_document_that_cannot_be_stored_is_taken_when_there_is_room_again(
    device: Device,
) -> None:
    await deploy_good(device, digits="r/digits:v1")
    (pages,) = device.store._db.execute("PRAGMA page_count").fetchone()
    device.store._db.execute(f"PRAGMA max_page_count={pages}")
    body = manifest(digits="r/digits:v2").replace(b"{", b"{" + b" " * 100_000, 1)
    verdict = device.reconciler.submit("iothub", 2, body)
    assert verdict.code == 500
    assert "free space" in verdict.description
    assert device.scoring.serving() == {"digits": short("r/digits:v1")}
    device.store._db.execute("PRAGMA max_page_count=1000000")
    await device.until(lambda: device.phase() == "good" and len(device.store.deployments()) == 2)
    assert device.scoring.serving() == {"digits": short("r/digits:v2")}


async def test_with_the_registry_away_an_image_that_is_here_is_good_enough(device: Device) -> None:
    await deploy_good(device, digits="r/digits:v1")
    await deploy_good(device, digits="r/digits:v2")
    device.images.unreachable = True
    await deploy_good(device, digits="r/digits:v1")
    assert device.scoring.serving() == {"digits": short("r/digits:v1")}


async def test_a_restart_of_a_model_loads_it_anew_beside_the_one_that_serves(
    device: Device,
) -> None:
    await deploy_good(device, digits="r/digits:v1")
    before = set(device.scoring.states)
    assert device.reconciler.restart("digits").code == 200
    served = []

    def again() -> bool:
        served.append(device.scoring.serving())
        return len(device.scoring.states) == 1 and set(device.scoring.states) != before

    await device.until(again)
    assert all(routes == {"digits": short("r/digits:v1")} for routes in served)


async def test_an_ordinary_image_on_a_device_without_an_engine_is_refused_at_once(
    device: Device,
) -> None:
    await deploy_good(device, digits="r/digits:v1")
    device.images.kinds["r/web:1"] = "container"
    device.reconciler.submit("local", 0, manifest(web="r/web:1"), always=True)
    await device.until(lambda: device.phase() == "failed")
    latest = device.store.latest()
    assert latest is not None
    assert "this device has no container engine" in latest.description
