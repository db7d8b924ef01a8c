"""What the device of a chaos run promised to deliver, and what the hub got."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field

from .iothub.telemetry import Message


@dataclass
class Ledger:
    """What the device promised to deliver, and what the hub got."""

    note: Callable[[str], None]
    promised: dict[str, int] = field(default_factory=dict)
    """Message id -> priority."""
    received: dict[str, bytes] = field(default_factory=dict)
    newest: dict[int, int] = field(default_factory=dict)
    events: set[tuple[str, int]] = field(default_factory=set)
    duplicates: int = 0
    problems: list[str] = field(default_factory=list)

    def take(self, message: Message) -> None:
        message_id = message.system["message-id"]
        digest = hashlib.sha256(message.body).digest()
        self.note(f"hub got {message_id}")
        if message_id in self.received:
            self.duplicates += 1
            if self.received[message_id] != digest:
                self.problems.append(f"{message_id} came twice with different bodies")
            return
        self.received[message_id] = digest
        body = json.loads(message.body)
        if "deployment" in body:
            self.events.add((body["event"], body["deployment"]["generation"]))
        priority = int(message.properties.get("priority", -1))
        sequence = int(message_id.rpartition("-")[2])
        if sequence < self.newest.get(priority, 0):
            self.problems.append(f"{message_id} overtook {self.newest[priority]} of its priority")
        self.newest[priority] = max(sequence, self.newest.get(priority, 0))

    def missing(self) -> list[str]:
        return [message_id for message_id in self.promised if message_id not in self.received]
