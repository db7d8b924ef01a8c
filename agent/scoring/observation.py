"""What is told of single requests: an access log, and spans for OpenTelemetry."""

from __future__ import annotations

import logging
import random
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

import msgspec

from .trace_context import TraceContext, parse_traceparent

access_log = logging.getLogger("gatelet.scoring.access")

TIMING_HEADER = "x-gatelet-timing"
"""A request with this header is told how long its parts took."""


@dataclass(frozen=True, slots=True)
class Served:
    """One answered request. `seconds`: from its arrival to its answer; `ended`: of
    `time.monotonic()`. `status`: HTTP's, or gRPC's code."""

    protocol: str
    operation: str
    endpoint: str
    version: str
    status: str
    failed: bool
    seconds: float
    ended: float
    client: str
    request_id: str = ""


class SpanSink(Protocol):
    """Where spans go."""

    def add(self, served: Served, context: TraceContext, span_id: str) -> None: ...


class Observer:
    """Thread-safe. Nothing costs anything that is not asked for."""

    def __init__(
        self,
        log_sample: float = 0.0,
        spans: SpanSink | None = None,
        trace_sample: float = 0.0,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`log_sample`: which part of the requests is logged, and every server's fault with them;
        0: none. `trace_sample`: the same of requests that bring no decision of their own."""
        self._log_sample = log_sample
        self._spans = spans
        self._trace_sample = trace_sample
        self._draw = draw

    @property
    def active(self) -> bool:
        return self._log_sample > 0 or self._spans is not None

    def note(self, served: Served, headers: Mapping[str, str]) -> None:
        context = parse_traceparent(headers.get("traceparent", ""))
        if self._log_sample and (served.failed or self._draw() < self._log_sample):
            self._log(served, context)
        if self._spans is not None:
            if context is None:
                sampled = self._draw() < self._trace_sample
                context = TraceContext(secrets.token_hex(16), "", sampled)
            if context.sampled:
                self._spans.add(served, context, secrets.token_hex(8))

    def _log(self, served: Served, context: TraceContext | None) -> None:
        record = {
            "protocol": served.protocol,
            "operation": served.operation,
            "endpoint": served.endpoint,
            "version": served.version,
            "status": served.status,
            "ms": round(served.seconds * 1000, 3),
            "client": served.client,
        }
        if served.request_id:
            record["requestId"] = served.request_id
        if context is not None:
            record["traceId"] = context.trace_id
        access_log.info("%s", msgspec.json.encode(record).decode())


def server_timing(started: float, submitted: float, computed: float) -> str:
    """The value of `Server-Timing` (W3C) in milliseconds; moments of `time.monotonic()`, 0 for one
    that was not reached."""
    now = monotonic()
    parts = [f"total;dur={(now - started) * 1000:.3f}"]
    if submitted:
        parts.append(f"decode;dur={(submitted - started) * 1000:.3f}")
    if submitted and computed:
        parts.append(f"infer;dur={(computed - submitted) * 1000:.3f}")
        parts.append(f"encode;dur={(now - computed) * 1000:.3f}")
    return ", ".join(parts)
