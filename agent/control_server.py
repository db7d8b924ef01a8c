"""The agent's own control service, for the commands on this device (protos/control.proto)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import msgspec

from ..protos import control_pb2 as pb
from ..protos.services import AGENT, handlers
from .reconcile import Verdict

MANIFEST_LIMIT = 4 * 1024 * 1024
"""Bytes; gRPC's own default, well above what the manifest parser accepts."""


class ControlServer:
    """Serves `gatelet.control.v1.Agent` on a Unix socket that only this user may open."""

    def __init__(
        self,
        socket: Path,
        apply: Callable[[bytes], Verdict],
        status: Callable[[], Awaitable[dict[str, Any]]],
    ) -> None:
        self._socket = socket
        self._apply = apply
        self._status = status
        self._changed = asyncio.Condition()
        self._server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", MANIFEST_LIMIT)],
            maximum_concurrent_rpcs=32,
        )

    async def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        self._server.add_generic_rpc_handlers((handlers(AGENT, _Service(self)),))
        before = os.umask(0o177)
        try:
            self._server.add_insecure_port(f"unix:{self._socket}")
            await self._server.start()
        finally:
            os.umask(before)

    async def stop(self) -> None:
        await self._server.stop(grace=0.5)
        self._socket.unlink(missing_ok=True)

    async def changed(self) -> None:
        """Tell those who watch that the status may have changed."""
        async with self._changed:
            self._changed.notify_all()


class _Service:
    def __init__(self, server: ControlServer) -> None:
        self._server = server

    async def apply(self, request: pb.ApplyRequest, context: object) -> pb.ApplyResponse:
        verdict = self._server._apply(request.manifest)
        return pb.ApplyResponse(
            code=verdict.code, description=verdict.description, generation=verdict.generation
        )

    async def status(
        self, request: pb.AgentStatusRequest, context: object
    ) -> pb.AgentStatusResponse:
        return pb.AgentStatusResponse(json=msgspec.json.encode(await self._server._status()))

    async def watch(
        self, request: pb.AgentStatusRequest, context: object
    ) -> AsyncIterator[pb.AgentStatusResponse]:
        last = b""
        changed = self._server._changed
        while True:
            async with changed:
                encoded = msgspec.json.encode(await self._server._status())
                while encoded == last:
                    await changed.wait()
                    encoded = msgspec.json.encode(await self._server._status())
            last = encoded
            yield pb.AgentStatusResponse(json=encoded)

    async def preview(
        self, request: pb.PreviewRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.PreviewResponse:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Preview")
        return pb.PreviewResponse()

    async def rollback(
        self, request: pb.RollbackRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ApplyResponse:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Rollback")
        return pb.ApplyResponse()

    async def invoke(
        self, request: pb.InvokeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.InvokeResponse:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Invoke")
        return pb.InvokeResponse()

    async def logs(
        self, request: pb.LogsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.LogsResponse]:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Logs")
        yield pb.LogsResponse()
