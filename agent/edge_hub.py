"""The `$edgeHub` section of a manifest: message routes and store-and-forward (schema 1.0-1.3)."""

from __future__ import annotations

import re

import msgspec

from .document import UNKNOWN_SCHEMA, Node, shown

DEFAULT_TTL_SECONDS = 7200
MAX_TTL_SECONDS = 4294967295

_SCHEMA = re.compile(r"1\.[0-3](\.[0-9]{1,9}){0,2}", re.ASCII)
_ROUTE_NAME = re.compile(r"[^.$#\s\x00-\x1f\x7f-\x9f]{1,512}")
_FROM = re.compile(r"FROM\s+(?P<source>/\S*)\s+", re.IGNORECASE)
_WHERE = re.compile(r"WHERE\s", re.IGNORECASE)
_INTO = re.compile(r"\bINTO\s", re.IGNORECASE)
_ENDPOINT = re.compile(
    r"BrokeredEndpoint\(\s*(?P<quote>[\"'])/modules/(?P<module>[A-Za-z0-9_-]+)/inputs/"
    r"(?P<input>[^\"'/\s]+)(?P=quote)\s*\)",
    re.IGNORECASE,
)


class HubRoute(msgspec.Struct, frozen=True):
    """One route. `sink` is "$upstream" or "modules/<m>/inputs/<i>"; `condition` "" matches all.

    `priority` 0 is the highest, 9 the lowest given, None comes after them. `ttl_seconds` is None
    where the section's own time to live counts.
    """

    name: str
    source: str
    sink: str
    condition: str = ""
    priority: int | None = None
    ttl_seconds: int | None = None


class EdgeHub(msgspec.Struct, frozen=True):
    """Routes sorted by name; `ttl_seconds` None keeps messages for ever (a negative number)."""

    schema_version: str
    routes: tuple[HubRoute, ...] = ()
    ttl_seconds: int | None = DEFAULT_TTL_SECONDS
    max_size_bytes: int | None = None
    mqtt_broker: bool = False


def parse_edge_hub(desired: Node) -> EdgeHub:
    """Read the desired properties of `$edgeHub`.

    Raises ManifestError 412 for a schema version beyond 1.3 and 400 for anything else.
    """
    # Before anything else: another schema may look different everywhere.
    version_node = desired.fields(("schemaVersion",), extra=r"[\s\S]*")["schemaVersion"]
    version = version_node.word()
    if not _SCHEMA.fullmatch(version):
        raise version_node.fail(
            f"schema version {shown(version)} is not supported; expected 1.0 to 1.3",
            UNKNOWN_SCHEMA,
        )
    fields = desired.fields(
        ("schemaVersion", "routes"),
        ("storeAndForwardConfiguration", "mqttBroker"),
        extra=r"\$(version|metadata)",
    )
    ttl: int | None = DEFAULT_TTL_SECONDS
    size: int | None = None
    if "storeAndForwardConfiguration" in fields:
        ttl, size = _store_and_forward(fields["storeAndForwardConfiguration"])
    broker = fields.get("mqttBroker")
    return EdgeHub(
        schema_version=version,
        routes=tuple(
            sorted(
                (_route(name, node) for name, node in fields["routes"].members().items()),
                key=lambda route: route.name,
            )
        ),
        ttl_seconds=ttl,
        max_size_bytes=size,
        mqtt_broker=bool(broker is not None and broker.members()),
    )


def _store_and_forward(node: Node) -> tuple[int | None, int | None]:
    fields = node.fields(("timeToLiveSecs",), ("storeLimits",))
    ttl = fields["timeToLiveSecs"].integer(-(2**31), MAX_TTL_SECONDS)
    limits = fields.get("storeLimits")
    size = None if limits is None else limits.fields(("maxSizeBytes",))["maxSizeBytes"]
    return None if ttl < 0 else ttl, None if size is None else size.integer(1, 2**63 - 1)


def _route(name: str, node: Node) -> HubRoute:
    if not _ROUTE_NAME.fullmatch(name):
        raise node.fail(f"a route name has no '.', '$', '#' and no blank; found {shown(name)}")
    if isinstance(node.value, str):
        return _parsed(name, node, None, None)
    fields = node.fields(("route",), ("priority", "timeToLiveSecs"))
    priority, ttl = fields.get("priority"), fields.get("timeToLiveSecs")
    return _parsed(
        name,
        fields["route"],
        None if priority is None else priority.integer(0, 9),
        None if ttl is None else ttl.integer(0, MAX_TTL_SECONDS),
    )


def _parsed(name: str, node: Node, priority: int | None, ttl: int | None) -> HubRoute:
    text = node.word().strip()
    start = _FROM.match(text)
    if start is None:
        raise node.expected("a route such as 'FROM /messages/* INTO $upstream'")
    # The last INTO: a condition may hold the word in a string.
    intos = list(_INTO.finditer(text, start.end()))
    if not intos:
        raise node.expected("a route that ends in 'INTO $upstream' or 'INTO BrokeredEndpoint(...)'")
    into = intos[-1]
    condition = text[start.end() : into.start()].strip()
    if condition:
        where = _WHERE.match(condition)
        if where is None:
            raise node.fail(f"expected WHERE or INTO after the source, found {shown(condition)}")
        condition = condition[where.end() :].strip()
    sink = text[into.end() :].strip()
    if sink.lower() == "$upstream":
        target = "$upstream"
    else:
        endpoint = _ENDPOINT.fullmatch(sink)
        if endpoint is None:
            raise node.fail(
                'expected $upstream or BrokeredEndpoint("/modules/<module>/inputs/<input>"), '
                f"found {shown(sink)}"
            )
        target = f"modules/{endpoint['module']}/inputs/{endpoint['input']}"
    return HubRoute(name, start["source"], target, condition, priority, ttl)
