"""What the agent does for the commands on this device, beside taking manifests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..reconcile import Verdict
from ..runtime.container import LogLine
from ..twin.transport import MethodResult


class CommandRefused(Exception):
    """The agent cannot do what was asked; the message is for people."""


@dataclass(frozen=True, slots=True)
class Preview:
    """What applying a manifest would change: edgeAgent's code, and the steps and differences."""

    code: int
    description: str
    document: Mapping[str, Any]


class Commands(Protocol):
    """All calls raise CommandRefused."""

    async def preview(self, manifest: bytes) -> Preview:
        """`manifest` is JSON; empty: the newest deployment against what runs."""

    async def rollback(self, generation: int) -> Verdict:
        """Return to `generation`, 0: the last good one before the present one."""

    async def invoke(self, method: str, payload: Any) -> MethodResult: ...

    def logs(
        self, module: str, tail: int | None, since: str, until: str, *, follow: bool
    ) -> AsyncIterator[LogLine]:
        """Lines oldest first; `since` and `until` as in edgeAgent's log requests, or empty."""
        ...


class DeviceCommands:
    """The `Commands` of one agent."""

    def __init__(self, invoke: Callable[[str, Any], Awaitable[MethodResult]]) -> None:
        self._invoke = invoke

    async def preview(self, manifest: bytes) -> Preview:
        raise CommandRefused("this version cannot show what a manifest would change")

    async def rollback(self, generation: int) -> Verdict:
        raise CommandRefused("this version cannot return to an earlier deployment by command")

    async def invoke(self, method: str, payload: Any) -> MethodResult:
        return await self._invoke(method, payload)

    async def logs(
        self, module: str, tail: int | None, since: str, until: str, *, follow: bool
    ) -> AsyncIterator[LogLine]:
        for line in tuple[LogLine, ...]():
            yield line
        raise CommandRefused(f"there is no log of {module}")
