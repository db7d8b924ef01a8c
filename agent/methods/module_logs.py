"""Which log a name stands for: containers' in the engine, the rest in gatelet's own log files.

| name | lines |
|---|---|
| a module in a container | what the container wrote |
| a model module | what the agent and the scoring process say of it |
| `edgeAgent`, `agent` | the agent's, and the supervisor's under `gatelet run` |
| `edgeHub` | what the agent says of its links and its outbox, which stand in for edgeHub |
| `scoring`, `fabric` | these processes' |
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from ..log_lines import LineFilter, chosen, mentions
from ..logs import LogPart, follow_logs, read_logs
from ..runtime.container import ContainerRuntime, LogFilter, LogLine, RuntimeFailed

_AGENT = (LogPart("agent"), LogPart("supervisor"))
_LINKS = ("[twin.", "[outbox", "[publish]", "[telemetry]", "[identity.", "[edge_hub]")
_PROCESSES: dict[str, tuple[LogPart, ...]] = {
    "edgeAgent": _AGENT,
    "edgeHub": (LogPart("agent", lambda line: any(link in line for link in _LINKS)),),
    "scoring": (LogPart("scoring"),),
    "fabric": (LogPart("fabric"),),
}
_ALIASES = {"agent": "edgeAgent", "supervisor": "edgeAgent"}


class NoSuchLog(Exception):
    """There is no log of this name, or it cannot be read now; the message says which."""


class ModuleLogs:
    """`modules` names the modules of the deployment; `containers` is None without an engine."""

    def __init__(
        self,
        folder: Path,
        modules: Callable[[], tuple[str, ...]],
        containers: ContainerRuntime | None = None,
    ) -> None:
        self._folder = folder
        self._modules = modules
        self._containers = containers

    def names(self) -> tuple[str, ...]:
        """Every log there may be: system modules, processes, the deployment's modules."""
        modules = self._modules()
        return (*(name for name in _PROCESSES if name not in modules), *modules)

    async def read(self, name: str, wanted: LineFilter) -> list[LogLine]:
        """The chosen lines, oldest first. Raises NoSuchLog."""
        # The tail counts chosen lines, so all must be read where the filter looks at them.
        where = wanted.where
        early = where if wanted.plain else LogFilter(None, where.since, where.until)
        container = await self._container(name)
        if container is None:
            return await asyncio.to_thread(self._read_files, name, early, wanted)
        assert self._containers is not None
        try:
            lines = [line async for line in self._containers.logs(container, early, follow=False)]
        except RuntimeFailed as error:
            raise NoSuchLog(f"the log of {name} cannot be read: {error}") from error
        return chosen(lines, wanted)

    async def follow(self, name: str, where: LogFilter) -> AsyncIterator[LogLine]:
        """The lines of `where`, then new ones until the caller stops. Raises NoSuchLog."""
        container = await self._container(name)
        try:
            if container is not None:
                assert self._containers is not None
                lines = self._containers.logs(container, where, follow=True)
            else:
                lines = follow_logs(self._folder, self._parts(name), where)
            async for line in lines:
                yield line
        except (RuntimeFailed, OSError) as error:
            raise NoSuchLog(f"the log of {name} cannot be read: {error}") from error

    def _read_files(self, name: str, early: LogFilter, wanted: LineFilter) -> list[LogLine]:
        try:
            return chosen(read_logs(self._folder, self._parts(name), early), wanted)
        except OSError as error:
            raise NoSuchLog(f"the log of {name} cannot be read: {error}") from error

    def _parts(self, name: str) -> tuple[LogPart, ...]:
        """Raises NoSuchLog."""
        if name in self._modules():
            about = mentions(name)
            return LogPart("agent", about), LogPart("scoring", about)
        without_case = {known.lower(): known for known in _PROCESSES}
        process = _ALIASES.get(name.lower()) or without_case.get(name.lower())
        if process is None:
            known = ", ".join(self.names())
            raise NoSuchLog(f"there is no module {name} on this device; there are: {known}")
        return _PROCESSES[process]

    async def _container(self, name: str) -> str | None:
        """The name of the module's container; also of one that its deployment lost already."""
        if self._containers is None:
            return None
        try:
            found = await self._containers.containers()
        except RuntimeFailed as error:
            if name in self._modules():
                raise NoSuchLog(f"the log of {name} cannot be read: {error}") from error
            return None
        return next((view.name for view in found if view.module == name), None)
