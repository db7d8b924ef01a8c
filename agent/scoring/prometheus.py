"""`/metrics` in Prometheus' text format 0.0.4, read off counts that are kept anyway.

Names and labels of `nv_inference_*` are Triton's (Triton Inference Server, "Metrics"), which are
not what OpenMetrics would call a counter; `process_*` are those of Prometheus' client libraries.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .dataplane import DataPlane
from .errors import ScoringError
from .http_types import HttpRequest, HttpResponse, Refusal, as_refusal, error_response
from .instances import Instance
from .residency import memory_of
from .statistics import MirrorSnapshot, Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)

Labels = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Family:
    """One metric; `samples`: suffix of the name, labels and value."""

    name: str
    kind: str
    help: str
    samples: list[tuple[str, Labels, float]] = field(default_factory=list)

    def add(self, value: float, labels: Labels = (), suffix: str = "") -> None:
        self.samples.append((suffix, labels, value))


def render(families: Iterable[Family]) -> bytes:
    """Families without samples are left out."""
    lines: list[str] = []
    for family in families:
        if not family.samples:
            continue
        lines.append(f"# HELP {family.name} {_escaped(family.help, quotes=False)}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        for suffix, labels, value in family.samples:
            shown = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels)
            around = f"{{{shown}}}" if shown else ""
            lines.append(f"{family.name}{suffix}{around} {_number(value)}")
    return ("\n".join(lines) + "\n").encode()


def _escaped(text: str, *, quotes: bool = True) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quotes else text


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))


def _labelled(plane: DataPlane) -> Iterator[tuple[Labels, Instance]]:
    """Every served instance once per endpoint; `deployment` tells equal versions apart."""
    seen: set[Labels] = set()
    for route in plane.table.routes.values():
        for target in route.targets:
            labels: Labels = (("model", route.endpoint), ("version", target.version))
            if labels in seen:
                labels = (*labels, ("deployment", target.name))
            seen.add(labels)
            yield labels, target.instance


def model_metrics(plane: DataPlane) -> list[Family]:
    """Of every model that is served now."""
    success = Family("nv_inference_request_success", "counter", "Requests that were answered")
    failure = Family("nv_inference_request_failure", "counter", "Requests that failed, by reason")
    count = Family("nv_inference_count", "counter", "Items that were scored")
    executions = Family("nv_inference_exec_count", "counter", "Runs of the model")
    durations = {
        name: Family(f"nv_inference_{name}_duration_us", "counter", text)
        for name, text in (
            ("request", "Time of requests from their arrival to their answer"),
            ("queue", "Time that requests waited for their turn"),
            ("compute_input", "Time spent on stacking inputs"),
            ("compute_infer", "Time spent in the model"),
            ("compute_output", "Time spent on splitting outputs"),
        )
    }
    pending = Family(
        "nv_inference_pending_request_count", "gauge", "Requests that wait for their turn"
    )
    batches = Family("gatelet_batch_size", "histogram", "Items that a run of the model carried")
    backends = _backend_families()
    memory = _memory_families()
    mirrored = Family("gatelet_mirrored_requests_total", "counter", "Copies of requests, by result")
    for labels, instance in _labelled(plane):
        snapshot = instance.statistics.snapshot()
        success.add(snapshot.success.count, labels)
        for reason, number in sorted((c.value, n) for c, n in snapshot.failures.items()):
            failure.add(number, (*labels, ("reason", reason)))
        if not snapshot.failures:
            failure.add(0, (*labels, ("reason", "INTERNAL")))
        count.add(snapshot.inference_count, labels)
        executions.add(snapshot.execution_count, labels)
        for name, duration in (
            ("request", snapshot.success),
            ("queue", snapshot.queue),
            ("compute_input", snapshot.compute_input),
            ("compute_infer", snapshot.compute_infer),
            ("compute_output", snapshot.compute_output),
        ):
            durations[name].add(duration.ns // 1000, labels)
        pending.add(instance.pending, labels)
        _add_histogram(batches, labels, snapshot)
        _add_backends(backends, labels, instance)
        _add_memory(memory, labels, instance)
        copies = instance.mirrored.snapshot()
        if copies != MirrorSnapshot():
            agreed = copies.compared - copies.differing
            for result, number in (
                ("same", agreed),
                ("different", copies.differing),
                ("failed", copies.failed),
                ("dropped", copies.dropped),
            ):
                mirrored.add(number, (*labels, ("result", result)))
    measured = [success, failure, count, executions, *durations.values(), pending, batches]
    return [*measured, *backends.values(), *memory.values(), mirrored]


def _add_histogram(family: Family, labels: Labels, snapshot: Snapshot) -> None:
    runs = {batch.size: batch.compute_infer.count for batch in snapshot.batches}
    for bound in BUCKETS:
        within = sum(number for size, number in runs.items() if size <= bound)
        family.add(within, (*labels, ("le", f"{bound}.0")), "_bucket")
    family.add(snapshot.execution_count, (*labels, ("le", "+Inf")), "_bucket")
    family.add(sum(size * number for size, number in runs.items()), labels, "_sum")
    family.add(snapshot.execution_count, labels, "_count")


def _backend_families() -> dict[str, Family]:
    return {
        "healthy": Family("gatelet_backend_healthy", "gauge", "1 when the backend can be asked"),
        "open": Family(
            "gatelet_backend_breaker_open", "gauge", "1 while the backend is left in peace"
        ),
        "requests": Family(
            "gatelet_backend_requests_total", "counter", "Requests the backend was asked"
        ),
        "failures": Family("gatelet_backend_failures_total", "counter", "Requests it failed on"),
        "fallbacks": Family(
            "gatelet_backend_fallbacks_total", "counter", "Requests passed on to the next backend"
        ),
    }


def _add_backends(families: Mapping[str, Family], labels: Labels, instance: Instance) -> None:
    for member in instance.members:
        report = member.report()
        own = (*labels, ("backend", report.name))
        families["healthy"].add(int(report.healthy), own)
        families["open"].add(int(report.breaker_open), own)
        families["requests"].add(report.requests, own)
        families["failures"].add(report.failures, own)
        families["fallbacks"].add(report.fallbacks, own)


def _memory_families() -> dict[str, Family]:
    """Of models that share a memory budget."""
    return {
        "bytes": Family("gatelet_model_memory_bytes", "gauge", "Memory of the model, 0 when out"),
        "loads": Family("gatelet_model_loads_total", "counter", "Times it was loaded on demand"),
        "evictions": Family(
            "gatelet_model_evictions_total", "counter", "Times it left memory for another"
        ),
    }


def _add_memory(families: Mapping[str, Family], labels: Labels, instance: Instance) -> None:
    report = memory_of(instance)
    if report is not None:
        families["bytes"].add(report.bytes, labels)
        families["loads"].add(report.loads, labels)
        families["evictions"].add(report.evictions, labels)


def process_metrics() -> list[Family]:
    """Of this process, from /proc; nothing where there is none."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
            # The name, in brackets, may hold anything.
            fields = file.read().rpartition(")")[2].split()
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = file.read().split()
        descriptors = len(os.listdir("/proc/self/fd"))
    except OSError:
        return []
    tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    cpu = Family("process_cpu_seconds_total", "counter", "User and system CPU time")
    cpu.add((int(fields[11]) + int(fields[12])) / tick)
    virtual = Family("process_virtual_memory_bytes", "gauge", "Virtual memory")
    virtual.add(int(pages[0]) * page)
    resident = Family("process_resident_memory_bytes", "gauge", "Resident memory")
    resident.add(int(pages[1]) * page)
    files = Family("process_open_fds", "gauge", "Open file descriptors")
    files.add(descriptors)
    threads = Family("gatelet_threads", "gauge", "Threads of Python")
    threads.add(threading.active_count())
    return [cpu, virtual, resident, files, threads]


class Gate(Protocol):
    """Refuses a request with ScoringError."""

    def admit_request(self, request: HttpRequest, endpoint: str, operation: str) -> None: ...


class MetricsSource(Protocol):
    """Something that keeps counts of its own."""

    def metrics(self) -> list[Family]: ...


class MetricsService:
    """A `Handler` for `GET /metrics`. `more`: families beside those of models and process."""

    def __init__(
        self,
        plane: DataPlane,
        more: Sequence[MetricsSource] = (),
        gate: Gate | None = None,
    ) -> None:
        """`gate` refuses who may not read them."""
        self._plane = plane
        self._more = more
        self._gate = gate

    def __call__(self, request: HttpRequest) -> None:
        if request.path != "/metrics":
            refusal = Refusal(404, "metrics are at /metrics")
            request.respond(error_response(refusal))
        elif request.method not in ("GET", "HEAD"):
            request.respond(error_response(Refusal(405, "use GET", (("Allow", "GET"),))))
        else:
            try:
                if self._gate is not None:
                    self._gate.admit_request(request, "", "metrics")
            except ScoringError as error:
                request.respond(error_response(as_refusal(error)))
            else:
                request.respond(HttpResponse(200, self.text(), CONTENT_TYPE))

    def text(self) -> bytes:
        families = [*model_metrics(self._plane), *process_metrics()]
        for source in self._more:
            families += source.metrics()
        return render(families)
