"""From measurements to settings: pure rules that say why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from .report import Point, Recommendation

# More threads must be this much faster to be worth the cores they take from others.
_THREADS_WORTHWHILE = 1.2
# Stacking must gain this much to be worth the waiting.
_BATCH_WORTHWHILE = 1.25
# Of the most that was reached: beyond it, more load only means longer waiting.
_ENOUGH = 0.9
_MEMORY_MARGIN = 1.25


def recommend(
    points: Sequence[Point],
    memory_mb: Mapping[str, float] | None = None,
    limit_ms: float | None = None,
) -> Recommendation:
    """The settings that serve most within `limit_ms` (99th percentile) if given.

    `points` need one of phase "batch" with batch 1 that has no errors: ValueError otherwise.
    """
    usable = [point for point in points if not point.errors and point.requests]
    singles = [p for p in usable if p.phase == "batch" and p.batch == 1]
    if not singles:
        raise ValueError("no request of one item was answered")
    reasons: list[str] = []
    choices = []
    for backend in dict.fromkeys(point.backend for point in singles):
        threads, why = _threads([p for p in singles if p.backend == backend])
        same = [p for p in usable if p.backend == backend and p.threads == threads]
        batch, why_batch = _batch([p for p in same if p.phase == "batch"], limit_ms)
        load, why_load = _load([p for p in same if p.phase == "concurrency"], limit_ms)
        choices.append((backend, threads, batch, load, (why, why_batch, why_load)))
    rates = {c[0]: c[3].requests_per_second if c[3] else _best_rate(usable, c[0]) for c in choices}
    backend, threads, batch, load, why_all = max(choices, key=lambda choice: rates[choice[0]])
    if len(choices) > 1:
        reasons.append(_backends(backend, rates, singles))
    reasons += [reason for reason in why_all if reason]
    best = load or next(p for p in singles if (p.backend, p.threads) == (backend, threads))
    reasons += _stacking([p for p in usable if (p.backend, p.threads) == (backend, threads)])
    memory = (memory_mb or {}).get(backend)
    return Recommendation(
        backend=backend,
        threads=threads,
        max_batch=batch,
        concurrency=best.concurrency,
        requests_per_second=best.requests_per_second,
        p50_ms=best.p50_ms,
        p99_ms=best.p99_ms,
        cpu=None if best.cores is None else max(0.1, math.ceil(best.cores * 10) / 10),
        memory_in_gb=None
        if memory is None
        else max(0.05, math.ceil(memory * _MEMORY_MARGIN / 1024 * 20) / 20),
        reasons=tuple(reasons),
    )


def _threads(singles: Sequence[Point]) -> tuple[int, str]:
    fastest = min(point.p50_ms for point in singles)
    ordered = sorted(singles, key=lambda point: point.threads)
    chosen = next(p for p in ordered if p.p50_ms <= fastest * _THREADS_WORTHWHILE)
    if len(ordered) == 1:
        return chosen.threads, ""
    others = ", ".join(
        f"{p.threads}: {p.p50_ms:.3g} ms" for p in ordered if p.threads != chosen.threads
    )
    return chosen.threads, (
        f"{chosen.threads} thread{'s' * (chosen.threads != 1)} for one run: "
        f"{chosen.p50_ms:.3g} ms an item ({others})"
    )


def _batch(points: Sequence[Point], limit_ms: float | None) -> tuple[int, str]:
    allowed = _within(points, limit_ms)
    single = next((p for p in points if p.batch == 1), None)
    if single is None or len(points) == 1:
        return 1, ""
    if not allowed:
        return 1, f"no batch stays within {limit_ms:g} ms, not even one item"
    best = max(allowed, key=lambda point: point.items_per_second)
    gain = best.items_per_second / single.items_per_second
    if gain < _BATCH_WORTHWHILE:
        return 1, f"no batches: an item is at most {max(gain, 1):.2f} times faster among others"
    chosen = min(
        (p for p in allowed if p.items_per_second >= _ENOUGH * best.items_per_second),
        key=lambda point: point.batch,
    )
    gain = chosen.items_per_second / single.items_per_second
    return chosen.batch, (
        f"batches of up to {chosen.batch}: {gain:.1f} times the items a second of single ones"
    )


def _load(points: Sequence[Point], limit_ms: float | None) -> tuple[Point | None, str]:
    if not points:
        return None, ""
    allowed = _within(points, limit_ms)
    if not allowed:
        fastest = min(points, key=lambda point: point.p99_ms)
        return fastest, f"{fastest.p99_ms:.3g} ms is the best 99th percentile, above the limit"
    best = max(allowed, key=lambda point: point.requests_per_second)
    chosen = min(
        (p for p in allowed if p.requests_per_second >= _ENOUGH * best.requests_per_second),
        key=lambda point: (point.concurrency, point.p99_ms),
    )
    return chosen, (
        f"{chosen.concurrency} request{'s' * (chosen.concurrency != 1)} at a time: "
        f"{chosen.requests_per_second:,.0f} a second; more only wait longer"
    )


def _stacking(points: Sequence[Point]) -> list[str]:
    """What it gains to run requests of many callers together."""
    loads = [point for point in points if point.phase == "concurrency"]
    most = max((point.concurrency for point in loads), default=1)
    rates = {p.together: p.requests_per_second for p in loads if p.concurrency == most}
    if most == 1 or len(rates) < 2:
        return []
    return [
        f"{most} callers' requests run together: {rates[True] / rates[False]:.1f} times as many"
    ]


def _within(points: Iterable[Point], limit_ms: float | None) -> list[Point]:
    return [point for point in points if limit_ms is None or point.p99_ms <= limit_ms]


def _best_rate(points: Iterable[Point], backend: str) -> float:
    return max(p.items_per_second for p in points if p.backend == backend)


def _backends(chosen: str, rates: Mapping[str, float], singles: Sequence[Point]) -> str:
    def said(name: str) -> str:
        latency = min(p.p50_ms for p in singles if p.backend == name)
        return f"{name} {rates[name]:,.0f} requests/s and {latency:.3g} ms an item"

    others = "; ".join(said(name) for name in rates if name != chosen)
    return f"{said(chosen)}, against {others}"
