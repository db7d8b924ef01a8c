"""What `inspect` says of a container and an image, as the seam's values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

from .container import (
    DIGEST_LABEL,
    MODULE_LABEL,
    SPEC_LABEL,
    ContainerState,
    ContainerView,
    EngineImage,
    Health,
)

_TIME = re.compile(
    r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:Z|([+-])(\d\d):(\d\d))\Z", re.ASCII
)
_STATES: Mapping[str, ContainerState] = {
    "created": "created",
    "running": "running",
    "paused": "paused",
    "restarting": "restarting",
    "removing": "dead",
    "exited": "exited",
    "dead": "dead",
}
_HEALTH: Mapping[str, Health] = {
    "starting": "starting",
    "healthy": "healthy",
    "unhealthy": "unhealthy",
}
_HEALTH_LOG = 1000


def parse_time(text: str) -> datetime | None:
    """RFC 3339 with up to nanoseconds, as aware UTC; None for Docker's year 1 and for nonsense."""
    match = _TIME.match(text)
    if match is None or text.startswith("0001-"):
        return None
    whole, fraction, sign, hours, minutes = match.groups()
    try:
        at = datetime.strptime(whole, "%Y-%m-%dT%H:%M:%S").replace(tzinfo=timezone.utc)
    except ValueError:
        return None
    offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
    return at.replace(microsecond=int((fraction or "0").ljust(6, "0")[:6])) - (
        -offset if sign == "-" else offset
    )


def container_view(inspect: Mapping[str, Any], drift: tuple[str, ...]) -> ContainerView:
    """A container from `GET /containers/{id}/json`."""
    labels = inspect["Config"].get("Labels") or {}
    state = inspect["State"]
    health = state.get("Health") or {}
    checks = health.get("Log") or []
    return ContainerView(
        module=labels.get(MODULE_LABEL, ""),
        name=inspect["Name"].lstrip("/"),
        id=inspect["Id"],
        spec=labels.get(SPEC_LABEL, ""),
        digest=labels.get(DIGEST_LABEL, ""),
        state=_STATES.get(state.get("Status", ""), "dead"),
        exit_code=state.get("ExitCode", 0),
        oom_killed=state.get("OOMKilled", False),
        error=state.get("Error", ""),
        health=_HEALTH.get(health.get("Status", ""), "none"),
        health_log=(checks[-1].get("Output") or "").strip()[-_HEALTH_LOG:] if checks else "",
        started_at=parse_time(state.get("StartedAt", "")),
        finished_at=parse_time(state.get("FinishedAt", "")),
        drift=drift,
    )


def engine_image(listed: Mapping[str, Any]) -> EngineImage:
    """An image from `GET /images/json`."""
    digests = [name.partition("@")[2] for name in listed.get("RepoDigests") or []]
    return EngineImage(
        id=listed["Id"],
        names=tuple(name for name in listed.get("RepoTags") or [] if name != "<none>:<none>"),
        digests=tuple(dict.fromkeys(digest for digest in digests if digest)),
        labels=listed.get("Labels") or {},
        size=listed.get("Size", 0),
        created=datetime.fromtimestamp(listed.get("Created", 0), timezone.utc),
    )
