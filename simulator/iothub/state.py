"""What a hub remembers, and its file."""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cloud_messages import CloudMessage
from .configurations import Configuration
from .devices import ClientId, Identity, Registry
from .errors import HubError
from .twins import Twin

_FORMAT = 1


class StateUnreadable(Exception):
    """The state file exists and is not one of ours; the message names it and says what to do."""


@dataclass(slots=True)
class HubState:
    """`subscriptions` maps topic filters to their granted QoS, per client of a persistent session.

    `policies` maps shared access policy names to base64 keys. `assignments` says which
    configurations a twin shows, `deployed` which modules of a device have content from them.
    """

    registry: Registry = field(default_factory=Registry)
    twins: dict[ClientId, Twin] = field(default_factory=dict)
    subscriptions: dict[ClientId, dict[str, int]] = field(default_factory=dict)
    policies: dict[str, str] = field(default_factory=lambda: {"iothubowner": _new_key()})
    configurations: dict[str, Configuration] = field(default_factory=dict)
    assignments: dict[ClientId, dict[str, str]] = field(default_factory=dict)
    deployed: dict[str, list[str]] = field(default_factory=dict)
    messages: dict[ClientId, list[CloudMessage]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "identities": [identity.as_json() for identity in self.registry],
            "twins": {str(client): twin.as_json() for client, twin in self.twins.items()},
            "subscriptions": {str(c): filters for c, filters in self.subscriptions.items()},
            "policies": self.policies,
            "configurations": [one.as_json() for one in self.configurations.values()],
            "assignments": {str(client): status for client, status in self.assignments.items()},
            "deployed": self.deployed,
            "messages": [one.as_json() for queue in self.messages.values() for one in queue],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HubState:
        if data["format"] != _FORMAT:
            raise ValueError(f"format {data['format']} instead of {_FORMAT}")
        parse = ClientId.parse
        messages: dict[ClientId, list[CloudMessage]] = {}
        for one in map(CloudMessage.from_json, data.get("messages", ())):
            messages.setdefault(one.target, []).append(one)
        return cls(
            Registry(Identity.from_json(item) for item in data["identities"]),
            {parse(client): Twin.from_json(twin) for client, twin in data["twins"].items()},
            {parse(client): dict(filters) for client, filters in data["subscriptions"].items()},
            dict(data["policies"]),
            configurations={
                item["id"]: Configuration(**item) for item in data.get("configurations", ())
            },
            assignments={parse(c): dict(s) for c, s in data.get("assignments", {}).items()},
            deployed=dict(data.get("deployed", {})),
            messages=messages,
        )


def load(file: Path) -> HubState:
    """The stored state, or a new one where there is no file. Raises StateUnreadable or OSError."""
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return HubState()
    try:
        return HubState.from_json(json.loads(text))
    except (HubError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateUnreadable(
            f"{file} is not the state of a simulated IoT Hub ({error}): move it away to start anew"
        ) from error


def save(file: Path, state: HubState) -> None:
    """See write_json."""
    write_json(file, state.as_json())


def write_json(file: Path, value: Any) -> None:
    """Replaces the file at once: a reader, or the next start, sees the old or the new state.

    Raises OSError.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(value, stream, separators=(",", ":"))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def _new_key() -> str:
    return base64.b64encode(secrets.token_bytes(32)).decode()
