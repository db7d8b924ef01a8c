"""Deployments and reports over an Azure IoT Hub twin, with the unmodified azure-iot-device SDK.

Each connection starts the same way: subscribe, read the whole twin, hand it over; from then on
patches are applied in the order of their versions, and anything odd leads to another read. Whatever
takes too long ends the connection; the next one comes after a jittered, growing pause, which only a
connection that held for a while resets (two clients with one identity disconnect each other).

A connection is replaced without a gap when its token or certificate is: the next one is opened
while it still serves, and takes over only once the hub has accepted it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from random import Random
from typing import Any, NoReturn

from ..clock import Clock, SystemClock
from ..identity.resolver import IdentityResolver
from .backoff import full_jitter
from .document import DesiredDocument, deployment_body
from .iothub_client import CallFailed, ConnectionEnded, HubConnection, IotHubSettings
from .transport import Desired, MethodResult, TransportUnavailable, TwinSink

__all__ = ["IotHubSettings", "IotHubTransport"]

MESSAGE_LIMIT = 256 * 1024
_log = logging.getLogger(__name__)
_FETCH_TRIES = 8
_METHODS_AT_ONCE = 16
_METHODS_REMEMBERED = 64
_SHORT_LIVES = 3
_UNCLOSED = 3
_LONGEST_WAIT = 3600.0

# Properties that are the message's own, under the names IoT Hub's topics have for them.
_SYSTEM = {
    "$.mid": "message_id",
    "$.cid": "correlation_id",
    "$.ct": "content_type",
    "$.ce": "content_encoding",
}


class IotHubTransport:
    """A TwinTransport. A device identity finds its deployment in the desired property `deployment`
    (see `deployment_body`); a module identity (`ModuleId=`) in its whole desired section. Reported
    documents go under the root of the reported section either way.
    """

    def __init__(
        self,
        settings: IotHubSettings,
        random: Random | None = None,
        clock: Clock | None = None,
        pause: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        """`pause` waits (seconds) between connections."""
        self._settings = settings
        self._random = random or Random()
        self._clock = clock or SystemClock()
        self._pause = pause
        self._resolver = IdentityResolver(
            settings.identity, settings.network, state_dir=settings.state_dir, clock=self._clock
        )
        self._link: _Link | None = None
        self._unclosed: list[HubConnection] = []
        self._retiring: set[asyncio.Future[None]] = set()
        self._renewal_trouble = ""

    @property
    def name(self) -> str:
        return "iothub"

    def warnings(self) -> tuple[str, ...]:
        """What people should know while all still works: expiring and refused certificates."""
        found = (self._resolver.warning(), self._renewal_trouble)
        return tuple(text for text in found if text)

    async def run(self, sink: TwinSink) -> None:
        """Serve until cancelled."""
        try:
            await self._run(sink)
        finally:
            if self._retiring:
                await asyncio.wait(self._retiring)

    async def _run(self, sink: TwinSink) -> None:
        attempt = short_lives = 0
        while True:
            lived, reason = await self._connect_once(sink)
            if lived >= self._settings.stable_after:
                attempt = short_lives = 0
            elif lived > 0:
                short_lives += 1
            if short_lives >= _SHORT_LIVES:
                reason += (
                    f" ({short_lives} times soon after connecting: "
                    "is another client using this identity?)"
                )
            await sink.disconnected(self.name, reason)
            await self._pause(
                full_jitter(
                    attempt, self._settings.retry_base, self._settings.retry_cap, self._random
                )
            )
            attempt += 1

    async def report(self, patch: Mapping[str, Any]) -> None:
        """Raises TransportUnavailable."""
        await self._connected().report(patch)

    async def send(self, body: bytes, properties: Mapping[str, str]) -> None:
        """`$.ct`, `$.ce`, `$.mid` and `$.cid` among the properties are the message's content type,
        content encoding, message id and correlation id.

        Raises TransportUnavailable; ValueError for a message above 256 KB, which no retry can send.
        """
        from azure.iot.device import Message

        size = len(body) + sum(len(k.encode()) + len(v.encode()) for k, v in properties.items())
        if size > MESSAGE_LIMIT:
            raise ValueError(f"a message of {size} bytes: IoT Hub takes up to {MESSAGE_LIMIT}")
        message = Message(body)  # type: ignore[no-untyped-call]
        for name, value in properties.items():
            if name in _SYSTEM:
                setattr(message, _SYSTEM[name], value)
            else:
                message.custom_properties[name] = value
        await self._connected().send(message)

    def _connected(self) -> HubConnection:
        if self._link is None:
            raise TransportUnavailable("not connected to the IoT Hub")
        return self._link.connection

    async def _connect_once(self, sink: TwinSink) -> tuple[float, str]:
        """One connection from start to end: how long it served (seconds) and why it ended."""
        self._unclosed = [c for c in self._unclosed if not c.closed]
        if len(self._unclosed) >= _UNCLOSED:
            # They share two threads of this process, so one more would wait behind them.
            return 0.0, "the IoT Hub SDK does not close its connections: restart the agent"
        since: float | None = None
        link: _Link | None = None
        try:
            link = await self._open(sink)
            since = time.monotonic()
            while True:
                self._link = link
                replaced, link = link, await self._serve(link)
                self._retire(replaced)
        except TransportUnavailable as error:
            return 0.0 if since is None else time.monotonic() - since, str(error)
        finally:
            self._link = None
            if link is not None:
                await self._close(link)

    async def _open(self, sink: TwinSink) -> _Link:
        """Raises TransportUnavailable."""
        link = _Link(self._settings, sink, self._resolver, clock=self._clock, random=self._random)
        try:
            await link.open()
        except BaseException:
            # Also a cancellation: a half open link has threads of the SDK. It is raised again.
            await self._close(link)
            raise
        return link

    async def _serve(self, link: _Link) -> _Link:
        """Until another connection has taken over, which is returned.

        Raises TransportUnavailable when the connection ends before.
        """
        serving = asyncio.ensure_future(link.serve())
        attempt = 0
        try:
            while True:
                due = asyncio.ensure_future(self._renewal_due(link.connection))
                try:
                    await asyncio.wait({serving, due}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    due.cancel()
                if serving.done():
                    serving.result()
                # The hub drops the old connection when it accepts the new one, not before: while
                # the new one is refused, the old one goes on.
                stamp = self._resolver.stamp()
                try:
                    successor = await self._open(link.sink)
                except TransportUnavailable as error:
                    self._renewal_failed(str(error))
                    link.connection.stamp = stamp
                    pause = full_jitter(
                        attempt, self._settings.retry_base, self._settings.retry_cap, self._random
                    )
                    link.connection.renew_at = time.monotonic() + pause
                    attempt += 1
                else:
                    self._renewal_trouble = ""
                    _log.info("the connection to the IoT Hub was renewed")
                    return successor
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    async def _renewal_due(self, connection: HubConnection) -> None:
        """Returns when the token is old, or the files of the identity have changed."""
        while connection.stamp == self._resolver.stamp():
            left = connection.renew_at - time.monotonic()
            if left <= 0:
                return
            # Without files there is nothing to look at before that time.
            watch = self._settings.watch_interval if connection.stamp else math.inf
            await asyncio.sleep(min(left, watch, _LONGEST_WAIT))

    def _renewal_failed(self, reason: str) -> None:
        text = f"the connection could not be renewed and stays on its old credentials: {reason}"
        if text != self._renewal_trouble:
            _log.warning("%s", text)
        self._renewal_trouble = text

    def _retire(self, link: _Link) -> None:
        closing = asyncio.ensure_future(self._close(link))
        self._retiring.add(closing)
        closing.add_done_callback(self._retiring.discard)

    async def _close(self, link: _Link) -> None:
        if not await link.close():
            _log.warning("the IoT Hub client takes long to shut down; going on without it")
            self._unclosed.append(link.connection)


class _Link:
    """What one connection knows: the desired document, and the methods that are running."""

    def __init__(
        self,
        settings: IotHubSettings,
        sink: TwinSink,
        resolver: IdentityResolver,
        *,
        clock: Clock,
        random: Random,
    ) -> None:
        self.connection = HubConnection(settings, resolver, clock, self._patched, self._called)
        self.sink = sink
        self._settings = settings
        self._random = random
        self._document = DesiredDocument()
        self._reported: Mapping[str, Any] = {}
        self._changed = asyncio.Event()
        self._methods: dict[tuple[str, str], asyncio.Task[MethodResult]] = {}
        self._answers: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Raises TransportUnavailable."""
        await self.connection.open()
        await self._fetch()

    async def serve(self) -> NoReturn:
        """Until the connection ends. Raises TransportUnavailable."""
        await self.sink.connected("iothub", self._reported)
        delivered = -1
        while True:
            if self._document.stale:
                await self._fetch()
            if self._document.version != delivered:
                delivered = self._document.version
                await self._deliver()
            elif not await self._change():
                # Quiet for long: a read proves that the hub still hears us, and finds lost patches.
                await self._fetch()

    async def close(self) -> bool:
        for task in (*self._answers, *self._methods.values()):
            task.cancel()
        return await self.connection.close()

    async def _change(self) -> bool:
        """Whether something may have changed before the time for another read."""
        changed = asyncio.ensure_future(self._changed.wait())
        events: set[asyncio.Future[Any]] = {changed, self.connection.lost}
        try:
            await asyncio.wait(
                events,
                timeout=self._settings.resync_interval,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            changed.cancel()
        if self.connection.lost.done():
            raise ConnectionEnded(self.connection.lost.result())
        was_set = self._changed.is_set()
        self._changed.clear()
        return was_set

    async def _fetch(self) -> None:
        """Read the whole twin, patiently where the hub says no. Raises TransportUnavailable."""
        for attempt in range(_FETCH_TRIES):
            try:
                twin = await self.connection.get_twin()
            except CallFailed as error:
                failure = str(error)
                _log.info("reading the twin failed: %s", failure)
            else:
                self._document = self._document.with_full(twin.get("desired") or {})
                self._reported = twin.get("reported") or {}
                if not self._document.stale:
                    return
                failure = f"the twin stays behind version {self._document.heard}"
            await self.connection.pause(
                full_jitter(
                    attempt, self._settings.retry_base, self._settings.retry_cap, self._random
                )
            )
        raise ConnectionEnded(f"the twin could not be read: {failure}")

    async def _deliver(self) -> None:
        document = self._document
        body = deployment_body(document.properties or {}, module=self.connection.module)
        if body is not None:
            await self.sink.desired(Desired("iothub", document.version, body))

    def _patched(self, patch: Mapping[str, Any]) -> None:
        self._document = self._document.with_patch(patch)
        self._changed.set()

    def _called(self, request_id: str, name: str, payload: Any) -> None:
        """A method call; a repeated one gets the answer of the first."""
        method = self._methods.get((request_id, name))
        if method is None:
            running = sum(not task.done() for task in self._methods.values())
            busy = running >= _METHODS_AT_ONCE
            method = asyncio.ensure_future(_busy() if busy else self._method(name, payload))
            self._methods[request_id, name] = method
            while len(self._methods) > _METHODS_REMEMBERED:
                del self._methods[next(iter(self._methods))]
        answer = asyncio.ensure_future(self._answer(request_id, method))
        self._answers.add(answer)
        answer.add_done_callback(self._answers.discard)

    async def _method(self, name: str, payload: Any) -> MethodResult:
        try:
            return await self.sink.method("iothub", name, payload)
        except Exception as error:  # noqa: BLE001 - the caller gets the answer, the log the defect
            _log.error("method %s failed", name, exc_info=error)
            return MethodResult(500, {"message": f"{name} failed: {error!r}"})

    async def _answer(self, request_id: str, method: asyncio.Task[MethodResult]) -> None:
        result = await asyncio.shield(method)
        try:
            await self.connection.respond(request_id, result)
        except TransportUnavailable as error:
            _log.warning("the answer to a method call was not sent: %s", error)


async def _busy() -> MethodResult:
    return MethodResult(429, {"message": "too many methods at once: try again later"})
