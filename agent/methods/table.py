"""edgeAgent's direct methods: its names, payloads, answers and errors, over every transport."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ..clock import Clock
from ..daemon_thread import in_daemon_thread
from ..log_lines import LineFilter, as_json, as_text, encoded
from ..runtime.container import LogLine
from ..twin.transport import MethodResult
from .blobs import BlobStorage, BlobTarget, UploadFailed, blob_url, parse_target
from .commands import CommandRefused
from .module_logs import ModuleLogs, NoSuchLog
from .requests import (
    BadRequest,
    BundleRequest,
    LogsRequest,
    bundle_request,
    logs_request,
    module_to_restart,
    sas_url,
    task_asked_for,
)
from .searching import matching
from .tasks import BackgroundTasks, TaskFailed, TaskStatus, TooBusy

log = logging.getLogger(__name__)

ANSWER_LIMIT = 127_000
"""Bytes of logs that an answer may hold: a direct method's 128 KB less a frame, as in edgeAgent."""

Method = Callable[[Any], Awaitable[MethodResult]]
Bundle = Callable[[BundleRequest], Awaitable[bytes]]
"""Makes a support bundle (zip). Raises OSError."""


@dataclass(frozen=True, slots=True)
class Names:
    """What answers and blobs call the hub and the device."""

    hub: str
    device: str


class DirectMethods:
    """Call `close` at the end: it cancels the tasks that run."""

    def __init__(
        self,
        names: Names,
        logs: ModuleLogs,
        restart: Callable[[str], Awaitable[None]],
        bundle: Bundle,
        storage: BlobStorage,
        clock: Clock,
    ) -> None:
        """`restart` ends a module once and lets it start again; it raises CommandRefused."""
        self._names = names
        self._logs = logs
        self._restart = restart
        self._bundle = bundle
        self._storage = storage
        self._clock = clock
        self._tasks = BackgroundTasks()

    def table(self) -> dict[str, Method]:
        """Every method by edgeAgent's name. None of them raises."""
        methods: dict[str, Method] = {
            "ping": self._ping,
            "RestartModule": self._restart_module,
            "GetModuleLogs": self._get_logs,
            "UploadModuleLogs": self._upload_logs,
            "UploadSupportBundle": self._upload_bundle,
            "GetTaskStatus": self._task_status,
        }
        return {name: self._guarded(name, method) for name, method in methods.items()}

    async def close(self) -> None:
        await self._tasks.close()

    def _guarded(self, name: str, method: Method) -> Method:
        async def call(payload: Any) -> MethodResult:
            try:
                return await method(payload)
            except BadRequest as error:
                return refusal(400, str(error))
            except TooBusy as error:
                return refusal(429, str(error))
            except (CommandRefused, NoSuchLog) as error:
                return refusal(500, str(error))
            except Exception as error:
                # Whoever calls must get an answer, and the defect must not go unseen.
                log.exception("%s: unexpected error", name)
                return refusal(500, f"unexpected {type(error).__name__}; see the agent's log")

        return call

    async def _ping(self, payload: Any) -> MethodResult:
        return MethodResult(200, None)

    async def _restart_module(self, payload: Any) -> MethodResult:
        await self._restart(module_to_restart(payload))
        return MethodResult(200, None)

    async def _get_logs(self, payload: Any) -> MethodResult:
        request = logs_request(payload, self._clock.now())
        answer, size = [], 0
        for name, wanted in (await self._matching(request)).items():
            body = self._shaped(name, await self._logs.read(name, wanted), request)
            size += len(body)
            if request.encoding == "gzip":
                packed = base64.b64encode(body).decode()
                answer.append({"id": name, "payloadBytes": packed})
            else:
                answer.append({"id": name, "payload": body.decode()})
        if size > ANSWER_LIMIT:
            return refusal(
                400,
                f"the logs have {size} bytes, and an answer holds {ANSWER_LIMIT}: ask for fewer "
                "with tail, since and until, for gzip, or use UploadModuleLogs",
            )
        return MethodResult(200, answer)

    async def _upload_logs(self, payload: Any) -> MethodResult:
        request, target = logs_request(payload, self._clock.now()), _target(payload)
        wanted = await self._matching(request)
        if target.is_blob and len(wanted) > 1:
            raise BadRequest(
                f"payload.sasUrl is for a single blob, and {len(wanted)} logs are asked for: give "
                "the URL of a container"
            )

        async def work() -> None:
            for name, lines in wanted.items():
                await self._upload_log(name, lines, request, target)

        return _begun(self._tasks.start("upload logs", work))

    async def _upload_log(
        self, name: str, wanted: LineFilter, request: LogsRequest, target: BlobTarget
    ) -> None:
        try:
            body = self._shaped(name, await self._logs.read(name, wanted), request)
        except (NoSuchLog, BadRequest) as error:
            raise TaskFailed(str(error)) from error
        extension = "json" if request.content == "json" else "log"
        kind = "application/json" if request.content == "json" else "text/plain; charset=utf-8"
        packed = request.encoding == "gzip"
        url = self._url(target, name, f"{extension}.gz" if packed else extension)
        await self._put(target, url, body, kind, "gzip" if packed else "")

    async def _upload_bundle(self, payload: Any) -> MethodResult:
        request, target = bundle_request(payload, self._clock.now()), _target(payload)

        async def work() -> None:
            try:
                body = await self._bundle(request)
            except OSError as error:
                raise TaskFailed(f"cannot make the bundle: {error}") from error
            url = self._url(target, "support-bundle", "zip")
            await self._put(target, url, body, "application/zip")

        return _begun(self._tasks.start("upload support bundle", work))

    async def _task_status(self, payload: Any) -> MethodResult:
        return _begun(self._tasks.status(task_asked_for(payload)))

    async def _matching(self, request: LogsRequest) -> dict[str, LineFilter]:
        try:
            return await asyncio.to_thread(matching, request.items, self._logs.names())
        except OSError as error:
            raise NoSuchLog(f"the logs cannot be searched: {error}") from error

    def _shaped(self, name: str, lines: list[LogLine], request: LogsRequest) -> bytes:
        names = self._names
        text = (
            as_json(lines, names.hub, names.device, name)
            if request.content == "json"
            else as_text(lines)
        )
        return encoded(text, gzipped=request.encoding == "gzip")

    def _url(self, target: BlobTarget, name: str, extension: str) -> str:
        names, now = self._names, self._clock.now()
        return blob_url(target, names.hub, names.device, name, extension, now)

    async def _put(
        self, target: BlobTarget, url: str, body: bytes, kind: str, encoding: str = ""
    ) -> None:
        try:
            await in_daemon_thread(lambda: self._storage.put(url, body, kind, encoding))
        except UploadFailed as error:
            raise TaskFailed(str(error)) from error
        log.info("uploaded %d bytes to %s", len(body), target.where)


def refusal(status: int, message: str) -> MethodResult:
    """An error as edgeAgent answers it."""
    return MethodResult(status, {"message": message})


def _target(payload: Any) -> BlobTarget:
    try:
        return parse_target(sas_url(payload))
    except ValueError as error:
        raise BadRequest(f"payload.{error}") from error


def _begun(status: TaskStatus) -> MethodResult:
    return MethodResult(200, status.document())
