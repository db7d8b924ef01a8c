"""The agent process: puts the control loop, the transports and the control service together."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import platform
import signal
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Protocol

from ..accelerators.notify import Notifier
from .clock import Clock, SystemClock
from .conditions import Start, conditions, note_starts
from .config import AgentConfig, ConfigError
from .configured import open_outbox, outbox_limits, reconcile_settings, retention_rules
from .container_modules import DeviceContainers, boot_id, open_engine
from .control_server import ControlServer
from .engine import Engine
from .file_lock import locked
from .hub_names import KnownHub
from .image_housekeeping import HostDisk, ImageHousekeeping
from .image_trust import ImageTrust
from .images import RegistryImages
from .links import transports, upstream
from .manifest import Manifest
from .manifest_fetch import HttpFetch
from .manifest_source import ManifestSource
from .methods.operations import Operations
from .outbox import Outbox
from .outbox_sender import OutboxSender
from .plan_types import Kind
from .publish import Publisher
from .reconcile import Reconciler, ReconcileSettings, Snapshot, Verdict
from .reported import (
    AgentVersion,
    DesiredStatus,
    Platform,
    build_reported,
    shutdown_report,
)
from .roles import board_of
from .runtime.container import ContainerRuntime
from .scoring_link import ScoringLink
from .status import (
    deployment_document,
    desired_status,
    fabric_state,
    module_state,
    outcome,
    status_document,
    stuck,
    system_module,
    telemetry_document,
)
from .steps import Executor, Images, Progress, ScoringControl, StepFailed
from .store import StateStore, StoreError
from .telemetry import LifecycleEvents, Upstream
from .trust import load_trust
from .twin.transport import TwinTransport
from .unsupported import shortened, unsupported
from .version import VERSION

log = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0
LOCAL = "local"
ENGINE_SEEN = "engine-seen"
PROGRESS_SECONDS = 10.0


async def run_agent(config: AgentConfig) -> int:
    """Serve until SIGTERM or SIGINT. Raises ConfigError."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with _only_one(config.device.state_dir):
        try:
            store = StateStore(config.device.state_dir / "state.db", SystemClock())
        except StoreError as error:
            raise ConfigError(str(error)) from error
        hub = KnownHub(store)
        links = transports(config, hub)
        outbox = open_outbox(config, SystemClock()) if links else None
        try:
            agent = Agent(config, store, SystemClock(), links, outbox, hub=hub)
            notifier = Notifier.from_environment()
            signs = asyncio.ensure_future(notifier.beat())
            try:
                await agent.run(stop, notifier.ready)
            finally:
                signs.cancel()
        finally:
            if outbox is not None:
                await outbox.close()
            store.close()
    return 0


class Scoring(ScoringControl, Protocol):
    async def close(self) -> None: ...


class Control(Protocol):
    """What serves the command line: see ControlServer."""

    async def start(self) -> None: ...

    async def changed(self) -> None: ...

    async def stop(self) -> None: ...


class Agent:
    """One device's control plane."""

    def __init__(
        self,
        config: AgentConfig,
        store: StateStore,
        clock: Clock,
        links: tuple[TwinTransport, ...],
        outbox: Outbox | None = None,
        *,
        images: Images | None = None,
        scoring: Scoring | None = None,
        control: Callable[..., Control] = ControlServer,
        settings: ReconcileSettings | None = None,
        jitter: Random | None = None,
        runtime: ContainerRuntime | None = None,
        hub: KnownHub | None = None,
        boot: str | None = None,
    ) -> None:
        """`outbox` is None where there is no link. The rest is for simulations.

        Raises ConfigError when telemetry is to go over a link that there is not.
        """
        self._config = config
        self._store = store
        self._clock = clock
        self._board = board_of(config)
        self._hub = hub or KnownHub(store)
        self._hub.on_change = self._look_again
        trust = load_trust(config.trust)
        self._images = images or RegistryImages(
            config.device.state_dir / "images",
            config.registry,
            None if self._board is None else self._board.name,
            None if self._board is None else self._board.part,
            ImageTrust(trust, store) if trust.images else None,
        )
        self._scoring = scoring or ScoringLink(config.scoring_socket)
        self._engine = open_engine(
            config,
            clock,
            self._look_again,
            runtime=runtime,
            seen_before=store.fact(ENGINE_SEEN) != "",
            store=store,
            jitter=jitter,
        )
        self._engine_noted = store.fact(ENGINE_SEEN) != ""
        housekeeping = ImageHousekeeping(
            store, clock, retention_rules(config), HostDisk(), config.device.state_dir / "images"
        )
        self._reconciler = Reconciler(
            store,
            Executor(
                self._images,
                self._scoring,
                store.pin,
                self._engine,
                housekeeping.bringing,
                self._images.verify_image if isinstance(self._images, RegistryImages) else None,
            ),
            clock,
            settings or reconcile_settings(config),
            self._publish,
            jitter,
            maker=DeviceContainers(config, lambda: self._hub.names),
            housekeeping=housekeeping,
            boot_id=boot_id() if boot is None else boot,
        )
        http_hosts = config.deployment.manifest_http_hosts
        self._source = ManifestSource(
            store,
            self._reconciler,
            clock,
            trust=trust,
            fetch=HttpFetch(config.deployment.manifest_ca_file, http_hosts),
            http_hosts=http_hosts,
            retry_seconds=(
                config.deployment.retry_base_seconds,
                config.deployment.retry_cap_seconds,
            ),
            jitter=jitter,
        )
        self._operations = Operations(
            config, clock, self._source, self._kinds, self._status, self._engine.runtime
        )
        self._publisher = Publisher(
            links, self._source.submit, self._operations.methods(), self._link_changed, jitter
        )
        self._outbox = outbox
        self._upstream = upstream(config, links)
        self._sender: OutboxSender | None = None
        self._events: LifecycleEvents | None = None
        self._telemetry: Upstream | None = None
        self._unsupported: tuple[Manifest | None, list[str]] = (None, [])
        if outbox is not None and self._upstream is not None:
            self._sender = OutboxSender(outbox, self._upstream, self._upstream_connected, jitter)
            self._telemetry = Upstream(outbox, config.device_id, outbox_limits(config))
            self._events = LifecycleEvents(self._telemetry, store, config.device_id, clock)
        self._control: Control = control(
            config.agent_socket, self._apply, self._status, self._operations
        )
        self._snapshot = Snapshot()
        self._told_progress: tuple[tuple[str, Progress], ...] = ()
        self._told_at = 0.0
        self._starts: dict[str, Start] = {}
        self._notices: set[asyncio.Task[None]] = set()
        self._began = clock.now()

    async def run(self, stop: asyncio.Event, ready: Callable[[], None] = lambda: None) -> None:
        """Run until `stop` is set or a part of the agent fails, whose error is raised.

        `ready` is called once commands are answered.
        """
        await self._control.start()
        ready()
        log.info("agent ready on %s", self._config.agent_socket)
        work = [
            stop.wait(),
            self._reconciler.run(),
            self._publisher.run(),
            self._source.run(),
        ]
        if self._sender is not None and self._events is not None:
            self._events.started("agent", uuid.uuid4().hex, os.getpid())
            work.append(self._sender.run())
        if isinstance(self._engine, Engine):
            work.append(self._engine.run())
        if isinstance(self._scoring, ScoringLink):
            work.append(self._scoring.watch(self._look_again))
        jobs = [asyncio.ensure_future(job) for job in work]
        try:
            done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
            for job in done:
                job.result()
        finally:
            self._say_goodbye()
            await self._publisher.flush(FLUSH_SECONDS)
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            await self._operations.close()
            await self._control.stop()
            await self._scoring.close()
            if isinstance(self._engine, Engine):
                await self._engine.close()

    def _look_again(self) -> None:
        self._reconciler.wake()

    def _link_changed(self) -> None:
        self._reconciler.wake()
        self._source.retry_now()
        if self._sender is not None:
            self._sender.link_changed()

    def _upstream_connected(self) -> bool:
        upstream = self._upstream
        return upstream is not None and any(
            link.connected for link in self._publisher.links() if link.source == upstream.name
        )

    def _apply(self, manifest: bytes) -> Verdict:
        return self._source.submit(LOCAL, 0, manifest, always=True)

    def _kinds(self) -> dict[str, Kind]:
        wanted = self._snapshot.wanted
        return {} if wanted is None else {module.name: module.kind for module in wanted.modules}

    # -- reports -------------------------------------------------------------------------------

    def _publish(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._tell_progress()
        if snapshot.observed is not None and snapshot.observed.engine == "up":
            self._note_engine()
        self._starts = note_starts(self._starts, snapshot, self._clock.now())
        if self._outbox is not None and self._events is not None:
            if snapshot.manifest is not None and self._telemetry is not None:
                self._telemetry.configure(snapshot.manifest.edge_hub)
            self._events.note(snapshot)
        for source in self._publisher.sources():
            self._publisher.publish(source, self._report(source))
        notice = asyncio.ensure_future(self._control.changed())
        self._notices.add(notice)
        notice.add_done_callback(self._notices.discard)

    def _tell_progress(self) -> None:
        """Reports take part in a hub's quota: how far a pull is goes into them now and then."""
        progress = self._snapshot.progress
        now = self._clock.monotonic()
        others = {name for name, _ in progress} != {name for name, _ in self._told_progress}
        if others or now - self._told_at >= PROGRESS_SECONDS:
            self._told_progress, self._told_at = progress, now

    def _note_engine(self) -> None:
        """From now on an engine is missed when it is away."""
        if not self._engine_noted:
            self._engine_noted = True
            self._store.note_fact(ENGINE_SEEN, "yes")

    def _not_done(self) -> list[str]:
        """What of the present manifest has no effect on this device."""
        manifest = self._snapshot.manifest
        if manifest is None:
            return []
        if self._unsupported[0] is not manifest:
            limit = None if self._outbox is None else self._config.telemetry.max_size_bytes
            self._unsupported = manifest, shortened(unsupported(manifest, limit))
        return self._unsupported[1]

    def _say_goodbye(self) -> None:
        for source in self._publisher.sources():
            self._publisher.publish(source, shutdown_report(self._report(source)))

    def _report(self, source: str) -> dict[str, Any]:
        snapshot = replace(self._snapshot, progress=self._told_progress)
        latest, last_good = self._store.latest(), self._store.last_good()
        seen = {entry.source: entry for entry in self._store.seen()}
        manifest = snapshot.manifest
        specs = {} if manifest is None else {spec.name: spec for spec in manifest.modules}
        system = {} if manifest is None else {m.name: m for m in manifest.system_modules}
        details: dict[str, Any] = {
            "device": self._config.device_id,
            "deployment": deployment_document(snapshot, latest, last_good, seen.get(source)),
        }
        if self._outbox is not None:
            telemetry = self._outbox.status()
            if telemetry.dropped or telemetry.error:
                details["telemetry"] = {
                    "dropped": dict(telemetry.dropped),
                    "error": telemetry.error,
                }
        if not_done := self._not_done():
            details["unsupported"] = not_done
        awaited = self._source.awaited
        if awaited is not None:
            details["fetch"] = awaited.report()
        if self._board is not None:
            fabric = fabric_state(snapshot.scoring.fabric if snapshot.scoring else None)
            details["board"] = {"name": self._board.name, "part": self._board.part, **fabric}
        return build_reported(
            version=AgentVersion(VERSION),
            platform=Platform(platform.system().lower(), platform.machine(), platform.release()),
            desired=DesiredStatus(
                *(
                    awaited.desired_status()
                    if awaited is not None and awaited.pending.source == source
                    else desired_status(
                        source,
                        seen.get(source),
                        latest,
                        last_good,
                        snapshot.failures,
                        stuck(snapshot),
                        back=latest is None
                        or outcome(snapshot, latest, last_good) != "rollingBack",
                    )
                )
            ),
            modules=[
                module_state(condition, specs[condition.module])
                for condition in conditions(snapshot, self._starts)
            ],
            edge_agent=system_module(system.get("edgeAgent"), self._began),
            edge_hub=system_module(system.get("edgeHub"), self._began),
            runtime=None if manifest is None else manifest.runtime,
            details=details,
        )

    async def _status(self) -> dict[str, Any]:
        # What the scoring process counts is asked for now: the last pass may be seconds old.
        try:
            scoring = await self._scoring.status()
        except StepFailed:
            scoring = None
        snapshot = replace(self._snapshot, scoring=scoring)
        return status_document(
            self._config.device_id,
            snapshot,
            conditions(snapshot, self._starts),
            self._store.latest(),
            self._store.last_good(),
            self._store.seen(),
            self._publisher.links(),
            _processes(self._config.processes_file),
            None
            if self._outbox is None or self._sender is None or self._upstream is None
            else telemetry_document(
                self._upstream.name, self._sender.sent, self._outbox.status(), self._outbox.limits
            ),
            None if self._source.awaited is None else self._source.awaited.document(),
            self._not_done(),
        )


def _processes(file: Path) -> dict[str, Any]:
    """What `gatelet run` supervises; empty where systemd does."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {"agent": {"pid": os.getpid()}}
    return dict(found)


def _only_one(state_dir: Path) -> AbstractContextManager[None]:
    """Keeps a second agent away from the same state. Raises ConfigError."""
    return locked(
        state_dir / "agent.lock",
        ConfigError(
            f"another agent already runs on {state_dir}; stop it, or give this one its own "
            "state-dir and run-dir"
        ),
    )
