"""The listeners of the scoring process, put together and ended as one."""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from .access import KEY, NONE, Access
from .dataplane import DataPlane
from .grpc_server import AddressUnavailable, GrpcLimits, GrpcServer
from .h2_connection import GrpcConnection
from .h2_service import GrpcCalls
from .http_server import HttpServer
from .http_service import HttpService
from .http_types import HttpLimits
from .keys import KeyStore
from .observation import Observer
from .otlp import OtlpExporter
from .prometheus import MetricsService, MetricsSource
from .settings import ScoringSettings
from .tls import TlsFiles, TlsUnusable
from .tokens import TokensUnusable, TokenVerifier


class Transports:
    """Listen from construction on, serve from `start` on; an address is "" where one is off."""

    def __init__(
        self,
        plane: DataPlane,
        settings: ScoringSettings,
        *,
        grpc_limits: GrpcLimits | None = None,
        http_limits: HttpLimits | None = None,
        metrics: Sequence[MetricsSource] = (),
    ) -> None:
        """`metrics`: what else is told there. Raises AddressUnavailable, then holds nothing."""
        largest = settings.max_message_bytes
        limits = grpc_limits or GrpcLimits(settings.grpc_threads, max_message_bytes=largest)
        http = http_limits or replace(HttpLimits(), max_body_bytes=largest)
        self.grpc_address = self.http_address = self.metrics_address = ""
        self._grpc: GrpcServer | None = None
        self._calls: GrpcCalls | None = None
        self._more = tuple(metrics)
        access = make_access(plane, settings)
        self._spans = (
            OtlpExporter(settings.otlp_url, "gatelet-scoring", plane.server_metadata().version)
            if settings.otlp_url
            else None
        )
        observer = Observer(settings.access_log_sample, self._spans, settings.trace_sample)
        with ExitStack() as undo:
            if self._spans is not None:
                undo.callback(self._spans.close)
            self._http = HttpServer(http)
            undo.callback(self._http.stop, 0.0)
            self._service = HttpService(
                plane,
                http,
                self._http,
                access=access,
                origins=settings.cors_origins,
                observer=observer,
            )
            undo.callback(self._service.close)
            if settings.http_address:
                self.http_address = self._http.listen(
                    settings.http_address, self._service, _tls(settings)
                )
            if settings.metrics_address:
                service = MetricsService(plane, self._sources(access), access)
                self.metrics_address = self._http.listen(
                    settings.metrics_address, service, _tls(settings)
                )
            if settings.grpc_address and settings.grpc_transport == "http2":
                calls = GrpcCalls(plane, limits, self._http, access, observer)
                undo.callback(calls.close)
                self._calls = calls
                self.grpc_address = self._http.listen_with(
                    settings.grpc_address,
                    lambda: GrpcConnection(self._http, calls),
                    _tls(settings, "h2"),
                )
            elif settings.grpc_address:
                tls = _tls(settings)
                credentials = None if tls is None else tls.credentials()
                self._grpc = GrpcServer(
                    plane, settings.grpc_address, limits, access, credentials, observer
                )
                self.grpc_address = self._grpc.address
            undo.pop_all()

    def start(self) -> None:
        self._http.start()
        if self._grpc is not None:
            self._grpc.start()

    def stop(self, drain: float) -> None:
        """Take no more requests, give running ones `drain` seconds, and wait for the end."""
        if self._calls is not None:
            self._calls.stop()
        ending = threading.Thread(target=self._http.stop, args=(drain,), name="http-end")
        ending.start()
        if self._grpc is not None:
            self._grpc.stop(drain)
        ending.join()
        self._service.close()
        if self._calls is not None:
            self._calls.close()
        if self._spans is not None:
            self._spans.close()

    def _sources(self, access: Access) -> tuple[MetricsSource, ...]:
        spans = () if self._spans is None else (self._spans,)
        return (self._http, access, *spans, *self._more)


def make_access(plane: DataPlane, settings: ScoringSettings) -> Access:
    """Raises AddressUnavailable when the settings would let strangers in."""
    addresses = (settings.grpc_address, settings.http_address, settings.metrics_address)
    wide = [address for address in addresses if address and not is_local(address)]
    floor = NONE
    if wide and not settings.allow_insecure:
        if settings.tls is None:
            raise AddressUnavailable(
                f"{wide[0]} can be reached from outside this device; set [scoring.tls], or a "
                "loopback address, or [scoring] allow-insecure = true if something else protects it"
            )
        if not settings.tls.require_client_certificate:
            floor = KEY
    try:
        tokens = None if settings.tokens is None else TokenVerifier(settings.tokens)
    except TokensUnusable as error:
        raise AddressUnavailable(str(error)) from None
    keys = None if settings.keys_dir is None else KeyStore(Path(settings.keys_dir))
    return Access(plane, keys=keys, tokens=tokens, floor=floor, rate=settings.rate)


def is_local(address: str) -> bool:
    """Whether only this device reaches it; names other than localhost are taken for wide."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _tls(settings: ScoringSettings, alpn: str = "http/1.1") -> TlsFiles | None:
    if settings.tls is None:
        return None
    try:
        return TlsFiles(settings.tls, alpn)
    except TlsUnusable as error:
        raise AddressUnavailable(str(error)) from None
