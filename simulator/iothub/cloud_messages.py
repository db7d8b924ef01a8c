"""One message from the cloud to a device or module, and the topic it travels on."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from .devices import ClientId

SYSTEM = {
    "messageId": "$.mid",
    "correlationId": "$.cid",
    "userId": "$.uid",
    "contentType": "$.ct",
    "contentEncoding": "$.ce",
}
"""System properties by their names in REST calls, and what they are called in topics."""


@dataclass(frozen=True, slots=True)
class CloudMessage:
    """`system` by the names of the REST call; `input` names a module's input, "" is the client.

    `expires` is epoch seconds, `enqueued` ISO 8601 UTC; `ack` says which outcomes make feedback.
    """

    target: ClientId
    body: bytes
    properties: Mapping[str, str]
    system: Mapping[str, str]
    expires: float
    enqueued: str
    ack: str = "none"
    input: str = ""
    deliveries: int = 0
    id: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def topic(self) -> str:
        if self.input:
            base = f"{self.target.path}/inputs/{quote(self.input, safe='')}/"
            pairs: dict[str, str] = {}
        else:
            base = f"{self.target.path}/messages/devicebound/"
            pairs = {"$.to": f"/{self.target.path}/messages/devicebound"}
        pairs |= {SYSTEM[name]: value for name, value in self.system.items()}
        if self.ack != "none":
            pairs["iothub-ack"] = self.ack
        pairs |= self.properties
        return base + "&".join(f"{quote(n, safe='')}={quote(v, safe='')}" for n, v in pairs.items())

    def as_json(self) -> dict[str, Any]:
        """For the state file and the service side; `from_json` reads it back."""
        return {
            "id": self.id,
            "target": str(self.target),
            "bodyBase64": base64.b64encode(self.body).decode(),
            "properties": dict(self.properties),
            "system": dict(self.system),
            "expires": self.expires,
            "enqueued": self.enqueued,
            "ack": self.ack,
            "input": self.input,
            "deliveries": self.deliveries,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CloudMessage:
        rest = {k: v for k, v in data.items() if k not in ("target", "bodyBase64")}
        body = base64.b64decode(data["bodyBase64"])
        return cls(target=ClientId.parse(data["target"]), body=body, **rest)
