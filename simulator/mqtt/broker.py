"""A plain MQTT broker (3.1.1 and 5.0) in one event loop; for tests and simulations.

    broker = Broker(users={"edge-1": "secret"}, grants=[Grant("devices/%u/#")])
    await broker.start()
    ... broker.port ...
    await broker.stop()

QoS 0 to 2, retained messages, last wills (also delayed), sessions with expiry and bounded queues,
wildcard and shared subscriptions, TLS, users by password or client certificate, access lists,
websockets. With a folder, sessions and messages survive the process; without, the object.
"""

from __future__ import annotations

import asyncio
import secrets
import ssl as ssl_module
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from ...agent.clock import Clock
from .access import AccessList, Grant, identify
from .connection import Accepted, Connection, Limits, Refused
from .packets import (
    V5,
    Connect,
    Disconnect,
    Properties,
    Publish,
    ReasonCode,
    Subscribe,
    Unsubscribe,
)
from .retained import RetainedMessages
from .router import Router
from .session import NEVER, Session, expiry_seconds, session_expiry
from .store import Store, StoreUnreadable
from .subscriptions import Entry, filter_size
from .topics import too_deep, topic_problem
from .websocket import WebsocketListener
from .wills import Wills

_RETAINED_BYTES = 256 * 1024 * 1024
_FILTER_BYTES = 4 * 1024 * 1024
_CLOSE_SECONDS = 2.0


class Broker:
    """See the module. `port` 0 lets the system choose; it is kept over pause and resume.

    `users`: passwords by user name, None lets everybody in. `ssl`: a server context; a client
    certificate that it verified names the user by its common name and stands for the password
    (`verify_mode` CERT_REQUIRED: only such clients; CERT_OPTIONAL: also those with passwords).
    `grants`: what each user may do, None means everything; a will needs its grant at CONNECT.
    `folder`: where sessions, queued and retained messages are kept, None keeps them in memory.
    `websockets`: serve `/mqtt` on `websocket_port` too. `queue_limit` messages wait for a client
    that is away; newer ones are dropped. `retained_limit` topics may have a retained message, and a
    client `subscription_limit` subscriptions; 0x97 refuses what is beyond. `response_prefix`: where
    a client that asks for response information is told to have its responses sent, followed by its
    id.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        users: Mapping[str, str] | None = None,
        ssl: ssl_module.SSLContext | None = None,
        limits: Limits | None = None,
        queue_limit: int = 1000,
        retained_limit: int = 100_000,
        subscription_limit: int = 1000,
        grants: Sequence[Grant] | None = None,
        folder: Path | None = None,
        websockets: bool = False,
        websocket_port: int = 0,
        response_prefix: str = "responses/",
        clock: Clock | None = None,
    ) -> None:
        self.host = host
        self._port = port
        self._users = users
        self._ssl = ssl
        self._limits = limits or Limits(topic_alias_maximum=16)
        self._queue_limit = queue_limit
        self._subscription_limit = subscription_limit
        self._access = None if grants is None else AccessList(grants)
        self._folder = folder
        self._response_prefix = response_prefix
        self._clock = clock
        self._store: Store | None = None
        self._server: asyncio.Server | None = None
        self._websockets = (
            WebsocketListener(self._new_connection, host, websocket_port, ssl=ssl)
            if websockets
            else None
        )
        self._connections: set[Connection] = set()
        self._live: dict[str, Connection] = {}
        self._sessions: dict[str, Session] = {}
        self._expiries: dict[str, asyncio.TimerHandle] = {}
        self._wills = Wills(self._send_will)
        self._router = Router(self._live, RetainedMessages(retained_limit, _RETAINED_BYTES))
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def port(self) -> int:
        return self._port

    @property
    def websocket_port(self) -> int:
        """Raises RuntimeError when the broker was made without websockets."""
        if self._websockets is None:
            raise RuntimeError("this broker has no websockets")
        return self._websockets.port

    @property
    def client_ids(self) -> frozenset[str]:
        """Clients connected now."""
        return frozenset(self._live)

    @property
    def retained(self) -> dict[str, bytes]:
        """Payloads of the retained messages by topic."""
        now = 0.0 if self._loop is None else self._loop.time()
        return self._router.retained.payloads(now)

    async def start(self) -> None:
        """Raises OSError when the address cannot be had, StoreUnreadable for a bad folder; what is
        in it stays as it is.
        """
        self._stopping = False
        self._loop = loop = asyncio.get_running_loop()
        if self._folder is not None and self._store is None:
            store = Store(self._folder, self._clock, lambda: loop.call_soon(store.commit))
            try:
                self._restore(store)
            except StoreUnreadable:
                store.abandon()
                self._forget()
                raise
            self._store = self._router.store = store
        for client_id, session in self._sessions.items():
            if client_id not in self._live and client_id not in self._expiries:
                self._expire_after(session, session.expiry_interval)
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
        if self._websockets is not None:
            await self._websockets.stop()
        if server is not None:
            # From Python 3.12 this also waits for connections that are still shaking hands.
            closed = asyncio.ensure_future(server.wait_closed())
            await asyncio.wait({closed}, timeout=_CLOSE_SECONDS)
            closed.cancel()
        self._wills.clear()
        self._cancel_expiries()
        if self._store is not None:
            self._store.close()
            self._store = None
            self._forget()

    async def pause(self) -> None:
        """Stop listening; connections stay (`drop_connections` cuts them)."""
        if self._websockets is not None:
            await self._websockets.pause()
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
        if self._websockets is not None:
            await self._websockets.resume()

    def drop_connections(self) -> None:
        """Cut every connection as a failing network does; wills are sent."""
        for connection in list(self._connections):
            connection.abort()

    def publish(self, topic: str, payload: bytes, qos: int = 0, retain: bool = False) -> None:
        """Publish as the broker itself. Raises ValueError for an invalid topic."""
        if problem := topic_problem(topic):
            raise ValueError(f"cannot publish to {topic!r}: {problem}")
        self._router.route(Publish(topic, payload, qos, retain), None)

    # Handler

    async def on_connect(self, connection: Connection, connect: Connect) -> Accepted | Refused:
        if self._stopping:
            # It was still shaking hands when the others were told.
            return Refused(ReasonCode.SERVER_UNAVAILABLE, "the broker is stopping")
        user = identify(self._users, connection.peer_certificate, connect)
        if isinstance(user, Refused):
            return user
        client_id = connect.client_id or f"auto-{secrets.token_hex(8)}"
        if connect.will and not self._may_publish(user, client_id, connect.will.topic):
            return Refused(ReasonCode.NOT_AUTHORIZED, "the will's topic is not granted")
        if connect.will and too_deep(connect.will.topic):
            return Refused(ReasonCode.TOPIC_NAME_INVALID, "the will's topic has too many levels")
        while (older := self._live.get(client_id)) is not None:
            if older.tag != user:
                break
            older.close(ReasonCode.SESSION_TAKEN_OVER)
            await older.wait_closed()
        # No await from here on: two newcomers with one id must not both get past the loop.
        session = self._sessions.get(client_id)
        if session is not None and session.owner != user:
            # Else a client id would be enough to read another user's messages.
            return Refused(
                ReasonCode.CLIENT_IDENTIFIER_NOT_VALID, "the client id belongs to another user"
            )
        if (timer := self._expiries.pop(client_id, None)) is not None:
            timer.cancel()
        if session is not None and connect.clean_start:
            self._end_session(session)
            session = None
        self._wills.cancel(client_id)
        present = session is not None
        expiry = session_expiry(connect)
        if session is None:
            journal = self._store if expiry else None
            session = Session(client_id, self._queue_limit, journal=journal)
            session.owner = user
            self._sessions[client_id] = session
        session.expiry_interval = expiry
        if self._store is not None and (expiry or present):
            self._store.save_session(client_id, user, expiry, here=True)
        connection.tag = user
        self._live[client_id] = connection
        properties = Properties(
            assigned_client_identifier=None if connect.client_id else client_id,
            response_information=f"{self._response_prefix}{client_id}"
            if connect.properties.request_response_information
            else None,
        )
        return Accepted(session, present, properties)

    def on_publish(self, connection: Connection, publish: Publish) -> int | None:
        if not self._may_publish(connection.tag, connection.client_id, publish.topic):
            # 3.1.1 has no way to say so: it is acknowledged and dropped [3.1.1 MQTT-3.3.5-2].
            return ReasonCode.NOT_AUTHORIZED
        if too_deep(publish.topic):
            return ReasonCode.TOPIC_NAME_INVALID
        if publish.retain and not self._has_room(publish):
            return ReasonCode.QUOTA_EXCEEDED
        receivers = self._router.route(publish, connection.session)
        if not receivers and publish.qos and connection.version == V5:
            return ReasonCode.NO_MATCHING_SUBSCRIBERS
        return ReasonCode.SUCCESS

    async def on_subscribe(self, connection: Connection, subscribe: Subscribe) -> Sequence[int]:
        session = connection.session
        assert session is not None
        identifiers = subscribe.properties.subscription_identifiers
        codes: list[int] = []
        room = _FILTER_BYTES - sum(map(filter_size, session.subscriptions))
        for wanted in subscribe.subscriptions:
            size = 0
            if wanted.topic_filter not in session.subscriptions:
                size = filter_size(wanted.topic_filter)
                full = len(session.subscriptions) >= self._subscription_limit
                if full or size > room or too_deep(wanted.topic_filter):
                    codes.append(ReasonCode.QUOTA_EXCEEDED)
                    continue
            if not self._may_subscribe(session, wanted.topic_filter):
                codes.append(ReasonCode.NOT_AUTHORIZED)
                continue
            granted = replace(wanted, qos=min(wanted.qos, self._limits.maximum_qos))
            entry = Entry(session, granted, identifiers[0] if identifiers else None)
            is_new = self._router.tree.add(entry)
            session.subscriptions[granted.topic_filter] = granted
            room -= size
            if self._store is not None and session.expiry_interval:
                self._store.subscribe(session.client_id, granted, entry.identifier)
            if granted.retain_handling == 0 or (granted.retain_handling == 1 and is_new):
                self._router.send_retained(entry)
            codes.append(granted.qos)
        return codes

    async def on_unsubscribe(
        self, connection: Connection, unsubscribe: Unsubscribe
    ) -> Sequence[int]:
        session = connection.session
        assert session is not None
        codes = []
        for topic_filter in unsubscribe.topic_filters:
            session.subscriptions.pop(topic_filter, None)
            if self._store is not None:
                self._store.unsubscribe(session.client_id, topic_filter)
            found = self._router.tree.remove(session.client_id, topic_filter)
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
                session.expiry_interval = expiry_seconds(later)
        will = connection.connect.will
        farewell = disconnect is not None and disconnect.reason_code == ReasonCode.SUCCESS
        if will is not None and not farewell and not self._stopping:
            self._wills.schedule(client_id, will, session.expiry_interval)
        if session.expiry_interval == 0:
            self._end_session(session)
            return
        if self._store is not None:
            self._store.save_session(client_id, session.owner, session.expiry_interval, here=False)
        if not self._stopping:
            self._expire_after(session, session.expiry_interval)

    # Inside

    def _has_room(self, publish: Publish) -> bool:
        return self._router.retained.has_room(publish, asyncio.get_running_loop().time())

    def _send_will(self, will: Publish) -> None:
        if will.retain and not self._has_room(will):
            will = replace(will, retain=False)
        self._router.route(will, None)

    def _new_connection(self) -> Connection:
        before_write = None if self._store is None else self._store.commit
        return Connection(self, self._limits, self._connections, before_write)

    def _cancel_expiries(self) -> None:
        for timer in self._expiries.values():
            timer.cancel()
        self._expiries.clear()

    def _forget(self) -> None:
        """What a store has, or was to give."""
        self._cancel_expiries()
        self._sessions.clear()
        self._router.clear()

    def _restore(self, store: Store) -> None:
        self._router.retained.restore(store.retained())
        self._sessions.clear()
        for stored in store.sessions():
            left = stored.expiry_interval - stored.left_for
            if left <= 0:
                store.remove_session(stored.client_id)
                continue
            session = self._sessions[stored.client_id] = stored.revive(self._queue_limit, store)
            for topic_filter, (subscription, identifier) in stored.subscriptions.items():
                # What is not granted any more ends with the broker that granted it.
                if self._may_subscribe(session, topic_filter):
                    self._router.tree.add(Entry(session, subscription, identifier))
                else:
                    del session.subscriptions[topic_filter]
                    store.unsubscribe(session.client_id, topic_filter)
            self._expire_after(session, left)

    def _may_publish(self, user: str | None, client_id: str, topic: str) -> bool:
        return self._access is None or self._access.may_publish(user, client_id, topic)

    def _may_subscribe(self, session: Session, topic_filter: str) -> bool:
        return self._access is None or self._access.may_subscribe(
            session.owner, session.client_id, topic_filter
        )

    def _expire_after(self, session: Session, seconds: float) -> None:
        if seconds != NEVER:
            self._expiries[session.client_id] = asyncio.get_running_loop().call_later(
                seconds, self._expire, session
            )

    def _expire(self, session: Session) -> None:
        del self._expiries[session.client_id]
        self._end_session(session)

    def _end_session(self, session: Session) -> None:
        for topic_filter in list(session.subscriptions):
            self._router.tree.remove(session.client_id, topic_filter)
        session.end()
        if self._store is not None:
            self._store.remove_session(session.client_id)
        del self._sessions[session.client_id]
        self._wills.session_ended(session.client_id)
