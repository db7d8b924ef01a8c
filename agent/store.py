"""What the agent must not forget: deployments, pins, restart counts, the journal of its steps.

SQLite in WAL mode with synchronous=FULL: what a method of this class stored when it returned
survives a power cut (sqlite.org/pragma.html#pragma_synchronous). The schema carries a version;
a newer one is refused rather than misread.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from .canary import Canary, CanaryPhase
from .clock import Clock
from .plan_types import Kind
from .restarts import RestartState
from .store_schema import open_database
from .store_statements import displace, note_proof, pin, see
from .store_types import (
    Deployment,
    KnownImage,
    Pending,
    Pin,
    Proof,
    Seen,
    StoreError,
)

__all__ = ["StateStore", "StoreError"]

KEPT_DEPLOYMENTS = 32
KEPT_JOURNAL = 2000


class StateStore:
    """Thread-safe; each method is one transaction."""

    def __init__(self, path: Path, clock: Clock) -> None:
        """Open or create the database at `path`. Raises StoreError."""
        self._clock = clock
        self._lock = threading.Lock()
        self._path = path
        self._db = open_database(path)

    def close(self) -> None:
        with self._lock:
            self._db.close()

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
            except sqlite3.DatabaseError as error:
                if not _is_storage(error):
                    raise
                raise StoreError(
                    f"cannot write {self._path}: {error}; free space on this disk, or check it"
                ) from error

    def _read(self, query: str, *parameters: object) -> list[Any]:
        """The rows of a SELECT. Raises StoreError."""
        with self._lock:
            try:
                return self._db.execute(query, parameters).fetchall()
            except sqlite3.DatabaseError as error:
                if not _is_storage(error):
                    raise
                raise StoreError(f"cannot read {self._path}: {error}; check this disk") from error

    # -- documents by source -------------------------------------------------------------------

    def seen(self) -> tuple[Seen, ...]:
        rows = self._read(
            "SELECT source, version, sha256, code, description FROM seen ORDER BY source"
        )
        return tuple(Seen(*row) for row in rows)

    def refuse(self, source: str, version: int, body: bytes, code: int, description: str) -> None:
        """Remember that this document is not a deployment, and why."""
        with self._transaction() as db:
            see(db, source, version, body, code, description)

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
        pins: Mapping[str, Pin] | None = None,
    ) -> Deployment:
        """Remember the manifest as a new deployment; the one being applied is superseded.

        `document` is what the source sent where that is not the manifest itself; `pins` are the
        images that it begins with, by module.
        """
        received = self._clock.now().isoformat(timespec="seconds")
        with self._transaction() as db:
            see(db, source, version, body if document is None else document, 200, "")
            displace(db, source)
            if proof is not None:
                note_proof(db, proof)
            db.execute(
                "UPDATE deployment SET phase='superseded' WHERE phase IN ('applying','probation')"
            )
            cursor = db.execute(
                "INSERT INTO deployment (source, version, body, phase, description, received) "
                "VALUES (?, ?, ?, 'applying', '', ?)",
                (source, version, body, received),
            )
            generation = int(cursor.lastrowid or 0)
            for module, pinned in (pins or {}).items():
                pin(db, generation, module, pinned)
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
            displace(db, None if pending is None else pending.source)
            if pending is not None:
                db.execute(
                    "INSERT INTO pending VALUES (?, ?, ?)",
                    (pending.source, pending.version, pending.document),
                )

    def pending(self) -> Pending | None:
        row = next(iter(self._read("SELECT source, version, document FROM pending")), None)
        return None if row is None else Pending(*row)

    def note_proof(self, proof: Proof) -> None:
        with self._transaction() as db:
            note_proof(db, proof)

    def proofs(self, scope: str) -> tuple[Proof, ...]:
        """What was accepted in `scope`, the highest generation first."""
        rows = self._read(
            "SELECT scope, sha256, key, generation, good FROM proof WHERE scope=? "
            "ORDER BY generation DESC, rowid DESC",
            scope,
        )
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
        rows = self._read(
            "SELECT generation, source, version, body, phase, description, received "
            f"FROM deployment {tail}"
        )
        return [Deployment(*row) for row in rows]

    # -- pins ----------------------------------------------------------------------------------

    def pins(self, generation: int) -> dict[str, str]:
        """Module name -> image digest that this deployment runs."""
        return {module: pin.digest for module, pin in self.pinned(generation).items()}

    def pinned(self, generation: int) -> dict[str, Pin]:
        """Module name -> digest and kind of the image that this deployment runs."""
        # With the digest: a gatelet that knows no names may have pinned another since.
        rows = self._read(
            "SELECT module, digest, kind, coalesce(model, '') FROM pin "
            "LEFT JOIN pin_model USING (generation, module, digest) WHERE generation=?",
            generation,
        )
        return {module: Pin(digest, kind, model) for module, digest, kind, model in rows}

    def pin(
        self, generation: int, module: str, digest: str, kind: Kind = "model", model: str = ""
    ) -> None:
        with self._transaction() as db:
            pin(db, generation, module, Pin(digest, kind, model))

    # -- restarts ------------------------------------------------------------------------------

    def restarts(self) -> dict[str, RestartState]:
        """Module -> what is remembered of its restarts."""
        rows = self._read(
            "SELECT module, container, count, exits, exit, stopped, asked, answered, "
            "restarted_at FROM restart"
        )
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
        rows = self._read("SELECT digest, place, name, idle FROM image")
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
        row = next(iter(self._read("SELECT value FROM fact WHERE name=?", name)), None)
        return "" if row is None else str(row[0])

    def note_fact(self, name: str, value: str) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (name, value))

    # -- canaries ------------------------------------------------------------------------------

    def canaries(self, generation: int) -> dict[str, Canary]:
        """Module -> how far its automatic rollout is, where that was stored."""
        rows = self._read(
            "SELECT module, step, phase, reason FROM canary WHERE generation=?", generation
        )
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
        rows = self._read(
            "SELECT digest FROM pin WHERE generation IN ("
            "(SELECT max(generation) FROM deployment WHERE phase='good'), "
            "(SELECT generation FROM deployment WHERE source='rollback' AND "
            "generation=(SELECT max(generation) FROM deployment)))"
        )
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
        rows = self._read(
            "SELECT at, generation, step, outcome, message FROM journal ORDER BY id DESC LIMIT ?",
            count,
        )
        return rows[::-1]


def _is_storage(error: sqlite3.DatabaseError) -> bool:
    """Whether the disk or the file is at fault, and not whoever asks."""
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError
