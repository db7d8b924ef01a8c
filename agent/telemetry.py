"""What the agent itself tells as telemetry: the life of deployments and processes.

Events follow from what the store holds, not from the moment something happened: each has a key
under which the outbox takes it once. So a crash between a change and its event, or a full disk,
delays the event and neither loses nor repeats it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .canary import CanaryPhase
from .clock import Clock
from .edge_hub import EdgeHub
from .message_condition import Message
from .message_routes import MessageRoutes, compile_routes
from .outbox import Limits, Outbox, OutboxError, Telemetry
from .snapshot import Snapshot
from .store import StateStore
from .store_types import Deployment

log = logging.getLogger(__name__)

EVENT_PROPERTY = "gatelet-event"
EVENT_PRIORITY = 2
"""Where no route of the manifest sets another."""

AGENT_MODULE, EVENT_OUTPUT = "$edgeAgent", "events"
_REMEMBERED = 512


@dataclass(frozen=True, slots=True)
class Event:
    """`name` such as "deployment.good"; `key` is the same for the same event for ever."""

    key: str
    name: str
    data: Mapping[str, Any]


def deployment_events(
    deployments: Iterable[Deployment], rolled_back_to: Deployment | None = None
) -> list[Event]:
    """All that happened to these deployments so far, oldest first.

    `rolled_back_to` is what runs now instead of the newest one, once it does.
    """
    events: list[Event] = []
    ordered = sorted(deployments, key=lambda deployment: deployment.generation)
    for deployment in ordered:
        about = {
            "generation": deployment.generation,
            "source": deployment.source,
            "version": deployment.version,
        }
        key = f"deployment/{deployment.generation}"
        accepted = {**about, "received": deployment.received}
        events.append(Event(f"{key}/accepted", "deployment.accepted", {"deployment": accepted}))
        if deployment.phase in ("good", "failed"):
            ended = {**about, "description": deployment.description}
            name = f"deployment.{deployment.phase}"
            events.append(Event(f"{key}/{deployment.phase}", name, {"deployment": ended}))
        if rolled_back_to is not None and deployment is ordered[-1]:
            back = {**about, "to": rolled_back_to.generation}
            events.append(Event(f"{key}/rolledBack", "deployment.rolledBack", {"deployment": back}))
    return events


def canary_events(snapshot: Snapshot) -> list[Event]:
    """How the automatic rollouts of the deployment ended that is the goal now.

    A promotion is told once for a module and what it runs: later deployments inherit it.
    """
    wanted = snapshot.wanted
    if wanted is None:
        return []
    instances = {module.name: module.instance for module in wanted.modules}
    events: list[Event] = []
    for module, view in snapshot.canaries.items():
        data = {"module": module, "generation": wanted.generation, **view.document()}
        if view.canary.phase is CanaryPhase.PROMOTED:
            key = f"canary/{instances.get(module)}/promoted"
            events.append(Event(key, "canary.promoted", {"canary": data}))
        elif view.canary.phase is CanaryPhase.ROLLED_BACK:
            key = f"canary/{wanted.generation}/{module}/rolledBack"
            events.append(Event(key, "canary.rolledBack", {"canary": data}))
    return events


def limits_for(device: Limits, hub: EdgeHub | None) -> Limits:
    """The outbox's limits: the manifest's store-and-forward settings within the device's own."""
    if hub is None:
        return device
    size = device.max_bytes if hub.max_size_bytes is None else hub.max_size_bytes
    ttl = None if hub.ttl_seconds is None else float(hub.ttl_seconds)
    return Limits(min(size, device.max_bytes), ttl)


class Upstream:
    """The outbox under the manifest's `$edgeHub` section: limits, priorities and times to live."""

    def __init__(self, outbox: Outbox, device: str, limits: Limits) -> None:
        """`limits` are the device's own."""
        self._outbox = outbox
        self._device = device
        self._limits = limits
        self._routes = MessageRoutes()
        self._hub: EdgeHub | None = None

    def configure(self, hub: EdgeHub | None) -> None:
        """Follow this section from now on; limits count for what is stored already too."""
        self._outbox.set_limits(limits_for(self._limits, hub))
        if hub != self._hub:
            self._hub = hub
            self._routes = compile_routes(hub)

    async def put(self, module: str, output: str, message: Telemetry) -> str:
        """Store `message` from `module`'s `output` as the routes say, and return its id.

        The agent's own messages (module "$edgeAgent") go upstream even where no route takes them;
        of all others those are not stored, and the id is empty. Raises what Outbox.put raises.
        """
        delivery = None
        if self._routes.routes:
            system = {
                "contentType": message.content_type,
                "contentEncoding": "utf-8",
                "connectionDeviceId": self._device,
                "connectionModuleId": module,
            }
            source = f"/messages/modules/{module}/outputs/{output}"
            delivery = self._routes.upstream(
                Message(source, message.body, message.properties, system)
            )
        if delivery is not None:
            message = replace(
                message,
                priority=message.priority if delivery.priority is None else delivery.priority,
                ttl_seconds=message.ttl_seconds
                if delivery.ttl_seconds is None
                else delivery.ttl_seconds,
            )
        elif module != AGENT_MODULE and self._hub is not None:
            return ""
        return await self._outbox.put(message)


class LifecycleEvents:
    """Puts each event into the outbox until it is there."""

    def __init__(self, outbox: Upstream, store: StateStore, device: str, clock: Clock) -> None:
        self._outbox = outbox
        self._store = store
        self._device = device
        self._clock = clock
        self._generation = -1
        self._stored: set[str] = set()
        self._storing: dict[str, asyncio.Task[None]] = {}

    def note(self, snapshot: Snapshot) -> None:
        """Look for news after a pass of the control loop. Returns at once."""
        for event in (*self._events(snapshot), *canary_events(snapshot)):
            if event.key not in self._stored and event.key not in self._storing:
                task = asyncio.ensure_future(self._put(event))
                self._storing[event.key] = task

    def started(self, process: str, key: str, pid: int) -> None:
        """A process of the agent began; `key` tells its starts apart."""
        event = Event(f"{process}/{key}", "process.started", {"process": process, "pid": pid})
        if event.key not in self._stored and event.key not in self._storing:
            self._storing[event.key] = asyncio.ensure_future(self._put(event))

    def _events(self, snapshot: Snapshot) -> list[Event]:
        latest = self._store.latest()
        if latest is None:
            return []
        if snapshot.scoring is not None:
            self.started("scoring", snapshot.scoring.boot_id, snapshot.scoring.pid)
        goal, plan = snapshot.goal, snapshot.plan
        back = goal is not None and goal.rolled_back and plan is not None and plan.settled
        rolled_back_to = goal.wanted if goal is not None and back else None
        if rolled_back_to is not None and latest.phase != "failed":
            rolled_back_to = None  # a newer deployment came after this pass
        # All of them once per start and deployment: some may have come and gone between passes.
        fresh = latest.generation != self._generation
        deployments = self._store.deployments() if fresh else [latest]
        events = deployment_events(deployments, rolled_back_to)
        if all(event.key in self._stored for event in events):
            self._generation = latest.generation
        return events

    async def _put(self, event: Event) -> None:
        body = {
            "event": event.name,
            "device": self._device,
            "time": self._clock.now().isoformat(timespec="seconds"),
            **event.data,
        }
        message = Telemetry(
            json.dumps(body, separators=(",", ":")).encode(),
            properties={EVENT_PROPERTY: event.name},
            priority=EVENT_PRIORITY,
            key=event.key,
        )
        try:
            await self._outbox.put(AGENT_MODULE, EVENT_OUTPUT, message)
        except OutboxError:
            log.debug("%s is not stored yet", event.key)
        else:
            if len(self._stored) >= _REMEMBERED:
                self._stored.clear()  # the outbox knows them too; this only saves asking
            self._stored.add(event.key)
        finally:
            del self._storing[event.key]
