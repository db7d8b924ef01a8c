"""Connected clients as the hub sees them, whatever protocol they speak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable


class Link(Protocol):
    """One connected client, as the hub sees it."""

    def subscribed(self, topic: str) -> bool: ...

    def deliver(self, topic: str, payload: bytes) -> None:
        """Sends a message to this client only, if a subscription of it matches."""

    def drop(self, reason: str) -> None:
        """Cuts the connection; MQTT 3.1.1 has no way to tell the client why."""

    async def wait_closed(self) -> None:
        """Until the connection is gone and detached."""


@runtime_checkable
class SettlingLink(Protocol):
    """A link that also says how a message ended; clients of other links get none of these."""

    def deliver_settled(
        self, topic: str, payload: bytes, done: Callable[[int | None], None] | None
    ) -> None:
        """`done` learns the reason code of the acknowledgement, None: not delivered."""
