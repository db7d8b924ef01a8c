"""The state store: what it keeps over a restart, and what it refuses."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest
from gatelet.agent.clock import SystemClock
from gatelet.agent.outbox import Outbox
from gatelet.agent.restarts import RestartState
from gatelet.agent.store import (
    KEPT_DEPLOYMENTS,
    KEPT_JOURNAL,
    KnownImage,
    Pending,
    Pin,
    Proof,
    StateStore,
    StoreError,
)
from gatelet.agent.store_statements import DISPLACED, KEPT_PROOFS
from gatelet.agent.store_types import document_hash


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


@pytest.fixture
def store(path: Path) -> Iterator[StateStore]:
    store = StateStore(path, SystemClock())
    yield store
    store.close()


def reopened(store: StateStore, path: Path) -> StateStore:
    store.close()
    return StateStore(path, SystemClock())


def test_a_deployment_with_its_pins_survives_a_restart(store: StateStore, path: Path) -> None:
    made = store.accept("iothub", 7, b"{}")
    store.pin(made.generation, "digits", "sha256:aa")
    store.pin(made.generation, "digits", "sha256:bb")
    again = reopened(store, path)
    assert again.latest() == made
    assert again.pins(made.generation) == {"digits": "sha256:bb"}
    assert again.last_good() is None
    again.close()


def test_a_newer_deployment_supersedes_only_those_being_applied(store: StateStore) -> None:
    first = store.accept("iothub", 1, b"1")
    store.set_phase(first.generation, "good")
    second = store.accept("mqtt", 1, b"2")
    store.set_phase(second.generation, "probation")
    third = store.accept("local", 0, b"3")
    phases = {d.generation: d.phase for d in store.deployments()}
    assert phases == {
        first.generation: "good",
        second.generation: "superseded",
        third.generation: "applying",
    }
    good = store.last_good()
    assert good is not None
    assert good.generation == first.generation


def test_what_a_source_sent_last_is_known_with_its_code(store: StateStore, path: Path) -> None:
    store.accept("iothub", 3, b"good")
    store.refuse("mqtt", 4, b"bad", 400, "modules.a: no image")
    store.note_version("iothub", 5)
    again = reopened(store, path)
    assert [(s.source, s.version, s.sha256, s.code, s.description) for s in again.seen()] == [
        ("iothub", 5, document_hash(b"good"), 200, ""),
        ("mqtt", 4, document_hash(b"bad"), 400, "modules.a: no image"),
    ]
    again.close()


def test_history_is_bounded_and_the_last_good_deployment_outlives_it(store: StateStore) -> None:
    good = store.accept("local", 0, b"good")
    store.set_phase(good.generation, "good")
    store.pin(good.generation, "a", "sha256:aa")
    for number in range(KEPT_DEPLOYMENTS + 5):
        store.accept("local", 0, str(number).encode())
    kept = store.deployments()
    assert len(kept) == KEPT_DEPLOYMENTS + 1
    assert store.last_good() == next(d for d in kept if d.phase == "good")
    assert store.pins(good.generation) == {"a": "sha256:aa"}


def test_pins_go_with_their_deployment(store: StateStore) -> None:
    first = store.accept("local", 0, b"first")
    store.pin(first.generation, "a", "sha256:aa")
    for number in range(KEPT_DEPLOYMENTS + 1):
        store.accept("local", 0, str(number).encode())
    assert store.pins(first.generation) == {}


def test_the_journal_is_bounded(store: StateStore, path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.executemany(
            "INSERT INTO journal (at, generation, step, outcome, message) "
            "VALUES ('', 1, ?, '', '')",
            [(str(number),) for number in range(KEPT_JOURNAL)],
        )
    db.close()
    store.journal(1, "last", "done")
    assert store.journal_tail(1)[0][2] == "last"
    assert len(store.journal_tail(KEPT_JOURNAL * 2)) == KEPT_JOURNAL


def test_what_is_to_be_fetched_is_known_until_something_newer_comes(
    store: StateStore, path: Path
) -> None:
    assert store.pending() is None
    store.wait_for(Pending("iothub", 1, b"first"))
    store.wait_for(Pending("iothub", 2, b"second"))
    again = reopened(store, path)
    assert again.pending() == Pending("iothub", 2, b"second")
    assert again.seen() == ()
    again.wait_for(Pending("mqtt", 0, b"other"))
    (seen,) = again.seen()
    assert (seen.source, seen.version, seen.code) == ("iothub", 2, DISPLACED)
    assert seen.sha256 == document_hash(b"second")
    made = again.accept("mqtt", 0, b"{}", document=b"other", proof=Proof("manifest", "aa", "k", 3))
    assert again.pending() is None
    assert {entry.source: entry.code for entry in again.seen()} == {"iothub": 409, "mqtt": 200}
    assert again.seen()[1].sha256 == document_hash(b"other")
    assert made.body == b"{}"
    assert again.proofs("manifest") == (Proof("manifest", "aa", "k", 3),)
    again.close()


def test_proofs_are_bounded_for_each_key_and_the_highest_stay(store: StateStore) -> None:
    store.note_proof(Proof("s", "other", "rare", 1))
    for number in range(KEPT_PROOFS + 10):
        store.note_proof(Proof("s", str(number), "often", number))
    store.note_proof(Proof("s", "low", "often", 0))
    proofs = store.proofs("s")
    assert [proof.generation for proof in proofs if proof.key == "often"] == list(
        range(KEPT_PROOFS + 9, 9, -1)
    )
    assert Proof("s", "other", "rare", 1) in proofs
    store.note_proof(Proof("s", "other", "rare", 9))
    store.note_proof(Proof("s", "other", "rare", 2))
    assert Proof("s", "other", "rare", 9) in store.proofs("s")
    assert store.proofs("elsewhere") == ()


def test_a_proof_is_good_once_a_deployment_with_it_was(store: StateStore) -> None:
    for digest in ("sha256:aa", "sha256:bb"):
        store.note_proof(Proof("s", digest, "k", 1))
    made = store.accept("iothub", 1, b"{}")
    store.pin(made.generation, "digits", "sha256:aa")
    store.set_phase(made.generation, "probation")
    assert not any(proof.good for proof in store.proofs("s"))
    store.set_phase(made.generation, "good")
    assert [proof.sha256 for proof in store.proofs("s") if proof.good] == ["sha256:aa"]
    store.note_proof(Proof("s", "sha256:aa", "k", 2))
    assert [proof.generation for proof in store.proofs("s") if proof.good] == [2]


def test_a_failed_transaction_leaves_nothing_behind(store: StateStore) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        store.pin(4711, "a", "sha256:aa")  # no such deployment
    assert store.pins(4711) == {}
    store.accept("local", 0, b"1")


def test_commits_are_durable(path: Path, store: StateStore) -> None:
    (mode,) = store._db.execute("PRAGMA synchronous").fetchone()
    (journal,) = store._db.execute("PRAGMA journal_mode").fetchone()
    assert (mode, journal) == (2, "wal")


def test_a_database_of_a_newer_release_is_refused(store: StateStore, path: Path) -> None:
    store.close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(StoreError, match=r"schema 99.*newer gatelet"):
        StateStore(path, SystemClock())


def test_a_database_of_the_first_release_is_taken_over(path: Path) -> None:
    """`databases/state-1.sql` was written by the store of schema 1."""
    path.parent.mkdir()
    with sqlite3.connect(path) as db:
        db.executescript((Path(__file__).parent / "databases" / "state-1.sql").read_text())
    db.close()
    for _ in range(2):
        store = StateStore(path, SystemClock())
        good = store.last_good()
        assert good is not None
        assert store.pinned(good.generation) == {"digits": Pin("sha256:" + "a" * 64, "model")}
        latest = store.latest()
        assert latest is not None
        assert (latest.phase, latest.description) == ("failed", "pull: gone")
        assert [(s.source, s.code) for s in store.seen()] == [
            ("iothub", 200),
            ("local", 400),
            ("mqtt", 200),
        ]
        assert store.restarts() == {}
        store.pin(good.generation, "web", "sha256:b", "container")
        assert store.pinned(good.generation)["web"].kind == "container"
        with sqlite3.connect(path) as db:
            db.execute("DELETE FROM pin WHERE module='web'")
        db.close()
        store.close()


def test_restarts_images_and_facts_survive(store: StateStore, path: Path) -> None:
    at = datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    state = RestartState("spec", 3, 4, "id at", True, 2, 1, at, trouble_since=5.0)
    store.set_restart("web", state)
    store.set_restart("gone", state)
    store.forget_restart("gone")
    store.set_images([KnownImage("d1", "engine", "a:1", 5.5), KnownImage("d2", "store", "b:1")])
    store.set_images([KnownImage("d1", "engine", "a:1", 6.5)], ["d2"])
    store.note_fact("boot-id", "x")
    again = reopened(store, path)
    assert again.restarts() == {"web": state.lasting()}
    assert again.known_images() == {"d1": KnownImage("d1", "engine", "a:1", 6.5)}
    assert (again.fact("boot-id"), again.fact("other")) == ("x", "")
    again.close()


def test_a_disk_that_takes_no_more_is_said_and_nothing_is_half_written(
    store: StateStore, path: Path
) -> None:
    deployment = store.accept("local", 0, b"first")
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StoreError, match=r"state\.db.*full.*free space"):
        store.accept("local", 0, b"x" * 1_000_000)
    assert store.latest() == deployment
    store._db.execute("PRAGMA max_page_count=1000000")
    assert store.accept("local", 0, b"x" * 1_000_000).generation == deployment.generation + 1


@pytest.mark.parametrize("before", ["nothing", "a file of an earlier gatelet"])
def test_manifests_are_their_owners_own(path: Path, before: str) -> None:
    if before != "nothing":
        StateStore(path, SystemClock()).close()
        path.chmod(0o644)
    store = StateStore(path, SystemClock())
    store.accept("iothub", 1, b'{"registryCredentials": {}}')
    outbox = Outbox(path.with_name("outbox.db"), SystemClock())
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in path.parent.iterdir()}
    outbox.abandon()
    store.close()
    assert len(modes) == 6
    assert set(modes.values()) == {"0o600"}


def spoil(path: Path) -> None:
    """Damage every page after the first, as a dying flash does."""
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    data = bytearray(path.read_bytes())
    for start in range(4096, len(data), 4096):
        data[start : start + 64] = b"\xff" * 64
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["no database", "pages"])
def test_a_damaged_database_is_set_aside_and_the_agent_starts(path: Path, how: str) -> None:
    store = StateStore(path, SystemClock())
    store.accept("iothub", 1, b"{}")
    store.close()
    if how == "pages":
        spoil(path)
    else:
        path.write_bytes(b"this is no database at all" * 400)
    spoiled = path.read_bytes()
    store = StateStore(path, SystemClock())
    assert store.latest() is None
    assert store.accept("iothub", 1, b"{}").generation == 1
    store.close()
    assert path.with_name("state.db.damaged").read_bytes() == spoiled


def test_what_cannot_be_read_any_more_is_a_store_error(path: Path) -> None:
    store = StateStore(path, SystemClock())
    store.accept("iothub", 1, b"{}")
    store.close()
    store = StateStore(path, SystemClock())
    spoil(path)
    with pytest.raises(StoreError, match=r"cannot read .*state\.db: .*check this disk"):
        store.latest()
    with pytest.raises(StoreError, match=r"cannot write .*state\.db"):
        store.accept("iothub", 2, b"{}")
    store.close()
