"""What several transactions of the state store have in common."""

from __future__ import annotations

import sqlite3

from .store_types import Pin, Proof, document_hash

DISPLACED = 409
KEPT_PROOFS = 64
"""For each scope and key."""


def see(
    db: sqlite3.Connection, source: str, version: int, body: bytes, code: int, description: str
) -> None:
    db.execute(
        "INSERT INTO seen (source, version, sha256, code, description) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT DO UPDATE SET version=excluded.version, sha256=excluded.sha256, "
        "code=excluded.code, description=excluded.description",
        (source, version, document_hash(body), code, description),
    )


def displace(db: sqlite3.Connection, source: str | None) -> None:
    """Nothing is to be fetched any more. What another source than `source` asked for counts as
    seen, so that it does not come back with that source's next connection."""
    rows = db.execute("SELECT source, version, document FROM pending").fetchall()
    for other, version, document in rows:
        if source is not None and other != source:
            description = f"a newer document from {source} came before its manifest was fetched"
            see(db, other, version, document, DISPLACED, description)
    db.execute("DELETE FROM pending")


def pin(db: sqlite3.Connection, generation: int, module: str, pinned: Pin) -> None:
    db.execute(
        "INSERT INTO pin (generation, module, digest, kind) VALUES (?, ?, ?, ?) "
        "ON CONFLICT DO UPDATE SET digest=excluded.digest, kind=excluded.kind",
        (generation, module, pinned.digest, pinned.kind),
    )
    db.execute("DELETE FROM pin_model WHERE generation=? AND module=?", (generation, module))
    if pinned.model:
        db.execute(
            "INSERT INTO pin_model VALUES (?, ?, ?, ?)",
            (generation, module, pinned.digest, pinned.model),
        )


def note_proof(db: sqlite3.Connection, proof: Proof) -> None:
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
