"""Who gets a message: matching subscriptions, shared ones in turn, retained ones for newcomers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from .connection import Connection
from .packets import NO_PROPERTIES, Publish
from .retained import RetainedMessages
from .session import Session
from .store import Store
from .subscriptions import Entry, SubscriptionTree
from .topics import split_shared


class Router:
    """`live` holds the connections by client id; with a `store` retained messages outlive us."""

    def __init__(self, live: Mapping[str, Connection]) -> None:
        self.tree = SubscriptionTree()
        self.retained = RetainedMessages()
        self.store: Store | None = None
        self._live = live
        self._turn = 0

    def clear(self) -> None:
        self.tree = SubscriptionTree()
        self.retained.restore({})
        self.store = None

    def route(self, publish: Publish, origin: Session | None) -> int:
        """Keep and hand out a message; how many sessions it goes to."""
        if publish.retain:
            publish = replace(publish, dup=False, packet_id=0)
            kept = self.retained.keep(publish, asyncio.get_running_loop().time())
            if self.store is not None:
                self.store.retain(publish.topic, kept)
        plain, groups = self.tree.match(publish.topic)
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
        if identifiers or properties is not NO_PROPERTIES:
            properties = replace(properties, subscription_identifiers=identifiers)
        retain = retained or (publish.retain and as_published)
        copy = Publish(publish.topic, publish.payload, qos, retain, False, 0, properties)
        connection = self._live.get(session.client_id)
        # A connection that ended and was not cleared away yet takes nothing any more.
        if connection is not None and connection.session is session and connection.is_open:
            # A new subscriber gets all that is kept, however much more than may queue up.
            connection.publish(copy, limited=not retained)
        elif qos:
            session.enqueue(copy, asyncio.get_running_loop().time())

    def send_retained(self, entry: Entry) -> None:
        share, topic_filter = split_shared(entry.subscription.topic_filter)
        if share:
            return
        for publish in self.retained.matching(topic_filter, asyncio.get_running_loop().time()):
            self._deliver(publish, [entry], retained=True)
