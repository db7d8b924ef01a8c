"""One chaos run: what the cloud asks for, what goes wrong, and how it must end."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from ..agent.manifest import Manifest, ManifestError, parse_manifest
from ..agent.module_spec import ModuleSpec
from ..agent.outbox import Limits, OutboxError, Telemetry
from ..agent.runtime.container import ContainerRuntime
from .chaos_device import MemoryImages, MemoryScoring, image_digest
from .chaos_faults import FAULTS, HOUR, Fault, kill, restart
from .chaos_ledger import Ledger
from .chaos_life import DEVICE, Life, register_tasks
from .chaos_link import MemoryHubLink, Weather
from .chaos_manifest import manifest
from .iothub.devices import ClientId
from .iothub.hub import Hub
from .iothub.state import HubState
from .virtual_time import VirtualClock

CLIENT = ClientId(DEVICE, "$edgeAgent")
FAULT_HOURS, DESIRE_HOURS, TELEMETRY_SECONDS = 6.0, 6.0, 900.0
"""Mean times between events at pace 1."""

SETTLE_HOURS = 6.0
MODULES = ("digits", "words", "faces", "sounds")
DISK_LIMIT_BYTES = 48 * 1024 * 1024


class ChaosFailed(AssertionError):
    """The run ended in a state it must not end in; the message says which and names the seed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run. `trace` identifies everything that happened, `counts` what was done and suffered."""

    seed: int
    hours: float
    trace: str
    counts: dict[str, int]
    code: int
    peak_disk_bytes: int


class Scenario:
    """The world of one run: a device that hosts models. For other worlds, names and faults of a
    class of its own."""

    names: tuple[str, ...] = MODULES
    faults: tuple[Fault, ...] = FAULTS
    alone: tuple[Fault, ...] = (restart, kill)
    last_desires: tuple[str, ...] = ("good", "good", "broken", "deadly", "invalid", "changed")
    boot = ""

    def __init__(
        self, seed: int, hours: float, folder: Path, clock: VirtualClock, pace: float = 1.0
    ) -> None:
        """`pace` multiplies how often everything happens."""
        self.seed = seed
        self.hours = hours
        self.pace = pace
        self.folder = folder
        self.clock = clock
        self.random = Random(seed)
        self.weather = Weather()
        self.counts: dict[str, int] = {}
        self._trace = hashlib.sha256()
        self.disk_full = False
        self._peak = 0
        self._life: Life | None = None
        self._link: MemoryHubLink | None = None
        self.ledger = Ledger(self.note)
        self.hub = Hub("chaos.azure-devices.net", HubState(), clock)
        self.hub.put_identity(ClientId(DEVICE), {"capabilities": {"iotEdge": True}})
        self.images = MemoryImages(self._fork(), self.note, self.kept)
        self.scoring = MemoryScoring(self._fork(), self.note, self._lasting)
        self._versions = 0

    def note(self, event: str) -> None:
        """Everything that happens goes into the trace."""
        self._trace.update(f"{self.clock.monotonic():.3f} {event}\n".encode())
        kind = " ".join(event.split(" ", 2)[:2]) if event.startswith("fault") else event.split()[0]
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def _fork(self) -> Random:
        return Random(self.random.getrandbits(64))

    # -- what must hold at any time ------------------------------------------------------------

    def _deployments(self) -> list[Any]:
        store = self.life.store
        return [d for d in (store.latest(), store.last_good()) if d is not None]

    def kept(self) -> frozenset[str]:
        return frozenset(
            digest
            for deployment in self._deployments()
            for digest in self.life.store.pins(deployment.generation).values()
        )

    def _lasting(self) -> frozenset[str]:
        wanted = [
            frozenset(module.name for module in parse_manifest(deployment.body).modules)
            for deployment in self._deployments()
        ]
        return frozenset.intersection(*wanted) if wanted else frozenset()

    # -- the agent -----------------------------------------------------------------------------

    @property
    def life(self) -> Life:
        if self._life is None:
            raise RuntimeError("no agent runs")
        return self._life

    def start_agent(self) -> None:
        self._link = MemoryHubLink(self.hub, CLIENT, self.weather, self._fork(), self.ledger.take)
        self._life = Life(
            self.folder,
            self.clock,
            self._link,
            self.images,
            self.scoring,
            self._fork(),
            Limits(32 * 1024 * 1024, None),
            self._outbox_fault,
            self.runtime(),
            self.boot,
        )
        self._life.start()
        self._life.spawn(self._produce(self._life, self._fork()))
        self.note("started agent")

    def runtime(self) -> ContainerRuntime | None:
        """The container engine, where there is one."""
        return None

    def _outbox_fault(self, point: str) -> None:
        if self.disk_full and point == "inserted":
            raise sqlite3.OperationalError("database or disk is full")

    async def _produce(self, life: Life, random: Random) -> None:
        """A module on the device that always has something to tell."""
        number = 0
        while True:
            await asyncio.sleep(random.expovariate(self.pace / TELEMETRY_SECONDS))
            for _ in range(random.choice((1, 1, 1, 5))):
                number += 1
                priority = random.choice((0, 3, 5, 5, 9))
                body = json.dumps({"n": number, "x": "x" * random.randint(0, 400)}).encode()
                message = Telemetry(body, properties={"priority": str(priority)}, priority=priority)
                try:
                    message_id = await life.outbox.put(message)
                except OutboxError:
                    self.note("refused telemetry")
                else:
                    self.ledger.promised[message_id] = priority

    # -- the cloud -----------------------------------------------------------------------------

    def desire(self, kind: str) -> None:
        """Desire something new. `kind`: good, broken, deadly, invalid, changed or again."""
        random = self.random
        desired = self.hub.twin(CLIENT).desired.value
        self.note(f"desired {kind}")
        if kind == "again":
            change: dict[str, Any] = {"tags": {"touched": random.random()}}
        elif kind == "invalid":
            change = {"properties": {"desired": {"schemaVersion": random.choice(("9.9", 7))}}}
        elif kind == "changed" and desired.get("modules"):
            name = random.choice(sorted(desired["modules"]))
            module = {"settings": {"image": self.image(name, "good")}}
            # Whatever was wrong with the schema is put right with it.
            patch = {"schemaVersion": "1.1", "modules": {name: module}}
            change = {"properties": {"desired": patch}}
        else:
            names = random.sample(self.names, random.randint(1, len(self.names)))
            special = random.choice(names)
            kinds = {name: kind if name == special else "good" for name in sorted(names)}
            whole = self.manifest(kinds)
            self.hub.update_twin(CLIENT, {"properties": {"desired": whole}}, whole=True)
            return
        self.hub.update_twin(CLIENT, change)

    def manifest(self, kinds: dict[str, str]) -> dict[str, Any]:
        """New desired properties, with what each module shall be like."""
        return manifest({name: self.image(name, kind) for name, kind in kinds.items()})

    def image(self, name: str, kind: str) -> str:
        """The name of a new image."""
        self._versions += 1
        image = f"registry.example/{name}:{self._versions}"
        if kind == "broken":
            self.scoring.broken.add(image_digest(image))
        elif kind == "deadly":
            self.scoring.deadly.add(image_digest(image))
        return image

    async def _operate(self) -> None:
        kinds = (
            ("good",) * 8 + ("changed",) * 8 + ("broken", "broken", "deadly", "invalid", "again")
        )
        while True:
            self.desire(self.random.choice(kinds))
            await asyncio.sleep(self.random.expovariate(self.pace / (DESIRE_HOURS * HOUR)))

    # -- the faults ----------------------------------------------------------------------------

    async def _storm(self) -> None:
        """One fault after the other, a few at a time, for ever."""
        pending: set[asyncio.Task[None]] = set()
        try:
            while True:
                self.life.check()
                self._peak = max(self._peak, self.disk_bytes())
                if self.violations():
                    return
                fault = self.random.choice(self.faults)
                self.note(f"fault {fault.__name__.strip('_')}")
                task = asyncio.ensure_future(fault(self))
                pending.add(task)
                task.add_done_callback(pending.discard)
                # Restarts are one at a time; they are short.
                if fault in self.alone:
                    await _to_its_end(task)
                await asyncio.sleep(self.random.expovariate(self.pace / (FAULT_HOURS * HOUR)))
        finally:
            for task in pending:
                task.cancel()

    def disk_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())

    # -- the run -------------------------------------------------------------------------------

    async def play(self) -> Outcome:
        """Raises ChaosFailed."""
        register_tasks(asyncio.get_running_loop())
        self.start_agent()
        jobs = [asyncio.ensure_future(self._operate()), asyncio.ensure_future(self._storm())]
        await asyncio.wait(jobs, timeout=self.hours * HOUR, return_when=asyncio.FIRST_COMPLETED)
        for job in jobs:
            if job.done() and not job.cancelled():
                job.result()
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        self.calm()
        last = self.random.choice(self.last_desires)
        if last in ("changed", "invalid"):
            self.desire("good")
        self.desire(last)
        code = await self._settle()
        counts = {
            **self.counts,
            "telemetry": len(self.ledger.received),
            "duplicates": self.ledger.duplicates,
            "deployments": self.life.store.latest().generation,  # type: ignore[union-attr]
        }
        await self.life.stop()
        trace = self._trace.hexdigest()[:16]
        return Outcome(self.seed, self.hours, trace, counts, code, self._peak)

    def calm(self) -> None:
        """All faults cease."""
        self.note("calm")
        self.weather.clear()
        self.scoring.up = self.images.registry_up = True
        self.scoring.errors = self.images.errors = 0.0
        self.disk_full = False

    async def _settle(self) -> int:
        """Until nothing is wrong any more; returns the code that is reported then."""
        problems = [""]
        end = self.clock.monotonic() + SETTLE_HOURS * HOUR
        pause = 10.0
        while self.clock.monotonic() < end:
            await asyncio.sleep(pause)
            pause = min(pause * 1.2, 600.0)
            self.life.check()
            problems = self.problems()
            if not problems:
                return int(self.hub.twin(CLIENT).reported.value["lastDesiredStatus"]["code"])
        raise ChaosFailed(f"seed {self.seed}, {self.hours:g} h: " + "; ".join(problems))

    def violations(self) -> list[str]:
        """What must never happen, and did."""
        return [*self.scoring.violations, *self.images.violations, *self.ledger.problems]

    def problems(self) -> list[str]:
        """Everything that is not as it must be in the end; empty when all is well."""
        found = self.violations()
        twin = self.hub.twin(CLIENT)
        reported = twin.reported.value
        store = self.life.store
        latest, good = store.latest(), store.last_good()
        if latest is None:
            return [*found, "nothing was ever deployed"]
        if reported.get("lastDesiredVersion") != twin.desired.version:
            found.append(
                f"desired is {twin.desired.version}, reported {reported.get('lastDesiredVersion')}"
            )
            return found
        status = reported["lastDesiredStatus"]
        expected = self._expected_code(twin.desired.value)
        if status["code"] != expected:
            found.append(f"code {status['code']} ({status['description']}) instead of {expected}")
        back = "rolled back to deployment" if good is not None else "no earlier good deployment"
        if expected == 500 and back not in status["description"]:
            found.append(f"the report does not say {back}: {status['description']}")
        goal = good if latest.phase == "failed" and good is not None else latest
        if good is not None and goal.generation == good.generation:
            found += self.unlike(parse_manifest(goal.body), reported["modules"])
        if missing := self.ledger.missing():
            found.append(f"{len(missing)} messages lost, such as {missing[0]}")
        accepted = {("deployment.accepted", n + 1) for n in range(latest.generation)}
        if unsaid := accepted - self.ledger.events:
            found.append(f"{len(unsaid)} deployments were never announced")
        outbox = self.life.outbox.status()
        if outbox.messages or outbox.error or outbox.dropped:
            found.append(f"the outbox holds {outbox.messages}, {outbox.dropped} {outbox.error}")
        if self._peak > DISK_LIMIT_BYTES:
            found.append(f"{self._peak} bytes on disk at the worst time")
        return found

    def unlike(self, wanted: Manifest, modules: dict[str, Any]) -> list[str]:
        """What is not as the good deployment `wanted` asks; `modules` are the reported ones."""
        found = []
        models = {m.name: image_digest(m.image) for m in wanted.modules if self.hosted(m.name)}
        if self.scoring.serving() != models:
            found.append(f"serving {self.scoring.serving()} instead of {models}")
        if not set(models.values()) <= self.images.stored_digests <= self.kept():
            found.append(f"{len(self.images.stored_digests)} images in the store")
        states = {name: module["runtimeStatus"] for name, module in modules.items()}
        asked = {module.name: module.status for module in wanted.modules}
        if states != asked:
            found.append(f"reported modules {states}, wanted {asked}")
        return found

    def hosted(self, name: str) -> bool:
        """Whether the module is a model."""
        return name in MODULES

    def _expected_code(self, desired: dict[str, Any]) -> int:
        try:
            parsed = parse_manifest(json.dumps(desired).encode())
        except ManifestError as error:
            return error.code
        return 500 if any(self.bad(module) for module in parsed.modules) else 200

    def bad(self, module: ModuleSpec) -> bool:
        """Whether no deployment with it can be good."""
        return image_digest(module.image) in self.scoring.broken | self.scoring.deadly


async def _to_its_end(task: asyncio.Task[None]) -> None:
    """Also when the storm is over in the midst of it: an agent has to run afterwards."""
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise
