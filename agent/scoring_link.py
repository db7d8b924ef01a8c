"""The agent's hold on the scoring process over the control API (protos/control.proto)."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio

from ..protos import control_pb2 as pb
from ..protos.services import AsyncScoringStub
from .canary import Counts
from .latencies import Latencies
from .plan import InstanceView, Route, Target, WantedEndpoint
from .plan_types import UNTOLD
from .scoring_env import ScoringOptions
from .seams import BackendView, LoadedModel, MemoryView, MirrorView, ScoringView, StepFailed

STATUS_SECONDS = 5.0
LOAD_SECONDS = 300.0
PROBE_SECONDS = 60.0
DRAIN_SECONDS = 30.0

_STATES = {
    pb.InstanceStatus.LOADED: "loaded",
    pb.InstanceStatus.READY: "ready",
    pb.InstanceStatus.FAILED: "failed",
}

# What a new attempt can heal: the process is away, restarting, busy or slow.
_RETRYABLE = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
}

T = TypeVar("T")


class ScoringLink:
    """`ScoringControl` over gRPC on a Unix socket."""

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.aio.insecure_channel(
            f"unix:{socket}",
            options=[
                # The scoring process restarts within a second; the default waits up to 120 s.
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ],
        )
        self._stub = AsyncScoringStub(self._channel)

    async def close(self) -> None:
        await self._channel.close(None)

    async def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever the scoring process went away or came back, until cancelled.

        What was seen of it last is no longer true then, and it has to be told everything anew.
        """
        up = False
        while True:
            state = self._channel.get_state(try_to_connect=True)
            if up != (state is grpc.ChannelConnectivity.READY):
                up = not up
                changed()
            await self._channel.wait_for_state_change(state)

    async def status(self) -> ScoringView:
        answer = await _ask(lambda: self._stub.status(pb.StatusRequest(), timeout=STATUS_SECONDS))
        return ScoringView(
            answer.boot_id,
            answer.pid,
            tuple(_model(instance) for instance in answer.instances),
            tuple(
                Route(
                    route.endpoint,
                    tuple(
                        Target(t.instance, t.percent, t.default, t.mirror, t.mirror_tolerance)
                        for t in route.targets
                    ),
                    route.sticky_header,
                )
                for route in sorted(answer.routes, key=lambda route: route.endpoint)
            ),
            tuple(
                (name, address)
                for name, address in (
                    ("grpc", answer.grpc_address),
                    ("http", answer.http_address),
                    ("metrics", answer.metrics_address),
                )
                if address
            ),
            _announced(answer),
            _fabric(answer.fabric),
        )

    async def load(self, instance: str, directory: Path, options: ScoringOptions) -> None:
        request = pb.LoadRequest(
            instance=instance, directory=str(directory), options=_options(options)
        )
        await _ask(lambda: self._stub.load(request, timeout=LOAD_SECONDS))

    async def attach(self, instance: str, socket: str, options: ScoringOptions) -> None:
        request = pb.LoadRequest(
            instance=instance, socket=socket, model=options.model, options=_options(options)
        )
        await _ask(lambda: self._stub.load(request, timeout=LOAD_SECONDS))

    async def probe(self, instance: str) -> None:
        request = pb.ProbeRequest(instance=instance)
        answer = await _ask(lambda: self._stub.probe(request, timeout=PROBE_SECONDS))
        if answer.status.state != pb.InstanceStatus.READY:
            raise StepFailed(answer.status.error or "the probe failed", retryable=False)

    async def announce(self, endpoints: tuple[WantedEndpoint, ...]) -> None:
        request = pb.AnnounceRequest(
            endpoints=[pb.WantedEndpoint(endpoint=one.endpoint, auth=one.auth) for one in endpoints]
        )
        await _ask(lambda: self._stub.announce(request, timeout=STATUS_SECONDS))

    async def switch(self, routes: tuple[Route, ...]) -> None:
        request = pb.SwitchRequest(
            routes=[
                pb.Route(
                    endpoint=route.endpoint,
                    targets=[
                        pb.RouteTarget(
                            instance=t.instance,
                            percent=t.percent,
                            default=t.default,
                            mirror=t.mirror,
                            mirror_tolerance=t.tolerance,
                        )
                        for t in route.targets
                    ],
                    sticky_header=route.sticky,
                )
                for route in routes
            ]
        )
        await _ask(lambda: self._stub.switch(request, timeout=STATUS_SECONDS))

    async def unload(self, instance: str) -> None:
        request = pb.UnloadRequest(instance=instance, drain_ms=int(DRAIN_SECONDS * 1000))
        await _ask(lambda: self._stub.unload(request, timeout=DRAIN_SECONDS + STATUS_SECONDS))


def _options(options: ScoringOptions) -> pb.ScoringOptions:
    return pb.ScoringOptions(
        backends=options.backends,
        max_batch=options.max_batch,
        max_delay_us=options.max_delay_us,
        timeout_ms=options.timeout_ms,
        threads=options.threads,
        instances=options.instances,
        priority=options.priority,
        auth=options.auth,
        isolate=options.isolate,
        clients=options.clients,
    )


def _model(status: pb.InstanceStatus) -> LoadedModel:
    return LoadedModel(
        InstanceView(status.instance, _STATES.get(status.state, "failed"), status.error),
        status.model,
        status.version,
        tuple(
            BackendView(b.name, b.healthy, b.detail, b.requests, b.failures)
            for b in status.backends
        ),
        tuple(status.notes),
        _counts(status.counts),
        _mirrored(status),
        _memory(status),
    )


def _counts(counts: pb.InstanceCounts) -> Counts:
    times = zip(counts.time_buckets, counts.time_counts, strict=True)
    return Counts(counts.successes, counts.failures, Latencies(tuple(times)))


def _fabric(told: bytes) -> Mapping[str, Any] | None:
    try:
        document = json.loads(told) if told else None
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _announced(answer: pb.StatusResponse) -> tuple[WantedEndpoint, ...] | None:
    # A scoring process of an earlier release knows no such call.
    if not answer.HasField("announced"):
        return None
    if not answer.announced:
        return UNTOLD
    return tuple(WantedEndpoint(one.endpoint, one.auth or "none") for one in answer.endpoints)


def _memory(status: pb.InstanceStatus) -> MemoryView | None:
    if not status.HasField("memory"):
        return None
    memory = status.memory
    return MemoryView(memory.resident, memory.bytes, memory.loads, memory.evictions)


def _mirrored(status: pb.InstanceStatus) -> MirrorView | None:
    if not status.HasField("mirror"):
        return None
    counts = status.mirror
    return MirrorView(
        counts.compared,
        counts.differing,
        counts.failed,
        counts.dropped,
        counts.largest_difference,
    )


async def _ask(call: Callable[[], Awaitable[T]]) -> T:
    try:
        return await call()
    except grpc.aio.AioRpcError as error:
        code = error.code()
        retryable = code in _RETRYABLE
        if code is grpc.StatusCode.UNAVAILABLE and "connect" in (error.details() or "").lower():
            raise StepFailed(
                "the scoring process does not answer; it is restarting or was not started",
                retryable=True,
            ) from error
        raise StepFailed(error.details() or code.name, retryable=retryable) from error
