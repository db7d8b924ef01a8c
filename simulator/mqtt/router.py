"""Who gets a message: matching subscriptions, shared ones in turn, retained ones for newcomers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from msgspec.structs import replace

from .connection import Connection
from .packets import NO_PROPERTIES, Publish
from .retained import RetainedMessages
from .session import Session
from .store import Store
from .subscriptions import Entry, Receiver, SubscriptionTree
from .topics import split_shared


class Router:
    """`live` holds the connections by client id; with a `store` retained messages outlive us."""

    def __init__(self, live: Mapping[str, Connection], retained: RetainedMessages) -> None:
        self.tree = SubscriptionTree()
        self.retained = retained
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
        found = self.tree.match(publish.topic)
        receivers = found.others(origin) if found.no_local else found.receivers
        for one in receivers:
            self._deliver(publish, one)
        for members in found.groups:
            self._deliver(publish, self._next_member(members).receiver)
        return len(receivers) + len(found.groups)

    def _next_member(self, members: Mapping[str, Entry]) -> Entry:
        """Round robin, connected members first [MQTT-4.8.2]."""
        self._turn += 1
        awake = [entry for client_id, entry in members.items() if client_id in self._live]
        candidates = awake or list(members.values())
        return candidates[self._turn % len(candidates)]

    def _deliver(self, publish: Publish, to: Receiver, retained: bool = False) -> None:
        session = to.session
        qos = min(publish.qos, to.qos)
        retain = retained or (publish.retain and to.as_published)
        properties = publish.properties
        if to.identifiers or properties is not NO_PROPERTIES:
            properties = replace(properties, subscription_identifiers=to.identifiers)
        if (
            qos != publish.qos
            or retain != publish.retain
            or publish.dup
            or properties is not publish.properties
        ):
            publish = Publish(publish.topic, publish.payload, qos, retain, False, 0, properties)
        connection = self._live.get(session.client_id)
        # A connection that ended and was not cleared away yet takes nothing any more.
        if connection is not None and connection.session is session and connection.is_open:
            # A new subscriber gets all that is kept, however much more than may queue up.
            connection.deliver(publish, limited=not retained)
        elif qos:
            session.enqueue(publish, asyncio.get_running_loop().time())

    def send_retained(self, entry: Entry) -> None:
        share, topic_filter = split_shared(entry.subscription.topic_filter)
        if share:
            return
        for publish in self.retained.matching(topic_filter, asyncio.get_running_loop().time()):
            self._deliver(publish, entry.receiver, retained=True)
