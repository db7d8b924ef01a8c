"""Open Inference Protocol over grpcio's synchronous server: the fastest of its servers here."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc

from ...protos.inference import INFERENCE
from ...protos.services import HEALTH, handlers
from .access import Access
from .dataplane import DataPlane
from .grpc_health import HealthService
from .grpc_service import InferenceService
from .grpc_streams import StreamPool
from .observation import Observer


@dataclass(frozen=True, slots=True)
class GrpcLimits:
    """What one server lets its clients do; sizes in bytes, times in milliseconds. `threads`: calls
    answered at once, 0 for automatic; `streams`: streams open at once.

    With these times 800 silent connections were gone within 4 s while calls took 2 ms; grpcio's own
    defaults closed none.
    """

    threads: int = 0
    streams: int = 32
    max_message_bytes: int = 64 * 1024 * 1024
    max_metadata_bytes: int = 16 * 1024
    max_concurrent_rpcs: int = 256
    max_concurrent_streams: int = 128
    handshake_timeout_ms: int = 2000
    max_connection_idle_ms: int = 3000
    keepalive_time_ms: int = 2000
    keepalive_timeout_ms: int = 1000


class AddressUnavailable(Exception):
    """The address cannot be listened on; the message says why and what to do."""


class GrpcServer:
    """Listens from construction on, serves from `start` on."""

    def __init__(
        self,
        plane: DataPlane,
        address: str,
        limits: GrpcLimits | None = None,
        access: Access | None = None,
        credentials: grpc.ServerCredentials | None = None,
        observer: Observer | None = None,
    ) -> None:
        """`address`: host:port (port 0: any free one) or unix:path. Raises AddressUnavailable."""
        limits = limits or GrpcLimits()
        threads = limits.threads or automatic_threads()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="grpc")
        self._streams = StreamPool(limits.streams)
        self._server = grpc.server(
            self._pool,
            options=_options(limits),
            maximum_concurrent_rpcs=limits.max_concurrent_rpcs,
        )
        inference = handlers(INFERENCE, InferenceService(plane, self._streams, access, observer))
        health = handlers(HEALTH, HealthService(plane, self._streams))
        self._server.add_generic_rpc_handlers((inference, health))
        try:
            self.address = _listen(self._server, address, credentials)
        except AddressUnavailable:
            self._server.stop(None)
            self._pool.shutdown()
            self._streams.shutdown()
            raise

    def start(self) -> None:
        self._server.start()

    def stop(self, drain: float) -> None:
        """Take no more calls, give running ones `drain` seconds, and wait for the end."""
        stopped = self._server.stop(drain)
        # Streams nobody uses would hold up the end until `drain` is over.
        self._streams.stop()
        stopped.wait()
        self._pool.shutdown()
        self._streams.shutdown()


def automatic_threads() -> int:
    """Calls wait on their threads until their batch is computed, so there are as many threads as
    requests of a large batch, and some that keep health calls answered. Each model limits how many
    of them compute."""
    return 32 + (os.cpu_count() or 1)


def _listen(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None) -> str:
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        port, reason = 0, error
    else:
        reason = RuntimeError("no reason given")
    if port == 0:
        raise AddressUnavailable(
            f"cannot listen on {address}: is another server using it? Set another grpc address "
            f"({reason})"
        ) from None
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{port}"


def _options(limits: GrpcLimits) -> list[tuple[str, int]]:
    return [
        # Two servers on one port would silently share its requests.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_message_bytes),
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.max_concurrent_streams", limits.max_concurrent_streams),
        ("grpc.server_handshake_timeout_ms", limits.handshake_timeout_ms),
        ("grpc.max_connection_idle_ms", limits.max_connection_idle_ms),
        ("grpc.keepalive_time_ms", limits.keepalive_time_ms),
        ("grpc.keepalive_timeout_ms", limits.keepalive_timeout_ms),
    ]
