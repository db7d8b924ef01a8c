"""gatelet.control.v1.Scoring: loads, probes, routes and unloads models for the agent.

Semantics are in protos/control.proto. Wrong arguments are INVALID_ARGUMENT, unknown instances
NOT_FOUND (which the agent heals by loading), refusals FAILED_PRECONDITION.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import grpc

from ...accelerators.backend import Backend
from ...protos import control_pb2 as pb
from .access import NONE, STRICTNESS
from .dataplane import DataPlane
from .ensemble import find_circle
from .ensemble_backend import EnsembleBackend, steps_of
from .errors import InstanceRefused, InstanceUnavailable
from .instances import Instance, State
from .isolated import isolated
from .loading import InstanceOptions, Loaded
from .remote import Served
from .remote_loading import LoadedRemote
from .residency import memory_of
from .routing import SESSION_HEADER, Route, Target, make_route
from .statistics import MirrorSnapshot

log = logging.getLogger(__name__)

_DEFAULT_DRAIN_SECONDS = 30.0
_MAX_NAME = 512

_STATES = {
    State.LOADED: pb.InstanceStatus.LOADED,
    State.READY: pb.InstanceStatus.READY,
    State.FAILED: pb.InstanceStatus.FAILED,
}


class ControlService:
    """Thread-safe. Loading is serialised: two models opening at once would only slow each other
    and every request down; `status` and `switch` do not wait for it."""

    def __init__(
        self,
        plane: DataPlane,
        backends: Mapping[str, Backend],
        *,
        grpc_address: str = "",
        http_address: str = "",
        metrics_address: str = "",
        fabric: Callable[[], bytes] = bytes,
        isolation: Path | None = None,
    ) -> None:
        """`fabric` gives what the fabric process tells, as JSON. `isolation`: a folder of this
        process's own for the sockets of models in processes of their own; None: beside others."""
        self._plane = plane
        ensembles = EnsembleBackend(plane)
        self._backends = {**backends, ensembles.name: ensembles}
        self._isolated = isolated(self._backends, isolation)
        self._addresses = (grpc_address, http_address, metrics_address)
        self._fabric = fabric
        self._boot_id = str(uuid.uuid4())
        self._loading = threading.Lock()
        self._changing = threading.Lock()
        self._loaded: dict[str, Loaded | LoadedRemote] = {}
        self._announced = False

    def load(self, request: pb.LoadRequest, context: grpc.ServicerContext) -> pb.LoadResponse:
        if not request.instance or len(request.instance) > _MAX_NAME:
            _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "instance must be named")
        directory = _source(request, context)
        options = InstanceOptions(
            backends=tuple(dict.fromkeys(request.options.backends)),
            threads=request.options.threads,
            timeout=request.options.timeout_ms / 1000 or None,
            max_batch=request.options.max_batch,
            max_delay=request.options.max_delay_us / 1e6,
            slots=request.options.instances,
            priority=request.options.priority,
            auth=request.options.auth or "none",
            isolate=request.options.isolate,
            clients=tuple(request.options.clients),
        )
        with self._loading:
            loaded = self._loaded.get(request.instance)
            if loaded is None:
                loaded = self._open(request.instance, directory, options, context)
            elif (loaded.directory, loaded.options) != (directory, options):
                _refuse(
                    context,
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"instance {request.instance!r} is already loaded from {loaded.directory} or "
                    "with other options; unload it or choose another name",
                )
            else:
                loaded.retry_missing()
            return pb.LoadResponse(status=_status(loaded))

    def _open(
        self,
        name: str,
        directory: Path | Served,
        options: InstanceOptions,
        context: grpc.ServicerContext,
    ) -> Loaded | LoadedRemote:
        loaded: Loaded | LoadedRemote
        try:
            if isinstance(directory, Served):
                loaded = LoadedRemote(directory, options, name)
            else:
                backends = self._isolated if options.isolate else self._backends
                loaded = Loaded(directory, options, backends, name)
        except InstanceRefused as error:
            _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except InstanceUnavailable as error:
            _refuse(context, grpc.StatusCode.UNAVAILABLE, str(error))
        with self._changing:
            self._loaded[name] = loaded
        members = ", ".join(f"{m.name} ({m.variant})" for m in loaded.instance.members)
        log.info("loaded %s from %s on %s", name, directory, members)
        return loaded

    def probe(self, request: pb.ProbeRequest, context: grpc.ServicerContext) -> pb.ProbeResponse:
        loaded = self._find(request.instance, context)
        with self._loading:
            try:
                loaded.probe()
            except InstanceUnavailable as error:
                _refuse(context, grpc.StatusCode.UNAVAILABLE, str(error))
        if loaded.instance.state is State.FAILED:
            log.warning("probe of %s failed: %s", request.instance, loaded.instance.error)
        return pb.ProbeResponse(status=_status(loaded))

    def announce(
        self, request: pb.AnnounceRequest, context: grpc.ServicerContext
    ) -> pb.AnnounceResponse:
        endpoints = {one.endpoint: one.auth or NONE for one in request.endpoints}
        if "" in endpoints or len(endpoints) < len(request.endpoints):
            _refuse(
                context, grpc.StatusCode.INVALID_ARGUMENT, "endpoints must be named, and once each"
            )
        unknown = set(endpoints.values()) - set(STRICTNESS)
        if unknown:
            _refuse(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                f"auth must be one of {', '.join(STRICTNESS)}, found {sorted(unknown)[0]!r}",
            )
        with self._changing:
            self._plane.announce(endpoints)
            self._announced = True
        log.info("wanted are %s", ", ".join(sorted(endpoints)) or "no endpoints")
        return pb.AnnounceResponse()

    def switch(self, request: pb.SwitchRequest, context: grpc.ServicerContext) -> pb.SwitchResponse:
        with self._changing:
            routes: dict[str, Route[Instance]] = {}
            for message in request.routes:
                if not message.endpoint or message.endpoint in routes:
                    _refuse(
                        context,
                        grpc.StatusCode.INVALID_ARGUMENT,
                        f"endpoint {message.endpoint!r} must be named, and once",
                    )
                routes[message.endpoint] = self._route(message, context)
            circle = find_circle(
                {
                    name: steps_of(target.instance for target in route.targets)
                    for name, route in routes.items()
                }
            )
            if circle:
                _refuse(
                    context,
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"ensembles ask each other: {' -> '.join(circle)}",
                )
            for route in routes.values():
                if len(route.targets) > 1:
                    for target in route.targets:
                        target.instance.statistics.keep_times()
            self._plane.switch(routes.values())
        log.info("serving %s", ", ".join(map(_described, routes.values())) or "no endpoint")
        return pb.SwitchResponse()

    def _route(self, message: pb.Route, context: grpc.ServicerContext) -> Route[Instance]:
        default: Target[Instance] | None = None
        others: list[Target[Instance]] = []
        for target in message.targets:
            instance = self._find(target.instance, context).instance
            if instance.state is not State.READY:
                _refuse(
                    context,
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"instance {instance.name!r} is {instance.state.value}, not ready"
                    f"{': ' + instance.error if instance.error else ''}; probe it first",
                )
            made = Target(
                instance,
                instance.version,
                target.percent,
                instance.name.rpartition("@")[0] or instance.name,
                target.mirror,
                target.mirror_tolerance,
            )
            # The only target takes everything, named default or not.
            if target.default or len(message.targets) == 1:
                if default is not None:
                    _refuse(
                        context,
                        grpc.StatusCode.INVALID_ARGUMENT,
                        f"endpoint {message.endpoint!r} has two default targets; keep one",
                    )
                default = made
            else:
                others.append(made)
        if default is None:
            _refuse(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                f"endpoint {message.endpoint!r} has no default target",
            )
        try:
            return make_route(message.endpoint, default, others, message.sticky_header)
        except ValueError as error:
            _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))

    def unload(self, request: pb.UnloadRequest, context: grpc.ServicerContext) -> pb.UnloadResponse:
        with self._changing:
            loaded = self._loaded.get(request.instance)
            if loaded is None:
                return pb.UnloadResponse()
            for route in self._plane.table.routes.values():
                if any(target.instance is loaded.instance for target in route.targets):
                    _refuse(
                        context,
                        grpc.StatusCode.FAILED_PRECONDITION,
                        f"endpoint {route.endpoint!r} routes to {request.instance!r}; switch first",
                    )
            # Out of sight at once: no later switch can name it while it drains.
            del self._loaded[request.instance]
        self._close(loaded, request.drain_ms / 1000 or _DEFAULT_DRAIN_SECONDS)
        return pb.UnloadResponse()

    def _close(self, loaded: Loaded | LoadedRemote, drain: float) -> None:
        if loaded.instance.close(drain):
            log.info("unloaded %s", loaded.instance.name)
        else:
            log.warning(
                "unloaded %s although %d requests were still running after %.1f s",
                loaded.instance.name,
                loaded.instance.in_flight,
                drain,
            )

    def status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusResponse:
        with self._changing:
            loaded = list(self._loaded.values())
        return pb.StatusResponse(
            pid=os.getpid(),
            instances=[_status(one) for one in loaded],
            routes=[_route_message(route) for route in self._plane.table.routes.values()],
            boot_id=self._boot_id,
            grpc_address=self._addresses[0],
            http_address=self._addresses[1],
            metrics_address=self._addresses[2],
            announced=self._announced,
            endpoints=[
                pb.WantedEndpoint(endpoint=endpoint, auth=auth)
                for endpoint, auth in sorted(self._plane.table.coming.items())
            ],
            fabric=self._fabric(),
        )

    def retry_missing(self) -> None:
        """Let backends that were unavailable when a model was loaded join it."""
        with self._changing:
            waiting = [loaded for loaded in self._loaded.values() if loaded.missing]
        for loaded in waiting:
            with self._loading:
                for name in loaded.retry_missing():
                    log.info("%s joined %s", name, loaded.instance.name)

    def close(self) -> None:
        """Close every instance without draining; for the end of the process."""
        with self._changing:
            loaded, self._loaded = list(self._loaded.values()), {}
        self._plane.close()
        for one in loaded:
            one.instance.close(0.0)

    def _find(self, name: str, context: grpc.ServicerContext) -> Loaded | LoadedRemote:
        loaded = self._loaded.get(name)
        if loaded is None:
            _refuse(
                context,
                grpc.StatusCode.NOT_FOUND,
                f"instance {name!r} is not loaded in this process; load it first",
            )
        return loaded


def _source(request: pb.LoadRequest, context: grpc.ServicerContext) -> Path | Served:
    """The model's directory, or where a container serves it."""
    if bool(request.directory) == bool(request.socket):
        _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, "give either a directory or a socket")
    path = Path(request.socket or request.directory)
    if not path.is_absolute():
        kind = "socket" if request.socket else "directory"
        _refuse(
            context,
            grpc.StatusCode.INVALID_ARGUMENT,
            f"{kind} {str(path)!r} must be an absolute path",
        )
    return Served(path, request.model) if request.socket else path


def _refuse(context: grpc.ServicerContext, code: grpc.StatusCode, message: str) -> NoReturn:
    context.abort(code, message)


def _status(loaded: Loaded | LoadedRemote) -> pb.InstanceStatus:
    instance = loaded.instance
    return pb.InstanceStatus(
        instance=instance.name,
        state=_STATES[instance.state],
        error=instance.error,
        model=instance.model,
        version=instance.version,
        backends=[
            pb.BackendStatus(
                name=report.name,
                healthy=report.healthy,
                detail=report.detail,
                requests=report.requests,
                failures=report.failures,
                fallbacks=report.fallbacks,
            )
            for report in (member.report() for member in instance.members)
        ],
        notes=loaded.notes,
        counts=_counts(instance),
        mirror=_mirrored(instance),
        memory=_memory(instance),
    )


def _memory(instance: Instance) -> pb.MemoryStatus | None:
    report = memory_of(instance)
    if report is None:
        return None
    return pb.MemoryStatus(
        resident=report.resident,
        bytes=report.bytes,
        loads=report.loads,
        evictions=report.evictions,
    )


def _counts(instance: Instance) -> pb.InstanceCounts:
    # First: a success between the two is without its time rather than a time without its success.
    times = instance.statistics.times().buckets
    snapshot = instance.statistics.snapshot()
    return pb.InstanceCounts(
        successes=snapshot.success.count,
        failures=snapshot.fail.count,
        success_ns=snapshot.success.ns,
        time_buckets=[number for number, _ in times],
        time_counts=[many for _, many in times],
    )


def _mirrored(instance: Instance) -> pb.MirrorCounts | None:
    counts = instance.mirrored.snapshot()
    if counts == MirrorSnapshot():
        return None
    return pb.MirrorCounts(
        compared=counts.compared,
        differing=counts.differing,
        failed=counts.failed,
        dropped=counts.dropped,
        largest_difference=counts.largest,
    )


def _route_message(route: Route[Instance]) -> pb.Route:
    return pb.Route(
        endpoint=route.endpoint,
        targets=[
            pb.RouteTarget(
                instance=target.instance.name,
                percent=target.percent,
                default=target is route.default,
                mirror=target.mirror,
                mirror_tolerance=target.tolerance,
            )
            for target in route.targets
        ],
        sticky_header="" if route.sticky == SESSION_HEADER else route.sticky,
    )


def _described(route: Route[Instance]) -> str:
    shares: Sequence[str] = [f"{t.version} {t.percent}%" for t in route.targets]
    return f"{route.endpoint} ({', '.join(shares)})"
