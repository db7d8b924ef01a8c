"""A plain MQTT broker (3.1.1 and 5.0) in one event loop, in memory; for tests and simulations.

    broker = Broker(users={"edge-1": "secret"})
    await broker.start()
    ... broker.port ...
    await broker.stop()

QoS 0 to 2, retained messages, last wills (also delayed), sessions with expiry and bounded queues,
wildcard and shared subscriptions. Everything is forgotten with the object.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import ssl as ssl_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .connection import Accepted, Connection, Limits, Refused
from .packets import (
    NO_PROPERTIES,
    V5,
    Connect,
    Disconnect,
    Properties,
    Publish,
    ReasonCode,
    Subscribe,
    Unsubscribe,
    Will,
)
from .session import NEVER, Session
from .subscriptions import Entry, SubscriptionTree
from .topics import matches, split_shared

_EXPIRES_NEVER = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class _Retained:
    publish: Publish
    expires_at: float


class Broker:
    """See the module. `port` 0 lets the system choose; it is kept over pause and resume.

    `users`: passwords by user name, None lets everybody in. `ssl`: a server context; with
    `verify_mode=CERT_REQUIRED` it also authenticates clients by certificate.
    `queue_limit` messages wait for a client that is away; newer ones are dropped.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        users: Mapping[str, str] | None = None,
        ssl: ssl_module.SSLContext | None = None,
        limits: Limits | None = None,
        queue_limit: int = 1000,
    ) -> None:
        self.host = host
        self._port = port
        self._users = users
        self._ssl = ssl
        self._limits = limits or Limits(topic_alias_maximum=16)
        self._queue_limit = queue_limit
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._live: dict[str, Connection] = {}
        self._sessions: dict[str, Session] = {}
        self._expiries: dict[str, asyncio.TimerHandle] = {}
        self._wills: dict[str, tuple[asyncio.TimerHandle, Will]] = {}
        self._tree = SubscriptionTree()
        self._retained: dict[str, _Retained] = {}
        self._turn = 0
        self._stopping = False

    @property
    def port(self) -> int:
        return self._port

    @property
    def client_ids(self) -> frozenset[str]:
        """Clients connected now."""
        return frozenset(self._live)

    @property
    def retained(self) -> dict[str, bytes]:
        """Payloads of the retained messages by topic."""
        return {topic: kept.publish.payload for topic, kept in self._retained.items()}

    async def start(self) -> None:
        """Raises OSError when the address cannot be had."""
        self._stopping = False
        await self.resume()

    async def stop(self) -> None:
        """Disconnect everybody and close the port; no wills are sent."""
        self._stopping = True
        server = self._server
        await self.pause()
        open_connections = list(self._connections)
        for connection in open_connections:
            connection.close(ReasonCode.SERVER_SHUTTING_DOWN)
        for connection in open_connections:
            await connection.wait_closed()
        if server is not None:
            await server.wait_closed()
        for timer in [*self._expiries.values(), *(timer for timer, _ in self._wills.values())]:
            timer.cancel()
        self._expiries.clear()
        self._wills.clear()

    async def pause(self) -> None:
        """Stop listening; connections stay (`drop_connections` cuts them)."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def resume(self) -> None:
        """Listen again on the same port."""
        if self._server is None:
            self._server = await asyncio.get_running_loop().create_server(
                self._new_connection, self.host, self._port, ssl=self._ssl
            )
            self._port = self._server.sockets[0].getsockname()[1]

    def drop_connections(self) -> None:
        """Cut every connection as a failing network does; wills are sent."""
        for connection in list(self._connections):
            connection.abort()

    def publish(self, topic: str, payload: bytes, qos: int = 0, retain: bool = False) -> None:
        """Publish as the broker itself. Raises ValueError for an invalid topic."""
        self._route(Publish(topic, payload, qos, retain), None)

    # Handler

    async def on_connect(self, connection: Connection, connect: Connect) -> Accepted | Refused:
        if (refusal := self._authenticate(connect)) is not None:
            return refusal
        client_id = connect.client_id or f"auto-{secrets.token_hex(8)}"
        while (older := self._live.get(client_id)) is not None:
            older.close(ReasonCode.SESSION_TAKEN_OVER)
            await older.wait_closed()
        # No await from here on: two newcomers with one id must not both get past the loop.
        if (timer := self._expiries.pop(client_id, None)) is not None:
            timer.cancel()
        session = self._sessions.get(client_id)
        if session is not None and connect.clean_start:
            self._end_session(session)
            session = None
        self._cancel_will(client_id)
        present = session is not None
        if session is None:
            session = self._sessions[client_id] = Session(client_id, self._queue_limit)
        session.expiry_interval = _expiry(connect)
        self._live[client_id] = connection
        assigned = None if connect.client_id else client_id
        return Accepted(session, present, Properties(assigned_client_identifier=assigned))

    async def on_publish(self, connection: Connection, publish: Publish) -> int | None:
        receivers = self._route(publish, connection.session)
        if not receivers and publish.qos and connection.version == V5:
            return ReasonCode.NO_MATCHING_SUBSCRIBERS
        return ReasonCode.SUCCESS

    async def on_subscribe(self, connection: Connection, subscribe: Subscribe) -> Sequence[int]:
        session = connection.session
        assert session is not None
        identifiers = subscribe.properties.subscription_identifiers
        for subscription in subscribe.subscriptions:
            entry = Entry(session, subscription, identifiers[0] if identifiers else None)
            is_new = self._tree.add(entry)
            session.subscriptions[subscription.topic_filter] = subscription
            if subscription.retain_handling == 0 or (subscription.retain_handling == 1 and is_new):
                self._send_retained(entry)
        return [subscription.qos for subscription in subscribe.subscriptions]

    async def on_unsubscribe(
        self, connection: Connection, unsubscribe: Unsubscribe
    ) -> Sequence[int]:
        session = connection.session
        assert session is not None
        codes = []
        for topic_filter in unsubscribe.topic_filters:
            session.subscriptions.pop(topic_filter, None)
            found = self._tree.remove(session.client_id, topic_filter)
            codes.append(ReasonCode.SUCCESS if found else ReasonCode.NO_SUBSCRIPTION_EXISTED)
        return codes

    async def on_disconnect(
        self, connection: Connection, disconnect: Disconnect | None, reason: str
    ) -> None:
        session = connection.session
        assert session is not None
        client_id = session.client_id
        del self._live[client_id]
        if disconnect is not None:
            later = disconnect.properties.session_expiry_interval
            if later is not None:
                session.expiry_interval = NEVER if later == _EXPIRES_NEVER else later
        will = connection.connect.will
        farewell = disconnect is not None and disconnect.reason_code == ReasonCode.SUCCESS
        if will is not None and not farewell and not self._stopping:
            self._schedule_will(client_id, will, session.expiry_interval)
        if session.expiry_interval == 0:
            self._end_session(session)
        elif session.expiry_interval != NEVER and not self._stopping:
            self._expiries[client_id] = asyncio.get_running_loop().call_later(
                session.expiry_interval, self._expire, session
            )

    # Inside

    def _new_connection(self) -> Connection:
        return Connection(self, self._limits, self._connections)

    def _authenticate(self, connect: Connect) -> Refused | None:
        if self._users is None:
            return None
        if connect.username is None:
            return Refused(ReasonCode.NOT_AUTHORIZED, "a user name and password are required")
        known = self._users.get(connect.username)
        # Compared in any case, so that time does not tell which names exist.
        good = hmac.compare_digest((known or "").encode(), connect.password or b"")
        if known is None or not good:
            return Refused(ReasonCode.BAD_USER_NAME_OR_PASSWORD, "wrong user name or password")
        return None

    def _route(self, publish: Publish, origin: Session | None) -> int:
        """Keep and hand out a message; how many sessions it goes to."""
        publish = replace(publish, dup=False, packet_id=0)
        if publish.retain:
            self._retain(publish)
        plain, groups = self._tree.match(publish.topic)
        by_session: dict[str, list[Entry]] = {}
        for entry in plain:
            if not (entry.subscription.no_local and entry.session is origin):
                by_session.setdefault(entry.session.client_id, []).append(entry)
        for entries in by_session.values():
            self._deliver(publish, entries)
        for members in groups:
            self._deliver(publish, [self._next_member(members)])
        return len(by_session) + len(groups)

    def _next_member(self, members: Mapping[str, Entry]) -> Entry:
        """Round robin, connected members first [MQTT-4.8.2]."""
        self._turn += 1
        awake = [entry for client_id, entry in members.items() if client_id in self._live]
        candidates = awake or list(members.values())
        return candidates[self._turn % len(candidates)]

    def _deliver(self, publish: Publish, entries: Sequence[Entry], retained: bool = False) -> None:
        """One copy for all matching subscriptions of a session, with their highest QoS."""
        session = entries[0].session
        qos = min(publish.qos, max(entry.subscription.qos for entry in entries))
        as_published = any(entry.subscription.retain_as_published for entry in entries)
        identifiers = tuple(e.identifier for e in entries if e.identifier is not None)
        properties = publish.properties
        if identifiers or properties != NO_PROPERTIES:
            properties = replace(properties, subscription_identifiers=identifiers)
        copy = replace(
            publish,
            qos=qos,
            retain=retained or (publish.retain and as_published),
            properties=properties,
        )
        connection = self._live.get(session.client_id)
        if connection is not None and connection.session is session:
            connection.publish(copy)
        elif qos:
            session.enqueue(copy, asyncio.get_running_loop().time())

    def _retain(self, publish: Publish) -> None:
        if not publish.payload:
            self._retained.pop(publish.topic, None)
            return
        expiry = publish.properties.message_expiry_interval
        now = asyncio.get_running_loop().time()
        self._retained[publish.topic] = _Retained(
            publish, NEVER if expiry is None else now + expiry
        )

    def _send_retained(self, entry: Entry) -> None:
        share, topic_filter = split_shared(entry.subscription.topic_filter)
        if share:
            return
        now = asyncio.get_running_loop().time()
        for topic, kept in list(self._retained.items()):
            if kept.expires_at <= now:
                del self._retained[topic]
            elif matches(topic_filter, topic):
                publish = kept.publish
                if kept.expires_at != NEVER:
                    left = max(1, int(kept.expires_at - now))
                    properties = replace(publish.properties, message_expiry_interval=left)
                    publish = replace(publish, properties=properties)
                self._deliver(publish, [entry], retained=True)

    def _schedule_will(self, client_id: str, will: Will, session_expiry: float) -> None:
        delay = min(will.properties.will_delay_interval or 0, session_expiry)
        if delay == 0:
            self._publish_will(will)
            return
        timer = asyncio.get_running_loop().call_later(delay, self._will_due, client_id)
        self._wills[client_id] = (timer, will)

    def _will_due(self, client_id: str) -> None:
        _, will = self._wills.pop(client_id)
        self._publish_will(will)

    def _cancel_will(self, client_id: str) -> None:
        if (waiting := self._wills.pop(client_id, None)) is not None:
            waiting[0].cancel()

    def _publish_will(self, will: Will) -> None:
        properties = replace(will.properties, will_delay_interval=None)
        self._route(
            Publish(will.topic, will.payload, will.qos, will.retain, False, 0, properties), None
        )

    def _expire(self, session: Session) -> None:
        del self._expiries[session.client_id]
        self._end_session(session)

    def _end_session(self, session: Session) -> None:
        for topic_filter in list(session.subscriptions):
            self._tree.remove(session.client_id, topic_filter)
        session.end()
        del self._sessions[session.client_id]
        # A delayed will is due when its session ends [MQTT-3.1.3-9].
        if (waiting := self._wills.pop(session.client_id, None)) is not None:
            waiting[0].cancel()
            self._publish_will(waiting[1])


def _expiry(connect: Connect) -> float:
    """Seconds the session outlives its connection."""
    if connect.version != V5:
        return 0 if connect.clean_start else NEVER
    interval = connect.properties.session_expiry_interval or 0
    return NEVER if interval == _EXPIRES_NEVER else interval
