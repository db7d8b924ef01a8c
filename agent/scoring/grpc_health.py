"""The standard health service of gRPC."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from ...protos import health_pb2 as health
from ...protos.inference import INFERENCE
from ...protos.services import HEALTH
from .dataplane import DataPlane
from .grpc_streams import StreamPool

_WATCH_SECONDS = 0.5


class HealthService:
    """grpc.health.v1.Health: the whole server ("") and the inference service are as ready as the
    data plane."""

    def __init__(self, plane: DataPlane, streams: StreamPool) -> None:
        self._plane = plane
        self._streams = streams
        self.watch = streams.served(self._watch)

    def check(
        self, request: health.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health.HealthCheckResponse:
        status = self._status(request.service)
        if status == health.HealthCheckResponse.SERVICE_UNKNOWN:
            context.abort(
                grpc.StatusCode.NOT_FOUND, f"there is no service {request.service!r} here"
            )
        return health.HealthCheckResponse(status=status)

    def _watch(
        self, request: health.HealthCheckRequest, context: grpc.ServicerContext
    ) -> Iterator[health.HealthCheckResponse]:
        told = None
        while context.is_active():
            status = self._status(request.service)
            if status != told:
                told = status
                yield health.HealthCheckResponse(status=status)
            if self._streams.stopping.wait(_WATCH_SECONDS):
                return

    def _status(self, service: str) -> health.HealthCheckResponse.ServingStatus:
        if service not in ("", INFERENCE.full_name, HEALTH.full_name):
            return health.HealthCheckResponse.SERVICE_UNKNOWN
        if self._plane.ready():
            return health.HealthCheckResponse.SERVING
        return health.HealthCheckResponse.NOT_SERVING
