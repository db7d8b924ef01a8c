"""A support bundle: one zip with everything that explains a device, and none of its secrets."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import shutil
import sqlite3
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..clock import Clock
from ..config import AgentConfig
from ..log_lines import as_text
from ..logs import LogPart, read_logs
from ..redaction import HIDDEN, redact, redact_document, secret_values
from ..runtime.container import LogFilter, LogLine
from .findings import Finding, summary

ROLES = ("agent", "supervisor", "scoring", "fabric")
JOURNAL_ROWS = 1000
DEPLOYMENTS = 8
TEXT_LIMIT = 4 * 1024 * 1024
SHORTEST_SECRET = 4
"""Known secrets that are shorter than this would blank out ordinary text."""
_SYSTEM_FILES = ("meminfo", "loadavg", "uptime", "mounts", "version", "cpuinfo")
_CHUNK = re.compile(r"createOptions(\d*)")


@dataclass(frozen=True, slots=True)
class BundleParts:
    """What the caller knows: the agent's status (None when it does not answer), the findings of the
    checks, and the logs of modules by name."""

    status: Mapping[str, Any] | None
    findings: Sequence[Finding]
    module_logs: Mapping[str, Sequence[LogLine]]


def make_bundle(config: AgentConfig, parts: BundleParts, span: LogFilter, clock: Clock) -> bytes:
    """The zip. `span` limits the logs. Raises OSError."""
    settings = msgspec.to_builtins(config, enc_hook=str)
    bodies = _deployments(config.device.state_dir / "state.db")
    manifests = {generation: _manifest(body) for generation, body in bodies.items()}
    known = secret_values(settings) | _secret_files(settings)
    for manifest in manifests.values():
        known |= secret_values(manifest)
    bundle = _Bundle(known)
    bundle.json("about.json", _about(config, clock))
    bundle.json("configuration.json", settings)
    bundle.json("status.json", parts.status)
    bundle.json("check.json", summary(parts.findings))
    bundle.json("versions.json", _versions())
    bundle.text("journal.txt", _journal(config.device.state_dir / "state.db"))
    for generation, manifest in manifests.items():
        bundle.json(f"deployments/{generation}.json", manifest)
    for role in ROLES:
        with contextlib.suppress(OSError):
            bundle.log(f"logs/{role}.log", read_logs(config.logs_dir, [LogPart(role)], span))
    for name, lines in parts.module_logs.items():
        bundle.log(f"logs/modules/{name}.log", lines)
    for name in _SYSTEM_FILES:
        with contextlib.suppress(OSError):
            bundle.text(f"system/{name}", (Path("/proc") / name).read_text(errors="replace"))
    return bundle.finished()


class _Bundle:
    def __init__(self, known: set[str]) -> None:
        self._known = sorted((s for s in known if len(s) >= SHORTEST_SECRET), key=len, reverse=True)
        self._buffer = io.BytesIO()
        self._zip = zipfile.ZipFile(self._buffer, "w", zipfile.ZIP_DEFLATED)

    def json(self, name: str, value: Any) -> None:
        self.text(name, json.dumps(redact_document(value), indent=2, default=str) + "\n")

    def log(self, name: str, lines: Iterable[LogLine]) -> None:
        self.text(name, as_text(lines))

    def text(self, name: str, text: str) -> None:
        text = redact(text[-TEXT_LIMIT:])
        for secret in self._known:
            for form in {secret, json.dumps(secret)[1:-1]}:
                text = text.replace(form, HIDDEN)
        self._zip.writestr(name, text)

    def finished(self) -> bytes:
        self._zip.close()
        return self._buffer.getvalue()


def _secret_files(value: Any, key: str = "") -> set[str]:
    """What the files hold that the configuration names for secrets."""
    if isinstance(value, Mapping):
        return {s for name, inner in value.items() for s in _secret_files(inner, str(name))}
    if isinstance(value, (list, tuple)):
        return {s for inner in value for s in _secret_files(inner, key)}
    if not isinstance(value, str) or not re.search(r"(password|key|string|phrase)[-_]file$", key):
        return set()
    try:
        text = Path(value).read_text(errors="replace")[:65536]
    except OSError:
        return set()
    found = {text.strip(), *(line.strip() for line in text.splitlines())}
    return {line for line in found if line and not line.startswith("-----")}


def _manifest(body: bytes) -> Any:
    """A deployment's document with its createOptions as objects, so that names are seen in them."""
    try:
        return _with_objects(json.loads(body))
    except (ValueError, RecursionError):
        return "not JSON"


def _with_objects(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_objects(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    chunks = sorted(
        (int(found[1] or 0), key, value[key])
        for key in value
        if (found := _CHUNK.fullmatch(key)) and isinstance(value[key], str)
    )
    rest = {key: _with_objects(inner) for key, inner in value.items()}
    if chunks:
        text = "".join(chunk for _, _, chunk in chunks)
        for _, key, _ in chunks:
            del rest[key]
        try:
            rest["createOptions"] = json.loads(text or "null")
        except ValueError:
            rest["createOptions"] = "not JSON"
    return rest


def _deployments(database: Path) -> dict[int, bytes]:
    rows = _rows(
        database,
        "SELECT generation, body FROM deployment ORDER BY generation DESC LIMIT ?",
        DEPLOYMENTS,
    )
    return {int(generation): bytes(body) for generation, body in rows}


def _journal(database: Path) -> str:
    rows = _rows(
        database,
        "SELECT at, generation, step, outcome, message FROM journal ORDER BY id DESC LIMIT ?",
        JOURNAL_ROWS,
    )
    return "".join("\t".join(map(str, row)).rstrip() + "\n" for row in reversed(rows))


def _rows(database: Path, query: str, count: int) -> list[tuple[Any, ...]]:
    """Read beside the running agent; nothing where there is no database to read."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
            return db.execute(query, (count,)).fetchall()
    except sqlite3.Error:
        return []


def _about(config: AgentConfig, clock: Clock) -> dict[str, Any]:
    state = config.device.state_dir
    there = next((p for p in (state, *state.absolute().parents) if os.path.exists(p)), Path("/"))
    disk = shutil.disk_usage(there)
    return {
        "device": config.device_id,
        "made": clock.now().isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "python": sys.version,
        "cpus": os.cpu_count(),
        "disk": {"path": str(there), "total": disk.total, "free": disk.free},
        "notInside": "keys, passwords, tokens, signatures and values of variables that hold them",
    }


def _versions() -> dict[str, str]:
    """Installed packages by their folders' names: their metadata would take a second to parse."""
    folders = (path for entry in sys.path for path in Path(entry or ".").glob("*.dist-info"))
    found = (path.stem.rpartition("-") for path in folders)
    return dict(sorted((name, version) for name, _, version in found))
