"""What the agent must not forget: deployments, pins, restart counts, the journal of its steps.

SQLite in WAL mode with synchronous=FULL: what a method of this class stored when it returned
survives a power cut (sqlite.org/pragma.html#pragma_synchronous). The schema carries a version;
a newer one is refused rather than misread.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from .canary import Canary, CanaryPhase
from .clock import Clock
from .plan_types import Kind
from .restarts import RestartState

SCHEMA_VERSION = 2
KEPT_DEPLOYMENTS = 32
KEPT_JOURNAL = 2000
DISPLACED = 409
KEPT_PROOFS = 64
"""For each scope and key."""

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


class StoreError(Exception):
    """The state database cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The last document of a source and what became of it (edgeAgent's status codes)."""

    source: str
    version: int
    sha256: str
    code: int
    description: str


@dataclass(frozen=True, slots=True)
class Deployment:
    """One accepted manifest.

    `phase`: "applying" (steps are being taken), "probation" (all modules ready, being watched),
    "good" (stayed healthy), "failed" (will not be tried again), "superseded" (a newer one came).
    """

    generation: int
    source: str
    version: int
    body: bytes
    phase: str
    description: str
    received: str


@dataclass(frozen=True, slots=True)
class Proof:
    """Something signed that was accepted: its hash, the key's fingerprint, its generation.

    `scope` is "manifest" or "image:<registry>/<repository>"; `good` tells of an image that it was
    part of a good deployment.
    """

    scope: str
    sha256: str
    key: str
    generation: int
    good: bool = False


@dataclass(frozen=True, slots=True)
class Pending:
    """A desired document that refers to a manifest which is not here yet."""

    source: str
    version: int
    document: bytes


@dataclass(frozen=True, slots=True)
class Pin:
    """What a module's image name was resolved to. `kind`: "model", "container" or "scoring";
    `model`: the one that the label of a scoring image names, "" where it names none."""

    digest: str
    kind: Kind = "model"
    model: str = ""


@dataclass(frozen=True, slots=True)
class KnownImage:
    """An image that gatelet brought here. `place` is "store" or "engine"; `idle` are the seconds
    for which nothing needed it, counted while the agent runs."""

    digest: str
    place: str
    name: str
    idle: float = 0.0


class StateStore:
    """Thread-safe; each method is one transaction."""

    def __init__(self, path: Path, clock: Clock) -> None:
        """Open or create the database at `path`. Raises StoreError."""
        self._clock = clock
        self._lock = threading.Lock()
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Transactions are explicit (isolation_level None); the lock serialises the threads.
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self._migrate()
        except sqlite3.Error as error:
            self._db.close()
            raise self._unusable(error) from error
        except StoreError:
            self._db.close()
            raise

    def _unusable(self, error: Exception) -> StoreError:
        return StoreError(
            f"cannot open the state database {self._path}: {error}; check the folder's "
            "permissions and free space, or move the file away to start without history"
        )

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self._path} has schema {version}, this gatelet knows {SCHEMA_VERSION}; "
                "install the newer gatelet again"
            )
        steps = [] if version else [_SCHEMA]
        steps += [text for number, text in sorted(_MIGRATIONS.items()) if number > version]
        if steps:
            self._db.executescript(
                f"BEGIN IMMEDIATE; {''.join(steps)} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;"
            )
        self._db.executescript(_ADDED)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:  # the transaction must end, whatever ended the work in it
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
                try:
                    self._db.execute("COMMIT")
                except sqlite3.Error:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.OperationalError as error:
                raise StoreError(
                    f"cannot write {self._path}: {error}; free space on this disk, or check it"
                ) from error

    # -- documents by source -------------------------------------------------------------------

    def seen(self) -> tuple[Seen, ...]:
        with self._lock:
            rows = self._db.execute(
                "SELECT source, version, sha256, code, description FROM seen ORDER BY source"
            ).fetchall()
        return tuple(Seen(*row) for row in rows)

    def refuse(self, source: str, version: int, body: bytes, code: int, description: str) -> None:
        """Remember that this document is not a deployment, and why."""
        with self._transaction() as db:
            _see(db, source, version, body, code, description)

    def note_version(self, source: str, version: int) -> None:
        """The document of `source` has a new version number and the same content."""
        with self._transaction() as db:
            db.execute("UPDATE seen SET version=? WHERE source=?", (version, source))

    def accept(
        self,
        source: str,
        version: int,
        body: bytes,
        *,
        document: bytes | None = None,
        proof: Proof | None = None,
    ) -> Deployment:
        """Remember the manifest as a new deployment; the one being applied is superseded.

        `document` is what the source sent where that is not the manifest itself.
        """
        received = self._clock.now().isoformat(timespec="seconds")
        with self._transaction() as db:
            _see(db, source, version, body if document is None else document, 200, "")
            _displace(db, source)
            if proof is not None:
                _note_proof(db, proof)
            db.execute(
                "UPDATE deployment SET phase='superseded' WHERE phase IN ('applying','probation')"
            )
            cursor = db.execute(
                "INSERT INTO deployment (source, version, body, phase, description, received) "
                "VALUES (?, ?, ?, 'applying', '', ?)",
                (source, version, body, received),
            )
            generation = int(cursor.lastrowid or 0)
            db.execute(
                "DELETE FROM deployment WHERE generation <= ? AND generation IS NOT "
                "(SELECT max(generation) FROM deployment WHERE phase='good')",
                (generation - KEPT_DEPLOYMENTS,),
            )
        return Deployment(generation, source, version, body, "applying", "", received)

    # -- what is not here yet, and what was accepted by its signature ---------------------------

    def wait_for(self, pending: Pending | None) -> None:
        """Remember that this document's manifest is to be fetched; None: nothing is any more."""
        with self._transaction() as db:
            _displace(db, None if pending is None else pending.source)
            if pending is not None:
                db.execute(
                    "INSERT INTO pending VALUES (?, ?, ?)",
                    (pending.source, pending.version, pending.document),
                )

    def pending(self) -> Pending | None:
        with self._lock:
            row = self._db.execute("SELECT source, version, document FROM pending").fetchone()
        return None if row is None else Pending(*row)

    def note_proof(self, proof: Proof) -> None:
        with self._transaction() as db:
            _note_proof(db, proof)

    def proofs(self, scope: str) -> tuple[Proof, ...]:
        """What was accepted in `scope`, the highest generation first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT scope, sha256, key, generation, good FROM proof WHERE scope=? "
                "ORDER BY generation DESC, rowid DESC",
                (scope,),
            ).fetchall()
        return tuple(
            Proof(kind, sha256, key, generation, bool(good))
            for kind, sha256, key, generation, good in rows
        )

    # -- deployments ---------------------------------------------------------------------------

    def latest(self) -> Deployment | None:
        """The newest deployment, whatever its phase."""
        return self._one("ORDER BY generation DESC")

    def last_good(self) -> Deployment | None:
        """The newest deployment that stayed healthy through its probation."""
        return self._one("WHERE phase='good' ORDER BY generation DESC")

    def deployments(self) -> tuple[Deployment, ...]:
        """Newest first."""
        return tuple(self._select("ORDER BY generation DESC"))

    def set_phase(self, generation: int, phase: str, description: str = "") -> None:
        with self._transaction() as db:
            db.execute(
                "UPDATE deployment SET phase=?, description=? WHERE generation=?",
                (phase, description, generation),
            )
            if phase == "good":
                db.execute(
                    "UPDATE proof SET good=1 WHERE sha256 IN "
                    "(SELECT digest FROM pin WHERE generation=?)",
                    (generation,),
                )

    def _one(self, tail: str) -> Deployment | None:
        return next(iter(self._select(f"{tail} LIMIT 1")), None)

    def _select(self, tail: str) -> list[Deployment]:
        with self._lock:
            rows = self._db.execute(
                "SELECT generation, source, version, body, phase, description, received "
                f"FROM deployment {tail}"
            ).fetchall()
        return [Deployment(*row) for row in rows]

    # -- pins ----------------------------------------------------------------------------------

    def pins(self, generation: int) -> dict[str, str]:
        """Module name -> image digest that this deployment runs."""
        return {module: pin.digest for module, pin in self.pinned(generation).items()}

    def pinned(self, generation: int) -> dict[str, Pin]:
        """Module name -> digest and kind of the image that this deployment runs."""
        with self._lock:
            rows = self._db.execute(
                # With the digest: a gatelet that knows no names may have pinned another since.
                "SELECT module, digest, kind, coalesce(model, '') FROM pin "
                "LEFT JOIN pin_model USING (generation, module, digest) WHERE generation=?",
                (generation,),
            ).fetchall()
        return {module: Pin(digest, kind, model) for module, digest, kind, model in rows}

    def pin(
        self, generation: int, module: str, digest: str, kind: Kind = "model", model: str = ""
    ) -> None:
        with self._transaction() as db:
            db.execute(
                "INSERT INTO pin (generation, module, digest, kind) VALUES (?, ?, ?, ?) "
                "ON CONFLICT DO UPDATE SET digest=excluded.digest, kind=excluded.kind",
                (generation, module, digest, kind),
            )
            db.execute(
                "DELETE FROM pin_model WHERE generation=? AND module=?", (generation, module)
            )
            if model:
                db.execute(
                    "INSERT INTO pin_model VALUES (?, ?, ?, ?)",
                    (generation, module, digest, model),
                )

    # -- restarts ------------------------------------------------------------------------------

    def restarts(self) -> dict[str, RestartState]:
        """Module -> what is remembered of its restarts."""
        with self._lock:
            rows = self._db.execute(
                "SELECT module, container, count, exits, exit, stopped, asked, answered, "
                "restarted_at FROM restart"
            ).fetchall()
        return {
            module: RestartState(
                container,
                count,
                exits,
                end,
                bool(stopped),
                asked,
                answered,
                None if at is None else datetime.fromisoformat(at),
            )
            for module, container, count, exits, end, stopped, asked, answered, at in rows
        }

    def set_restart(self, module: str, state: RestartState) -> None:
        at = None if state.restarted_at is None else state.restarted_at.isoformat()
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO restart VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    module,
                    state.container,
                    state.count,
                    state.exits,
                    state.exit,
                    int(state.stopped),
                    state.asked,
                    state.answered,
                    at,
                ),
            )

    def forget_restart(self, module: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM restart WHERE module=?", (module,))

    # -- images --------------------------------------------------------------------------------

    def known_images(self) -> dict[str, KnownImage]:
        """Digest -> what is remembered of an image that gatelet brought here."""
        with self._lock:
            rows = self._db.execute("SELECT digest, place, name, idle FROM image").fetchall()
        return {row[0]: KnownImage(*row) for row in rows}

    def set_images(self, images: Iterable[KnownImage], forgotten: Iterable[str] = ()) -> None:
        with self._transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO image VALUES (?, ?, ?, ?)",
                [(image.digest, image.place, image.name, image.idle) for image in images],
            )
            db.executemany("DELETE FROM image WHERE digest=?", [(d,) for d in forgotten])

    # -- facts ---------------------------------------------------------------------------------

    def fact(self, name: str) -> str:
        """Empty when it was never noted."""
        with self._lock:
            row = self._db.execute("SELECT value FROM fact WHERE name=?", (name,)).fetchone()
        return "" if row is None else str(row[0])

    def note_fact(self, name: str, value: str) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (name, value))

    # -- canaries ------------------------------------------------------------------------------

    def canaries(self, generation: int) -> dict[str, Canary]:
        """Module -> how far its automatic rollout is, where that was stored."""
        with self._lock:
            rows = self._db.execute(
                "SELECT module, step, phase, reason FROM canary WHERE generation=?", (generation,)
            ).fetchall()
        return {
            module: Canary(step, CanaryPhase(phase), reason) for module, step, phase, reason in rows
        }

    def set_canary(self, generation: int, module: str, canary: Canary) -> None:
        with self._transaction() as db:
            db.execute(
                "INSERT INTO canary (generation, module, step, phase, reason) "
                "VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "step=excluded.step, phase=excluded.phase, reason=excluded.reason",
                (generation, module, canary.step, canary.phase.value, canary.reason),
            )

    def kept_digests(self) -> frozenset[str]:
        """The images that the device may have to return to: those of the last good deployment, and
        of the one to which somebody on the device just returned."""
        with self._lock:
            rows = self._db.execute(
                "SELECT digest FROM pin WHERE generation IN ("
                "(SELECT max(generation) FROM deployment WHERE phase='good'), "
                "(SELECT generation FROM deployment WHERE source='rollback' AND "
                "generation=(SELECT max(generation) FROM deployment)))"
            ).fetchall()
        return frozenset(row[0] for row in rows)

    # -- journal -------------------------------------------------------------------------------

    def journal(self, generation: int, step: str, outcome: str, message: str = "") -> None:
        """`outcome`: "started", "done" or "failed"."""
        at = self._clock.now().isoformat(timespec="milliseconds")
        with self._transaction() as db:
            cursor = db.execute(
                "INSERT INTO journal (at, generation, step, outcome, message) "
                "VALUES (?, ?, ?, ?, ?)",
                (at, generation, step, outcome, message),
            )
            db.execute(
                "DELETE FROM journal WHERE id <= ?", ((cursor.lastrowid or 0) - KEPT_JOURNAL,)
            )

    def journal_tail(self, count: int = 50) -> list[tuple[str, int, str, str, str]]:
        """(at, generation, step, outcome, message), oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT at, generation, step, outcome, message FROM journal "
                "ORDER BY id DESC LIMIT ?",
                (count,),
            ).fetchall()
        return rows[::-1]


def _see(
    db: sqlite3.Connection, source: str, version: int, body: bytes, code: int, description: str
) -> None:
    db.execute(
        "INSERT INTO seen (source, version, sha256, code, description) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT DO UPDATE SET version=excluded.version, sha256=excluded.sha256, "
        "code=excluded.code, description=excluded.description",
        (source, version, document_hash(body), code, description),
    )


def _displace(db: sqlite3.Connection, source: str | None) -> None:
    """Nothing is to be fetched any more. What another source than `source` asked for counts as
    seen, so that it does not come back with that source's next connection."""
    rows = db.execute("SELECT source, version, document FROM pending").fetchall()
    for other, version, document in rows:
        if source is not None and other != source:
            description = f"a newer document from {source} came before its manifest was fetched"
            _see(db, other, version, document, DISPLACED, description)
    db.execute("DELETE FROM pending")


def _note_proof(db: sqlite3.Connection, proof: Proof) -> None:
    db.execute(
        "INSERT INTO proof (scope, sha256, key, generation) VALUES (?, ?, ?, ?) "
        "ON CONFLICT DO UPDATE SET generation=max(generation, excluded.generation)",
        (proof.scope, proof.sha256, proof.key, proof.generation),
    )
    db.execute(
        "DELETE FROM proof WHERE scope=?1 AND key=?2 AND rowid NOT IN (SELECT rowid FROM proof "
        "WHERE scope=?1 AND key=?2 ORDER BY good DESC, generation DESC, rowid DESC LIMIT ?3)",
        (proof.scope, proof.key, KEPT_PROOFS),
    )


def document_hash(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
