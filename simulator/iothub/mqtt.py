"""A hub's MQTT side: sessions, and messages that reach one client only.

As Azure's: 3.1.1, QoS 0 and 1, lasting sessions whose subscriptions survive the connection (here
the process too), one connection per client id, the newest, and a close for whatever is not allowed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from ..mqtt.connection import Accepted, Connection, Limits, Refused
from ..mqtt.packets import (
    V311,
    Connect,
    Disconnect,
    Properties,
    Publish,
    ReasonCode,
    Subscribe,
    Subscription,
    Unsubscribe,
)
from ..mqtt.session import NEVER, Done, Session
from ..mqtt.topics import matches
from .client_certificates import PresentedCertificates
from .credentials import Login
from .device_topics import handle_publish, may_subscribe, telemetry_bag
from .devices import ClientId
from .errors import HubError
from .hub import TELEMETRY_LIMIT, Hub

_log = logging.getLogger(__name__)

# Payload, topic with its property bag, and header.
LIMITS = Limits(
    versions=frozenset({V311}),
    max_packet_size=TELEMETRY_LIMIT + 64 * 1024 + 16,
    maximum_qos=1,
)


# 1.5 times this is the hub's longest time-out, 1767 s; no keep alive means the longest too.
_LONGEST_KEEPALIVE = 1178
_PATCH_TOPIC = "$iothub/twin/PATCH/properties/desired/"


class DeviceLink:
    """A client's connection; what `Connection.tag` holds."""

    def __init__(self, login: Login, connection: Connection, session: Session, hub: Hub) -> None:
        self.client = login.client
        self.session = session
        self._expiry = login.expiry
        self._connection = connection
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self._held: list[Publish] = []
        self._delayed: deque[tuple[float, Publish, Done | None]] = deque()
        self._delay_timer: asyncio.TimerHandle | None = None
        self._expiry_timer: asyncio.TimerHandle | None = None
        self.check_expiry()

    def subscribed(self, topic: str) -> bool:
        return self._granted(topic) is not None

    def deliver(self, topic: str, payload: bytes) -> None:
        self.deliver_settled(topic, payload, None)

    def deliver_settled(self, topic: str, payload: bytes, done: Done | None) -> None:
        qos = self._granted(topic)
        if qos is None:
            if done is not None:
                done(None)
            return
        # An answer is worth nothing to the next connection; a notification is repeated to it.
        if topic.startswith(("$iothub/twin/res/", "$iothub/methods/")):
            qos = 0
        publish = Publish(topic, payload, qos=qos)
        faults = self._hub.faults
        if not topic.startswith(_PATCH_TOPIC):
            self._send(publish, done)
        elif not self._held and faults.take("reorder_desired_patches"):
            self._held.append(publish)
        else:
            self._send(publish)
            if faults.take("repeat_desired_patches"):
                self._send(publish)
            while self._held:
                self._send(self._held.pop())

    def check_expiry(self) -> bool:
        """Whether the login is still good; one that is not is dropped."""
        if self._expiry is None:
            return True
        left = self._expiry - self._hub.clock.now().timestamp()
        if left <= 0:
            self.drop("the token expired")
            return False
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
        # Tokens of years are common, and so are clocks that are set meanwhile.
        self._expiry_timer = self._loop.call_later(min(left, 86_400.0), self.check_expiry)
        return True

    def closed(self) -> None:
        """Nothing is to happen any more; what the cloud's queues gave goes back to them."""
        self.session.withdraw(lambda publish: publish.topic.startswith("devices/"))
        for timer in (self._expiry_timer, self._delay_timer):
            if timer is not None:
                timer.cancel()
        while self._delayed:
            _, _, done = self._delayed.popleft()
            if done is not None:
                done(None)

    def _send(self, publish: Publish, done: Done | None = None) -> None:
        delay = self._hub.faults.delay_seconds
        if not delay and not self._delayed:
            self._publish(publish, done)
            return
        due = self._loop.time() + delay
        self._delayed.append(
            (max(due, self._delayed[-1][0] if self._delayed else due), publish, done)
        )
        if self._delay_timer is None:
            self._delay_timer = self._loop.call_at(due, self._send_delayed)

    def _send_delayed(self) -> None:
        self._delay_timer = None
        while self._delayed and self._delayed[0][0] <= self._loop.time():
            _, publish, done = self._delayed.popleft()
            self._publish(publish, done)
        if self._delayed:
            self._delay_timer = self._loop.call_at(self._delayed[0][0], self._send_delayed)

    def _publish(self, publish: Publish, done: Done | None) -> None:
        if not self._connection.publish(publish, done) and done is not None:
            done(None)

    def drop(self, reason: str) -> None:
        self._connection.abort(reason)

    async def wait_closed(self) -> None:
        await self._connection.wait_closed()

    def _granted(self, topic: str) -> int | None:
        subscriptions = self.session.subscriptions.values()
        granted = [one.qos for one in subscriptions if matches(one.topic_filter, topic)]
        return max(granted, default=None)


class DeviceServer:
    """The `Handler` of every device connection of one hub."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.certificates: PresentedCertificates | None = None
        """Of the TLS context in front of this server."""
        self.admits: Callable[[], bool] = lambda: True
        """False while the hub is away: who is just connecting is cut off like everybody."""
        self._sessions: dict[ClientId, Session] = {}
        self._open: set[Connection] = set()

    def connection(self) -> Connection:
        """The server's end of a new connection."""
        return Connection(self, LIMITS, self._open)

    def drop_connections(self, reason: str) -> None:
        """Also those that have not logged in yet."""
        for connection in list(self._open):
            connection.abort(reason)

    async def on_connect(self, connection: Connection, connect: Connect) -> Accepted | Refused:
        hub = self._hub
        if not self.admits():
            connection.abort("the hub is paused")
            return Refused(ReasonCode.NOT_AUTHORIZED, "the hub is paused")
        try:
            password = (connect.password or b"").decode("utf-8", "replace")
            certificate = self.certificates and self.certificates.of(
                connection.peer_certificate_der
            )
            login = hub.authenticate(
                connect.client_id, connect.username, password, certificate or None
            )
        except HubError as error:
            _log.info("refused %r: %s", connect.client_id, error)
            code = (
                ReasonCode.CLIENT_IDENTIFIER_NOT_VALID
                if error.status == 400
                else ReasonCode.NOT_AUTHORIZED
            )
            return Refused(code, str(error))
        client = login.client
        if hub.faults.take("refuse_connects"):
            return Refused(ReasonCode.NOT_AUTHORIZED, "refused on request")
        if hub.faults.take("drop_before_connack"):
            connection.abort("dropped before CONNACK on request")
            return Refused(ReasonCode.NOT_AUTHORIZED, "dropped on request")
        while (old := hub.link(client)) is not None:
            old.drop("another connection took this client id")
            await old.wait_closed()
        forget = hub.faults.take("forget_sessions") or connect.clean_start
        if client not in hub.state.registry:
            return Refused(ReasonCode.NOT_AUTHORIZED, "the identity was deleted meanwhile")
        session, present = self._session(client, forget=forget)
        session.expiry_interval = 0 if connect.clean_start else NEVER
        connection.tag = link = DeviceLink(login, connection, session, hub)
        hub.attach(client, link)
        if hub.faults.take("drop_after_connack"):
            asyncio.get_running_loop().call_soon(connection.close)
        asyncio.get_running_loop().call_soon(hub.c2d.pump, client)
        if login.expiry is not None and hub.faults.take("expire_tokens"):
            asyncio.get_running_loop().call_soon(connection.close)
        keepalive = min(connect.keepalive or _LONGEST_KEEPALIVE, _LONGEST_KEEPALIVE)
        return Accepted(session, present, Properties(server_keep_alive=keepalive))

    def on_publish(self, connection: Connection, publish: Publish) -> int | None:
        link: DeviceLink = connection.tag
        if not link.check_expiry():
            return None
        if self._hub.faults.take("drop_unhandled"):
            connection.abort("dropped before its message was handled on request")
            return None
        try:
            handle_publish(
                self._hub,
                link.client,
                link,
                publish.topic,
                publish.payload,
                retain=publish.retain,
            )
        except HubError as error:
            _log.info("closing %s: %s", link.client, error)
            connection.abort(str(error))
            return None
        if publish.qos and self._hub.faults.take("drop_before_ack"):
            connection.abort("dropped before PUBACK on request")
            return None
        if publish.qos and self._hub.faults.take("lose_acks"):
            return None
        if publish.qos and self._hub.faults.take("drop_after_ack"):
            # The acknowledgement is written when this returns.
            asyncio.get_running_loop().call_soon(connection.close)
        return ReasonCode.SUCCESS

    async def on_subscribe(self, connection: Connection, subscribe: Subscribe) -> Sequence[int]:
        link: DeviceLink = connection.tag
        codes: list[int] = []
        for wanted in subscribe.subscriptions:
            refused = self._hub.faults.take("refuse_subscriptions")
            if not refused and may_subscribe(link.client, wanted.topic_filter):
                granted = Subscription(wanted.topic_filter, min(wanted.qos, LIMITS.maximum_qos))
                link.session.subscriptions[wanted.topic_filter] = granted
                codes.append(granted.qos)
            else:
                codes.append(ReasonCode.UNSPECIFIED_ERROR)
        self._subscriptions_changed(link)
        if self._hub.faults.take("drop_before_suback"):
            connection.abort("dropped before SUBACK on request")
        elif self._hub.faults.take("drop_after_suback"):
            asyncio.get_running_loop().call_soon(connection.close)
        return codes

    async def on_unsubscribe(
        self, connection: Connection, unsubscribe: Unsubscribe
    ) -> Sequence[int]:
        link: DeviceLink = connection.tag
        for topic_filter in unsubscribe.topic_filters:
            link.session.subscriptions.pop(topic_filter, None)
        self._subscriptions_changed(link)
        return [ReasonCode.SUCCESS] * len(unsubscribe.topic_filters)

    async def on_disconnect(
        self, connection: Connection, disconnect: Disconnect | None, reason: str
    ) -> None:
        link: DeviceLink = connection.tag
        link.closed()
        self._hub.detach(link.client, link)
        if disconnect is None:
            self._send_will(link.client, connection.connect)
        if link.session.expiry_interval == 0:
            link.session.end()
            self._sessions.pop(link.client, None)

    def _send_will(self, client: ClientId, connect: Connect) -> None:
        """A will is telemetry, or nothing: nobody else could read it."""
        will = connect.will
        bag = None if will is None else telemetry_bag(client, will.topic)
        if will is None or bag is None or client not in self._hub.state.registry:
            return
        added = {"iothub-MessageType": "Will"}
        if will.retain:
            added["mqtt-retain"] = "true"
        self._hub.accept_telemetry(client, will.payload, bag, added)

    def _session(self, client: ClientId, *, forget: bool) -> tuple[Session, bool]:
        """The client's session and whether it existed."""
        stored = self._hub.state.subscriptions.get(client)
        session = self._sessions.get(client)
        generation = self._hub.state.registry.get(client).generation
        if session is not None and session.owner != generation:
            # Another device of that name had it.
            session.end()
            session = None
        if forget:
            if session is not None:
                session.end()
            self._hub.subscriptions_changed(client, {})
            session = stored = None
        present = session is not None or stored is not None
        if session is None:
            session = Session(str(client))
            session.owner = generation
            session.subscriptions = {f: Subscription(f, qos) for f, qos in (stored or {}).items()}
            self._sessions[client] = session
        return session, present

    def _subscriptions_changed(self, link: DeviceLink) -> None:
        lasting = link.session.expiry_interval > 0
        filters = {f: one.qos for f, one in link.session.subscriptions.items()}
        self._hub.subscriptions_changed(link.client, filters if lasting else {})
