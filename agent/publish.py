"""Carrying reports upstream: one report per transport, sent as merge patches, newest wins."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .submissions import Verdict
from .twin.backoff import full_jitter
from .twin.merge_patch import make_patch
from .twin.transport import (
    Desired,
    MethodResult,
    TransportUnavailable,
    TwinTransport,
    WarningTransport,
)

log = logging.getLogger(__name__)

RETRY_BASE_SECONDS = 0.5
RETRY_CAP_SECONDS = 60.0
COALESCE_SECONDS = 0.1
"""Reports that change faster than this are sent as one."""

Method = Callable[[Any], Awaitable[MethodResult]]
Submit = Callable[[str, int, bytes], Verdict]


@dataclass(frozen=True, slots=True)
class LinkState:
    """Whether a transport is connected; `reason` says why not, `warnings` what may end it soon."""

    source: str
    connected: bool
    reason: str
    warnings: tuple[str, ...] = ()


class _Link:
    """One transport: what the other side holds, and what it should hold."""

    def __init__(self, transport: TwinTransport) -> None:
        self.transport = transport
        self.held: dict[str, Any] | None = None
        self.report: dict[str, Any] | None = None
        self.connected = False
        self.reason = "not connected yet"
        self.changed = asyncio.Event()


class Publisher:
    """The TwinSink of all transports, and the sender of their reports.

    A report that cannot be sent is kept and replaced by newer ones until the link is back; then
    the difference to what the other side holds goes out.
    """

    def __init__(
        self,
        transports: tuple[TwinTransport, ...],
        submit: Submit,
        methods: Mapping[str, Method],
        on_link_change: Callable[[], None],
        jitter: random.Random | None = None,
    ) -> None:
        self._links = {transport.name: _Link(transport) for transport in transports}
        self._submit = submit
        self._methods = {name.lower(): method for name, method in methods.items()}
        self._known = ", ".join(methods)
        self._on_link_change = on_link_change
        self._jitter = jitter or random.Random()
        self._sent = asyncio.Event()

    def links(self) -> tuple[LinkState, ...]:
        return tuple(
            LinkState(name, link.connected, link.reason, _warnings(link.transport))
            for name, link in self._links.items()
        )

    def sources(self) -> tuple[str, ...]:
        return tuple(self._links)

    def publish(self, source: str, report: dict[str, Any]) -> None:
        """Make `report` the one that `source` should hold. Returns at once."""
        link = self._links[source]
        if report != link.report:
            link.report = report
            link.changed.set()

    async def run(self) -> None:
        """Serve all transports until cancelled."""
        tasks = [
            asyncio.ensure_future(job)
            for link in self._links.values()
            for job in (link.transport.run(self), self._send(link))
        ]
        if not tasks:
            await asyncio.Event().wait()
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def flush(self, seconds: float) -> None:
        """Give what is not sent yet a last chance."""

        async def sent() -> None:
            while any(link.connected and link.held != link.report for link in self._links.values()):
                self._sent.clear()
                await self._sent.wait()

        try:
            await asyncio.wait_for(sent(), seconds)
        except asyncio.TimeoutError:
            log.warning("the last report could not be sent within %.1f s", seconds)

    async def _send(self, link: _Link) -> None:
        attempt = 0
        while True:
            await link.changed.wait()
            link.changed.clear()
            await asyncio.sleep(COALESCE_SECONDS)
            if not link.connected or link.report is None:
                continue
            report = link.report
            # Root keys that are not ours belong to somebody else on a shared device twin.
            held = {key: value for key, value in (link.held or {}).items() if key in report}
            patch = make_patch(held, report)
            if not patch:
                continue
            try:
                await link.transport.report(patch)
            except TransportUnavailable as error:
                log.warning("report over %s not sent: %s", link.transport.name, error)
                await asyncio.sleep(
                    full_jitter(attempt, RETRY_BASE_SECONDS, RETRY_CAP_SECONDS, self._jitter)
                )
                attempt += 1
                link.changed.set()
            else:
                attempt = 0
                link.held = report
                self._sent.set()

    # -- TwinSink ------------------------------------------------------------------------------

    async def desired(self, desired: Desired) -> None:
        self._submit(desired.source, desired.version, desired.body)

    async def connected(self, source: str, reported: Mapping[str, Any] | None) -> None:
        link = self._links[source]
        link.connected, link.reason = True, ""
        if reported is not None:
            link.held = {key: value for key, value in reported.items() if not key.startswith("$")}
        link.changed.set()
        log.info("%s: connected", source)
        self._on_link_change()

    async def disconnected(self, source: str, reason: str) -> None:
        link = self._links[source]
        if not link.connected and link.reason == reason:
            return  # one more failed attempt is no news, and there may be thousands
        log.warning("%s: not connected: %s", source, reason)
        link.connected, link.reason = False, reason
        self._on_link_change()

    async def method(self, source: str, name: str, payload: Any) -> MethodResult:
        method = self._methods.get(name.lower())
        if method is None:
            return MethodResult(400, {"message": f"unknown method {name!r}; known: {self._known}"})
        return await method(payload)


def _warnings(transport: TwinTransport) -> tuple[str, ...]:
    return transport.warnings() if isinstance(transport, WarningTransport) else ()
