"""Messages of the outbox, its limits and what is told of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

PRIORITIES = range(10)
DEFAULT_PRIORITY = 5
OVERHEAD_BYTES = 64
"""What a message counts for beyond its body, properties and content type."""

MESSAGE_LIMIT_BYTES = 256 * 1024


class OutboxError(Exception):
    """A message was not stored; the message says why (most often: the disk is full)."""


@dataclass(frozen=True, slots=True)
class Telemetry:
    """One message. `priority` 0 is sent first, 9 last. `ttl_seconds` None: the outbox's.

    A message whose `key` is not empty is stored once: again means the id of the first time.
    """

    body: bytes
    content_type: str = "application/json"
    properties: Mapping[str, str] = field(default_factory=dict)
    priority: int = DEFAULT_PRIORITY
    ttl_seconds: float | None = None
    key: str = ""

    @property
    def size(self) -> int:
        """Bytes it counts for in the outbox."""
        named = sum(len(k.encode()) + len(v.encode()) for k, v in self.properties.items())
        return len(self.body) + named + len(self.content_type) + OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class Held:
    """A stored message as it is sent: `properties` hold its id, type and encoding as well."""

    sequence: int
    priority: int
    body: bytes
    properties: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Limits:
    """`ttl_seconds` None keeps messages for ever."""

    max_bytes: int = 64 * 1024 * 1024
    ttl_seconds: float | None = 7 * 24 * 3600.0


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class OutboxStatus:
    """`dropped` counts by reason ("overflow", "expired", "too-large") over the outbox's life."""

    messages: int
    bytes: int
    oldest_seconds: float
    dropped: Mapping[str, int]
    error: str


def overflow(candidates: Iterable[tuple[int, int]], excess: int) -> tuple[list[int], int]:
    """Which messages go so that `excess` bytes become free, and how many bytes that frees.

    `candidates` are (sequence, size), the first to go first: of the lowest priority the oldest.
    """
    gone: list[int] = []
    freed = 0
    for sequence, size in candidates:
        if freed >= excess:
            break
        gone.append(sequence)
        freed += size
    return gone, freed
