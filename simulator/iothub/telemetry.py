"""Device-to-cloud messages: their properties decoded, the latest of them kept for queries."""

from __future__ import annotations

import base64
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from .devices import ClientId
from .errors import HubError
from .json_text import parse_json

# System properties of the topic's bag, under the names that routes and queries use.
_SYSTEM_NAMES = {
    "$.mid": "message-id",
    "$.cid": "correlation-id",
    "$.uid": "user-id",
    "$.ct": "content-type",
    "$.ce": "content-encoding",
    "$.on": "output-name",
    "$.ifid": "interface-id",
    "$.exp": "absolute-expiry-time",
}


@dataclass(frozen=True, slots=True)
class Message:
    """`sequence` counts from 1 over the whole hub; `enqueued` is ISO 8601 UTC."""

    sequence: int
    client: ClientId
    body: bytes
    properties: Mapping[str, str]
    system: Mapping[str, str]
    enqueued: str

    def as_json(self) -> dict[str, Any]:
        """`body` is the JSON value where the bytes are JSON, else the text, else null; the bytes
        themselves are always in `bodyBase64`.
        """
        try:
            body = parse_json(self.body)
        except HubError:
            try:
                body = self.body.decode()
            except UnicodeDecodeError:
                body = None
        return {
            "sequenceNumber": self.sequence,
            "deviceId": self.client.device,
            "moduleId": self.client.module or None,
            "enqueuedTimeUtc": self.enqueued,
            "properties": dict(self.properties),
            "systemProperties": dict(self.system),
            "body": body,
            "bodyBase64": base64.b64encode(self.body).decode(),
        }


def decode_properties(bag: str) -> tuple[dict[str, str], dict[str, str]]:
    """Application and system properties of a property bag, the last part of a topic.

    Names and values are percent-encoded; a plus sign is itself. No `=` means the value "".
    """
    properties: dict[str, str] = {}
    system: dict[str, str] = {}
    for pair in bag.lstrip("?").rstrip("/").split("&"):
        encoded_name, _, value = pair.partition("=")
        name = unquote(encoded_name)
        if name in _SYSTEM_NAMES:
            system[_SYSTEM_NAMES[name]] = unquote(value)
        elif name:
            properties[name] = unquote(value)
    return properties, system


class TelemetryStore:
    """The newest messages of a hub, up to `capacity` of them and bodies of `capacity_bytes`."""

    def __init__(self, capacity: int = 10_000, capacity_bytes: int = 64 * 1024 * 1024) -> None:
        self._messages: deque[Message] = deque()
        self._capacity = capacity
        self._capacity_bytes = capacity_bytes
        self._bytes = 0
        self._last = 0

    def add(
        self,
        client: ClientId,
        body: bytes,
        bag: str,
        enqueued: str,
        added: Mapping[str, str] | None = None,
    ) -> Message:
        """`added` are application properties that the hub itself sets."""
        properties, system = decode_properties(bag)
        properties.update(added or {})
        self._last += 1
        message = Message(self._last, client, body, properties, system, enqueued)
        self._messages.append(message)
        self._bytes += len(body)
        while len(self._messages) > self._capacity or (
            self._bytes > self._capacity_bytes and len(self._messages) > 1
        ):
            self._bytes -= len(self._messages.popleft().body)
        return message

    def query(
        self,
        device: str | None = None,
        module: str | None = None,
        after: int = 0,
        limit: int | None = None,
    ) -> list[Message]:
        """Oldest first; `after` is the sequence number seen last."""
        found = [
            message
            for message in self._messages
            if message.sequence > after
            and device in (None, message.client.device)
            and module in (None, message.client.module)
        ]
        return found[:limit]
