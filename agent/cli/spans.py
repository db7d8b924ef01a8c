"""Spans of time as people say them: "3 hours", "2 minutes ago"."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))


def span(seconds: float) -> str:
    """In the largest unit that fits, as `docker ps` and `iotedge list` say it."""
    seconds = max(0.0, seconds)
    for unit, size in _UNITS:
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return "less than a second"


def module_text(module: Mapping[str, Any], now: datetime) -> str:
    """The DESCRIPTION of `gatelet list` for an entry of the status document."""
    status, description = module["status"], str(module["description"])
    started, exited = _time(module.get("started")), _time(module.get("exited"))
    if status == "running" and started is not None:
        return f"Up {span((now - started).total_seconds())}"
    if exited is not None and module.get("container", {}).get("state") in ("exited", "dead"):
        ago = f"{span((now - exited).total_seconds())} ago"
        if status == "stopped":
            return f"Stopped {ago}"
        if status in ("failed", "backoff", "dead"):
            again = ", to be restarted" if status == "backoff" else ""
            return f"Failed ({module['exitCode']}) {ago}{again}"
    return "Stopped" if status == "stopped" else description


def _time(text: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else None
