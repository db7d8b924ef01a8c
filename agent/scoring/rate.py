"""How many requests one client may send: token buckets in a table of bounded size."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

MOST_CLIENTS = 4096


@dataclass(frozen=True, slots=True)
class RateLimit:
    """`per_second` requests on average and `burst` at once."""

    per_second: float
    burst: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """`tokens` left at `at` (monotonic seconds)."""

    tokens: float
    at: float


def take(bucket: Bucket | None, limit: RateLimit, now: float) -> tuple[Bucket, float]:
    """The bucket after one request, and how many seconds that one is too early; 0: it may go."""
    if bucket is None:
        bucket = Bucket(limit.burst, now)
    tokens = min(limit.burst, bucket.tokens + (now - bucket.at) * limit.per_second)
    if tokens >= 1:
        return Bucket(tokens - 1, now), 0.0
    return Bucket(tokens, now), (1 - tokens) / limit.per_second


class RateTable:
    """Buckets by client; whoever was not seen for longest is forgotten first."""

    def __init__(self, limit: RateLimit, most: int = MOST_CLIENTS) -> None:
        self._limit = limit
        self._most = most
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def take(self, client: str, now: float) -> float:
        """As `take`, for `client`. Not thread-safe."""
        bucket, wait = take(self._buckets.pop(client, None), self._limit, now)
        self._buckets[client] = bucket
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return wait
