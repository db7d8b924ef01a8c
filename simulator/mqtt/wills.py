"""Last wills that wait for their delay (section 3.1.3.2.2)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msgspec.structs import replace

from .packets import Publish, Will


class Wills:
    """`publish` sends one; at most one waits per client."""

    def __init__(self, publish: Callable[[Publish], object]) -> None:
        self._publish = publish
        self._waiting: dict[str, tuple[asyncio.TimerHandle, Will]] = {}

    def schedule(self, client_id: str, will: Will, session_expiry: float) -> None:
        """Due after its delay, or when the session ends, whichever is first [MQTT-3.1.2-8]."""
        delay = min(will.properties.will_delay_interval or 0, session_expiry)
        if delay == 0:
            self._send(will)
            return
        timer = asyncio.get_running_loop().call_later(delay, self.session_ended, client_id)
        self._waiting[client_id] = (timer, will)

    def cancel(self, client_id: str) -> None:
        """The client is back [MQTT-3.1.3-9]."""
        if (waiting := self._waiting.pop(client_id, None)) is not None:
            waiting[0].cancel()

    def session_ended(self, client_id: str) -> None:
        if (waiting := self._waiting.pop(client_id, None)) is not None:
            waiting[0].cancel()
            self._send(waiting[1])

    def clear(self) -> None:
        for timer, _ in self._waiting.values():
            timer.cancel()
        self._waiting.clear()

    def _send(self, will: Will) -> None:
        properties = replace(will.properties, will_delay_interval=None)
        self._publish(
            Publish(will.topic, will.payload, will.qos, will.retain, False, 0, properties)
        )
