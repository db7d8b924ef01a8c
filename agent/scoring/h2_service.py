"""What answers the calls of the HTTP/2 transport: inference on the loop, the rest on threads."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from ...protos.inference import INFERENCE
from ...protos.services import HEALTH, snake_case
from .access import Access
from .dataplane import DataPlane
from .errors import DEFECT
from .grpc_health import HealthService
from .grpc_server import GrpcLimits
from .grpc_service import InferenceService
from .grpc_streams import StreamPool
from .h2_call import Call, Connection
from .h2_context import Aborted, CallContext, Inbox
from .h2_grpc import CANCELLED, DEADLINE, INTERNAL, OK, Failed, Method, framed, unpack
from .h2_inference import Host as InferenceHost
from .h2_inference import Inferences
from .observation import Observer

log = logging.getLogger(__name__)


class Host(InferenceHost, Protocol):
    """What the service needs of its server."""

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
        self._host = host
        access, observer = access or Access(plane), observer or Observer()
        self._streams = StreamPool(limits.streams)
        self._pool = ThreadPoolExecutor(4 + (os.cpu_count() or 1), thread_name_prefix="grpc")
        inference = InferenceService(plane, self._streams, access, observer)
        health = HealthService(plane, self._streams)
        self.methods = {**_methods(INFERENCE, inference), **_methods(HEALTH, health)}
        self._inferences = Inferences(plane, host, access, observer, self._pool, self._sent_once)
        self._changed: list[Connection] = []
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

    def changed(self, connection: Connection) -> None:
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

    def _sent_once(self, work: Callable[[], None]) -> None:
        # Flushed below: the loop need not be asked.
        before, self._flushing = self._flushing, True
        work()
        self._flushing = before
        self._flush()

    def serve(self, call: Call, message: bytes | memoryview) -> None:
        if not call.method.quick:
            self._beside(call, bytes(message))
            return
        self._inferences.serve(call, message)

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

    # --- calls on threads

    def _fail(self, call: Call, failed: Failed) -> None:
        self._host.post(lambda: call.connection.fail(call, failed))

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
