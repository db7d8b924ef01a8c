"""Automatic deployments: what each of them is, and what all of them together give a device.

The rules are those of "Understand IoT Edge automatic deployments": of the base deployments that
target an edge device the one with the highest priority counts, and over it every targeted layer
with a higher priority than it, the highest last; among equals the newer wins. A device that no
deployment targets any more keeps what it has. Everything here is pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

from .deployment import desired_sections, is_base, layered
from .devices import ClientId
from .errors import HubError, invalid
from .etags import accepts
from .queries import parse_condition, parse_query
from .queries_evaluation import matches
from .queries_tree import Expression
from .twins import Twin

SCHEMA_VERSION = "2.0"
EVERY_DEVICE = "*"
TARGETED, APPLIED = "Targeted", "Applied"
CONFIGURATION_LIMIT = 100
_ID = re.compile(r"[a-z0-9\-:+%_*!']{1,128}\Z", re.ASCII)
_PRIORITIES = range(2**31)


@dataclass(frozen=True, slots=True)
class Configuration:
    """`order` counts creations: of two with the same priority, the newer wins. Times are ISO."""

    id: str
    content: Mapping[str, Any]
    target_condition: str = ""
    priority: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    metric_queries: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    updated: str = ""
    order: int = 0
    version: int = 1

    @property
    def etag(self) -> str:
        return f"CFG{self.version:08X}"

    @property
    def for_edge(self) -> bool:
        return "modulesContent" in self.content

    def targets(self, device_twin: Mapping[str, Any]) -> bool:
        """`device_twin` is the service side's view of it."""
        if self.for_edge and not device_twin["capabilities"]["iotEdge"]:
            return False
        if self.target_condition.strip() in ("", EVERY_DEVICE):
            return self.target_condition.strip() == EVERY_DEVICE
        return matches(_condition(self.target_condition), device_twin)

    def check_match(self, if_match: str | None) -> None:
        """Raises HubError 412 unless If-Match is absent, `*` or this version's ETag."""
        if not accepts(if_match, self.etag):
            raise HubError(
                412,
                "PreconditionFailed",
                f"configuration {self.id} is at ETag {self.etag}: read it again, then retry",
            )

    def system_queries(self) -> dict[str, str]:
        """The hub's own metrics, each as the query that counts its devices."""
        where = "" if self.target_condition.strip() in ("", EVERY_DEVICE) else self.target_condition
        applied = f"configurations.[[{self.id}]].status = '{APPLIED}'"
        if not self.for_edge:
            targeted = f" WHERE {where}" if where else ""
            return {
                "targetedCount": f"SELECT deviceId FROM devices{targeted}",
                "appliedCount": f"SELECT deviceId FROM devices WHERE {applied}",
            }
        agents = f"SELECT deviceId FROM devices.modules WHERE moduleId = '$edgeAgent' AND {applied}"
        current = "properties.desired.$version = properties.reported.lastDesiredVersion"
        code = "properties.reported.lastDesiredStatus.code"
        edge = "SELECT deviceId FROM devices WHERE capabilities.iotEdge = true"
        return {
            "targetedCount": f"{edge} AND ({where})" if where else edge,
            "appliedCount": agents,
            "reportedSuccessfulCount": f"{agents} AND {current} AND {code} = 200",
            "reportedFailedCount": f"{agents} AND {current} AND {code} != 200",
        }

    def as_json(self) -> dict[str, Any]:
        """For the state file; `Configuration(**data)` reads it back."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What configurations mean for one device.

    `status` maps the twins that show configurations to {configuration id: Targeted | Applied};
    `modules` maps module ids to whole desired sections and is None where no base deployment
    applies; `device` is laid over the device twin's desired properties, path by path.
    """

    status: Mapping[ClientId, Mapping[str, str]]
    modules: Mapping[str, Mapping[str, Any]] | None
    device: Mapping[str, Any]


def described(
    id: str, body: Mapping[str, Any], old: Configuration | None, now: str, order: int
) -> Configuration:
    """A configuration from the body of a PUT. Raises HubError 400 or 413.

    As in IoT Hub the content of an existing one cannot change.
    """
    if not _ID.match(id):
        raise invalid(f"{id!r} is not a configuration id: lower-case letters, digits and -:+%_*!'")
    if body.get("id") not in (None, id):
        raise invalid(f"the body has id {body['id']!r}, the address {id!r}")
    version = body.get("schemaVersion") or SCHEMA_VERSION
    if version not in ("1.0", SCHEMA_VERSION):
        raise invalid(f"schemaVersion {version!r}: this hub reads {SCHEMA_VERSION}")
    content = {name: part for name, part in _object(body, "content").items() if part is not None}
    if old is not None:
        if content and content != old.content:
            raise invalid(f"the content of {id} cannot change: delete it or create another one")
        content = dict(old.content)
    _check_content(content)
    condition = body.get("targetCondition") or ""
    priority = body.get("priority", 0 if old is None else old.priority) or 0
    if not isinstance(condition, str):
        raise invalid("targetCondition is a text")
    if isinstance(priority, bool) or priority not in _PRIORITIES:
        raise invalid(f"priority is a whole number from 0, not {priority!r}")
    if condition.strip() not in ("", EVERY_DEVICE):
        _condition(condition)
    queries = _texts(_object(body, "metrics").get("queries") or {}, "metrics.queries")
    for name, query in queries.items():
        try:
            parse_query(query)
        except HubError as error:
            raise invalid(f"metrics.queries.{name}: {error.message}") from error
    fresh = Configuration(
        id,
        content,
        condition,
        priority,
        _texts(_object(body, "labels"), "labels"),
        queries,
        now,
        now,
        order,
    )
    if old is None:
        return fresh
    return replace(fresh, created=old.created, order=old.order, version=old.version + 1)


def plan(
    device: str, device_twin: Mapping[str, Any], configurations: Iterable[Configuration]
) -> DevicePlan:
    """Raises HubError 400 where layers do not fit together."""
    targeting = sorted(
        (one for one in configurations if one.targets(device_twin)),
        key=lambda one: (one.priority, one.order),
    )
    edge = [one for one in targeting if one.for_edge]
    plain = [one for one in targeting if not one.for_edge]
    bases = [one for one in edge if is_base(one.content)]
    applied: list[Configuration] = []
    if bases:
        base = bases[-1]
        layers = [o for o in edge if not is_base(o.content) and o.priority > base.priority]
        applied = [base, *layers]
    status: dict[ClientId, dict[str, str]] = {}
    if edge:
        status[ClientId(device, "$edgeAgent")] = {
            one.id: APPLIED if one in applied else TARGETED for one in edge
        }
    if plain:
        status[ClientId(device)] = {one.id: APPLIED for one in plain}
    return DevicePlan(
        status,
        layered(one.content for one in applied) if applied else None,
        layered([one.content for one in plain]).get("", {}) if plain else {},
    )


@lru_cache(maxsize=CONFIGURATION_LIMIT)
def _condition(text: str) -> Expression:
    return parse_condition(text)


def _check_content(content: Mapping[str, Any]) -> None:
    if len([name for name in ("modulesContent", "deviceContent") if content.get(name)]) != 1:
        raise invalid("content holds either modulesContent (edge) or deviceContent")
    unknown = set(content) - {"modulesContent", "deviceContent"}
    if unknown:
        raise invalid(f"content.{min(unknown)} is not served by this hub")
    for module, section in desired_sections(content).items():
        ClientId.parse(f"d/{module}" if module else "d")
        Twin().updated({"properties": {"desired": section}}, "", whole=True)


def _object(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name) or {}
    if not isinstance(value, dict):
        raise invalid(f"{name} must be a JSON object")
    return value


def _texts(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise invalid(f"{name} is an object of texts")
    return dict(value)
