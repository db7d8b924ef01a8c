"""Messages from the cloud to devices, and to the inputs of modules: queued, delivered, settled.

A message stays in its queue until the client acknowledges it (MQTT: PUBACK), it expires, was
delivered too often or is purged (IoT Hub developer guide, "Send cloud-to-device messages"). A
connection that ends puts what it has not acknowledged back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from ...agent.clock import Clock
from .cloud_messages import SYSTEM, CloudMessage
from .devices import ClientId
from .errors import HubError, invalid
from .faults import Faults
from .links import Link, SettlingLink
from .state import HubState

MESSAGE_LIMIT = 64 * 1024
QUEUE_LIMIT = 50
MAX_DELIVERIES = 10
RECORDS = 10_000
DEFAULT_SECONDS = 3600.0
LONGEST_SECONDS = 2 * 86_400.0
_ACKS = ("none", "positive", "negative", "full")


class Owner(Protocol):
    """The hub, as far as its queues go."""

    state: HubState
    clock: Clock
    faults: Faults

    def link(self, client: ClientId) -> Link | None: ...

    def now(self) -> str: ...

    def state_changed(self) -> None: ...


class CloudQueues:
    """The queues of one hub's clients; `hub.state.messages` holds them."""

    def __init__(
        self, hub: Owner, max_deliveries: int = MAX_DELIVERIES, records: int = RECORDS
    ) -> None:
        """`records`: how many outcomes, and dead letters, are kept for those who ask."""
        self._hub = hub
        self.max_deliveries = max_deliveries
        self._in_flight: set[str] = set()
        self._outcomes = 0
        self._feedback: deque[dict[str, Any]] = deque(maxlen=records)
        self.dead_letters: deque[CloudMessage] = deque(maxlen=records)

    def send(
        self,
        target: ClientId,
        body: bytes,
        *,
        properties: Mapping[str, str] | None = None,
        system: Mapping[str, str] | None = None,
        ack: str = "none",
        seconds: float = DEFAULT_SECONDS,
        input: str = "",
    ) -> CloudMessage:
        """Queues a message and delivers it if the client listens; it lives for `seconds`.

        Raises HubError 400, 403 (queue full), 404 or 413.
        """
        hub = self._hub
        hub.state.registry.get(target)
        if ack not in _ACKS:
            raise invalid(f"ack is one of {', '.join(_ACKS)}, not {ack!r}")
        if unknown := set(system or {}) - set(SYSTEM):
            raise invalid(f"unknown system properties: {', '.join(sorted(unknown))}")
        if not 0 < seconds <= LONGEST_SECONDS:
            raise invalid(f"a message lives up to {LONGEST_SECONDS:g} s, not {seconds:g}")
        if input and not target.module:
            raise invalid(f"{target} is a device: only modules have inputs")
        message = CloudMessage(
            target,
            body,
            dict(properties or {}),
            dict(system or {}),
            hub.clock.now().timestamp() + seconds,
            hub.now(),
            ack,
            input,
        )
        size = len(body) + len(message.topic)
        if size > MESSAGE_LIMIT:
            raise HubError(413, "MessageTooLarge", f"a message has up to {MESSAGE_LIMIT} bytes")
        if self.count(target) >= QUEUE_LIMIT:
            raise HubError(
                403,
                "DeviceMaximumQueueDepthExceeded",
                f"{QUEUE_LIMIT} messages already wait for {target}",
            )
        hub.state.messages.setdefault(target, []).append(message)
        hub.state_changed()
        self.pump(target)
        return message

    def count(self, target: ClientId) -> int:
        """Messages of a client that are not settled."""
        self._expire(target)
        return len(self._hub.state.messages.get(target, ()))

    def queued(self, target: ClientId) -> list[CloudMessage]:
        self._expire(target)
        return list(self._hub.state.messages.get(target, ()))

    def pump(self, target: ClientId) -> None:
        """Delivers what waits, if the client is connected and subscribed."""
        link = self._hub.link(target)
        if link is None or not isinstance(link, SettlingLink):
            return
        for message in self.queued(target):
            if message.id in self._in_flight or not link.subscribed(message.topic):
                continue
            if message not in self._hub.state.messages.get(target, ()):
                continue  # settled, or sent again, by one of those before it
            if message.deliveries >= self.max_deliveries:
                self._end(message, "DeliveryCountExceeded")
                continue
            again = replace(message, deliveries=message.deliveries + 1)
            self._replace(message, again)
            self._in_flight.add(message.id)
            link.deliver_settled(message.topic, message.body, self._settlement(again))

    def purge(self, target: ClientId) -> int:
        """Empties a queue; returns how many messages went."""
        waiting = self.queued(target)
        for message in waiting:
            self._end(message, "Purged")
        return len(waiting)

    def forget(self, target: ClientId) -> None:
        """The client was deleted."""
        self._hub.state.messages.pop(target, None)

    def feedback(self, after: int = 0) -> list[dict[str, Any]]:
        """Records of settled messages that asked for them, `sequenceNumber` above `after`."""
        for target in list(self._hub.state.messages):
            self._expire(target)
        return [record for record in self._feedback if record["sequenceNumber"] > after]

    def _settlement(self, message: CloudMessage) -> Any:
        def done(code: int | None) -> None:
            self._in_flight.discard(message.id)
            waiting = self._hub.state.messages.get(message.target, [])
            if message not in waiting:
                return  # purged, expired or deleted meanwhile
            if code is None:
                return  # back in the queue, for the next connection
            if self._hub.faults.take("lose_c2d_acks"):
                self.pump(message.target)
                return
            self._end(message, "Success")

        return done

    def _end(self, message: CloudMessage, outcome: str) -> None:
        waiting = self._hub.state.messages.get(message.target, [])
        if message in waiting:
            waiting.remove(message)
        if not waiting:
            self._hub.state.messages.pop(message.target, None)
        self._in_flight.discard(message.id)
        wanted = ("positive", "full") if outcome == "Success" else ("negative", "full")
        if outcome != "Success":
            self.dead_letters.append(message)
        if message.ack in wanted:
            self._outcomes += 1
            self._feedback.append(
                {
                    "sequenceNumber": self._outcomes,
                    "originalMessageId": message.system.get("messageId", message.id),
                    "deviceId": message.target.device,
                    "moduleId": message.target.module or None,
                    "statusCode": outcome,
                    "deliveryCount": message.deliveries,
                    "enqueuedTimeUtc": self._hub.now(),
                }
            )
        self._hub.state_changed()

    def _expire(self, target: ClientId) -> None:
        now = self._hub.clock.now().timestamp()
        for message in list(self._hub.state.messages.get(target, ())):
            if message.expires <= now and message.id not in self._in_flight:
                self._end(message, "Expired")

    def _replace(self, old: CloudMessage, new: CloudMessage) -> None:
        waiting = self._hub.state.messages[old.target]
        waiting[waiting.index(old)] = new
        self._hub.state_changed()
