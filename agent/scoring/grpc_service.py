"""The Open Inference Protocol with Triton's extensions over gRPC."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar
from urllib.parse import unquote

import grpc
from google.protobuf.message import Message

from ...protos import open_inference_pb2 as oip
from . import oip_extensions as extensions
from . import repository
from .access import Access, Caller
from .dataplane import DataPlane
from .errors import DEFECT, Code, ScoringError
from .grpc_streams import StreamPool
from .observation import TIMING_HEADER, Observer, Served, server_timing
from .oip_messages import decode_request, encode_metadata, encode_response

log = logging.getLogger(__name__)

STATUS = {code: grpc.StatusCode[code.value] for code in Code}
# Deadlines further away than this are no deadlines (grpcio gives infinity without one).
_LONGEST_SECONDS = 10_000_000.0
FAULTS = frozenset({"INTERNAL", "UNKNOWN", "UNAVAILABLE", "DEADLINE_EXCEEDED"})

T = TypeVar("T", bound=Message)


class InferenceService:
    """One method per rpc of `inference.GRPCInferenceService`."""

    def __init__(
        self,
        plane: DataPlane,
        streams: StreamPool,
        access: Access | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._plane = plane
        self._streams = streams
        self._access = access or Access(plane)
        self._observer = observer or Observer()
        self._memory = plane.shared_memory
        self.model_stream_infer = streams.served(self._stream)

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
        return self._guarded(
            context,
            request.name,
            lambda: encode_metadata(self._plane.model_metadata(request.name, request.version)),
        )

    def _guarded(
        self,
        context: grpc.ServicerContext,
        endpoint: str,
        work: Callable[[], T],
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """What `work` gives whoever may call it; `endpoint` "": a call about the whole server."""

        def admitted() -> T:
            self._admit(context, endpoint, _headers(context) if headers is None else headers)
            return work()

        return _answer(context, admitted)

    def _admit(
        self, context: grpc.ServicerContext, endpoint: str, headers: Mapping[str, str]
    ) -> None:
        if not self._access.open_to_all(endpoint):
            self._access.admit(_caller(context, headers), endpoint, "grpc")

    def model_infer(
        self, request: oip.ModelInferRequest, context: grpc.ServicerContext
    ) -> oip.ModelInferResponse:
        headers = _headers(context)

        def infer() -> oip.ModelInferResponse:
            return self._infer(request, _deadline(context), headers)

        if not self._observer.active and TIMING_HEADER not in headers:
            return self._guarded(context, request.model_name, infer, headers)
        started, version = time.monotonic(), ""
        try:
            answer = self._guarded(context, request.model_name, infer, headers)
            version = answer.model_version
            if TIMING_HEADER in headers:
                timing = server_timing(started, 0.0, 0.0)
                context.set_trailing_metadata((("server-timing", timing),))
            return answer
        finally:
            self._observe(context, request, headers, started, version)

    def _observe(
        self,
        context: grpc.ServicerContext,
        request: oip.ModelInferRequest,
        headers: Mapping[str, str],
        started: float,
        version: str,
    ) -> None:
        if not self._observer.active:
            return
        now = time.monotonic()
        # Set by an abort; typeshed's stubs do not know the method.
        code: Any = context.code()  # type: ignore[attr-defined]
        status = code.name if isinstance(code, grpc.StatusCode) else "OK"
        served = Served(
            "grpc",
            "infer",
            request.model_name,
            version,
            status,
            status in FAULTS,
            now - started,
            now,
            _caller(context, headers).address,
            request.id,
        )
        self._observer.note(served, headers)

    def _infer(
        self, message: oip.ModelInferRequest, deadline: float | None, headers: Mapping[str, str]
    ) -> oip.ModelInferResponse:
        decoded = decode_request(message, deadline, self._memory, headers=headers)
        response = self._plane.infer(decoded.request)
        return encode_response(response, decoded.raw, decoded.placements, self._memory)

    def _stream(
        self, requests: Iterator[oip.ModelInferRequest], context: grpc.ServicerContext
    ) -> Iterator[oip.ModelStreamInferResponse]:
        deadline, headers = _deadline(context), _headers(context)
        while (message := self._streams.next(requests, context)) is not None:
            yield self._stream_answer(message, deadline, headers, context)

    def _stream_answer(
        self,
        message: oip.ModelInferRequest,
        deadline: float | None,
        headers: Mapping[str, str],
        context: grpc.ServicerContext,
    ) -> oip.ModelStreamInferResponse:
        try:
            self._admit(context, message.model_name, headers)
            answer = self._infer(message, deadline, headers)
        except ScoringError as error:
            text = error.message
        except Exception:
            # One defect must not end the stream: the client is told, the log has it whole.
            log.exception("a scoring request hit a defect of the server")
            text = DEFECT
        else:
            answer.parameters["triton_final_response"].bool_param = True
            return oip.ModelStreamInferResponse(infer_response=answer)
        return oip.ModelStreamInferResponse(
            error_message=text,
            infer_response=oip.ModelInferResponse(
                model_name=message.model_name, model_version=message.model_version, id=message.id
            ),
        )

    def model_config(
        self, request: oip.ModelConfigRequest, context: grpc.ServicerContext
    ) -> oip.ModelConfigResponse:
        return self._guarded(
            context,
            request.name,
            lambda: extensions.model_config(self._plane, request.name, request.version),
        )

    def model_statistics(
        self, request: oip.ModelStatisticsRequest, context: grpc.ServicerContext
    ) -> oip.ModelStatisticsResponse:
        return self._guarded(
            context,
            request.name,
            lambda: extensions.model_statistics(self._plane, request.name, request.version),
        )

    def repository_index(
        self, request: oip.RepositoryIndexRequest, context: grpc.ServicerContext
    ) -> oip.RepositoryIndexResponse:
        return self._guarded(
            context, "", lambda: extensions.repository_index(self._plane, request.ready)
        )

    def repository_model_load(
        self, request: oip.RepositoryModelLoadRequest, context: grpc.ServicerContext
    ) -> oip.RepositoryModelLoadResponse:
        def load() -> oip.RepositoryModelLoadResponse:
            repository.load(self._plane, request.model_name, bool(request.parameters))
            return oip.RepositoryModelLoadResponse()

        return self._guarded(context, request.model_name, load)

    def repository_model_unload(
        self, request: oip.RepositoryModelUnloadRequest, context: grpc.ServicerContext
    ) -> oip.RepositoryModelUnloadResponse:
        def unload() -> oip.RepositoryModelUnloadResponse:
            repository.unload(self._plane, request.model_name)
            return oip.RepositoryModelUnloadResponse()

        return self._guarded(context, request.model_name, unload)

    def system_shared_memory_status(
        self, request: oip.SystemSharedMemoryStatusRequest, context: grpc.ServicerContext
    ) -> oip.SystemSharedMemoryStatusResponse:
        return self._guarded(
            context, "", lambda: extensions.shared_memory_status(self._memory, request.name)
        )

    def system_shared_memory_register(
        self, request: oip.SystemSharedMemoryRegisterRequest, context: grpc.ServicerContext
    ) -> oip.SystemSharedMemoryRegisterResponse:
        def register() -> oip.SystemSharedMemoryRegisterResponse:
            self._memory.register(request.name, request.key, request.offset, request.byte_size)
            return oip.SystemSharedMemoryRegisterResponse()

        return self._guarded(context, "", register)

    def system_shared_memory_unregister(
        self, request: oip.SystemSharedMemoryUnregisterRequest, context: grpc.ServicerContext
    ) -> oip.SystemSharedMemoryUnregisterResponse:
        def unregister() -> oip.SystemSharedMemoryUnregisterResponse:
            self._memory.unregister(request.name)
            return oip.SystemSharedMemoryUnregisterResponse()

        return self._guarded(context, "", unregister)

    def cuda_shared_memory_status(
        self, request: oip.CudaSharedMemoryStatusRequest, context: grpc.ServicerContext
    ) -> oip.CudaSharedMemoryStatusResponse:
        _no_cuda(context)

    def cuda_shared_memory_register(
        self, request: oip.CudaSharedMemoryRegisterRequest, context: grpc.ServicerContext
    ) -> oip.CudaSharedMemoryRegisterResponse:
        _no_cuda(context)

    def cuda_shared_memory_unregister(
        self, request: oip.CudaSharedMemoryUnregisterRequest, context: grpc.ServicerContext
    ) -> oip.CudaSharedMemoryUnregisterResponse:
        _no_cuda(context)

    def trace_setting(
        self, request: oip.TraceSettingRequest, context: grpc.ServicerContext
    ) -> oip.TraceSettingResponse:
        return self._guarded(context, "", lambda: extensions.trace_setting(request))

    def log_settings(
        self, request: oip.LogSettingsRequest, context: grpc.ServicerContext
    ) -> oip.LogSettingsResponse:
        return self._guarded(context, "", lambda: extensions.log_settings(request))


def _headers(context: grpc.ServicerContext) -> Mapping[str, str]:
    # Those that end in "-bin" hold bytes, which no routing rule looks at.
    return {k: value for k, value in context.invocation_metadata() if isinstance(value, str)}


def _caller(context: grpc.ServicerContext, headers: Mapping[str, str]) -> Caller:
    # "ipv4:127.0.0.1:40000", "ipv6:%5B::1%5D:40000" or "unix:".
    peer = context.peer()
    proven: Any = context.auth_context()
    names = proven.get("x509_common_name", [])
    return Caller(
        unquote(peer.partition(":")[2].rpartition(":")[0]).strip("[]") or "unix",
        names[0].decode("utf-8", "replace") if names else "",
        headers.get("authorization", ""),
    )


def _deadline(context: grpc.ServicerContext) -> float | None:
    remaining = context.time_remaining()
    if remaining is None or remaining >= _LONGEST_SECONDS:
        return None
    return time.monotonic() + remaining


def _answer(context: grpc.ServicerContext, work: Callable[[], T]) -> T:
    try:
        return work()
    except ScoringError as error:
        if error.retry_after is not None:
            # Clients with a retry policy heed it (gRPC proposal A6).
            milliseconds = str(max(1, round(error.retry_after * 1000)))
            context.set_trailing_metadata((("grpc-retry-pushback-ms", milliseconds),))
        context.abort(STATUS[error.code], error.message)
    except Exception:
        # The client gets INTERNAL without our internals, the log the whole traceback.
        log.exception("a scoring request hit a defect of the server")
        context.abort(grpc.StatusCode.INTERNAL, DEFECT)


def _no_cuda(context: grpc.ServicerContext) -> NoReturn:
    context.abort(
        grpc.StatusCode.UNIMPLEMENTED,
        "this device has no CUDA; use system shared memory or send the tensors",
    )
