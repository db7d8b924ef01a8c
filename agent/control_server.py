"""The agent's own control service, for the commands on this device (protos/control.proto)."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import grpc.aio
import msgspec

from ..protos import control_pb2 as pb
from ..protos.services import AGENT, handlers
from .methods.commands import CommandRefused, Commands
from .submissions import Verdict
from .twin.transport import MethodResult

MANIFEST_LIMIT = 4 * 1024 * 1024
"""Bytes; gRPC's own default, well above what the manifest parser accepts."""


class ControlServer:
    """Serves `gatelet.control.v1.Agent` on a Unix socket that only this user may open."""

    def __init__(
        self,
        socket: Path,
        apply: Callable[[bytes], Verdict],
        status: Callable[[], Awaitable[dict[str, Any]]],
        commands: Commands,
    ) -> None:
        self._socket = socket
        self._apply = apply
        self._status = status
        self._commands = commands
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
        try:
            found = await self._server._commands.preview(request.manifest)
        except CommandRefused as error:
            await _refuse(context, error)
        return pb.PreviewResponse(
            code=found.code,
            description=found.description,
            json=msgspec.json.encode(found.document()),
        )

    async def rollback(
        self, request: pb.RollbackRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ApplyResponse:
        try:
            verdict = await self._server._commands.rollback(request.generation)
        except CommandRefused as error:
            await _refuse(context, error)
        return pb.ApplyResponse(
            code=verdict.code, description=verdict.description, generation=verdict.generation
        )

    async def invoke(
        self, request: pb.InvokeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.InvokeResponse:
        try:
            payload = json.loads(request.payload) if request.payload else None
        except (ValueError, RecursionError) as error:
            result = MethodResult(400, {"message": f"the payload is not JSON: {error}"})
        else:
            result = await self._server._commands.invoke(request.method, payload)
        return pb.InvokeResponse(status=result.status, payload=msgspec.json.encode(result.payload))

    async def logs(
        self, request: pb.LogsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.LogsResponse]:
        try:
            async for line in self._server._commands.logs(
                request.module,
                request.tail if request.tail >= 0 else None,
                request.since,
                request.until,
                follow=request.follow,
            ):
                at = "" if line.at is None else line.at.isoformat().replace("+00:00", "Z")
                yield pb.LogsResponse(at=at, stream=line.stream, text=line.text)
        except CommandRefused as error:
            await _refuse(context, error)


async def _refuse(context: grpc.aio.ServicerContext[Any, Any], error: CommandRefused) -> NoReturn:
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    raise AssertionError("abort raises")
