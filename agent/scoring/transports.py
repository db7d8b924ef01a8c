"""The listeners of the scoring process, put together and ended as one."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace

from .dataplane import DataPlane
from .grpc_server import GrpcLimits, GrpcServer
from .http_server import HttpServer
from .http_service import HttpService
from .http_types import HttpLimits
from .prometheus import MetricsService
from .settings import ScoringSettings


class Transports:
    """Listen from construction on, serve from `start` on; an address is "" where one is off."""

    def __init__(
        self,
        plane: DataPlane,
        settings: ScoringSettings,
        *,
        grpc_limits: GrpcLimits | None = None,
        http_limits: HttpLimits | None = None,
    ) -> None:
        """Raises AddressUnavailable, and then holds nothing."""
        largest = settings.max_message_bytes
        limits = grpc_limits or GrpcLimits(settings.grpc_threads, max_message_bytes=largest)
        http = http_limits or replace(HttpLimits(), max_body_bytes=largest)
        self.grpc_address = self.http_address = self.metrics_address = ""
        self._grpc: GrpcServer | None = None
        with ExitStack() as undo:
            self._http = HttpServer(http)
            undo.callback(self._http.stop, 0.0)
            self._service = HttpService(plane, http, self._http.soon)
            undo.callback(self._service.close)
            if settings.http_address:
                self.http_address = self._http.listen(settings.http_address, self._service)
            if settings.metrics_address:
                metrics = MetricsService(plane, (self._http,))
                self.metrics_address = self._http.listen(settings.metrics_address, metrics)
            if settings.grpc_address:
                self._grpc = GrpcServer(plane, settings.grpc_address, limits)
                self.grpc_address = self._grpc.address
            undo.pop_all()

    def start(self) -> None:
        self._http.start()
        if self._grpc is not None:
            self._grpc.start()

    def stop(self, drain: float) -> None:
        """Take no more requests, give running ones `drain` seconds, and wait for the end."""
        ending = threading.Thread(target=self._http.stop, args=(drain,), name="http-end")
        ending.start()
        if self._grpc is not None:
            self._grpc.stop(drain)
        ending.join()
        self._service.close()
