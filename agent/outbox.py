"""Telemetry that waits for its acknowledgement, whatever happens to the link or to this process.

A message is in SQLite (WAL, synchronous=FULL) before `put` returns its id, and leaves only after
the transport acknowledged it, its time to live ran out, or the size limit pushed it out; the last
two are counted. What a crash or a lost acknowledgement sends twice carries the same id twice.

Age is counted by the outbox's own clock, which runs while the outbox is open and is stored with
the messages: neither a jump of the wall clock nor a reboot makes a message expire early.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

from .clock import Clock
from .outbox_file import OutboxFile, Work
from .outbox_types import (
    DEFAULT_LIMITS,
    MESSAGE_LIMIT_BYTES,
    OVERHEAD_BYTES,
    PRIORITIES,
    Held,
    Limits,
    OutboxError,
    OutboxStatus,
    Telemetry,
    overflow,
)

__all__ = [
    "MESSAGE_LIMIT_BYTES",
    "OVERHEAD_BYTES",
    "PRIORITIES",
    "Held",
    "Limits",
    "Outbox",
    "OutboxError",
    "OutboxStatus",
    "Telemetry",
    "overflow",
]

log = logging.getLogger(__name__)

ACKNOWLEDGED_AT_ONCE = 64
ACKNOWLEDGED_SECONDS = 1.0
"""Removals wait this long for company: each commit costs flash a sync."""


class Outbox:
    """One durable queue. All methods belong to one event loop; commits run beside it."""

    def __init__(
        self,
        path: Path,
        clock: Clock,
        limits: Limits = DEFAULT_LIMITS,
        *,
        instance: str | None = None,
        fault: Callable[[str], None] = lambda point: None,
    ) -> None:
        """Nothing fails here: a file that cannot be opened is tried again with every message.

        `instance` begins the ids of a new outbox (random where None); `fault` is called at each
        step of a transaction, for tests.
        """
        self._path = path
        self._file = OutboxFile(path, clock, instance, fault)
        self._limits = limits
        self._error = ""
        self._work = Work()
        self._committing: asyncio.Task[None] | None = None
        self._again = False
        self._timer: asyncio.TimerHandle | None = None
        self._removing: dict[int, str] = {}
        self.changed = asyncio.Event()
        """Set whenever there may be something new to send."""
        self._ready()

    # -- producing -----------------------------------------------------------------------------

    async def put(self, message: Telemetry) -> str:
        """Store `message` and return its id. Messages that come together share one commit.

        Raises OutboxError (it was not stored) and ValueError (it could never be sent).
        """
        if message.priority not in PRIORITIES:
            raise ValueError(f"priority {message.priority}: expected 0 (first) to 9 (last)")
        if message.size > MESSAGE_LIMIT_BYTES:
            raise ValueError(f"a message of {message.size} bytes; the limit is 256 KB")
        stored: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._work.puts.append((message, stored))
        self._commit_soon()
        return await stored

    def set_limits(self, limits: Limits) -> None:
        """From now on, for what is queued too (with the next commit)."""
        if limits != self._limits:
            self._limits = limits
            self._commit_soon()

    # -- sending -------------------------------------------------------------------------------

    def head(self) -> Held | None:
        """The next message to send: of the most urgent priority the oldest."""
        if not self._ready():
            return None
        try:
            return self._file.head(self._removing)
        except sqlite3.Error as error:
            self._failed(error)
            return None

    def acknowledge(self, sequence: int) -> None:
        """The other side has it: it is not sent again by this process, and soon removed."""
        self._remove(sequence, "")

    def reject(self, sequence: int, reason: str) -> None:
        """It can never be sent: removed and counted under `reason`."""
        self._remove(sequence, reason)

    async def tidy(self) -> None:
        """Drop what expired or exceeds the limits, store the age of the rest, try again what
        a full disk prevented. An outbox at rest writes nothing."""
        if self._file.messages or self._removing or self._work.puts or self._error:
            self._commit_soon()
        await self.settle()

    async def settle(self) -> None:
        """Until everything asked for so far is committed (or failed)."""
        while self._committing is not None:
            await asyncio.wait({self._committing})

    @property
    def limits(self) -> Limits:
        return self._limits

    def status(self) -> OutboxStatus:
        oldest = 0.0
        if self._file.is_open:
            try:
                at = self._file.oldest()
            except sqlite3.Error as error:
                self._failed(error)
            else:
                oldest = 0.0 if at is None else max(0.0, self._file.elapsed() - at)
        waiting = len(self._removing)
        messages = max(0, self._file.messages - waiting)
        return OutboxStatus(
            messages,
            self._file.bytes,
            oldest if messages else 0.0,
            dict(self._file.dropped),
            self._error,
        )

    async def close(self) -> None:
        """Commit what is pending and close the file."""
        if self._removing:
            self._commit_soon()
        await self.settle()
        self.abandon()

    def abandon(self) -> None:
        """Close without committing: what a crash leaves, for tests."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._file.closed = True
        self._file.close()

    # -- inside --------------------------------------------------------------------------------

    def _remove(self, sequence: int, reason: str) -> None:
        self._work.done[sequence] = self._removing[sequence] = reason
        if len(self._work.done) >= ACKNOWLEDGED_AT_ONCE:
            self._commit_soon()
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(ACKNOWLEDGED_SECONDS, self._commit_soon)

    def _commit_soon(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._again = True
        if self._committing is None:
            self._committing = asyncio.get_running_loop().create_task(self._commit_all())
            self._committing.add_done_callback(self._committed)

    def _committed(self, task: asyncio.Task[None]) -> None:
        self._committing = None
        self._leave_damaged()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the telemetry outbox failed", exc_info=error)
        if self._again:
            self._commit_soon()

    async def _commit_all(self) -> None:
        while self._again:
            self._again = False
            self._leave_damaged()
            work, self._work = self._work, Work()
            try:
                ids = await asyncio.to_thread(
                    self._file.commit, work, self._limits, self._file.elapsed()
                )
            except (sqlite3.Error, OSError) as error:
                self._failed(error)
                # Removals are asked for again; who wanted to store something is told.
                self._work.done = {**work.done, **self._work.done}
                for _, stored in work.puts:
                    if not stored.done():
                        stored.set_exception(OutboxError(self._error))
                return
            if self._error:
                log.info("the telemetry outbox works again")
                self._error = ""
            for sequence in work.done:
                self._removing.pop(sequence, None)
            for (_, stored), message_id in zip(work.puts, ids, strict=True):
                if not stored.done():
                    stored.set_result(message_id)
            if ids:
                self.changed.set()

    def _failed(self, error: Exception) -> None:
        text = f"the telemetry outbox {self._path} cannot be used: {error}; free some space there"
        if text != self._error:
            log.error("%s", text)
        self._error = text
        if type(error) is sqlite3.DatabaseError:  # its subclasses mean other things than damage
            self._file.damaged = True
            if self._committing is None:  # else its thread still writes there
                self._leave_damaged()

    def _leave_damaged(self) -> None:
        if self._file.damaged:
            self._file.close()

    def _ready(self) -> bool:
        """Whether the file is open; opens it for the first reader."""
        if self._file.is_open:
            return True
        if self._committing is not None:
            return False  # the committing thread is opening it
        try:
            self._file.open()
        except (sqlite3.Error, OSError) as error:
            self._failed(error)
            return False
        return True
