"""Open Inference Protocol over grpcio's synchronous server: the fastest of its servers here."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from ...protos import open_inference_pb2 as oip
from ...protos.services import INFERENCE, handlers
from .dataplane import DataPlane
from .errors import Code, ScoringError
from .oip_messages import decode_request, encode_metadata, encode_response

log = logging.getLogger(__name__)

_STATUS = {code: grpc.StatusCode[code.value] for code in Code}
# Deadlines further away than this are no deadlines (grpcio gives infinity without one).
_LONGEST_SECONDS = 10_000_000.0

T = TypeVar("T", bound=Message)


@dataclass(frozen=True, slots=True)
class GrpcLimits:
    """What one server lets its clients do; sizes in bytes, times in milliseconds.

    With these times 800 silent connections were gone within 4 s while calls took 2 ms; grpcio's own
    defaults closed none.
    """

    threads: int = 0
    max_message_bytes: int = 64 * 1024 * 1024
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

    def __init__(self, plane: DataPlane, address: str, limits: GrpcLimits | None = None) -> None:
        """`address`: host:port (port 0: any free one) or unix:path. Raises AddressUnavailable."""
        limits = limits or GrpcLimits()
        threads = limits.threads or automatic_threads()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="grpc")
        self._server = grpc.server(
            self._pool,
            options=_options(limits),
            maximum_concurrent_rpcs=limits.max_concurrent_rpcs,
        )
        service = handlers(INFERENCE, _InferenceService(plane))
        self._server.add_generic_rpc_handlers((service,))
        try:
            self.address = _listen(self._server, address)
        except AddressUnavailable:
            self._server.stop(None)
            self._pool.shutdown()
            raise

    def start(self) -> None:
        self._server.start()

    def stop(self, drain: float) -> None:
        """Take no more calls, give running ones `drain` seconds, and wait for the end."""
        self._server.stop(drain).wait()
        self._pool.shutdown()


def automatic_threads() -> int:
    """onnxruntime computes without the interpreter lock, so every core is of use; the two more
    keep health calls answered while all of them compute."""
    return (os.cpu_count() or 1) + 2


def _listen(server: grpc.Server, address: str) -> str:
    try:
        port = server.add_insecure_port(address)
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
        ("grpc.max_concurrent_streams", limits.max_concurrent_streams),
        ("grpc.server_handshake_timeout_ms", limits.handshake_timeout_ms),
        ("grpc.max_connection_idle_ms", limits.max_connection_idle_ms),
        ("grpc.keepalive_time_ms", limits.keepalive_time_ms),
        ("grpc.keepalive_timeout_ms", limits.keepalive_timeout_ms),
    ]


class _InferenceService:
    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane

    def server_live(
        self, request: oip.ServerLiveRequest, context: grpc.ServicerContext
    ) -> oip.ServerLiveResponse:
        return oip.ServerLiveResponse(live=self._plane.live())

    def server_ready(
        self, request: oip.ServerReadyRequest, context: grpc.ServicerContext
    ) -> oip.ServerReadyResponse:
        return oip.ServerReadyResponse(ready=self._plane.ready())

    def model_ready(
        self, request: oip.ModelReadyRequest, context: grpc.ServicerContext
    ) -> oip.ModelReadyResponse:
        return oip.ModelReadyResponse(ready=self._plane.model_ready(request.name, request.version))

    def server_metadata(
        self, request: oip.ServerMetadataRequest, context: grpc.ServicerContext
    ) -> oip.ServerMetadataResponse:
        metadata = self._plane.server_metadata()
        return oip.ServerMetadataResponse(
            name=metadata.name, version=metadata.version, extensions=metadata.extensions
        )

    def model_metadata(
        self, request: oip.ModelMetadataRequest, context: grpc.ServicerContext
    ) -> oip.ModelMetadataResponse:
        return _answer(
            context,
            lambda: encode_metadata(self._plane.model_metadata(request.name, request.version)),
        )

    def model_infer(
        self, request: oip.ModelInferRequest, context: grpc.ServicerContext
    ) -> oip.ModelInferResponse:
        return _answer(context, lambda: self._infer(request, context))

    def _infer(
        self, message: oip.ModelInferRequest, context: grpc.ServicerContext
    ) -> oip.ModelInferResponse:
        remaining = context.time_remaining()
        deadline = None
        if remaining is not None and remaining < _LONGEST_SECONDS:
            deadline = time.monotonic() + remaining
        request, raw = decode_request(message, deadline)
        return encode_response(self._plane.infer(request), raw)


def _answer(context: grpc.ServicerContext, work: Callable[[], T]) -> T:
    try:
        return work()
    except ScoringError as error:
        context.abort(_STATUS[error.code], error.message)
    except Exception:
        log.exception("a scoring request hit a defect of the server")
        context.abort(
            grpc.StatusCode.INTERNAL,
            "the scoring process hit a defect of its own; its log has the details",
        )
