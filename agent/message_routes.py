"""The routes of `$edgeHub` for messages that leave this device: which go upstream, how urgently.

Sources: "Learn how to deploy modules and establish routes in IoT Edge" and "IoT Hub message routing
query syntax". What of them has no effect here is named, never passed over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .document import joined
from .edge_hub import EdgeHub, HubRoute
from .message_condition import Condition, Message, UnsupportedCondition, parse_condition

UPSTREAM = "$upstream"
_MODULES = "/messages/modules/"
_SOURCE = re.compile(
    r"/\*|/messages/\*|/messages/modules/\*"
    r"|/messages/modules/[\w$-]+/\*|/messages/modules/[\w$-]+/outputs/[^/*]+"
    r"|/messages/modules/[\w$-]+/outputs/\*",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Delivery:
    """How a message goes upstream; None where the route leaves it to the message or the outbox."""

    route: str
    priority: int | None
    ttl_seconds: float | None


@dataclass(frozen=True, slots=True)
class _Route:
    name: str
    prefix: str
    exact: bool
    condition: Condition
    delivery: Delivery

    def takes(self, message: Message) -> bool:
        source = message.source
        fits = source == self.prefix if self.exact else source.startswith(self.prefix)
        return fits and self.condition(message) is True


@dataclass(frozen=True, slots=True)
class MessageRoutes:
    """Of one manifest, the most urgent first; `unsupported` are (path, reason)."""

    routes: tuple[_Route, ...] = ()
    unsupported: tuple[tuple[str, str], ...] = ()

    def upstream(self, message: Message) -> Delivery | None:
        """Of the routes upstream that take `message`, the most urgent; None where none does."""
        return next((route.delivery for route in self.routes if route.takes(message)), None)


def compile_routes(hub: EdgeHub | None) -> MessageRoutes:
    routes: list[_Route] = []
    unsupported: list[tuple[str, str]] = []
    for route in () if hub is None else hub.routes:
        try:
            routes.append(_compiled(route))
        except UnsupportedCondition as error:
            unsupported.append((joined("$edgeHub.routes", route.name), str(error)))
    routes.sort(key=lambda route: _urgency(route.delivery))
    return MessageRoutes(tuple(routes), tuple(unsupported))


def _compiled(route: HubRoute) -> _Route:
    if route.sink != UPSTREAM:
        raise UnsupportedCondition(
            "from module to module: modules do not connect to this agent; only $upstream is served"
        )
    source = route.source
    if not _SOURCE.fullmatch(source):
        raise UnsupportedCondition(f"nothing here sends from {source[:128]}")
    delivery = Delivery(
        route.name,
        route.priority,
        # As in edgeHub, 0 stands for the section's own time to live.
        float(route.ttl_seconds) if route.ttl_seconds else None,
    )
    return _Route(
        route.name,
        source.removesuffix("*"),
        not source.endswith("*"),
        parse_condition(route.condition),
        delivery,
    )


def _urgency(delivery: Delivery) -> tuple[int, str]:
    # Routes without a priority come after all that have one.
    return 10 if delivery.priority is None else delivery.priority, delivery.route
