"""The direct methods and the commands of one agent, put together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from ..clock import Clock
from ..config import AgentConfig
from ..daemon_thread import in_daemon_thread
from ..log_lines import LineFilter
from ..plan_types import Kind
from ..preview import FieldChange, Preview
from ..redaction import HIDDEN, redact_document, secret_name
from ..runtime.container import ContainerRuntime, LogFilter, LogLine
from ..submissions import Verdict
from ..twin.transport import MethodResult
from .blobs import BlobStorage
from .commands import CommandRefused
from .module_logs import SYSTEM_MODULES, ModuleLogs, NoSuchLog
from .moments import parse_moment
from .requests import BundleRequest
from .table import DirectMethods, Method, Names, refusal

BUNDLE_LINES = 10_000
"""Of each module's log in a bundle."""


class Deployments(Protocol):
    """The reconciler, as far as it serves commands."""

    def preview(self, body: bytes = b"") -> Preview: ...

    def rollback(self, generation: int = 0) -> Verdict: ...

    def restart(self, module: str) -> Verdict: ...


class Operations:
    """Implements `Commands`. Call `close` at the end."""

    def __init__(
        self,
        config: AgentConfig,
        clock: Clock,
        deployments: Deployments,
        modules: Callable[[], Mapping[str, Kind]],
        status: Callable[[], Awaitable[dict[str, Any]]],
        containers: ContainerRuntime | None,
    ) -> None:
        """`modules` are those of the running deployment with their kind, `status` is the agent's
        document."""
        self._config = config
        self._clock = clock
        self._deployments = deployments
        self._modules = modules
        self._status = status
        self._logs = ModuleLogs(config.logs_dir, modules, containers)
        hub = config.iothub
        self._methods = DirectMethods(
            Names(_hub_name(config), config.device_id),
            self._logs,
            self._restart,
            self._bundle,
            BlobStorage() if hub is None else BlobStorage(hub.proxy, hub.ca_file),
            clock,
        )
        self._table = self._methods.table()

    def methods(self) -> Mapping[str, Method]:
        """By edgeAgent's name."""
        return self._table

    async def close(self) -> None:
        await self._methods.close()

    # -- Commands ------------------------------------------------------------------------------

    async def preview(self, manifest: bytes) -> Preview:
        found = self._deployments.preview(manifest)
        modules = tuple(
            replace(module, fields=tuple(map(without_secrets, module.fields)))
            for module in found.modules
        )
        return replace(found, modules=modules)

    async def rollback(self, generation: int) -> Verdict:
        return self._deployments.rollback(generation)

    async def invoke(self, method: str, payload: Any) -> MethodResult:
        found = {name.lower(): call for name, call in self._table.items()}.get(method.lower())
        if found is None:
            known = ", ".join(self._table)
            return refusal(400, f"unknown method {method!r}; known: {known}")
        return await found(payload)

    async def logs(
        self, module: str, tail: int | None, since: str, until: str, *, follow: bool
    ) -> AsyncIterator[LogLine]:
        where = LogFilter(tail, self._moment("since", since), self._moment("until", until))
        try:
            if follow:
                async for line in self._logs.follow(module, where):
                    yield line
            else:
                for line in await self._logs.read(module, LineFilter(where)):
                    yield line
        except NoSuchLog as error:
            raise CommandRefused(str(error)) from error

    def _moment(self, name: str, text: str) -> datetime | None:
        try:
            return parse_moment(text, self._clock.now()) if text else None
        except ValueError as error:
            raise CommandRefused(f"--{name}: {error}") from error

    # -- for the methods -----------------------------------------------------------------------

    async def _restart(self, module: str) -> None:
        if module in SYSTEM_MODULES and module not in self._modules():
            raise CommandRefused(
                f"{module} is gatelet itself here: restart it with `systemctl restart "
                "gatelet-agent`, which disturbs no module"
            )
        verdict = self._deployments.restart(module)
        if verdict.code != 200:
            raise CommandRefused(verdict.description)

    async def _bundle(self, request: BundleRequest) -> bytes:
        span = LogFilter(None, request.since, request.until)
        logs = {}
        if not request.runtime_only:
            wanted = LineFilter(LogFilter(BUNDLE_LINES, request.since, request.until))
            for module in self._modules():
                try:
                    logs[module] = await self._logs.read(module, wanted)
                except NoSuchLog as error:
                    logs[module] = [LogLine(None, "stderr", str(error))]
        status = await self._status()
        return await in_daemon_thread(lambda: self._packed(status, logs, span))

    def _packed(
        self, status: dict[str, Any], logs: dict[str, list[LogLine]], span: LogFilter
    ) -> bytes:
        from ..diagnosis.bundle import BundleParts, make_bundle
        from ..diagnosis.findings import run_checks
        from ..diagnosis.machine import machine_checks
        from ..diagnosis.network import network_checks

        config, clock = self._config, self._clock
        checks = [
            *machine_checks(config, Path("agent.toml"), status),
            *network_checks(config, status, clock),
        ]
        parts = BundleParts(status, list(run_checks(checks)), logs)
        return make_bundle(config, parts, span, clock)


def without_secrets(change: FieldChange) -> FieldChange:
    """The values of variables and options that hold secrets are hidden, that they differ is not."""
    if any(secret_name(part) for part in change.path.split(".")):
        hidden = [None if v is None else HIDDEN for v in (change.before, change.after)]
        return FieldChange(change.path, *hidden)
    name = change.path.rpartition(".")[2]
    before, after = (redact_document(value, name) for value in (change.before, change.after))
    return FieldChange(change.path, before, after)


def _hub_name(config: AgentConfig) -> str:
    """As answers and blob names call it; a plain word where there is no hub."""
    from ..diagnosis.network import hub_host

    return (hub_host(config.iothub) if config.iothub is not None else "") or "gatelet"
