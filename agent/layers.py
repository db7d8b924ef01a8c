"""Layered deployments merged on the device, by the rules of IoT Hub's automatic deployments.

The hub merges before a device sees anything; a broker or a file cannot. So a document may hold the
layers themselves: {"layers": {"<id>": {"priority": n, "content": {"modulesContent": {...}}}}}, each
in the shape that `az iot edge deployment show` prints, so that an export can be pasted.

Of the layers with a whole `properties.desired` of $edgeAgent the highest is the base; over it goes
every other one with a higher priority, the highest last. Of equals the newer one (`createdTimeUtc`)
is higher, then the one whose id sorts later. `properties.desired` replaces a section,
`properties.desired.<path>` what is at that path.
Source: "Understand IoT Edge automatic deployments for single devices or at scale".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .document import EMPTY, Node, decoded, parse_json

LAYERS = "layers"
MAX_LAYERS = 100
"""IoT Hub's limit of deployments."""

MAX_PATH = 10
"""Levels of a twin; a longer path could not have been set anywhere."""

_DESIRED = "properties.desired"
_AGENT = "$edgeAgent"
_MAX_PRIORITY = 2**31 - 1
_CREATED = re.compile(
    r"(?P<seconds>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.(?P<fraction>\d{1,9}))?(Z|\+00:00)?", re.ASCII
)
# What an exported deployment carries besides; no device can make use of it.
_EXPORTED = (
    "id",
    "schemaVersion",
    "labels",
    "lastUpdatedTimeUtc",
    "systemMetrics",
    "metrics",
    "etag",
)


@dataclass(frozen=True, slots=True)
class Merged:
    """`sections` maps module ids to whole desired sections; `ignored` are (path, reason)."""

    sections: Mapping[str, Mapping[str, Any]]
    ignored: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Layer:
    rank: tuple[int, str, str, str]
    node: Node
    sections: Mapping[str, Mapping[str, Node]]

    @property
    def is_base(self) -> bool:
        return _DESIRED in self.sections.get(_AGENT, {})


def merge_layers(document: Node) -> Merged:
    """What the layers of `document` ({"layers": {...}}) give together, in whatever order they are.

    Raises ManifestError: 417 when there is no layer, 400 for anything else.
    """
    members = document.members()
    node = members[LAYERS]
    entries = node.members()
    if not entries:
        raise node.fail("there is no layer; set a deployment manifest", EMPTY)
    if len(entries) > MAX_LAYERS:
        raise node.fail(f"{len(entries)} layers; at most {MAX_LAYERS} are merged")
    ignored: list[tuple[str, str]] = []
    layers = sorted(
        (_layer(id, entry, ignored) for id, entry in entries.items()), key=lambda one: one.rank
    )
    bases = [one for one in layers if one.is_base]
    if not bases:
        raise node.fail(
            f"none of the layers is a base; one must have a whole {_DESIRED} of {_AGENT}"
        )
    base = bases[-1]
    sections: dict[str, dict[str, Any]] = {}
    for one in layers:
        if one is base or (not one.is_base and one.rank[0] > base.rank[0]):
            for module, parts in one.sections.items():
                sections[module] = laid_over(sections.get(module, {}), parts)
        else:
            ignored.append((one.node.path, f"not above the base {base.node.path}: not applied"))
    return Merged(sections, tuple(ignored))


def _layer(id: str, node: Node, ignored: list[tuple[str, str]]) -> _Layer:
    fields = node.fields(
        ("priority",),
        ("content", "modulesContent", "moduleContent", "createdTimeUtc", "targetCondition"),
        extra="|".join(_EXPORTED),
    )
    priority = fields["priority"].integer(0, _MAX_PRIORITY)
    seconds = fraction = ""
    created = fields.get("createdTimeUtc")
    if created is not None and created.value is not None:
        match = _CREATED.fullmatch(created.text())
        if match is None:
            raise created.expected("a time in UTC such as 2026-03-01T10:00:00Z")
        seconds, fraction = match["seconds"], (match["fraction"] or "").ljust(9, "0")
    condition = fields.get("targetCondition")
    if condition is not None and condition.value is not None and condition.text().strip():
        ignored.append((condition.path, "a device applies every layer it is sent"))
    content = fields.get("content")
    if content is not None:
        parts = content.fields((), ("modulesContent", "moduleContent", "deviceContent"))
        if (other := parts.get("deviceContent")) is not None and other.value:
            ignored.append((other.path, "only IoT Hub can set the device twin"))
    else:
        parts = fields
    modules = parts.get("modulesContent") or parts.get("moduleContent")
    if modules is None or modules.value is None:
        raise node.fail("no modulesContent; a layer needs one, alone or inside content")
    sections = {}
    for module, section in modules.members().items():
        sections[module] = section.members()
        check_parts(sections[module])
    return _Layer((priority, seconds, fraction, id), node, sections)


def laid_over(section: dict[str, Any], parts: Mapping[str, Node]) -> dict[str, Any]:
    """`section` (changed in place) after `properties.desired` and `properties.desired.<path>`."""
    if _DESIRED in parts:
        section = _copied(parts[_DESIRED].value)
    for name, part in parts.items():
        if name == _DESIRED:
            continue
        inner = section
        *path, leaf = name[len(_DESIRED) + 1 :].split(".")
        for step in path:
            if not isinstance(inner.get(step), dict):
                inner[step] = {}
            inner = inner[step]
        inner[leaf] = _copied(part.value)
    return section


def check_parts(parts: Mapping[str, Node]) -> None:
    """Raises ManifestError for a member that is neither a section nor a path in it."""
    for name, part in parts.items():
        if name == _DESIRED:
            part.members()
        elif not name.startswith(f"{_DESIRED}."):
            raise part.fail(f"expected {_DESIRED} or {_DESIRED}.<path>")
        elif name.count(".") > MAX_PATH + 1:
            raise part.fail(f"a path of more than {MAX_PATH} levels")


def layered_document(base: bytes, layers: Sequence[tuple[int, str, bytes]]) -> bytes:
    """One document of `base` and (priority, name, content) layers; of equals the later is higher.

    The base may be in any form that a manifest has. Raises ManifestError, its path beginning with
    the name of the layer.
    """
    entries = {"base": {"priority": 0, **_content(base, "base")}}
    for number, (priority, name, body) in enumerate(layers, 1):
        entries[f"{number:03}-{name}"] = {"priority": priority, **_content(body, name)}
    return json.dumps({LAYERS: entries}, ensure_ascii=False, separators=(",", ":")).encode()


def _content(body: bytes, name: str) -> dict[str, Any]:
    node = Node(parse_json(decoded(body), name), name)
    members = node.members()
    if LAYERS in members:
        raise node.fail("holds layers itself; name its parts one by one")
    for key in ("content", "modulesContent", "moduleContent"):
        if key in members:
            return {key: members[key].value}
    return {"modulesContent": {_AGENT: {_DESIRED: node.value}}}


def _copied(value: Any) -> Any:
    """Changed in place later on: a new copy for every key would make a long document quadratic."""
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value
