"""The state database: its tables, and opening it."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from pathlib import Path

from .store_types import StoreError

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2

_SCHEMA = """
CREATE TABLE seen (
    source TEXT PRIMARY KEY, version INTEGER NOT NULL, sha256 TEXT NOT NULL,
    code INTEGER NOT NULL, description TEXT NOT NULL
) STRICT;
CREATE TABLE deployment (
    generation INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL, version INTEGER NOT NULL,
    body BLOB NOT NULL, phase TEXT NOT NULL, description TEXT NOT NULL, received TEXT NOT NULL
) STRICT;
CREATE TABLE pin (
    generation INTEGER NOT NULL REFERENCES deployment(generation) ON DELETE CASCADE,
    module TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (generation, module)
) STRICT;
CREATE TABLE journal (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, generation INTEGER NOT NULL,
    step TEXT NOT NULL, outcome TEXT NOT NULL, message TEXT NOT NULL
) STRICT;
"""

# Version n brings a database of version n - 1 to its own. Before 2 only models were deployed.
_MIGRATIONS = {
    2: """
ALTER TABLE pin ADD COLUMN kind TEXT NOT NULL DEFAULT 'model';
CREATE TABLE restart (
    module TEXT PRIMARY KEY, container TEXT NOT NULL, count INTEGER NOT NULL,
    exits INTEGER NOT NULL, exit TEXT NOT NULL, stopped INTEGER NOT NULL, asked INTEGER NOT NULL,
    answered INTEGER NOT NULL, restarted_at TEXT
) STRICT;
CREATE TABLE image (
    digest TEXT PRIMARY KEY, place TEXT NOT NULL, name TEXT NOT NULL, idle REAL NOT NULL
) STRICT;
CREATE TABLE fact (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
""",
}

# Tables that an older gatelet passes over: they need no new schema version.
_ADDED = """
CREATE TABLE IF NOT EXISTS canary (
    generation INTEGER NOT NULL REFERENCES deployment(generation) ON DELETE CASCADE,
    module TEXT NOT NULL, step INTEGER NOT NULL, phase TEXT NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (generation, module)
) STRICT;
CREATE TABLE IF NOT EXISTS proof (
    scope TEXT NOT NULL, sha256 TEXT NOT NULL, key TEXT NOT NULL, generation INTEGER NOT NULL,
    good INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (scope, key, sha256)
) STRICT;
CREATE TABLE IF NOT EXISTS pin_model (
    generation INTEGER NOT NULL REFERENCES deployment(generation) ON DELETE CASCADE,
    module TEXT NOT NULL, digest TEXT NOT NULL, model TEXT NOT NULL,
    PRIMARY KEY (generation, module)
) STRICT;
CREATE TABLE IF NOT EXISTS pending (
    source TEXT PRIMARY KEY, version INTEGER NOT NULL, document BLOB NOT NULL
) STRICT;
"""


def private_file(path: Path) -> None:
    """Make the database readable by its owner only: manifests and messages hold secrets.

    SQLite gives its other files the same mode. Raises OSError.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            path.with_name(path.name + suffix).chmod(0o600)


def open_database(path: Path) -> sqlite3.Connection:
    """Open or create the database, of the newest schema. Raises StoreError.

    A damaged file is moved aside: the device then starts without its history, which beats not
    starting at all, and learns from its hub or broker again what it shall run.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _opened(path)
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # locked, full, not permitted
                raise
            _move_aside(path, error)
            return _opened(path)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(
            f"cannot open the state database {path}: {error}; check the folder's "
            "permissions and free space, or move the file away to start without history"
        ) from error


def _move_aside(path: Path, error: Exception) -> None:
    aside = path.with_name(path.name + ".damaged")
    log.error("%s is damaged (%s): moved to %s, starting without history", path, error, aside)
    path.replace(aside)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _opened(path: Path) -> sqlite3.Connection:
    """Raises sqlite3.Error, OSError, StoreError."""
    private_file(path)
    # Transactions are explicit (isolation_level None); the store's lock serialises its threads.
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA foreign_keys=ON")
        (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        _migrate(db, path)
    except BaseException:  # nobody else knows of the connection yet; raised again
        db.close()
        raise
    return db


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} has schema {version}, this gatelet knows {SCHEMA_VERSION}; "
            "install the newer gatelet again"
        )
    steps = [] if version else [_SCHEMA]
    steps += [text for number, text in sorted(_MIGRATIONS.items()) if number > version]
    if steps:
        db.executescript(
            f"BEGIN IMMEDIATE; {''.join(steps)} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"
        )
    db.executescript(_ADDED)
