"""What an MQTT connection needs to come up, and what it brings."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Final

from .transport import TransportUnavailable

V311: Final = 4
V5: Final = 5


class ConnectFailed(TransportUnavailable):
    """No connection; `version_refused` when another MQTT version may be welcome, `keepalive` when
    the broker demands that one (in seconds)."""

    def __init__(
        self, reason: str, version_refused: bool = False, keepalive: int | None = None
    ) -> None:
        super().__init__(reason)
        self.version_refused = version_refused
        self.keepalive = keepalive


@dataclass(frozen=True, slots=True)
class Login:
    """All that CONNECT needs. The will is sent retained with QoS 1; times in seconds."""

    host: str
    port: int
    client_id: str
    will_topic: str
    will_payload: bytes
    version: int = V5
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None
    keepalive: int = 60
    session_expiry: int = 4 * 3600
    max_packet_size: int = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Message:
    topic: str
    payload: bytes
    retain: bool = False
    response_topic: str | None = None
    correlation_data: bytes | None = None
