"""Deployments over plain MQTT, 5.0 or 3.1.1, on any broker.

Topics under the prefix (`gatelet/v1/{device}` unless configured), all with QoS 1:

    {p}/desired             retained, to the device: the whole desired document
    {p}/reported            retained, from the device: the whole reported document
    {p}/status              retained: {"status": "online"|"offline", "session": n[, "reason"]};
                            the last will is the offline one of the same session
    {p}/cmd/{name}          a method call with MQTT 5's response topic and correlation data; the
                            answer has the JSON payload and the user property "status"
    {p}/cmd/{name}/{rid}    the same for 3.1.1: answered on {p}/resp/{rid}/{status}
    {p}/telemetry[/{bag}]   messages; their properties are MQTT 5 user properties, or with 3.1.1
                            a URL-encoded bag as one more level

Retained method calls are ignored: a stored "reboot" would be repeated after every connect.
Whoever may write {p}/desired may deploy: protect it with the broker's access lists.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from random import Random
from typing import Any, Final
from urllib.parse import quote, urlencode

from ..clock import Clock, SystemClock
from .backoff import full_jitter
from .merge_patch import apply_patch
from .mqtt_login import V5, V311, ConnectFailed, Login, Message
from .mqtt_payloads import read_json, read_object, read_status, status_document, to_json, version_of
from .mqtt_settings import MqttSettings
from .mqtt_tls import TlsWatch
from .paho_connection import PahoConnection
from .transport import Desired, MethodResult, TransportUnavailable, TwinSink

__all__ = ["MqttSettings", "MqttTransport"]

_log = logging.getLogger(__name__)

_NAME: Final = "mqtt"
_METHODS_AT_ONCE: Final = 16
_ANSWERS_AT_ONCE: Final = 64
_FAREWELL_SECONDS: Final = 2.0


class MqttTransport:
    """A `TwinTransport`. Back-off is full jitter from `base_delay` to `max_delay` seconds."""

    name: Final = _NAME

    def __init__(
        self,
        settings: MqttSettings,
        clock: Clock | None = None,
        random: Random | None = None,
        *,
        base_delay: float = 0.5,
        max_delay: float = 60.0,
        connect_timeout: float = 15.0,
        answer_timeout: float = 30.0,
        seed_timeout: float = 5.0,
        settled_after: float = 10.0,
    ) -> None:
        self._settings = settings
        self._clock = clock or SystemClock()
        self._random = random or Random()
        self._base_delay = base_delay
        self._max_delay = max_delay
        self._connect_timeout = connect_timeout
        self._answer_timeout = answer_timeout
        self._seed_timeout = seed_timeout
        self._settled_after = settled_after
        self._version = V5
        self._keepalive = settings.keepalive
        self._session = 0
        self._reported: Mapping[str, Any] = {}
        self._report_lock = asyncio.Lock()
        self._ready: PahoConnection | None = None
        files = settings.tls_files
        self._tls: TlsWatch | None = None
        if files is not None:
            self._tls = TlsWatch(files, settings.host, settings.port, connect_timeout)

    def warnings(self) -> tuple[str, ...]:
        """What people should know while all still works: expiring and refused certificates."""
        return self._tls.warnings(self._clock.now()) if self._tls else ()

    async def run(self, sink: TwinSink) -> None:
        attempt = 0
        told = ""
        while True:
            link = _Link(self, sink, self._next_session())
            started = self._clock.monotonic()
            try:
                reason = await link.serve()
            except TransportUnavailable as error:
                reason = str(error)
                if isinstance(error, ConnectFailed) and self._learns(error) and attempt == 0:
                    # Nothing is wrong yet: what was learned deserves its try at once.
                    attempt = 1
                    continue
            finally:
                self._session = max(self._session, link.newest_session)
            if link.renewed:
                attempt = 0
                continue
            if link.was_up or reason != told:
                told = reason
                _log.warning("MQTT %s: %s", self._settings.host, reason)
                await sink.disconnected(_NAME, reason)
            # A connection that lasted is a success; one that breaks at once (two clients with
            # one id kick each other) is a failure like any other.
            lasted = link.was_up and self._clock.monotonic() - started >= self._settled_after
            attempt = 0 if lasted else attempt
            await asyncio.sleep(
                full_jitter(attempt, self._base_delay, self._max_delay, self._random)
            )
            attempt += 1

    async def report(self, patch: Mapping[str, Any]) -> None:
        async with self._report_lock:
            connection = self._connection()
            # Kept even if the acknowledgement stays away: the message may have arrived, and after
            # the next connect the broker's retained document counts.
            self._reported = apply_patch(self._reported, patch)
            body = to_json(self._reported)
            topic = f"{self._settings.topics}/reported"
            await connection.publish(topic, body, self._answer_timeout, retain=True)

    async def send(self, body: bytes, properties: Mapping[str, str]) -> None:
        topic = f"{self._settings.topics}/telemetry"
        if properties and self._version == V311:
            topic += "/" + urlencode(properties, quote_via=quote, safe="")
        await self._connection().publish(
            topic, body, self._answer_timeout, user_properties=properties
        )

    def _learns(self, error: ConnectFailed) -> bool:
        """Whether the next connection will be asked for differently."""
        if error.keepalive is not None:
            self._keepalive = error.keepalive
        elif error.version_refused:
            self._version = V311 if self._version == V5 else V5
        else:
            return False
        return True

    def _connection(self) -> PahoConnection:
        if self._ready is None or self._ready.lost.done():
            raise TransportUnavailable(
                f"not connected to the MQTT broker {self._settings.host}:{self._settings.port}"
            )
        return self._ready

    def _next_session(self) -> int:
        """Grows over restarts too as long as the clock does; the retained status corrects it."""
        self._session = max(self._session + 1, int(self._clock.now().timestamp() * 1e6))
        return self._session

    def _login(self, session: int) -> Login:
        settings = self._settings
        return Login(
            host=settings.host,
            port=settings.port,
            client_id=settings.client_id or settings.device_id,
            will_topic=f"{settings.topics}/status",
            will_payload=status_document("offline", session, "connection lost"),
            version=self._version,
            username=settings.username or None,
            password=settings.password or None,
            tls=self._tls.context() if self._tls else None,
            keepalive=self._keepalive,
        )


class _Link:
    """One connection from CONNECT to its end: seeding, deliveries, methods, farewell."""

    def __init__(self, transport: MqttTransport, sink: TwinSink, session: int) -> None:
        self._transport = transport
        self._sink = sink
        self._session = session
        self._topics = transport._settings.topics
        self._connection: PahoConnection
        self._seeded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._retained_report: bytes | None = None
        self._desired: bytes | None = None
        self._has_desired = asyncio.Event()
        self._early: list[Message] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.was_up = False
        self.renewed = False
        self.newest_session = session

    async def serve(self) -> str:
        """Until the connection ends; why. Raises TransportUnavailable when it did not come up."""
        transport = self._transport
        self._connection = PahoConnection(transport._login(self._session), self._on_message)
        await self._connection.open(transport._connect_timeout)
        worker = asyncio.create_task(self._work())
        ends: set[asyncio.Future[Any]] = {worker, self._connection.lost}
        renewal: asyncio.Task[None] | None = None
        if transport._tls is not None:
            interval = transport._settings.watch_interval
            renewal = asyncio.create_task(transport._tls.renewed(interval, _log.warning))
            self._tasks.add(renewal)
            ends.add(renewal)
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if worker.done():
                await worker
            if renewal is not None and renewal.done() and not self._connection.lost.done():
                await renewal
                self.renewed = True
                return "the certificate was renewed"
            return self._connection.lost.result()
        except asyncio.CancelledError:
            await self._say_goodbye()
            raise
        finally:
            transport._ready = None
            self._connection.drop("gave up")
            self._tasks.add(worker)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self) -> None:
        reported = await self._subscribe_and_seed()
        if reported is not None:
            self._transport._reported = reported
        self._transport._ready = self._connection
        self.was_up = True
        _log.info("MQTT %s connected", self._transport._settings.host)
        await self._sink.connected(_NAME, reported)
        early, self._early = self._early, []
        for message in early:
            self._on_command(message)
        while True:
            await self._has_desired.wait()
            self._has_desired.clear()
            body, self._desired = self._desired, None
            if body is not None:
                await self._sink.desired(Desired(_NAME, version_of(body), body))

    async def _subscribe_and_seed(self) -> Mapping[str, Any] | None:
        """Subscribe, give birth, and learn the reported document the broker holds.

        The broker has sent what it retains when our own birth comes back through the
        subscription of {p}/status: messages to one subscriber keep their order.
        """
        connection, timeout = self._connection, self._transport._answer_timeout
        names = ["desired", "cmd/+", "cmd/+/+", "reported", "status"]
        codes = await connection.subscribe([f"{self._topics}/{name}" for name in names], timeout)
        refused = [name for name, code in zip(names, codes, strict=False) if code >= 0x80]
        if "desired" in refused:
            raise TransportUnavailable(
                f"the broker refuses the subscription of {self._topics}/desired; "
                "allow it in the broker's access list"
            )
        await self._publish_status("online", timeout)
        if "reported" in refused or "status" in refused:
            return None
        await asyncio.wait({self._seeded}, timeout=self._transport._seed_timeout)
        if not self._seeded.done():
            return None
        # Our own reports need not come back.
        connection.unsubscribe(f"{self._topics}/reported")
        return read_object(self._retained_report or b"")

    async def _publish_status(self, status: str, timeout: float, reason: str = "") -> None:
        await self._connection.publish(
            f"{self._topics}/status",
            status_document(status, self._session, reason),
            timeout,
            retain=True,
        )

    async def _say_goodbye(self) -> None:
        if self._connection.lost.done():
            return
        try:
            await self._publish_status("offline", _FAREWELL_SECONDS, "stopped")
        except TransportUnavailable:
            return  # then the broker sends the will
        await self._connection.close()

    def _on_message(self, message: Message) -> None:
        if not message.topic.startswith(f"{self._topics}/"):
            return  # a subscription of the stored session under an earlier prefix
        kind = message.topic[len(self._topics) + 1 :]
        if kind == "desired":
            # An empty payload only clears what is retained. Of several documents the newest counts.
            if message.payload:
                self._desired = message.payload
                self._has_desired.set()
        elif kind == "reported":
            if not self._seeded.done():
                self._retained_report = message.payload
        elif kind == "status":
            self._on_status(message.payload)
        elif kind.startswith("cmd/") and not message.retain:
            if self.was_up:
                self._on_command(message)
            elif len(self._early) < _METHODS_AT_ONCE:
                self._early.append(message)

    def _on_status(self, payload: bytes) -> None:
        status, session = read_status(payload)
        if session == self._session:
            if status == "online" and not self._seeded.done():
                self._seeded.set_result(None)
            return
        self.newest_session = max(self.newest_session, session)
        if status == "offline" and self._seeded.done():
            # The will of an earlier connection came late and hides our birth.
            self._start(self._publish_status("online", self._transport._answer_timeout))

    def _on_command(self, message: Message) -> None:
        if len(self._tasks) >= _ANSWERS_AT_ONCE:
            return  # whoever calls so often cannot be told even that
        if len(self._tasks) >= _METHODS_AT_ONCE:
            busy = {"error": f"{_METHODS_AT_ONCE} calls are running; try again later"}
            self._start(self._answer(message, MethodResult(429, busy)))
            return
        self._start(self._call(message))

    def _start(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, TransportUnavailable):
            _log.warning("MQTT answer not sent: %s", error)
            return
        context = {"message": "an MQTT command failed", "exception": error, "task": task}
        asyncio.get_running_loop().call_exception_handler(context)

    async def _call(self, message: Message) -> None:
        name = message.topic[len(self._topics) :].split("/")[2]
        try:
            payload = read_json(message.payload) if message.payload else None
        except ValueError as error:
            result = MethodResult(400, {"error": f"the payload is not JSON: {error}"})
        else:
            result = await self._sink.method(_NAME, name, payload)
        await self._answer(message, result)

    async def _answer(self, message: Message, result: MethodResult) -> None:
        levels = message.topic[len(self._topics) :].split("/")
        properties: dict[str, str] = {}
        if message.response_topic is not None:
            topic = message.response_topic
            if not topic or set(topic) & set("+#"):
                return  # only a broken broker lets this pass
            if topic.startswith(f"{self._topics}/") and not topic.startswith(
                f"{self._topics}/resp/"
            ):
                return  # what may call methods may not write our desired or reported document
            properties["status"] = str(result.status)
        elif len(levels) == 4:
            topic = f"{self._topics}/resp/{levels[3]}/{result.status}"
        else:
            return  # nobody wants to know
        await self._connection.publish(
            topic,
            to_json(result.payload),
            self._transport._answer_timeout,
            correlation_data=message.correlation_data,
            user_properties=properties,
        )
