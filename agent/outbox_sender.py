"""Sending what the outbox holds: one message at a time, so that each priority keeps its order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from random import Random

from .outbox import Outbox
from .twin.backoff import full_jitter
from .twin.transport import TransportUnavailable, TwinTransport

log = logging.getLogger(__name__)

RETRY_BASE_SECONDS = 0.5
RETRY_CAP_SECONDS = 60.0
TIDY_SECONDS = 300.0


class OutboxSender:
    """Drains an outbox through one transport whenever it is connected."""

    def __init__(
        self,
        outbox: Outbox,
        transport: TwinTransport,
        connected: Callable[[], bool],
        jitter: Random | None = None,
    ) -> None:
        self._outbox = outbox
        self._transport = transport
        self._connected = connected
        self._jitter = jitter or Random()
        self._link_changed = asyncio.Event()
        self.sent = 0
        """Acknowledged since the start of this process."""

    def link_changed(self) -> None:
        """The link came or went."""
        self._link_changed.set()
        self._outbox.changed.set()

    async def run(self) -> None:
        """Send until cancelled."""
        loop = asyncio.get_running_loop()
        attempt = 0
        tidy_at = loop.time()
        while True:
            self._outbox.changed.clear()
            self._link_changed.clear()
            if loop.time() >= tidy_at:
                await self._outbox.tidy()
                tidy_at = loop.time() + _tidy_seconds(self._outbox)
            held = self._outbox.head() if self._connected() else None
            if held is None:
                await _wait(self._outbox.changed, tidy_at - loop.time())
                continue
            try:
                await self._transport.send(held.body, held.properties)
            except TransportUnavailable as error:
                if attempt == 0:
                    log.warning("telemetry waits: %s", error)
                pause = full_jitter(attempt, RETRY_BASE_SECONDS, RETRY_CAP_SECONDS, self._jitter)
                # A link that came back is worth an attempt at once.
                await _wait(self._link_changed, pause)
                attempt += 1
            except ValueError as error:
                message_id = held.properties["$.mid"]
                log.error("telemetry %s can never be sent and is dropped: %s", message_id, error)
                self._outbox.reject(held.sequence, "too-large")
            else:
                attempt = 0
                self.sent += 1
                self._outbox.acknowledge(held.sequence)


def _tidy_seconds(outbox: Outbox) -> float:
    ttl = outbox.limits.ttl_seconds
    return TIDY_SECONDS if ttl is None else min(TIDY_SECONDS, max(1.0, ttl / 10))


async def _wait(event: asyncio.Event, seconds: float) -> None:
    # Not wait_for: before Python 3.12 it can swallow a cancellation.
    timer = asyncio.get_running_loop().call_later(max(0.0, seconds), event.set)
    try:
        await event.wait()
    finally:
        timer.cancel()
