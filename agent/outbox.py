"""Telemetry that waits for its acknowledgement, whatever happens to the link or to this process.

A message is in SQLite (WAL, synchronous=FULL) before `put` returns its id, and leaves only after
the transport acknowledged it, its time to live ran out, or the size limit pushed it out; the last
two are counted. What a crash or a lost acknowledgement sends twice carries the same id twice.

Age is counted by the outbox's own clock, which runs while the outbox is open and is stored with
the messages: neither a jump of the wall clock nor a reboot makes a message expire early.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .clock import Clock

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
PRIORITIES = range(10)
DEFAULT_PRIORITY = 5
OVERHEAD_BYTES = 64
"""What a message counts for beyond its body, properties and content type."""

MESSAGE_LIMIT_BYTES = 256 * 1024
REMEMBERED_KEYS = 1024
ACKNOWLEDGED_AT_ONCE = 64
ACKNOWLEDGED_SECONDS = 1.0
"""Removals wait this long for company: each commit costs flash a sync."""

_JOURNAL_LIMIT_BYTES = 1024 * 1024
_VACUUM_PAGES = 256
_CHECKPOINT_PAGES = 256

_SCHEMA = f"""
PRAGMA auto_vacuum=INCREMENTAL;
BEGIN IMMEDIATE;
CREATE TABLE message (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, priority INTEGER NOT NULL, at REAL NOT NULL,
    ttl REAL, size INTEGER NOT NULL, content_type TEXT NOT NULL, properties TEXT NOT NULL,
    body BLOB NOT NULL
) STRICT;
CREATE INDEX message_order ON message(priority, sequence, size);
CREATE INDEX message_age ON message(at, ttl, size);
CREATE TABLE announced (key TEXT PRIMARY KEY, sequence INTEGER NOT NULL) STRICT;
CREATE TABLE dropped (reason TEXT PRIMARY KEY, count INTEGER NOT NULL) STRICT;
CREATE TABLE own (instance TEXT NOT NULL, elapsed REAL NOT NULL) STRICT;
PRAGMA user_version={SCHEMA_VERSION};
COMMIT;
"""


class OutboxError(Exception):
    """A message was not stored; the message says why (most often: the disk is full)."""


@dataclass(frozen=True, slots=True)
class Telemetry:
    """One message. `priority` 0 is sent first, 9 last. `ttl_seconds` None: the outbox's.

    A message whose `key` is not empty is stored once: again means the id of the first time.
    """

    body: bytes
    content_type: str = "application/json"
    properties: Mapping[str, str] = field(default_factory=dict)
    priority: int = DEFAULT_PRIORITY
    ttl_seconds: float | None = None
    key: str = ""

    @property
    def size(self) -> int:
        """Bytes it counts for in the outbox."""
        named = sum(len(k.encode()) + len(v.encode()) for k, v in self.properties.items())
        return len(self.body) + named + len(self.content_type) + OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class Held:
    """A stored message as it is sent: `properties` hold its id, type and encoding as well."""

    sequence: int
    priority: int
    body: bytes
    properties: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Limits:
    """`ttl_seconds` None keeps messages for ever."""

    max_bytes: int = 64 * 1024 * 1024
    ttl_seconds: float | None = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class OutboxStatus:
    """`dropped` counts by reason ("overflow", "expired", "too-large") over the outbox's life."""

    messages: int
    bytes: int
    oldest_seconds: float
    dropped: Mapping[str, int]
    error: str


def overflow(candidates: Iterable[tuple[int, int]], excess: int) -> tuple[list[int], int]:
    """Which messages go so that `excess` bytes become free, and how many bytes that frees.

    `candidates` are (sequence, size), the first to go first: of the lowest priority the oldest.
    """
    gone: list[int] = []
    freed = 0
    for sequence, size in candidates:
        if freed >= excess:
            break
        gone.append(sequence)
        freed += size
    return gone, freed


@dataclass(slots=True)
class _Work:
    """What one transaction is to do."""

    puts: list[tuple[Telemetry, asyncio.Future[str]]] = field(default_factory=list)
    done: dict[int, str] = field(default_factory=dict)
    """Sequence -> reason of its removal, "" when it was acknowledged."""


class Outbox:
    """One durable queue. All methods belong to one event loop; commits run beside it."""

    def __init__(
        self,
        path: Path,
        clock: Clock,
        limits: Limits = Limits(),
        *,
        instance: str | None = None,
        fault: Callable[[str], None] = lambda point: None,
    ) -> None:
        """Nothing fails here: a file that cannot be opened is tried again with every message.

        `instance` begins the ids of a new outbox (random where None); `fault` is called at each
        step of a transaction, for tests.
        """
        self._path = path
        self._clock = clock
        self._limits = limits
        self._new_instance = instance
        self._fault = fault
        self._instance = ""
        self._began = clock.monotonic()
        self._base = 0.0
        self._messages = self._bytes = 0
        self._dropped: dict[str, int] = {}
        self._error = ""
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._work = _Work()
        self._committing: asyncio.Task[None] | None = None
        self._again = False
        self._damaged = self._closed = False
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
            return self._head()
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
        if self._messages or self._removing or self._work.puts or self._error:
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
        if self._reader is not None:
            try:
                row = self._reader.execute("SELECT min(at) FROM message").fetchone()
            except sqlite3.Error as error:
                self._failed(error)
            else:
                oldest = 0.0 if row[0] is None else max(0.0, self._elapsed() - row[0])
        waiting = len(self._removing)
        messages = max(0, self._messages - waiting)
        return OutboxStatus(
            messages, self._bytes, oldest if messages else 0.0, dict(self._dropped), self._error
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
        self._closed = True
        self._disconnect()

    # -- inside --------------------------------------------------------------------------------

    def _elapsed(self) -> float:
        return self._base + self._clock.monotonic() - self._began

    def _head(self) -> Held | None:
        assert self._reader is not None
        # At most as many rows as wait for their removal can stand before the one wanted.
        rows = self._reader.execute(
            "SELECT sequence FROM message ORDER BY priority, sequence LIMIT ?",
            (len(self._removing) + 1,),
        ).fetchall()
        sequence = next((row[0] for row in rows if row[0] not in self._removing), None)
        if sequence is None:
            return None
        row = self._reader.execute(
            "SELECT priority, content_type, properties, body FROM message WHERE sequence=?",
            (sequence,),
        ).fetchone()
        if row is None:
            return None
        priority, content_type, properties, body = row
        system = {"$.mid": self._id(sequence), "$.ct": content_type}
        if content_type == "application/json":
            system["$.ce"] = "utf-8"  # without it IoT Hub does not route by the body's members
        return Held(sequence, priority, body, {**json.loads(properties), **system})

    def _id(self, sequence: int) -> str:
        return f"{self._instance}-{sequence}"

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
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the telemetry outbox failed", exc_info=error)
        if self._again:
            self._commit_soon()

    async def _commit_all(self) -> None:
        while self._again:
            self._again = False
            work, self._work = self._work, _Work()
            try:
                ids = await asyncio.to_thread(self._commit, work, self._limits, self._elapsed())
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
            self._damaged = True
            self._disconnect()

    # On the committing thread; nothing else uses the writing connection.

    def _commit(self, work: _Work, limits: Limits, elapsed: float) -> list[str]:
        """One transaction; returns an id for each message put. Raises sqlite3.Error or OSError."""
        if self._writer is None:
            self._open()
        db = self._writer
        assert db is not None
        messages, size, dropped = self._messages, self._bytes, dict(self._dropped)
        self._fault("begin")
        db.execute("BEGIN IMMEDIATE")
        try:
            for sequence, reason in work.done.items():
                freed = self._delete(db, sequence)
                messages, size = messages - (freed > 0), size - freed
                if reason and freed:
                    dropped[reason] = dropped.get(reason, 0) + 1
            self._fault("removed")
            sequences = []
            for message, _ in work.puts:
                sequence, new = self._insert(db, message, elapsed)
                sequences.append(sequence)
                if new:
                    messages, size = messages + 1, size + message.size
            self._fault("inserted")
            for sequence in self._expired(db, limits, elapsed):
                messages, size = messages - 1, size - self._delete(db, sequence)
                dropped["expired"] = dropped.get("expired", 0) + 1
            if size > limits.max_bytes:
                lowest_first = "SELECT sequence, size FROM message ORDER BY priority DESC, sequence"
                gone, freed = overflow(db.execute(lowest_first), size - limits.max_bytes)
                for sequence in gone:
                    self._delete(db, sequence)
                messages, size = messages - len(gone), size - freed
                dropped["overflow"] = dropped.get("overflow", 0) + len(gone)
            db.executemany(
                "INSERT INTO dropped VALUES (?, ?) ON CONFLICT DO UPDATE SET count=excluded.count",
                dropped.items(),
            )
            db.execute("UPDATE own SET elapsed=?", (elapsed,))
            self._fault("dropped")
        except BaseException:  # the transaction must end, whatever ended the work in it
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        self._end(db)
        self._fault("committed")
        self._messages, self._bytes, self._dropped = messages, size, dropped
        if not messages:
            self._shrink(db)
        return [self._id(sequence) for sequence in sequences]

    @staticmethod
    def _shrink(db: sqlite3.Connection) -> None:
        try:
            (free,) = db.execute("PRAGMA freelist_count").fetchone()
            if free >= _VACUUM_PAGES:
                # A plain execute() stops after its first page.
                db.executescript("PRAGMA incremental_vacuum;")
        except sqlite3.Error as error:  # what counts is committed
            log.debug("the file keeps its size: %s", error)

    @staticmethod
    def _end(db: sqlite3.Connection) -> None:
        try:
            db.execute("COMMIT")
        except sqlite3.Error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    @staticmethod
    def _delete(db: sqlite3.Connection, sequence: int) -> int:
        """Bytes that became free; 0 when it was gone before."""
        row = db.execute(
            "DELETE FROM message WHERE sequence=? RETURNING size", (sequence,)
        ).fetchone()
        return 0 if row is None else int(row[0])

    @staticmethod
    def _insert(db: sqlite3.Connection, message: Telemetry, elapsed: float) -> tuple[int, bool]:
        """Its sequence number, and whether it is new."""
        if message.key:
            known = db.execute(
                "SELECT sequence FROM announced WHERE key=?", (message.key,)
            ).fetchone()
            if known is not None:
                return int(known[0]), False
        cursor = db.execute(
            "INSERT INTO message (priority, at, ttl, size, content_type, properties, body) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                message.priority,
                elapsed,
                message.ttl_seconds,
                message.size,
                message.content_type,
                json.dumps(dict(message.properties)),
                message.body,
            ),
        )
        sequence = int(cursor.lastrowid or 0)
        if message.key:
            db.execute("INSERT INTO announced VALUES (?, ?)", (message.key, sequence))
            db.execute(
                "DELETE FROM announced WHERE sequence <= (SELECT sequence FROM announced "
                "ORDER BY sequence DESC LIMIT 1 OFFSET ?)",
                (REMEMBERED_KEYS,),
            )
        return sequence, True

    @staticmethod
    def _expired(db: sqlite3.Connection, limits: Limits, elapsed: float) -> list[int]:
        default = -1.0 if limits.ttl_seconds is None else limits.ttl_seconds
        rows = db.execute(
            "SELECT sequence FROM message WHERE COALESCE(ttl, ?1) >= 0 AND "
            "at + COALESCE(ttl, ?1) <= ?2 AND at <= ?2",
            (default, elapsed),
        )
        return [row[0] for row in rows]

    def _ready(self) -> bool:
        """Whether the file is open; opens it for the first reader."""
        if self._reader is not None:
            return True
        if self._committing is not None:
            return False  # the committing thread is opening it
        try:
            self._open()
        except (sqlite3.Error, OSError) as error:
            self._failed(error)
            return False
        return True

    def _open(self) -> None:
        """Raises sqlite3.Error or OSError. A damaged file is moved aside: telemetry is lost then,
        but the agent goes on."""
        if self._closed:
            raise OSError("it is closed")
        if not self._damaged:
            try:
                self._connect()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):  # full, locked, not permitted
                    raise
            else:
                return
        aside = self._path.with_name(self._path.name + ".damaged")
        log.error("%s is damaged: moved to %s, starting empty", self._path, aside)
        self._path.replace(aside)
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        self._connect()
        self._damaged = False

    def _disconnect(self) -> None:
        for db in (self._reader, self._writer):
            if db is not None:
                db.close()
        self._reader = self._writer = None

    def _connect(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        opened: list[sqlite3.Connection] = []
        try:
            for _ in range(2):
                db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
                opened.append(db)
            writer, reader = opened
            (version,) = writer.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise sqlite3.OperationalError(
                    f"it has schema {version}, this gatelet knows {SCHEMA_VERSION}: install the "
                    "newer gatelet again"
                )
            if version == 0:
                writer.executescript(_SCHEMA)
            writer.execute("PRAGMA journal_mode=WAL")
            writer.execute("PRAGMA synchronous=FULL")
            writer.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
            writer.execute(f"PRAGMA journal_size_limit={_JOURNAL_LIMIT_BYTES}")
            own = writer.execute("SELECT instance, elapsed FROM own").fetchone()
            if own is None:
                own = (self._new_instance or secrets.token_hex(4), 0.0)
                writer.execute("INSERT INTO own VALUES (?, ?)", own)
            totals = writer.execute("SELECT count(*), sum(size), max(at) FROM message").fetchone()
            dropped = dict(writer.execute("SELECT reason, count FROM dropped").fetchall())
        except BaseException:
            # Nobody else knows of these connections yet. Whatever it was is raised again.
            for db in opened:
                db.close()
            raise
        self._instance, elapsed = own
        self._base = max(elapsed, totals[2] or 0.0)
        self._began = self._clock.monotonic()
        self._messages, self._bytes, self._dropped = totals[0], totals[1] or 0, dropped
        self._writer, self._reader = writer, reader
