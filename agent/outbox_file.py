"""The outbox on disk: its tables, and the one transaction that changes them.

SQLite in WAL mode with synchronous=FULL. Age is counted by a clock of the file's own, which runs
while the file is open and is stored with the messages.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import sqlite3
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from .clock import Clock
from .outbox_types import Held, Limits, Telemetry, overflow
from .store_schema import private_file

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
REMEMBERED_KEYS = 1024

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


@dataclass(slots=True)
class Work:
    """What one transaction is to do."""

    puts: list[tuple[Telemetry, asyncio.Future[str]]] = field(default_factory=list)
    done: dict[int, str] = field(default_factory=dict)
    """Sequence -> reason of its removal, "" when it was acknowledged."""


class OutboxFile:
    """`messages` and `bytes` count what is stored, `dropped` by reason what was lost.

    `commit` runs on one thread at a time and is alone with the writing connection; everything else
    belongs to the event loop, which does not `open` while a commit runs.
    """

    def __init__(
        self, path: Path, clock: Clock, instance: str | None, fault: Callable[[str], None]
    ) -> None:
        """Opens nothing yet. `instance` and `fault`: see Outbox."""
        self._path = path
        self._clock = clock
        self._new_instance = instance
        self._fault = fault
        self._instance = ""
        self._began = clock.monotonic()
        self._base = 0.0
        self.messages = self.bytes = 0
        self.dropped: dict[str, int] = {}
        self.damaged = self.closed = False
        """`closed`: for good, it is not opened any more."""
        self._highest = 0  # what was told of a file that is damaged now is not to mean another
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None

    @property
    def is_open(self) -> bool:
        return self._reader is not None

    def elapsed(self) -> float:
        """Seconds on the file's own clock."""
        return self._base + self._clock.monotonic() - self._began

    def open(self) -> None:
        """Raises sqlite3.Error or OSError. A damaged file is moved aside: telemetry is lost then,
        but the agent goes on."""
        if self.closed:
            raise OSError("it is closed")
        if not self.damaged:
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
        self.damaged = False

    def close(self) -> None:
        for db in (self._reader, self._writer):
            if db is not None:
                db.close()
        self._reader = self._writer = None

    def head(self, passed: Collection[int]) -> Held | None:
        """The next message that is not one of `passed`. Raises sqlite3.Error."""
        assert self._reader is not None
        # At most as many rows as wait for their removal can stand before the one wanted.
        rows = self._reader.execute(
            "SELECT sequence FROM message ORDER BY priority, sequence LIMIT ?",
            (len(passed) + 1,),
        ).fetchall()
        sequence = next((row[0] for row in rows if row[0] not in passed), None)
        if sequence is None:
            return None
        row = self._reader.execute(
            "SELECT priority, content_type, properties, body FROM message WHERE sequence=?",
            (sequence,),
        ).fetchone()
        if row is None:
            return None
        self._highest = max(self._highest, sequence)
        priority, content_type, properties, body = row
        system = {"$.mid": self._id(sequence), "$.ct": content_type}
        if content_type == "application/json":
            system["$.ce"] = "utf-8"  # without it IoT Hub does not route by the body's members
        return Held(sequence, priority, body, {**json.loads(properties), **system})

    def oldest(self) -> float | None:
        """When the oldest message was stored. Raises sqlite3.Error."""
        assert self._reader is not None
        (at,) = self._reader.execute("SELECT min(at) FROM message").fetchone()
        return None if at is None else float(at)

    def _id(self, sequence: int) -> str:
        return f"{self._instance}-{sequence}"

    def commit(self, work: Work, limits: Limits, elapsed: float) -> list[str]:
        """One transaction; returns an id for each message put. Raises sqlite3.Error or OSError."""
        if self._writer is None:
            self.open()
        db = self._writer
        assert db is not None
        messages, size, dropped = self.messages, self.bytes, dict(self.dropped)
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
        self.messages, self.bytes, self.dropped = messages, size, dropped
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

    def _connect(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        private_file(self._path)
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
                writer.execute(
                    "INSERT INTO sqlite_sequence VALUES ('message', ?)", (self._highest,)
                )
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
        self.messages, self.bytes, self.dropped = totals[0], totals[1] or 0, dropped
        self._writer, self._reader = writer, reader
