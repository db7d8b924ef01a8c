"""Whether IoT Hub would take a manifest: the limits of its twins, checked before anything is sent.

Source: IoT Hub developer guide, "Understand and use device twins": desired properties 32 KB, 10
levels, strings of 4 KB, keys of 1 KB without control characters, '.', '$' and space, integers of 53
bits. IoT Edge's tools cut createOptions into chunks of 512 characters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .create_options import CHUNK_CHARACTERS
from .document import Node, decoded, joined, parse_json, shown, without_nulls
from .layers import LAYERS, laid_over, merge_layers

PROPERTIES_LIMIT_BYTES = 32 * 1024
DEPTH_LIMIT = 10
STRING_LIMIT_BYTES = 4 * 1024
KEY_LIMIT_BYTES = 1024
_INTEGERS = range(-(2**52), 2**52)
_AGENT = "$edgeAgent"
_CONTENT = ("content", "modulesContent", "moduleContent", "deployment")


@dataclass(frozen=True, slots=True)
class Misfit:
    """`path` begins with the module whose twin it is."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


def twin_misfits(body: bytes) -> tuple[Misfit, ...]:
    """What keeps the manifest `body` (in any of its forms, layers too) out of IoT Hub's twins.

    Raises ManifestError where `body` is no JSON document or its layers cannot be merged.
    """
    sections = _sections(Node(parse_json(decoded(body), "")))
    return tuple(
        misfit
        for name, section in sections.items()
        for misfit in (*section_misfits(section, name), *_chunk_misfits(section, name))
    )


def section_misfits(section: Any, path: str) -> list[Misfit]:
    """What IoT Hub would refuse in one desired section."""
    if not isinstance(section, Mapping):
        return [Misfit(path, f"expected an object, found {shown(section)}")]
    own = {key: item for key, item in section.items() if key not in ("$version", "$metadata")}
    found: list[Misfit] = []
    _check(own, path, 0, found)
    size = section_bytes(without_nulls(own))
    if size > PROPERTIES_LIMIT_BYTES:
        found.insert(
            0,
            Misfit(
                path,
                f"{size:,} bytes; a twin holds {PROPERTIES_LIMIT_BYTES:,}. Put the manifest on a "
                "web server and send a manifest by reference: `gatelet manifest sign --url`",
            ),
        )
    return found


def section_bytes(value: Any) -> int:
    """Bytes it counts for in a twin: keys and texts as UTF-8, numbers 8, booleans 4, null 0."""
    if isinstance(value, Mapping):
        return sum(_bytes(key) + section_bytes(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(map(section_bytes, value))
    if isinstance(value, str):
        return _bytes(value)
    if isinstance(value, bool):
        return 4
    return 0 if value is None else 8


def _sections(node: Node) -> dict[str, Any]:
    while True:
        if not isinstance(node.value, dict) or "systemModules" in node.value:
            return {_AGENT: node.value}
        members = node.members()
        if LAYERS in members:
            return dict(merge_layers(node).sections)
        key = next((name for name in _CONTENT if name in members), None)
        if key is None:
            return {_AGENT: node.value}
        node = members[key]
        if key in ("modulesContent", "moduleContent"):
            return {
                name: laid_over({}, section.members()) for name, section in node.members().items()
            }


def _check(value: Any, path: str, depth: int, found: list[Misfit]) -> None:
    if isinstance(value, (dict, list)) and depth > DEPTH_LIMIT:
        found.append(Misfit(path, f"nested deeper than {DEPTH_LIMIT} levels"))
        return
    if isinstance(value, dict):
        for key, item in value.items():
            here = joined(path, key)
            if any(c in ".$ " or ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in key):
                found.append(Misfit(here, "a key has no '.', '$', space or control character"))
            elif not 0 < _bytes(key) <= KEY_LIMIT_BYTES:
                found.append(Misfit(here, f"a key has 1 to {KEY_LIMIT_BYTES:,} bytes"))
            _check(item, here, depth + 1, found)
    elif isinstance(value, list):
        for item in value:
            _check(item, path, depth + 1, found)
    elif isinstance(value, str):
        if _bytes(value) > STRING_LIMIT_BYTES:
            size = f"a text of {_bytes(value):,} bytes; a twin takes {STRING_LIMIT_BYTES:,}"
            found.append(Misfit(path, f"{size}: cut it, createOptions into createOptions01, ..."))
    elif isinstance(value, int) and not isinstance(value, bool):
        if value not in _INTEGERS:
            found.append(Misfit(path, f"{value} is beyond the integers of 53 bits"))
    elif isinstance(value, float) and not math.isfinite(value):
        found.append(Misfit(path, f"{value} is not JSON"))


def _chunk_misfits(section: Any, name: str) -> list[Misfit]:
    """What the hub takes and edgeAgent, or the tools that send to it, do not."""
    if name != _AGENT or not isinstance(section, dict):
        return []
    found = []
    for group in ("systemModules", "modules"):
        modules = section.get(group)
        for module, spec in (modules if isinstance(modules, dict) else {}).items():
            settings = spec.get("settings") if isinstance(spec, dict) else None
            for key, value in (settings if isinstance(settings, dict) else {}).items():
                if not key.startswith("createOptions"):
                    continue
                path = joined(joined(f"{name}.{group}", module), f"settings.{key}")
                if isinstance(value, str) and CHUNK_CHARACTERS < len(value) <= STRING_LIMIT_BYTES:
                    long = f"{len(value)} characters; chunks have {CHUNK_CHARACTERS}"
                    found.append(Misfit(path, f"{long}: continue in createOptions01, ..."))
                elif not isinstance(value, (str, type(None))):
                    found.append(Misfit(path, "edgeAgent takes the text of a JSON object only"))
    return found


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
