"""What stands in the messages of the MQTT transport."""

from __future__ import annotations

import json
from typing import Any

from ..document import ManifestError, decoded, parse_json


def to_json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def status_document(status: str, session: int, reason: str = "") -> bytes:
    document: dict[str, Any] = {"status": status, "session": session}
    if reason:
        document["reason"] = reason
    return to_json(document)


def read_json(payload: bytes) -> Any:
    """What others wrote, within bounds of size and depth. Raises ValueError."""
    try:
        return parse_json(decoded(payload), "")
    except ManifestError as error:
        raise ValueError(str(error)) from None


def read_object(payload: bytes) -> dict[str, Any]:
    """Empty for what is no JSON object."""
    try:
        document = read_json(payload)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def read_status(payload: bytes) -> tuple[str, int]:
    """("", 0) for what we did not write."""
    document = read_object(payload)
    status, session = document.get("status"), document.get("session")
    if not isinstance(status, str) or not isinstance(session, int) or not 0 < session < 2**53:
        return "", 0
    return status, session


def version_of(body: bytes) -> int:
    """The top-level `$version`, 0 when the document has none or is no JSON object."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return 0
    version = document.get("$version") if isinstance(document, dict) else None
    return version if isinstance(version, int) and not isinstance(version, bool) else 0
