"""The reported properties, in the shape of edgeAgent's (schema 1.0), within a twin's limits."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Literal

import msgspec

from .create_options import write_create_options
from .module_spec import ModuleSpec, Runtime

RuntimeStatus = Literal["unknown", "backoff", "running", "unhealthy", "stopped", "failed", "dead"]

OK = 200
NOT_RUNNING = 406
FAILED = 500

SCHEMA_VERSION = "1.0"
TWIN_LIMIT_BYTES = 32 * 1024
MAX_STRING_BYTES = 4096
MAX_DESCRIPTION_BYTES = 1024
MAX_DETAIL_DEPTH = 5
"""A twin has 10 levels; details begin at the fourth, and their containers count."""

_MAX_EXACT_INTEGER = 2**52 - 1
_NEVER = "0001-01-01T00:00:00Z"
_ILLEGAL_IN_KEY = re.compile(r"[.$#\s\x00-\x1f\x7f-\x9f\ud800-\udfff]")

Document = dict[str, Any]


class DesiredStatus(msgspec.Struct, frozen=True):
    """What became of the newest desired properties: `$version`, edgeAgent's code, and why."""

    version: int
    code: int
    description: str = ""


class AgentVersion(msgspec.Struct, frozen=True):
    version: str
    build: str = ""
    commit: str = ""


class Platform(msgspec.Struct, frozen=True):
    """`os` such as "linux", `architecture` such as "aarch64", `version` of the host's system."""

    os: str
    architecture: str
    version: str = ""


class ModuleState(msgspec.Struct, frozen=True):
    """One module as observed. Times carry a zone; None means it never happened.

    `details` is JSON-like and appears under the module's key "gatelet": model, backends, progress.
    """

    spec: ModuleSpec
    runtime_status: RuntimeStatus = "unknown"
    description: str = ""
    image_hash: str | None = None
    started: datetime | None = None
    exited: datetime | None = None
    restarted: datetime | None = None
    restart_count: int = 0
    exit_code: int = 0
    details: Mapping[str, Any] = {}


def build_reported(
    *,
    version: AgentVersion,
    platform: Platform,
    desired: DesiredStatus,
    modules: Sequence[ModuleState] = (),
    edge_agent: ModuleState | None = None,
    edge_hub: ModuleState | None = None,
    runtime: Runtime | None = None,
    details: Mapping[str, Any] | None = None,
    limit: int = TWIN_LIMIT_BYTES,
) -> Document:
    """The whole reported document, shortened where it must be to stay below `limit` bytes.

    Registry credentials are not part of it. `details` appear under the top-level key "gatelet".
    """
    runtime = runtime or Runtime()
    system: Document = {}
    # edgeAgent leaves out of its own entry, and of edgeHub's, what nobody can choose.
    if edge_agent is not None:
        chosen = ("version", "status", "restartPolicy", "startupOrder")
        system["edgeAgent"] = _without(
            _module(edge_agent), (*chosen, "restartCount", "lastRestartTimeUtc")
        )
    if edge_hub is not None:
        system["edgeHub"] = _without(_module(edge_hub), ("version",))
    document: Document = {
        "schemaVersion": SCHEMA_VERSION,
        "version": {
            "version": _text(version.version),
            "build": _text(version.build),
            "commit": _text(version.commit),
        },
        "lastDesiredVersion": desired.version,
        "lastDesiredStatus": {
            "code": desired.code,
            "description": shorten(desired.description, MAX_DESCRIPTION_BYTES),
        },
        "runtime": {
            "type": runtime.type,
            "settings": {
                "minDockerVersion": _text(runtime.min_docker_version),
                "loggingOptions": _text(runtime.logging_options),
            },
            "platform": {
                "os": _text(platform.os),
                "architecture": _text(platform.architecture),
                "version": _text(platform.version),
            },
        },
        "systemModules": system,
        "modules": {state.spec.name: _module(state) for state in modules},
    }
    if details:
        document["gatelet"] = twin_value(details)
    return fit_to_limit(document, limit)


def shutdown_report(document: Mapping[str, Any], limit: int = TWIN_LIMIT_BYTES) -> Document:
    """`document` as it is reported when the agent stops: code 406, every runtimeStatus unknown."""

    def unknown(section: Mapping[str, Any]) -> Document:
        return {name: {**entry, "runtimeStatus": "unknown"} for name, entry in section.items()}

    stopped = {
        **document,
        "lastDesiredStatus": {"code": NOT_RUNNING, "description": "Agent is not running"},
        "systemModules": unknown(document.get("systemModules", {})),
        "modules": unknown(document.get("modules", {})),
    }
    return fit_to_limit(stopped, limit)


def fit_to_limit(document: Mapping[str, Any], limit: int = TWIN_LIMIT_BYTES) -> Document:
    """`document` when it is smaller than `limit` bytes, else a copy with the least useful left out.

    First go details, then long descriptions, createOptions, environment and times, and at last
    modules, those that are as desired before the others; status and runtimeStatus stay as long as
    a module does. What was left out is named in `gatelet.omitted`. A `limit` below 512 bytes
    is met only as far as version, code and description permit.
    """
    if twin_size(document) < limit:
        return dict(document)
    current = _copy(document)
    details = dict(document.get("gatelet", {}))
    # A document that was cut before keeps saying what it lacks.
    omitted: list[str] = list(details.pop("omitted", []))
    device: Document = {"gatelet": details} if details else {}
    for name, cut in _CUTS:
        before = twin_size([_entries(current), device])
        for entry in _entries(current):
            cut(entry)
        if cut in (_cut_detail_texts, _cut_details):
            cut(device)
        if name not in omitted and twin_size([_entries(current), device]) != before:
            omitted.append(name)
        current["gatelet"] = {**device.get("gatelet", {}), "omitted": omitted}
        if twin_size(current) < limit:
            return current
    return _fewer_modules(current, omitted, limit)


def twin_size(value: Any) -> int:
    """Bytes that `value` counts in a twin: the larger of its JSON and IoT Hub's own measure."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return max(len(text.encode()), _hub_size(value))


def shorten(text: str, limit: int) -> str:
    """`text` in at most `limit` bytes of UTF-8 (`limit` >= 3), "..." where something is missing."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 3].decode("utf-8", "ignore") + "..."


def twin_value(value: Any, depth: int = MAX_DETAIL_DEPTH) -> Any:
    """`value` as a twin can hold it.

    Keys lose their illegal characters, null members go (a patch would delete them), strings are
    shortened to 4 KB, and whatever JSON or the depth limit do not permit becomes text.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) <= _MAX_EXACT_INTEGER else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, datetime):
        return _time(value)
    if isinstance(value, Mapping) and depth > 0:
        return {
            twin_key(str(key)): twin_value(item, depth - 1)
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, (list, tuple, set, frozenset)) and depth > 0:
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [twin_value(item, depth - 1) for item in items if item is not None]
    return _text(str(value))


def twin_key(key: str) -> str:
    """`key` without the characters a twin refuses in keys."""
    return shorten(_ILLEGAL_IN_KEY.sub("_", key), 512) or "_"


def _module(state: ModuleState) -> Document:
    spec = state.spec
    entry: Document = {
        "exitCode": state.exit_code,
        "statusDescription": shorten(state.description, MAX_DESCRIPTION_BYTES),
        "lastStartTimeUtc": _time(state.started),
        "lastExitTimeUtc": _time(state.exited),
        "restartCount": state.restart_count,
        "lastRestartTimeUtc": _time(state.restarted),
        "runtimeStatus": state.runtime_status,
        "version": _text(spec.version),
        "status": spec.status,
        "restartPolicy": spec.restart_policy,
        "imagePullPolicy": spec.image_pull_policy,
        "startupOrder": spec.startup_order,
        "type": spec.type,
        "settings": {
            "image": spec.image,
            "imageHash": state.image_hash or "",
            **write_create_options(spec.create_options),
        },
        "env": {name: {"value": _text(value)} for name, value in spec.env},
    }
    if state.details:
        entry["gatelet"] = twin_value(state.details)
    return entry


def _time(when: datetime | None) -> str:
    if when is None:
        return _NEVER
    return when.astimezone(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _text(text: str) -> str:
    return shorten(text, MAX_STRING_BYTES)


def _without(entry: Document, keys: tuple[str, ...]) -> Document:
    return {key: value for key, value in entry.items() if key not in keys}


def _copy(document: Mapping[str, Any]) -> Document:
    """Copied down to what the cuts change: sections, entries and their settings."""

    def section(entries: Mapping[str, Any]) -> Document:
        return {
            name: {**entry, "settings": dict(entry.get("settings", {}))}
            for name, entry in entries.items()
        }

    return {
        **document,
        "systemModules": section(document.get("systemModules", {})),
        "modules": section(document.get("modules", {})),
    }


def _entries(document: Document) -> list[Document]:
    return [*document["systemModules"].values(), *document["modules"].values()]


def _hub_size(value: Any) -> int:
    if isinstance(value, Mapping):
        return sum(len(key.encode()) + _hub_size(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return sum(map(_hub_size, value))
    if isinstance(value, str):
        return len(value.encode())
    return 8


def _cut_detail_texts(entry: Document) -> None:
    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, list):
            return [cut(item) for item in value[:8]]
        return shorten(value, 96) if isinstance(value, str) else value

    if "gatelet" in entry:
        entry["gatelet"] = cut(entry["gatelet"])


def _cut_details(entry: Document) -> None:
    entry.pop("gatelet", None)


def _cut_descriptions(entry: Document) -> None:
    if "statusDescription" in entry:
        entry["statusDescription"] = shorten(entry["statusDescription"], 96)


def _cut_create_options(entry: Document) -> None:
    settings = entry["settings"]
    for key in [key for key in settings if key.startswith("createOptions")]:
        del settings[key]


def _cut_env(entry: Document) -> None:
    entry.pop("env", None)


def _cut_all_but_status(entry: Document) -> None:
    image = entry["settings"].get("image", "")
    kept = ("statusDescription", "runtimeStatus", "status")
    for key in [key for key in entry if key not in kept]:
        del entry[key]
    entry["settings"] = {"image": image}


def _cut_to_status(entry: Document) -> None:
    entry.pop("settings", None)
    entry.pop("statusDescription", None)


_CUTS: tuple[tuple[str, Callable[[Document], None]], ...] = (
    ("long texts in details", _cut_detail_texts),
    ("ends of long descriptions", _cut_descriptions),
    ("details", _cut_details),
    ("createOptions", _cut_create_options),
    ("env", _cut_env),
    ("times, counts and policies", _cut_all_but_status),
    ("descriptions and images", _cut_to_status),
)


def _fewer_modules(document: Document, omitted: list[str], limit: int) -> Document:
    modules: Document = document["modules"]
    # Troubled modules first: those are what a reader looks for.
    order = sorted(
        modules, key=lambda name: modules[name].get("status") == modules[name].get("runtimeStatus")
    )

    def keeping(count: int) -> Document:
        kept = set(order[:count])
        return {
            **document,
            "modules": {name: entry for name, entry in modules.items() if name in kept},
            "gatelet": {"omitted": [*omitted, f"{len(modules) - count} modules"]},
        }

    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        if twin_size(keeping(middle)) < limit:
            low = middle
        else:
            high = middle - 1
    smallest = keeping(low)
    if twin_size(smallest) < limit:
        return smallest
    status = document.get("lastDesiredStatus", {})
    return {
        "schemaVersion": SCHEMA_VERSION,
        "lastDesiredVersion": document.get("lastDesiredVersion", 0),
        "lastDesiredStatus": {
            "code": status.get("code", FAILED),
            "description": shorten(str(status.get("description", "")), 128),
        },
        "gatelet": {"omitted": ["all but the status"]},
    }
