"""The client's view of a desired section: full documents, patches, versions and gaps. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .merge_patch import apply_patch

STRING_LIMIT = 4096
_DEPLOYMENT = "deployment"


@dataclass(frozen=True, slots=True)
class DesiredDocument:
    """What is known of a desired section within one connection.

    `properties` (without `$` names) is None until the first full document; `heard` is the newest
    version that any message named.
    """

    properties: Mapping[str, Any] | None = None
    version: int = 0
    heard: int = 0

    @property
    def stale(self) -> bool:
        """Whether something is missing, so that the whole twin must be fetched (again)."""
        return self.properties is None or self.heard > self.version

    def with_full(self, section: Mapping[str, Any]) -> DesiredDocument:
        """After a twin read: always taken, except that a newer state already known is kept.

        An answer may have left the hub before a patch that overtook it.
        """
        version = _version(section)
        if self.properties is not None and version < self.version:
            return self
        properties = {key: value for key, value in section.items() if not key.startswith("$")}
        return replace(self, properties=properties, version=version)

    def with_patch(self, patch: Mapping[str, Any]) -> DesiredDocument:
        """After a desired patch: applied when it is the next one, dropped when it is old.

        Everything else (a gap, no document yet, no version) makes the document stale.
        """
        version = _version(patch)
        if version == 0:
            return replace(self, properties=None)
        if version <= self.version:
            return self
        if self.properties is None or version != self.version + 1:
            return replace(self, heard=max(self.heard, version))
        change = {key: value for key, value in patch.items() if not key.startswith("$")}
        return replace(
            self,
            properties=apply_patch(self.properties, change),
            version=version,
            heard=max(self.heard, version),
        )


def deployment_body(properties: Mapping[str, Any], *, module: bool) -> bytes | None:
    """The deployment a desired section holds, as JSON text; None when it holds none.

    Of a module twin it is the whole section, of a device twin the property `deployment`: an object,
    or JSON text as a string or as a list of strings to be joined. Text is the only form in which
    IoT Hub takes a whole manifest in a device twin, because it refuses names such as `$edgeAgent`
    and `properties.desired`, and strings above 4 KB (see `deployment_property`).
    """
    if module:
        return _json(properties) if properties else None
    value = properties.get(_DEPLOYMENT)
    if value is None:
        return None
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return "".join(value).encode()
    return _json(value)


def deployment_property(manifest: Mapping[str, Any]) -> list[str]:
    """What to set as the device twin's `deployment` so that IoT Hub accepts the manifest."""
    text = json.dumps(manifest, separators=(",", ":"))  # ASCII: characters are bytes
    return [text[start : start + STRING_LIMIT] for start in range(0, len(text), STRING_LIMIT)]


def _version(section: Mapping[str, Any]) -> int:
    version = section.get("$version")
    return version if isinstance(version, int) and not isinstance(version, bool) else 0


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
