"""Telling systemd that a process is ready and alive (sd_notify(3)); silent where nobody listens."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping


class Notifier:
    """`interval`: seconds between two signs of life, None where no watchdog waits for them."""

    def __init__(self, address: str = "", interval: float | None = None) -> None:
        self._address = address
        self.interval = interval if address else None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Notifier:
        address = environment.get("NOTIFY_SOCKET", "")
        if not address.startswith(("/", "@")):
            return cls()
        # Three signs per period: one may be late, and one may be lost.
        microseconds = environment.get("WATCHDOG_USEC", "")
        own = environment.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
        watched = own and microseconds.isdecimal() and int(microseconds) > 0
        return cls(address, int(microseconds) / 3e6 if watched else None)

    def ready(self) -> None:
        self._send("READY=1")

    def alive(self) -> None:
        if self.interval is not None:
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    async def beat(self) -> None:
        """Signs of life for as long as the event loop turns; until cancelled."""
        if self.interval is None:
            await asyncio.Event().wait()
            return
        while True:
            self.alive()
            await asyncio.sleep(self.interval)

    def _send(self, text: str) -> None:
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link:
                link.setblocking(False)
                link.sendto(text.encode(), address)
        except OSError:
            # Whoever waits for the sign notices that it is missing.
            pass
