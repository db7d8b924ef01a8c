"""The document of a profile: what was measured, where, and what to do with it."""

from __future__ import annotations

from typing import Literal

import msgspec

FORMAT = 1

Phase = Literal["batch", "concurrency"]


class Point(msgspec.Struct, frozen=True, rename="camel"):
    """One measurement of `seconds` with `concurrency` callers that each wait for their answer.

    `phase` "batch": requests of `batch` items each; "concurrency": requests of one item, which the
    server stacks where `together`. `threads` 0: not known from here. Times are milliseconds of one
    request; `cpu_ms` and `cores` are None where the server's process cannot be seen. `errors`: of
    the requests, with the first one's text in `error`.
    """

    phase: Phase
    backend: str
    threads: int
    batch: int
    concurrency: int
    together: bool
    seconds: float
    requests: int
    requests_per_second: float
    items_per_second: float
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    cpu_ms: float | None = None
    cores: float | None = None
    errors: int = 0
    error: str = ""


class Recommendation(msgspec.Struct, frozen=True, rename="camel"):
    """`cpu` in cores and `memory_in_gb` None where they could not be measured; `reasons`: for
    people, one for each choice."""

    backend: str
    threads: int
    max_batch: int
    concurrency: int
    requests_per_second: float
    p50_ms: float
    p99_ms: float
    cpu: float | None = None
    memory_in_gb: float | None = None
    reasons: tuple[str, ...] = ()


class Device(msgspec.Struct, frozen=True, rename="camel"):
    name: str
    machine: str
    processor: str
    cores: int
    memory_in_gb: float
    board: str = ""


class Report(msgspec.Struct, frozen=True, rename="camel"):
    """`target`: what was asked, an address or a folder. `memory_mb`: by backend, what the model
    takes beside the process. `latency_limit_ms`: of the 99th percentile, as asked for."""

    model: str
    version: str
    target: str
    created: str
    gatelet: str
    device: Device
    points: tuple[Point, ...]
    recommendation: Recommendation
    memory_mb: dict[str, float] = {}
    latency_limit_ms: float | None = None
    notes: tuple[str, ...] = ()
    format: int = FORMAT
