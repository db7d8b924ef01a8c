"""W3C Trace Context: which trace a request belongs to. Source: W3C Trace Context, section 3.2."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TRACEPARENT = re.compile(
    r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII
)
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Lower-case hexadecimal: `trace_id` 32 digits, `parent_id` 16, "" without a parent."""

    trace_id: str
    parent_id: str
    sampled: bool


def parse_traceparent(text: str) -> TraceContext | None:
    """None for what is no valid `traceparent`, which is to be treated as if it were not there."""
    match = _TRACEPARENT.fullmatch(text.strip())
    if match is None:
        return None
    version, trace_id, parent_id, flags, rest = match.groups()
    if version == "ff" or (version == "00" and rest) or not int(trace_id, 16):
        return None
    if not int(parent_id, 16):
        return None
    return TraceContext(trace_id, parent_id, bool(int(flags, 16) & _SAMPLED))


def continued(context: TraceContext, span_id: str) -> str:
    """The `traceparent` of what is called in the span `span_id`."""
    return f"00-{context.trace_id}-{span_id}-{_SAMPLED if context.sampled else 0:02x}"
