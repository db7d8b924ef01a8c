"""Moments as edgeAgent's log requests give them: RFC 3339, seconds since 1970, or a time ago."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone

_SECONDS = {
    "second": 1, "sec": 1, "s": 1,
    "minute": 60, "min": 60, "m": 60,
    "hour": 3600, "hr": 3600, "h": 3600,
    "day": 86400, "d": 86400,
    "week": 7 * 86400, "w": 7 * 86400,
}  # fmt: skip
_AGO = re.compile(r"(\d{1,9})\s*([a-z]+?)s?(?=[\s\d]|,|$)[\s,]*(?:and\s+)?", re.ASCII)
_RFC3339 = re.compile(
    r"(\d{4}-\d{2}-\d{2})[Tt ](\d{2}:\d{2}:\d{2})(?:\.(\d{1,9}))?\s?([Zz]|[+-]\d{2}:\d{2})",
    re.ASCII,
)
_FORMS = (
    'expected a time such as 2026-11-21T05:47:00Z, seconds since 1970, or a duration such as "90m" '
    'or "2 days 3 hours"'
)


def parse_moment(value: str | int | float, now: datetime) -> datetime:
    """The moment as aware UTC; a duration counts back from `now`. Raises ValueError."""
    if isinstance(value, bool):
        raise ValueError(_FORMS)
    if isinstance(value, (int, float)):
        return _epoch(float(value))
    text = value.strip()
    if re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text, re.ASCII):
        return _epoch(float(text))
    found = _RFC3339.fullmatch(text)
    if found is not None:
        day, time, fraction, zone = found.groups()
        micro = (fraction or "0")[:6].ljust(6, "0")
        offset = "+00:00" if zone in "Zz" else zone
        try:
            moment = datetime.fromisoformat(f"{day}T{time}.{micro}{offset}")
            return moment.astimezone(timezone.utc)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{text!r}: {error}; {_FORMS}") from error
    return _ago(text, now)


def _epoch(seconds: float) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc)
    except (ValueError, OverflowError, OSError) as error:
        raise ValueError(f"{seconds:g} is not a time in seconds since 1970; {_FORMS}") from error


def _ago(text: str, now: datetime) -> datetime:
    lowered, position, seconds = text.lower().removesuffix("ago").strip(), 0, 0
    while position < len(lowered):
        part = _AGO.match(lowered, position)
        if part is None or part[2] not in _SECONDS:
            raise ValueError(f"{text[:60]!r} is not a time; {_FORMS}")
        seconds += int(part[1]) * _SECONDS[part[2]]
        position = part.end()
    if not lowered:
        raise ValueError(f"an empty text is not a time; {_FORMS}")
    try:
        return now - timedelta(seconds=seconds)
    except OverflowError as error:
        raise ValueError(f"{text[:60]!r} is before all time; {_FORMS}") from error
