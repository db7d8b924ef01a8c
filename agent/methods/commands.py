"""What the agent does for the commands on this device, beside taking manifests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from ..preview import Preview
from ..runtime.container import LogLine
from ..submissions import Verdict
from ..twin.transport import MethodResult


class CommandRefused(Exception):
    """The agent cannot do what was asked; the message is for people."""


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
