"""What a server gives to its connections: its limits, and the calls it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .packets import (
    NO_PROPERTIES,
    V5,
    V311,
    Connect,
    Disconnect,
    Properties,
    Publish,
    Subscribe,
    Unsubscribe,
)
from .session import Session

if TYPE_CHECKING:
    from .connection import Connection


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server takes from one client; told to MQTT 5 clients in CONNACK.

    Sizes in bytes of whole packets, times in seconds. `in_flight` is how many unacknowledged
    messages a client gets that does not say its own receive maximum.
    """

    versions: frozenset[int] = frozenset({V311, V5})
    max_packet_size: int = 1024 * 1024
    receive_maximum: int = 1024
    topic_alias_maximum: int = 0
    maximum_qos: int = 2
    retain_available: bool = True
    connect_timeout: float = 10.0
    in_flight: int = 100


@dataclass(frozen=True, slots=True)
class Accepted:
    """The connection may go on with `session`; `properties` are added to CONNACK."""

    session: Session
    session_present: bool = False
    properties: Properties = NO_PROPERTIES


@dataclass(frozen=True, slots=True)
class Refused:
    """`reason_code` is MQTT 5's; a 3.1.1 client gets the return code nearest to it."""

    reason_code: int
    reason: str = ""


class Handler(Protocol):
    """The server behind the connections. An exception closes that connection and is reported."""

    async def on_connect(self, connection: Connection, connect: Connect) -> Accepted | Refused:
        """Authenticate and choose the session.

        A server that allows one connection per client closes the older one here
        (`older.close(ReasonCode.SESSION_TAKEN_OVER)`, then `await older.wait_closed()`).
        """

    def on_publish(self, connection: Connection, publish: Publish) -> int | None:
        """A message, once per QoS 2 identifier, topic aliases resolved.

        Not a coroutine: it is called for every message, and nobody has had to wait in it.
        Returns the reason code of its acknowledgement (0 is success); None sends none at all,
        for fault injection.
        """

    async def on_subscribe(self, connection: Connection, subscribe: Subscribe) -> Sequence[int]:
        """One reason code per subscription. What is published meanwhile goes out after SUBACK."""

    async def on_unsubscribe(
        self, connection: Connection, unsubscribe: Unsubscribe
    ) -> Sequence[int]:
        """One reason code per topic filter."""

    async def on_disconnect(
        self, connection: Connection, disconnect: Disconnect | None, reason: str
    ) -> None:
        """The end of an accepted connection, always called once.

        `disconnect` is the client's packet, None when it left without (then its will is due);
        `reason` says in words what ended it.
        """
