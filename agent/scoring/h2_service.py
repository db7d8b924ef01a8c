"""What answers the calls of the HTTP/2 transport: inference on the loop, the rest on threads."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import monotonic
from typing import Any, Protocol

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from ...protos import open_inference_pb2 as oip
from ...protos.inference import INFERENCE
from ...protos.services import HEALTH, snake_case
from .access import Access, Caller
from .batching_job import Job
from .dataplane import DataPlane
from .errors import DEFECT, ScoringError
from .grpc_health import HealthService
from .grpc_server import GrpcLimits
from .grpc_service import FAULTS, STATUS, InferenceService
from .grpc_streams import StreamPool
from .h2_call import Call
from .h2_connection import GrpcConnection
from .h2_context import Aborted, CallContext, Inbox
from .h2_grpc import CANCELLED, DEADLINE, INTERNAL, OK, Failed, Method, framed, unpack
from .h2_plans import AnswerPlans, RequestPlans
from .instances import Instance
from .observation import TIMING_HEADER, Observer, Served, server_timing
from .oip_messages import Decoded, decode_request, encode_response
from .types import InferenceRequest, InferenceResponse

log = logging.getLogger(__name__)

# Larger requests are decoded beside the event loop, which others wait for, as are packed ones.
_LARGE = 128 * 1024


class Host(Protocol):
    """What the service needs of its server."""

    def here(self) -> bool:
        """Whether this is the loop's thread."""

    def soon(self, work: Callable[[], None]) -> None: ...
    def post(self, work: Callable[[], None]) -> None: ...
    def reserve(self, size: int) -> bool: ...
    def release(self, size: int) -> None: ...


class GrpcCalls:
    """`Calls` of all connections of one listener."""

    def __init__(
        self,
        plane: DataPlane,
        limits: GrpcLimits,
        host: Host,
        access: Access | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.limits = limits
        self._plane = plane
        self._host = host
        self._access = access or Access(plane)
        self._observer = observer or Observer()
        self._memory = plane.shared_memory
        self._streams = StreamPool(limits.streams)
        self._pool = ThreadPoolExecutor(4 + (os.cpu_count() or 1), thread_name_prefix="grpc")
        inference = InferenceService(plane, self._streams, self._access, self._observer)
        health = HealthService(plane, self._streams)
        self.methods = {**_methods(INFERENCE, inference), **_methods(HEALTH, health)}
        self._requests = RequestPlans()
        self._answers = AnswerPlans()
        # Of this turn of the loop; only the loop touches these.
        self._waiting: dict[Instance, None] = {}
        self._changed: list[GrpcConnection] = []
        self._flushing = False
        self._under_way = 0

    def stop(self) -> None:
        """End the streams after their current request."""
        self._streams.stop()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._streams.threads.shutdown(wait=False, cancel_futures=True)

    # --- what connections need

    def begin(self) -> bool:
        if self._under_way >= self.limits.max_concurrent_rpcs:
            return False
        self._under_way += 1
        return True

    def end(self) -> None:
        self._under_way -= 1

    def changed(self, connection: GrpcConnection) -> None:
        if connection.dirty:
            return
        connection.dirty = True
        self._changed.append(connection)
        if not self._flushing:
            self._flushing = True
            self._host.soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        changed, self._changed = self._changed, []
        for connection in changed:
            connection.flush()

    def serve(self, call: Call, message: bytes | memoryview) -> None:
        if not call.method.quick:
            self._beside(call, bytes(message))
            return
        if len(message) > _LARGE:
            self._pool.submit(self._decode, call, message, True)
            return
        plain = bytes(message)
        request = self._requests.read(plain, call.deadline, call.head.headers)
        if request is None:
            self._decode(call, plain, False)
            return
        try:
            self._admit(call, request.model)
            self._submit(call, request, None)
        except ScoringError as error:
            self._refuse(call, request.model, "", error)
        except Exception:  # noqa: BLE001 - logged there, and the client is told
            self._defect(call)

    def unpack(self, call: Call, message: bytes) -> None:
        self._pool.submit(self._unpack, call, message)

    def _unpack(self, call: Call, message: bytes) -> None:
        held = 0

        def reserve(size: int) -> bool:
            nonlocal held
            if not call.open or not self._host.reserve(size):
                return False
            held += size
            return True

        try:
            plain = unpack(message, self.limits.max_message_bytes, reserve)
        except Failed as failed:
            self._host.release(held)
            self._fail(call, failed)
            return

        def go_on() -> None:
            call.held += held
            if call.open:
                self.serve(call, plain)
            else:
                call.connection.fail(call, Failed(CANCELLED, "the call ended"))

        self._host.post(go_on)

    def open(self, call: Call, inbox: Inbox) -> None:
        self._beside(call, inbox)

    # --- inference

    def _decode(self, call: Call, given: bytes | memoryview, beside: bool) -> None:
        if not call.open:
            self._fail(call, Failed(CANCELLED, "the call ended"))
            return
        message = bytes(given)
        try:
            parsed = oip.ModelInferRequest.FromString(message)
        except DecodeError:
            self._fail(call, Failed(INTERNAL, "the message is no ModelInferRequest"))
            return

        def work() -> None:
            if beside:
                self._admit(call, parsed.model_name)
            decoded = decode_request(parsed, call.deadline, self._memory, headers=call.head.headers)
            self._requests.learn(message, parsed)
            self._submit(call, decoded.request, decoded, beside)

        if beside:
            self._guarded(call, parsed.model_name, parsed.id, work)
            return

        def admitted() -> None:
            self._admit(call, parsed.model_name)
            work()

        self._guarded(call, parsed.model_name, parsed.id, admitted)

    def _guarded(self, call: Call, model: str, id: str, work: Callable[[], None]) -> None:
        """Whatever happens, the client is answered."""
        try:
            work()
        except ScoringError as error:
            self._refuse(call, model, id, error)
        except Exception:  # noqa: BLE001 - logged there, and the client is told
            self._defect(call)

    def _defect(self, call: Call) -> None:
        # The client gets INTERNAL without our internals, the log the whole traceback.
        log.exception("a scoring request hit a defect of the server")
        self._fail(call, Failed(INTERNAL, DEFECT))

    def _admit(self, call: Call, model: str) -> None:
        if not self._access.open_to_all(model):
            connection = call.connection
            bearer = call.head.headers.get("authorization", "")
            caller = Caller(connection.client, connection.certificate, bearer)
            self._access.admit(caller, model, "grpc")

    def _submit(
        self,
        call: Call,
        request: InferenceRequest,
        decoded: Decoded | None,
        beside: bool = False,
    ) -> None:
        submitted = monotonic()
        plain = decoded is None or (decoded.raw and not decoded.placements)
        told = self._observer.active or TIMING_HEADER in call.head.headers

        def done(answer: InferenceResponse | ScoringError) -> None:
            try:
                if isinstance(answer, ScoringError):
                    self._refuse(call, request.model, request.id, answer)
                    return
                if plain or decoded is None:
                    data = self._answers.write(answer)
                else:
                    message = encode_response(answer, decoded.raw, decoded.placements, self._memory)
                    data = framed(message.SerializeToString())
                more = self._tell(call, request, answer, submitted) if told else None
                if self._host.here():
                    call.connection.answer(call, data, more)
                else:
                    self._host.post(partial(call.connection.answer, call, data, more))
            except ScoringError as error:
                self._refuse(call, request.model, request.id, error)
            except Exception:  # noqa: BLE001 - logged there, and the client is told
                self._defect(call)

        instance, job = self._plane.submit(request, done, wake=beside)
        if beside:
            self._host.post(partial(self._submitted, call, instance, job))
            return
        call.pending = (instance, job)
        if not self._waiting:
            self._host.soon(self._serve_waiting)
        self._waiting[instance] = None

    def _tell(
        self, call: Call, request: InferenceRequest, answer: InferenceResponse, submitted: float
    ) -> dict[str, str] | None:
        """Trailers of an answer, besides what observers are told."""
        more = None
        if TIMING_HEADER in call.head.headers:
            more = {"server-timing": server_timing(call.started, submitted, monotonic())}
        if self._observer.active:
            self._observe(call, request.model, answer.version, request.id, "OK")
        return more

    def _submitted(self, call: Call, instance: Instance, job: Job) -> None:
        """On the loop, perhaps after the answer."""
        if call.open:
            call.pending = (instance, job)
        elif call.working:
            instance.withdraw(job)

    def _serve_waiting(self) -> None:
        waiting, self._waiting = self._waiting, {}
        # Flushed below: the loop need not be asked.
        before, self._flushing = self._flushing, True
        for instance in waiting:
            instance.serve_here()
        self._flushing = before
        self._flush()

    def _refuse(self, call: Call, model: str, id: str, error: ScoringError) -> None:
        more = {}
        if error.retry_after is not None:
            # Clients with a retry policy heed it (gRPC proposal A6).
            more["grpc-retry-pushback-ms"] = str(max(1, round(error.retry_after * 1000)))
        if TIMING_HEADER in call.head.headers:
            more["server-timing"] = server_timing(call.started, 0.0, 0.0)
        if self._observer.active:
            self._observe(call, model, "", id, error.code.value)
        self._fail(call, Failed(STATUS[error.code].value[0], error.message, more))

    def _observe(self, call: Call, model: str, version: str, id: str, status: str) -> None:
        now = monotonic()
        served = Served(
            *("grpc", "infer", model, version, status, status in FAULTS),
            *(now - call.started, now, call.connection.client, id),
        )
        self._observer.note(served, call.head.headers)

    def _fail(self, call: Call, failed: Failed) -> None:
        self._host.post(lambda: call.connection.fail(call, failed))

    # --- all other calls, on threads

    def _beside(self, call: Call, message: bytes | Inbox) -> None:
        connection = call.connection
        context = call.context = CallContext(
            call.head.headers,
            connection.peer,
            connection.certificate,
            call.deadline,
            lambda: connection.cancel(call),
            message if isinstance(message, Inbox) else None,
        )
        pool = getattr(call.method.behaviour, "experimental_thread_pool", self._pool)
        pool.submit(self._perform, call, context, message)

    def _perform(self, call: Call, context: CallContext, message: bytes | Inbox) -> None:
        try:
            failed = self._performed(call, context, message)
        except Aborted:
            failed = context.failure() or Failed(INTERNAL, DEFECT)
        except DecodeError:
            failed = Failed(INTERNAL, "the message is not the method's request")
        except Exception:
            log.exception("a call hit a defect of the server")
            failed = Failed(INTERNAL, DEFECT)
        if isinstance(message, Inbox):
            message.close()
        if failed is not None:
            self._fail(call, failed)

    def _performed(self, call: Call, context: CallContext, message: bytes | Inbox) -> Failed | None:
        """How it ended; None where the answer is on its way."""
        if not context.is_active():
            return Failed(CANCELLED, "the call ended")
        if context.time_remaining() == 0:
            return Failed(DEADLINE, "the deadline passed before the call was begun")
        request: Any = message if isinstance(message, Inbox) else call.method.parse(message)
        result = call.method.behaviour(request, context)
        if call.method.answers:
            self._send_all(call, context, result)
            return Failed(OK, "", context.trailing)
        data = framed(result.SerializeToString())
        self._host.post(lambda: call.connection.answer(call, data, context.trailing))
        return None

    def _send_all(self, call: Call, context: CallContext, answers: Any) -> None:
        try:
            for answer in answers:
                if not context.is_active():
                    return
                self._host.post(partial(call.connection.send, call, answer.SerializeToString()))
                context.writable.wait()
        finally:
            answers.close()


def _methods(service: ServiceDescriptor, implementation: object) -> dict[str, Method]:
    found = {}
    for method in service.methods:
        path = f"/{service.full_name}/{method.name}"
        found[path] = Method(
            path,
            getattr(implementation, snake_case(method.name)),
            GetMessageClass(method.input_type).FromString,
            method.client_streaming,
            method.server_streaming,
            method.name == "ModelInfer",
        )
    return found
