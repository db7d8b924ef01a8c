"""A TwinTransport in memory: a hub's core at its other end, and bad weather in between.

It does what the real one does in the same order (connect, read the twin, apply patches by version,
read again after a gap, give the connection up when an answer does not come), with the agent's own
rules for documents and back-off; only the bytes on the wire are left out.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from random import Random
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote, urlencode

from ..agent.twin.backoff import full_jitter
from ..agent.twin.document import DesiredDocument, deployment_body
from ..agent.twin.transport import Desired, TransportUnavailable, TwinSink
from .iothub.devices import ClientId
from .iothub.errors import HubError
from .iothub.hub import Hub
from .iothub.telemetry import Message

T = TypeVar("T")
NAME = "iothub"
ANSWER_SECONDS = 30.0
RESYNC_SECONDS = 900.0
STABLE_SECONDS = 30.0
RETRY_BASE_SECONDS, RETRY_CAP_SECONDS = 1.0, 60.0
FETCH_TRIES = 8


@dataclass(slots=True)
class Weather:
    """What the network and the hub do to messages. Probabilities are per message.

    `silent`: connected, but nothing arrives on either side any more.
    """

    up: bool = True
    silent: bool = False
    latency: float = 0.05
    """Longest way of a message in one direction, in seconds."""
    breaks: float = 0.0
    """The connection breaks while the request is on its way."""
    acknowledgement_lost: float = 0.0
    """The request was carried out, then the connection broke."""
    answer_lost: float = 0.0
    """The request was carried out, and its answer never comes."""
    throttled: float = 0.0
    """Refused with 429, not carried out."""
    refused: float = 0.0
    """A connection attempt that the hub refuses."""
    patch_lost: float = 0.0
    patch_late: float = 0.0
    """A desired patch overtaken by later ones."""
    patch_twice: float = 0.0

    def clear(self) -> None:
        for item in fields(self):
            setattr(self, item.name, item.default)


class MemoryHubLink:
    """One client's transport. `received` is told each telemetry message that the hub takes."""

    def __init__(
        self,
        hub: Hub,
        client: ClientId,
        weather: Weather,
        random: Random,
        received: Callable[[Message], None] = lambda message: None,
    ) -> None:
        self._hub = hub
        self._client = client
        self._weather = weather
        self._random = random
        self._received = received
        self._connection: _Connection | None = None
        self._dead = False

    @property
    def name(self) -> str:
        return NAME

    def cut(self, reason: str) -> None:
        """The connection is gone; a later attempt may succeed."""
        if self._connection is not None:
            self._connection.end(reason)

    def die(self) -> None:
        """The process at this end was killed."""
        self._dead = True
        self.cut("killed")

    async def run(self, sink: TwinSink) -> None:
        loop = asyncio.get_running_loop()
        attempt = 0
        while True:
            began = loop.time()
            reason = await self._connect_once(sink)
            if loop.time() - began >= STABLE_SECONDS:
                attempt = 0
            await sink.disconnected(self.name, reason)
            await asyncio.sleep(
                full_jitter(attempt, RETRY_BASE_SECONDS, RETRY_CAP_SECONDS, self._random)
            )
            attempt += 1

    async def report(self, patch: Mapping[str, Any]) -> None:
        text = json.dumps(patch)
        await self._open().exchange(
            lambda: self._hub.patch_reported(self._client, json.loads(text))
        )

    async def send(self, body: bytes, properties: Mapping[str, str]) -> None:
        bag = urlencode(properties, quote_via=quote, safe="")

        def take() -> None:
            self._received(self._hub.accept_telemetry(self._client, body, bag))

        await self._open().exchange(take)

    def _open(self) -> _Connection:
        if self._connection is None or self._connection.lost.done() or self._dead:
            raise TransportUnavailable("not connected to the hub")
        return self._connection

    async def _connect_once(self, sink: TwinSink) -> str:
        weather = self._weather
        await asyncio.sleep(self._random.uniform(0, weather.latency))
        if not weather.up or weather.silent or self._dead:
            return "the hub cannot be reached"
        if self._random.random() < weather.refused:
            return "the hub refused the connection"
        old = self._hub.link(self._client)
        if old is not None:
            old.drop("another connection took this client id")
        connection = _Connection(self._hub, self._client, weather, self._random)
        self._hub.attach(self._client, connection)
        try:
            reported = await connection.fetch()
            self._connection = connection
            await sink.connected(self.name, reported)
            await connection.serve(sink)
        except TransportUnavailable as error:
            return str(error)
        finally:
            self._connection = None
            connection.end("closed")


class _Connection:
    """From CONNACK to the end; the hub knows it as the client's Link."""

    def __init__(self, hub: Hub, client: ClientId, weather: Weather, random: Random) -> None:
        self._hub = hub
        self._client = client
        self._weather = weather
        self._random = random
        self._document = DesiredDocument()
        self._changed = asyncio.Event()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def end(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)
            self._hub.detach(self._client, self)
            self._changed.set()

    # -- as the hub sees it --------------------------------------------------------------------

    def subscribed(self, topic: str) -> bool:
        return True

    def deliver(self, topic: str, payload: bytes) -> None:
        if not topic.startswith("$iothub/twin/PATCH/properties/desired/"):
            return
        weather, random = self._weather, self._random
        if weather.silent or random.random() < weather.patch_lost:
            return
        delay = random.uniform(0, weather.latency)
        if random.random() < weather.patch_late:
            delay += random.uniform(0, 120)
        copies = 2 if random.random() < weather.patch_twice else 1
        for copy in range(copies):
            asyncio.get_running_loop().call_later(delay + copy * 0.5, self._patched, payload)

    def drop(self, reason: str) -> None:
        self.end(reason)

    async def wait_closed(self) -> None:
        await asyncio.wait({self.lost})

    # -- as the client sees it -----------------------------------------------------------------

    async def exchange(self, action: Callable[[], T]) -> T:
        """A request and its answer. Raises TransportUnavailable; then it may have been done."""
        weather, random = self._weather, self._random
        await self._travel()
        if random.random() < weather.breaks:
            self._fail("the connection broke")
        if random.random() < weather.throttled:
            await self._travel()
            raise TransportUnavailable("429: throttled")
        if weather.silent:
            await self._no_answer()
        try:
            result = action()
        except HubError as error:
            await self._travel()
            raise TransportUnavailable(str(error)) from error
        if random.random() < weather.acknowledgement_lost:
            self._fail("the connection broke before the acknowledgement")
        if random.random() < weather.answer_lost or weather.silent:
            await self._no_answer()
        await self._travel()
        return result

    async def fetch(self) -> Mapping[str, Any]:
        """Read the whole twin; returns its reported section. Raises TransportUnavailable."""
        failure = ""
        for attempt in range(FETCH_TRIES):
            try:
                view = await self.exchange(lambda: self._hub.twin(self._client).device_view())
            except TransportUnavailable as error:
                failure = str(error)
            else:
                twin = json.loads(json.dumps(view))
                self._document = self._document.with_full(twin["desired"])
                if not self._document.stale:
                    return dict(twin["reported"])
                failure = f"the twin stays behind version {self._document.heard}"
            pause = full_jitter(attempt, RETRY_BASE_SECONDS, RETRY_CAP_SECONDS, self._random)
            await self._wait(pause)
        reason = f"the twin could not be read: {failure}"
        self.end(reason)
        raise TransportUnavailable(reason)

    async def serve(self, sink: TwinSink) -> NoReturn:
        delivered = -1
        while True:
            if self._document.stale:
                await self.fetch()
            if self._document.version != delivered:
                delivered = self._document.version
                body = deployment_body(self._document.properties or {}, module=True)
                if body is not None:
                    await sink.desired(Desired(NAME, delivered, body))
                continue
            timer = asyncio.get_running_loop().call_later(RESYNC_SECONDS, self._quiet)
            try:
                await self._changed.wait()
            finally:
                timer.cancel()
            self._changed.clear()
            self._check()

    def _quiet(self) -> None:
        # Hearing nothing for long may mean that nothing arrives: read again.
        self._document = DesiredDocument()
        self._changed.set()

    def _patched(self, payload: bytes) -> None:
        if not self.lost.done():
            self._document = self._document.with_patch(json.loads(payload))
            self._changed.set()

    async def _travel(self) -> None:
        await self._wait(self._random.uniform(0, self._weather.latency))

    async def _no_answer(self) -> NoReturn:
        await self._wait(ANSWER_SECONDS)
        self._fail(f"no answer within {ANSWER_SECONDS:g} s")

    async def _wait(self, seconds: float) -> None:
        await asyncio.wait({self.lost}, timeout=seconds)
        self._check()

    def _check(self) -> None:
        if self.lost.done():
            raise TransportUnavailable(self.lost.result())

    def _fail(self, reason: str) -> NoReturn:
        self.end(reason)
        raise TransportUnavailable(reason)
