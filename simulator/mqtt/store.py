"""Sessions, their messages and retained messages in one SQLite file that outlives the process.

Every change is written at once and committed before the broker sends a byte that depends on it
(`commit` is a connection's `before_write`), so a killed broker has lost nothing it acknowledged.
A power failure may cost the last moments: commits do not wait for the disk (WAL, synchronous
NORMAL), which is what makes one per turn of the event loop affordable.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from ...agent.clock import Clock, SystemClock
from .codec import MalformedPacket, decode, encode
from .packets import V5, Publish, ReasonCode, Subscription
from .retained import Retained
from .session import NEVER, Session

FILE_NAME = "broker.db"
_VERSION = 1
_SCHEMA = """
CREATE TABLE retained (topic TEXT PRIMARY KEY, packet BLOB NOT NULL, expires REAL);
CREATE TABLE sessions (client_id TEXT PRIMARY KEY, owner TEXT, expiry REAL, left REAL);
CREATE TABLE subscriptions (
    client_id TEXT NOT NULL, topic_filter TEXT NOT NULL, qos INTEGER NOT NULL,
    no_local INTEGER NOT NULL, as_published INTEGER NOT NULL, handling INTEGER NOT NULL,
    identifier INTEGER, PRIMARY KEY (client_id, topic_filter));
CREATE TABLE messages (
    key INTEGER PRIMARY KEY, client_id TEXT NOT NULL, packet BLOB NOT NULL, expires REAL,
    packet_id INTEGER NOT NULL, received INTEGER NOT NULL, sent INTEGER);
CREATE INDEX messages_of ON messages (client_id);
CREATE TABLE received (
    client_id TEXT NOT NULL, packet_id INTEGER NOT NULL, PRIMARY KEY (client_id, packet_id));
"""


class StoreUnreadable(Exception):
    """The folder holds something else, or another broker has it open."""


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """`packet_id` is 0 while the message was never sent; `expires_at` is monotonic seconds."""

    key: int
    publish: Publish
    expires_at: float
    received: bool


@dataclass(slots=True)
class StoredSession:
    """`expiry_interval` in seconds; `left_for` seconds since the client left (0: it was here)."""

    client_id: str
    owner: str | None
    expiry_interval: float
    left_for: float
    subscriptions: dict[str, tuple[Subscription, int | None]] = field(default_factory=dict)
    messages: list[StoredMessage] = field(default_factory=list)
    received: set[int] = field(default_factory=set)

    def revive(self, queue_limit: int, store: Store) -> Session:
        session = Session(self.client_id, queue_limit, journal=store)
        session.owner = self.owner
        session.expiry_interval = self.expiry_interval
        session.subscriptions = {f: one for f, (one, _) in self.subscriptions.items()}
        session.received = self.received
        for message in self.messages:
            session.restore(message.publish, message.expires_at, message.key, message.received)
        return session


class Store:
    """One broker's file in `folder` (created). Raises StoreUnreadable; nothing is deleted then."""

    def __init__(
        self,
        folder: Path,
        clock: Clock | None = None,
        on_change: Callable[[], object] = lambda: None,
    ) -> None:
        """`on_change`: called when something waits for the next commit."""
        self._clock = clock or SystemClock()
        self._on_change = on_change
        self._dirty = False
        self._sent = 0
        self._path = path = folder / FILE_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=1, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise StoreUnreadable(f"cannot open {path}: {error}") from None
        try:
            # Two brokers on one file would both believe that its sessions are theirs.
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("BEGIN IMMEDIATE")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={_VERSION}")
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._db.close()
            raise StoreUnreadable(
                f"cannot use {path}: {error}; stop the other broker that has it open, "
                "or move the file away to begin anew"
            ) from None
        if version not in (0, _VERSION):
            self._db.close()
            raise StoreUnreadable(f"{path} was written by another version ({version})")

    def close(self) -> None:
        self.commit()
        self._db.close()

    def abandon(self) -> None:
        """Close it as it was found."""
        if self._dirty:
            self._dirty = False
            self._db.execute("ROLLBACK")
        self._db.close()

    def commit(self) -> None:
        if self._dirty:
            self._dirty = False
            self._db.execute("COMMIT")

    # Retained messages

    def retain(self, topic: str, kept: Retained | None) -> None:
        if kept is None:
            self._do("DELETE FROM retained WHERE topic = ?", topic)
        else:
            row = (topic, _pack(kept.publish), self._wall(kept.expires_at))
            self._do("INSERT OR REPLACE INTO retained VALUES (?, ?, ?)", *row)

    def retained(self) -> dict[str, Retained]:
        """Raises StoreUnreadable."""
        self._do("DELETE FROM retained WHERE expires <= ?", self._clock.now().timestamp())
        with self._reading():
            rows = self._db.execute("SELECT topic, packet, expires FROM retained")
            return {
                topic: Retained(_unpack(packet, 0), self._monotonic(expires))
                for topic, packet, expires in rows
            }

    # Sessions

    def save_session(self, client_id: str, owner: str | None, expiry: float, here: bool) -> None:
        """When a client comes (`here`) and when it leaves."""
        left = None if here else self._clock.now().timestamp()
        row = (client_id, owner, None if expiry == NEVER else expiry, left)
        self._do("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?)", *row)

    def remove_session(self, client_id: str) -> None:
        for table in ("sessions", "subscriptions", "messages", "received"):
            self._do(f"DELETE FROM {table} WHERE client_id = ?", client_id)

    def subscribe(self, client_id: str, wanted: Subscription, identifier: int | None) -> None:
        self._do(
            "INSERT OR REPLACE INTO subscriptions VALUES (?, ?, ?, ?, ?, ?, ?)",
            client_id,
            wanted.topic_filter,
            wanted.qos,
            wanted.no_local,
            wanted.retain_as_published,
            wanted.retain_handling,
            identifier,
        )

    def unsubscribe(self, client_id: str, topic_filter: str) -> None:
        statement = "DELETE FROM subscriptions WHERE client_id = ? AND topic_filter = ?"
        self._do(statement, client_id, topic_filter)

    def sessions(self) -> list[StoredSession]:
        """Raises StoreUnreadable."""
        with self._reading():
            return list(self._sessions())

    def _sessions(self) -> Iterator[StoredSession]:
        now = self._clock.now().timestamp()
        found = self._db.execute("SELECT client_id, owner, expiry, left FROM sessions").fetchall()
        for client_id, owner, expiry, left in found:
            left_for = 0.0 if left is None else max(0.0, now - left)
            interval = NEVER if expiry is None else expiry
            session = StoredSession(client_id, owner, interval, left_for)
            for topic_filter, qos, *flags, handling, identifier in self._rows(
                "SELECT topic_filter, qos, no_local, as_published, handling, identifier "
                "FROM subscriptions WHERE client_id = ? ORDER BY rowid",
                client_id,
            ):
                no_local, as_published = map(bool, flags)
                subscription = Subscription(topic_filter, qos, no_local, as_published, handling)
                session.subscriptions[topic_filter] = (subscription, identifier)
            # What was sent comes first and in the order in which it was sent [MQTT-4.6.0-1].
            for key, packet, expires, packet_id, received in self._rows(
                "SELECT key, packet, expires, packet_id, received FROM messages "
                "WHERE client_id = ? ORDER BY sent IS NULL, sent, key",
                client_id,
            ):
                publish = _unpack(packet, packet_id)
                expires_at = self._monotonic(expires)
                message = StoredMessage(key, publish, expires_at, bool(received))
                session.messages.append(message)
            statement = "SELECT packet_id FROM received WHERE client_id = ?"
            session.received = {row[0] for row in self._rows(statement, client_id)}
            yield session
        (self._sent,) = self._db.execute("SELECT COALESCE(MAX(sent), 0) FROM messages").fetchone()

    # session.Journal

    def queued(self, client_id: str, publish: Publish, expires_at: float) -> int:
        row = (client_id, _pack(publish), self._wall(expires_at))
        statement = (
            "INSERT INTO messages (client_id, packet, expires, packet_id, received) "
            "VALUES (?, ?, ?, 0, 0)"
        )
        return self._do(statement, *row)

    def sent(self, key: int, packet_id: int) -> None:
        self._sent += 1
        statement = "UPDATE messages SET packet_id = ?, sent = ? WHERE key = ?"
        self._do(statement, packet_id, self._sent, key)

    def released(self, key: int) -> None:
        self._do("UPDATE messages SET received = 1 WHERE key = ?", key)

    def finished(self, key: int) -> None:
        self._do("DELETE FROM messages WHERE key = ?", key)

    def arrived(self, client_id: str, packet_id: int) -> None:
        self._do("INSERT OR IGNORE INTO received VALUES (?, ?)", client_id, packet_id)

    def completed(self, client_id: str, packet_id: int) -> None:
        statement = "DELETE FROM received WHERE client_id = ? AND packet_id = ?"
        self._do(statement, client_id, packet_id)

    # Inside

    def _do(self, statement: str, *values: object) -> int:
        if not self._dirty:
            self._dirty = True
            self._db.execute("BEGIN")
            self._on_change()
        return self._db.execute(statement, values).lastrowid or 0

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, MalformedPacket, TypeError, ValueError) as error:
            raise StoreUnreadable(
                f"cannot read {self._path}: {error}; move the file away to begin anew"
            ) from None

    def _rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        return self._db.execute(statement, values).fetchall()

    def _wall(self, at: float) -> float | None:
        if at == NEVER:
            return None
        return self._clock.now().timestamp() + at - self._clock.monotonic()

    def _monotonic(self, wall: float | None) -> float:
        if wall is None:
            return NEVER
        return self._clock.monotonic() + wall - self._clock.now().timestamp()


def _pack(publish: Publish) -> bytes:
    return encode(replace(publish, dup=False, packet_id=1 if publish.qos else 0), V5)


def _unpack(packet: bytes, packet_id: int) -> Publish:
    publish = decode(packet, V5)
    if not isinstance(publish, Publish):
        raise MalformedPacket(ReasonCode.PROTOCOL_ERROR, f"a kept {type(publish).__name__}", "3.3")
    return replace(publish, packet_id=packet_id)
