"""Spans to an OpenTelemetry collector: OTLP over HTTP in its JSON form, without its SDK.

Source: OpenTelemetry Protocol 1.x, "JSON Protobuf Encoding"; semantic conventions for RPC and HTTP.
"""

from __future__ import annotations

import logging
import queue
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from typing import Any

import msgspec

from ..clock import Clock, SystemClock
from .observation import Served
from .prometheus import Family
from .trace_context import TraceContext

log = logging.getLogger(__name__)

_WAITING = 2048
_TOGETHER = 256
_PAUSE_SECONDS = 1.0
_TIMEOUT_SECONDS = 5.0
_SERVER, _UNSET, _ERROR = 2, 0, 2


class OtlpExporter:
    """A `SpanSink` that sends in the background; what does not fit its queue is dropped."""

    def __init__(self, url: str, service: str, version: str, clock: Clock | None = None) -> None:
        """`url`: of the collector's traces, such as http://127.0.0.1:4318/v1/traces."""
        self._url = url
        self._clock = clock or SystemClock()
        self._resource = {
            "attributes": [
                _attribute("service.name", service),
                _attribute("service.version", version),
            ]
        }
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_WAITING)
        self._dropped = self._sent = 0
        self._told = False
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._thread.start()

    def add(self, served: Served, context: TraceContext, span_id: str) -> None:
        ago = self._clock.monotonic() - served.ended
        end = self._clock.now().timestamp() - ago
        span = {
            "traceId": context.trace_id,
            "spanId": span_id,
            "parentSpanId": context.parent_id,
            "name": f"{served.operation} {served.endpoint}".strip(),
            "kind": _SERVER,
            "startTimeUnixNano": str(int((end - served.seconds) * 1e9)),
            "endTimeUnixNano": str(int(end * 1e9)),
            "status": {"code": _ERROR if served.failed else _UNSET},
            "attributes": [
                _attribute("network.protocol.name", served.protocol),
                _attribute("gatelet.endpoint", served.endpoint),
                _attribute("gatelet.version", served.version),
                _attribute(
                    "rpc.grpc.status" if served.protocol == "grpc" else "http.response.status_code",
                    served.status,
                ),
            ],
        }
        try:
            self._queue.put_nowait(span)
        except queue.Full:
            self._dropped += 1

    def metrics(self) -> list[Family]:
        """For `/metrics`."""
        spans = Family("gatelet_spans_total", "counter", "Spans for OpenTelemetry, by result")
        spans.add(self._sent, (("result", "sent"),))
        spans.add(self._dropped, (("result", "dropped"),))
        return [spans]

    def close(self) -> None:
        """Send what waits, within a few seconds."""
        with suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(_TIMEOUT_SECONDS + _PAUSE_SECONDS)

    def _run(self) -> None:
        ending = False
        while not ending:
            spans = []
            first = self._queue.get()
            if first is None:
                return
            spans.append(first)
            with suppress(queue.Empty):
                while len(spans) < _TOGETHER:
                    span = self._queue.get(timeout=_PAUSE_SECONDS)
                    if span is None:
                        ending = True
                        break
                    spans.append(span)
            self._send(spans)

    def _send(self, spans: list[dict[str, Any]]) -> None:
        scope = {"scope": {"name": "gatelet.scoring"}, "spans": spans}
        body = {"resourceSpans": [{"resource": self._resource, "scopeSpans": [scope]}]}
        request = urllib.request.Request(
            self._url, msgspec.json.encode(body), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS):
                self._sent += len(spans)
                self._told = False
        except (OSError, ValueError, urllib.error.URLError) as error:
            self._dropped += len(spans)
            if not self._told:
                log.warning("spans are dropped: %s does not take them (%s)", self._url, error)
                self._told = True


def _attribute(key: str, value: str) -> dict[str, Any]:
    return {"key": key, "value": {"stringValue": value}}
