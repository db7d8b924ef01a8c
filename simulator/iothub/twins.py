"""Device and module twins: pure values and the rules IoT Hub has for them.

Limits, from the IoT Hub developer guide "Understand and use device twins": tags 8 KB, desired and
reported 32 KB each, 10 levels, string values 4 KB, keys up to 1 KB without control characters, `.`,
`$` and space, integers of 53 bits. Names starting with `$` at the top of a section are the hub's:
a twin that was read may be written back with its `$version` and `$metadata`, which are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...agent.twin.merge_patch import apply_patch, without_nulls
from .errors import HubError, invalid
from .etags import accepts

TAGS_LIMIT = 8 * 1024
PROPERTIES_LIMIT = 32 * 1024
DEPTH_LIMIT = 10
STRING_LIMIT = 4 * 1024
KEY_LIMIT = 1024
_INTEGERS = range(-(2**52), 2**52)
_NEVER = "0001-01-01T00:00:00Z"


@dataclass(frozen=True, slots=True)
class Section:
    """Desired or reported properties, their version and when each of them was last written."""

    value: dict[str, Any] = field(default_factory=dict)
    version: int = 1
    metadata: dict[str, Any] = field(default_factory=lambda: {"$lastUpdated": _NEVER})

    def patched(self, patch: Mapping[str, Any], now: str, name: str) -> Section:
        """Raises HubError 400 (rule broken) or 413 (too large); `name` is for its message."""
        patch = _without_hub_keys(patch)
        _check_values(patch, name)
        return self._next(apply_patch(self.value, patch), patch, now, name)

    def replaced(self, value: Mapping[str, Any], now: str, name: str) -> Section:
        """Raises HubError as `patched` does."""
        value = _without_hub_keys(value)
        _check_values(value, name)
        deletions = {key: None for key in self.value if key not in value}
        return self._next(without_nulls(value), {**value, **deletions}, now, name)

    def _next(
        self, value: dict[str, Any], change: Mapping[str, Any], now: str, name: str
    ) -> Section:
        _check_size(value, name, PROPERTIES_LIMIT)
        return Section(value, self.version + 1, _touch(self.metadata, change, value, now))

    def with_version(self, *, metadata: bool) -> dict[str, Any]:
        extra = {"$metadata": self.metadata} if metadata else {}
        return {**self.value, **extra, "$version": self.version}


@dataclass(frozen=True, slots=True)
class Twin:
    """One twin; `version` counts every change made by the service side and is the ETag."""

    desired: Section = field(default_factory=Section)
    reported: Section = field(default_factory=Section)
    tags: dict[str, Any] = field(default_factory=dict)
    version: int = 1

    @property
    def etag(self) -> str:
        return f"AAAA{self.version:08X}"

    def updated(self, change: Mapping[str, Any], now: str, *, whole: bool = False) -> Twin:
        """After a service-side PATCH (or PUT: `whole`) of `tags` and `properties.desired`.

        Other members of a twin are read-only and ignored. Raises HubError 400 or 413.
        """
        tags, desired = self.tags, self.desired
        if "tags" in change or whole:
            wanted = _object(change.get("tags"), "tags")
            _check_values(wanted, "tags")
            tags = without_nulls(wanted) if whole else apply_patch(tags, wanted)
            _check_size(tags, "tags", TAGS_LIMIT)
        properties = _object(change.get("properties"), "properties")
        if "desired" in properties or whole:
            wanted = _object(properties.get("desired"), "properties.desired")
            step = desired.replaced if whole else desired.patched
            desired = step(wanted, now, "properties.desired")
        return replace(self, tags=tags, desired=desired, version=self.version + 1)

    def reported_patched(self, patch: Any, now: str) -> Twin:
        """After a device's patch. Raises HubError 400 or 413."""
        if patch is None:
            raise invalid("properties.reported must be a JSON object, not null")
        patch = _object(patch, "properties.reported")
        return replace(self, reported=self.reported.patched(patch, now, "properties.reported"))

    def check_match(self, if_match: str | None) -> None:
        """Raises HubError 412 unless the If-Match header is absent, `*` or this version's ETag."""
        if not accepts(if_match, self.etag):
            raise HubError(
                412,
                "PreconditionFailed",
                f"the twin is at ETag {self.etag}, not {if_match}: read it again, then retry",
            )

    def device_view(self) -> dict[str, Any]:
        """What a device gets for a twin GET over MQTT."""
        return {
            "desired": self.desired.with_version(metadata=False),
            "reported": self.reported.with_version(metadata=False),
        }

    def service_view(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """What the service side gets; `identity` holds deviceId, status and so on."""
        return {
            **identity,
            "etag": self.etag,
            "version": self.version,
            "tags": self.tags,
            "properties": {
                "desired": self.desired.with_version(metadata=True),
                "reported": self.reported.with_version(metadata=True),
            },
        }

    def as_json(self) -> dict[str, Any]:
        """For the hub's state file; `from_json` reads it back."""
        return {
            "desired": [self.desired.value, self.desired.version, self.desired.metadata],
            "reported": [self.reported.value, self.reported.version, self.reported.metadata],
            "tags": self.tags,
            "version": self.version,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Twin:
        return cls(
            Section(*data["desired"]), Section(*data["reported"]), data["tags"], data["version"]
        )


def section_size(value: Any) -> int:
    """Bytes a value counts for: keys and strings as UTF-8, numbers 8, booleans 4, null 0."""
    if isinstance(value, Mapping):
        return sum(len(key.encode()) + section_size(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(map(section_size, value))
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, bool):
        return 4
    return 0 if value is None else 8


def _check_values(value: Any, path: str, depth: int = 0) -> None:
    if isinstance(value, (dict, list)) and depth > DEPTH_LIMIT:
        raise invalid(f"{path}: nested deeper than {DEPTH_LIMIT} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_key(key, path)
            _check_values(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_values(item, f"{path}[{index}]", depth + 1)
    elif isinstance(value, str):
        if len(value.encode("utf-8", "surrogatepass")) > STRING_LIMIT:
            raise invalid(f"{path}: the string is longer than {STRING_LIMIT} bytes")
        if any(0xD800 <= ord(c) < 0xE000 for c in value):
            raise invalid(f"{path}: the string holds an unpaired surrogate")
    elif isinstance(value, int) and not isinstance(value, bool) and value not in _INTEGERS:
        raise invalid(f"{path}: {value} is outside the integers of 53 bits")
    elif isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        raise invalid(f"{path}: {value} is not JSON")


def _check_key(key: str, path: str) -> None:
    bad = [c for c in key if c in ".$ " or ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0]
    if bad or any(0xD800 <= ord(c) < 0xE000 for c in key):
        raise invalid(
            f"{path}: the name {json.dumps(key)} is not allowed: "
            "no '.', '$', space or control character in property names"
        )
    if not 0 < len(key.encode()) <= KEY_LIMIT:
        raise invalid(f"{path}: a property name has 1 to {KEY_LIMIT} bytes")


def _check_size(value: Mapping[str, Any], name: str, limit: int) -> None:
    size = section_size(value)
    if size > limit:
        raise HubError(
            413, "RequestEntityTooLarge", f"{name} would hold {size} bytes; the limit is {limit}"
        )


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid(f"{name} must be a JSON object, not {type(value).__name__}")
    return value


def _without_hub_keys(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key not in ("$version", "$metadata")}


def _touch(
    metadata: Mapping[str, Any], change: Mapping[str, Any], value: Mapping[str, Any], now: str
) -> dict[str, Any]:
    """Metadata after `change` led to `value`: members that are gone lose theirs."""
    result = {key: item for key, item in metadata.items() if key.startswith("$") or key in value}
    for key, item in change.items():
        after = value.get(key)
        if isinstance(after, dict):
            old = result.get(key)
            inner = item if isinstance(item, dict) else {}
            result[key] = _touch(old if isinstance(old, dict) else {}, inner, after, now)
        elif key in value:
            result[key] = {"$lastUpdated": now}
    return {**result, "$lastUpdated": now}
