"""The seam between the agent and whatever brings it deployments.

A transport connects, reconnects with jittered back-off, and hands whole desired documents to a
`TwinSink`; it never merges a deployment into an older one and never decides what to do with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


class TransportUnavailable(Exception):
    """Not connected, or the other side did not take it; keep it and try again later."""


@dataclass(frozen=True, slots=True)
class Desired:
    """A whole desired document as JSON text, exactly as received where the protocol permits.

    `source` is the transport's name; `version` the twin's `$version` (0 where there is none).
    """

    source: str
    version: int
    body: bytes


@dataclass(frozen=True, slots=True)
class MethodResult:
    """Answer to a direct method: HTTP-like status and a JSON-serialisable payload."""

    status: int
    payload: Any


class TwinSink(Protocol):
    """What a transport calls; all of it on the event loop that runs the transport."""

    async def desired(self, desired: Desired) -> None:
        """A desired document arrived (also after every reconnect, whether or not it changed)."""

    async def connected(self, source: str, reported: Mapping[str, Any] | None) -> None:
        """The link is up; `reported` is what the other side holds now, None if it cannot tell."""

    async def disconnected(self, source: str, reason: str) -> None: ...

    async def method(self, source: str, name: str, payload: Any) -> MethodResult: ...


class TwinTransport(Protocol):
    """IoT Hub, plain MQTT, or a test double."""

    @property
    def name(self) -> str:
        """ "iothub" or "mqtt": the `source` of its documents."""

    async def run(self, sink: TwinSink) -> None:
        """Serve until cancelled; survives every failure of the network and of the other side."""

    async def report(self, patch: Mapping[str, Any]) -> None:
        """Send a JSON merge patch of the reported properties and wait until it is acknowledged.

        Raises TransportUnavailable.
        """

    async def send(self, body: bytes, properties: Mapping[str, str]) -> None:
        """Send one telemetry message and wait for its acknowledgement.

        Raises TransportUnavailable.
        """


@runtime_checkable
class WarningTransport(Protocol):
    """A transport that knows of trouble to come, such as a certificate that expires soon."""

    def warnings(self) -> tuple[str, ...]: ...
