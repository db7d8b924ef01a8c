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
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from ..log_lines import Choice, LineFilter, chosen, mentions
from ..logs import LogPart, follow_logs, read_logs
from ..plan_types import Kind
from ..runtime.container import ContainerRuntime, LogFilter, LogLine, RuntimeFailed
from .searching import filtered

_AGENT = (LogPart("agent"), LogPart("supervisor"))
_LINKS = ("[twin.", "[outbox", "[publish]", "[telemetry]", "[identity.", "[edge_hub]")
_PROCESSES: dict[str, tuple[LogPart, ...]] = {
    "edgeAgent": _AGENT,
    "edgeHub": (LogPart("agent", lambda line: any(link in line for link in _LINKS)),),
    "scoring": (LogPart("scoring"),),
    "fabric": (LogPart("fabric"),),
}
SYSTEM_MODULES = ("edgeAgent", "edgeHub")
_ALIASES = {"agent": "edgeAgent", "supervisor": "edgeAgent"}


class NoSuchLog(Exception):
    """There is no log of this name, or it cannot be read now; the message says which."""


class ModuleLogs:
    """`modules` are those of the deployment: name and kind, empty where that is not known yet.

    `containers` is None without an engine.
    """

    def __init__(
        self,
        folder: Path,
        modules: Callable[[], Mapping[str, Kind]],
        containers: ContainerRuntime | None = None,
    ) -> None:
        self._folder = folder
        self._modules = modules
        self._containers = containers

    def names(self) -> tuple[str, ...]:
        """Every log there is: system modules, processes that wrote one, and modules."""
        modules = self._modules()
        return (*(name for name in _PROCESSES if name not in modules and self._has(name)), *modules)

    def _has(self, name: str) -> bool:
        files = (self._folder / f"{part.role}.log" for part in _PROCESSES[name])
        return name in SYSTEM_MODULES or any(file.exists() for file in files)

    async def read(self, name: str, wanted: LineFilter) -> list[LogLine]:
        """The chosen lines, oldest first. Raises NoSuchLog, BadRequest."""
        lines = await self._before_pattern(name, wanted.without_pattern())
        if wanted.pattern is None:
            return lines
        try:
            return await asyncio.to_thread(filtered, lines, wanted)
        except OSError as error:
            raise NoSuchLog(f"the log of {name} cannot be searched: {error}") from error

    async def _before_pattern(self, name: str, wanted: LineFilter) -> list[LogLine]:
        # The tail counts chosen lines, so all must be read where the filter looks at them.
        where = wanted.where
        early = where if wanted.plain else LogFilter(None, where.since, where.until)
        container = await self._container(name)
        if container is None:
            return await asyncio.to_thread(self._read_files, name, early, wanted)
        assert self._containers is not None
        choice = Choice(wanted)
        try:
            async for line in self._containers.logs(container, early, follow=False):
                choice.add(line)
        except RuntimeFailed as error:
            raise NoSuchLog(f"the log of {name} cannot be read: {error}") from error
        return choice.lines()

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
        return _read(self._folder, name, self._parts(name), early, wanted)

    def _parts(self, name: str) -> tuple[LogPart, ...]:
        """Raises NoSuchLog."""
        if name in self._modules():
            about = mentions(name)
            return LogPart("agent", about), LogPart("scoring", about)
        parts = _process_parts(name)
        if parts is None:
            known = ", ".join(self.names())
            raise NoSuchLog(f"there is no module {name} on this device; there are: {known}")
        return parts

    async def _container(self, name: str) -> str | None:
        """The name of the module's container; also of one that its deployment lost already."""
        kind = self._modules().get(name)
        if self._containers is None or kind == "model":
            return None
        try:
            found = await self._containers.containers()
        except RuntimeFailed as error:
            if kind:
                raise NoSuchLog(f"the log of {name} cannot be read: {error}") from error
            return None
        return next((view.name for view in found if view.module == name), None)


def read_process_log(folder: Path, name: str, wanted: LineFilter) -> list[LogLine]:
    """What the files tell without a running agent; any name but a process's is a module's.

    Blocking. Raises NoSuchLog.
    """
    about = mentions(name)
    parts = _process_parts(name) or (LogPart("agent", about), LogPart("scoring", about))
    where = LogFilter(None, wanted.where.since, wanted.where.until)
    return _read(folder, name, parts, where, wanted)


def _process_parts(name: str) -> tuple[LogPart, ...] | None:
    without_case = {known.lower(): known for known in _PROCESSES}
    process = _ALIASES.get(name.lower()) or without_case.get(name.lower())
    return None if process is None else _PROCESSES[process]


def _read(
    folder: Path, name: str, parts: tuple[LogPart, ...], early: LogFilter, wanted: LineFilter
) -> list[LogLine]:
    try:
        return chosen(read_logs(folder, parts, early), wanted)
    except OSError as error:
        raise NoSuchLog(f"the log of {name} cannot be read: {error}") from error
