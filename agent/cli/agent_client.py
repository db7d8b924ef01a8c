"""Calls to the agent on this device, for the commands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import msgspec

from ...protos import control_pb2 as pb
from ...protos.services import AgentStub
from .command import CommandError

CALL_SECONDS = 10.0
LOG_SECONDS = 60.0


class AgentAway(CommandError):
    """No agent answers on the socket."""


class AgentClient:
    """Use as a context manager. All calls raise CommandError."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._channel = grpc.insecure_channel(f"unix:{socket}")
        self._stub = AgentStub(self._channel)

    def __enter__(self) -> AgentClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def apply(self, manifest: bytes) -> tuple[int, str, int]:
        """Returns edgeAgent's code, a description, and the generation of the new deployment."""
        try:
            answer = self._stub.apply(pb.ApplyRequest(manifest=manifest), CALL_SECONDS)
        except grpc.RpcError as error:
            raise self._away(error) from error
        return answer.code, answer.description, answer.generation

    def status(self, seconds: float = CALL_SECONDS) -> dict[str, Any]:
        """The document of `agent/status.py`."""
        try:
            answer = self._stub.status(pb.AgentStatusRequest(), seconds)
        except grpc.RpcError as error:
            raise self._away(error) from error
        return msgspec.json.decode(answer.json, type=dict[str, Any])

    def watch(self, seconds: float) -> Iterator[dict[str, Any]]:
        """The status now and after every change; ends after `seconds`."""
        call = self._stub.watch(pb.AgentStatusRequest(), seconds)
        try:
            for answer in call:
                yield msgspec.json.decode(answer.json, type=dict[str, Any])
        except grpc.RpcError as error:
            if _code(error) is grpc.StatusCode.DEADLINE_EXCEEDED:
                return
            raise self._away(error) from error
        finally:
            call.cancel()

    def preview(self, manifest: bytes) -> tuple[int, str, dict[str, Any]]:
        """edgeAgent's code, a description, and the document of `agent/preview.py`."""
        try:
            answer = self._stub.preview(pb.PreviewRequest(manifest=manifest), CALL_SECONDS)
        except grpc.RpcError as error:
            raise self._away(error) from error
        document = msgspec.json.decode(answer.json or b"{}", type=dict[str, Any])
        return answer.code, answer.description, document

    def rollback(self, generation: int) -> tuple[int, str, int]:
        """edgeAgent's code, a description, and the generation of the new deployment."""
        try:
            answer = self._stub.rollback(pb.RollbackRequest(generation=generation), CALL_SECONDS)
        except grpc.RpcError as error:
            raise self._away(error) from error
        return answer.code, answer.description, answer.generation

    def invoke(self, method: str, payload: bytes, seconds: float) -> tuple[int, Any]:
        """A direct method's status and its answer; `payload` is JSON, empty for null."""
        request = pb.InvokeRequest(method=method, payload=payload)
        try:
            answer = self._stub.invoke(request, seconds)
        except grpc.RpcError as error:
            raise self._away(error) from error
        return answer.status, msgspec.json.decode(answer.payload or b"null")

    def logs(
        self, module: str, tail: int | None, since: str, until: str, *, follow: bool
    ) -> Iterator[tuple[str, str, str]]:
        """(time, stream, text) of each line, oldest first; with `follow` without an end."""
        request = pb.LogsRequest(
            module=module,
            tail=-1 if tail is None else tail,
            since=since,
            until=until,
            follow=follow,
        )
        call = self._stub.logs(request, None if follow else LOG_SECONDS)
        try:
            for line in call:
                yield line.at, line.stream, line.text
        except grpc.RpcError as error:
            raise self._away(error) from error
        finally:
            call.cancel()

    def _away(self, error: grpc.RpcError) -> CommandError:
        if _code(error) in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            if _forbidden(self._socket):
                return AgentAway(
                    f"you may not open {self._socket}; run the command as the agent's user or as "
                    "root (sudo)"
                )
            return AgentAway(
                f"no agent answers on {self._socket}; start it with `gatelet run`, or name its "
                "configuration with --config"
            )
        if _code(error) is grpc.StatusCode.FAILED_PRECONDITION:
            return CommandError(str(getattr(error, "details", str)()))
        return CommandError(f"the agent refused the call: {getattr(error, 'details', str)()}")


def _forbidden(socket: Path) -> bool:
    """Whether the socket, or the folder that it would be in, is closed to this user."""
    if os.path.exists(socket):
        return not os.access(socket, os.W_OK)
    return os.path.exists(socket.parent) and not os.access(socket.parent, os.X_OK)


def _code(error: grpc.RpcError) -> grpc.StatusCode | None:
    # grpcio raises objects that are both RpcError and Call; its stubs cannot say so.
    code = getattr(error, "code", None)
    return None if code is None else code()
