"""gRPC handlers and client stubs, built from the service descriptors of the *_pb2 modules.

One rpc `ModelInfer` is the method `model_infer` on both sides. Building them here keeps out the
lower bound on grpcio that the modules of protoc's gRPC plugin check for.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from . import control_pb2 as control
from . import health_pb2 as health_messages

if TYPE_CHECKING:
    import grpc
    import grpc.aio

HEALTH = health_messages.DESCRIPTOR.services_by_name["Health"]
SCORING = control.DESCRIPTOR.services_by_name["Scoring"]
AGENT = control.DESCRIPTOR.services_by_name["Agent"]

Req = TypeVar("Req", bound=Message, contravariant=True)
Res = TypeVar("Res", bound=Message, covariant=True)


class Unary(Protocol[Req, Res]):
    """A blocking call; `timeout` in seconds. Raises grpc.RpcError."""

    def __call__(
        self,
        request: Req,
        /,
        timeout: float | None = None,
        metadata: tuple[tuple[str, str], ...] | None = None,
        *,
        wait_for_ready: bool | None = None,
    ) -> Res: ...


class Stream(Protocol[Req, Res]):
    """A call answered by many messages; `cancel` ends it."""

    def __call__(
        self, request: Req, /, timeout: float | None = None, *, wait_for_ready: bool | None = None
    ) -> Answers[Res]: ...


class Bidirectional(Protocol[Req, Res]):
    """A call of many requests, answered by many messages; `cancel` ends it."""

    def __call__(
        self,
        requests: Iterator[Req],
        /,
        timeout: float | None = None,
        *,
        wait_for_ready: bool | None = None,
    ) -> Answers[Res]: ...


class Answers(Protocol[Res]):
    def __iter__(self) -> Iterator[Res]: ...
    def cancel(self) -> bool: ...


class AsyncUnary(Protocol[Req, Res]):
    """The same on a `grpc.aio` channel: await what the call returns."""

    def __call__(
        self, request: Req, /, timeout: float | None = None, *, wait_for_ready: bool | None = None
    ) -> Awaitable[Res]: ...


class AsyncStream(Protocol[Req, Res]):
    """The same on a `grpc.aio` channel: iterate over it with `async for`."""

    def __call__(
        self, request: Req, /, timeout: float | None = None, *, wait_for_ready: bool | None = None
    ) -> AsyncAnswers[Res]: ...


class AsyncAnswers(Protocol[Res]):
    def __aiter__(self) -> AsyncIterator[Res]: ...
    def cancel(self) -> bool: ...


C = TypeVar("C")


class Stub(Generic[C]):
    """Calls of `service` on a channel of kind `C`; the subclasses name and type them."""

    service: ClassVar[ServiceDescriptor]

    def __init__(self, channel: C) -> None:
        for method in self.service.methods:
            setattr(self, snake_case(method.name), _call(channel, method))


class HealthStub(Stub["grpc.Channel"]):
    service = HEALTH
    check: Unary[health_messages.HealthCheckRequest, health_messages.HealthCheckResponse]
    watch: Stream[health_messages.HealthCheckRequest, health_messages.HealthCheckResponse]


class ScoringStub(Stub["grpc.Channel"]):
    service = SCORING
    load: Unary[control.LoadRequest, control.LoadResponse]
    probe: Unary[control.ProbeRequest, control.ProbeResponse]
    announce: Unary[control.AnnounceRequest, control.AnnounceResponse]
    switch: Unary[control.SwitchRequest, control.SwitchResponse]
    unload: Unary[control.UnloadRequest, control.UnloadResponse]
    status: Unary[control.StatusRequest, control.StatusResponse]


class AsyncScoringStub(Stub["grpc.aio.Channel"]):
    service = SCORING
    load: AsyncUnary[control.LoadRequest, control.LoadResponse]
    probe: AsyncUnary[control.ProbeRequest, control.ProbeResponse]
    announce: AsyncUnary[control.AnnounceRequest, control.AnnounceResponse]
    switch: AsyncUnary[control.SwitchRequest, control.SwitchResponse]
    unload: AsyncUnary[control.UnloadRequest, control.UnloadResponse]
    status: AsyncUnary[control.StatusRequest, control.StatusResponse]


class AgentStub(Stub["grpc.Channel"]):
    service = AGENT
    apply: Unary[control.ApplyRequest, control.ApplyResponse]
    status: Unary[control.AgentStatusRequest, control.AgentStatusResponse]
    watch: Stream[control.AgentStatusRequest, control.AgentStatusResponse]
    preview: Unary[control.PreviewRequest, control.PreviewResponse]
    rollback: Unary[control.RollbackRequest, control.ApplyResponse]
    invoke: Unary[control.InvokeRequest, control.InvokeResponse]
    logs: Stream[control.LogsRequest, control.LogsResponse]


class AsyncAgentStub(Stub["grpc.aio.Channel"]):
    service = AGENT
    apply: AsyncUnary[control.ApplyRequest, control.ApplyResponse]
    status: AsyncUnary[control.AgentStatusRequest, control.AgentStatusResponse]
    watch: AsyncStream[control.AgentStatusRequest, control.AgentStatusResponse]
    preview: AsyncUnary[control.PreviewRequest, control.PreviewResponse]
    rollback: AsyncUnary[control.RollbackRequest, control.ApplyResponse]
    invoke: AsyncUnary[control.InvokeRequest, control.InvokeResponse]
    logs: AsyncStream[control.LogsRequest, control.LogsResponse]


def handlers(
    service: ServiceDescriptor, implementation: object
) -> grpc.GenericRpcHandler[Any, Any]:
    """Handlers for every rpc of `service`, for `grpc.server` and `grpc.aio.server` alike.

    `implementation` has one method per rpc, `model_infer(request, context)` for `ModelInfer`, with
    an iterator of requests where the client streams, and yielding where the server does. Raises
    AttributeError at once when one is missing.
    """
    import grpc

    methods = {}
    for method in service.methods:
        behaviour: Callable[..., Any] = getattr(implementation, snake_case(method.name))
        methods[method.name] = _by_kind(grpc, "_rpc_method_handler", method)(
            behaviour,
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(service.full_name, methods)


def snake_case(name: str) -> str:
    """`ModelInfer` -> `model_infer`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _call(channel: object, method: MethodDescriptor) -> Any:
    return _by_kind(channel, "", method)(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )


def _by_kind(owner: object, suffix: str, method: MethodDescriptor) -> Any:
    request = "stream" if method.client_streaming else "unary"
    response = "stream" if method.server_streaming else "unary"
    return getattr(owner, f"{request}_{response}{suffix}")
