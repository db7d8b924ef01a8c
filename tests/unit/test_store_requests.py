"""What people ask for is stored whole or not at all, and they hear why not."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

import pytest
from container_world import V1, V2, Device, manifest, play, publish
from gatelet.agent.manifest_source import ManifestSource

NO_PINS = "CREATE TEMP TRIGGER full BEFORE INSERT ON pin BEGIN SELECT RAISE(ABORT, 'no more'); END"

ASKED: dict[str, Callable[[Device], object]] = {
    "a document": lambda device: device.reconciler.submit("local", 2, manifest(aa=V1, bb=V2)),
    "a rollback": lambda device: device.reconciler.rollback(1),
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_deployment_is_never_stored_without_the_images_it_begins_with(asked: str) -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1))
        await device.good(manifest(aa=V1, cc=V1))
        before = device.store.latest()
        device.store._db.execute(NO_PINS)
        with pytest.raises(sqlite3.IntegrityError, match="no more"):
            ASKED[asked](device)
        assert device.store.latest() == before
        device.store._db.execute("DROP TRIGGER full")
        ASKED[asked](device)
        begun = device.store.latest()
        assert begun is not None
        assert begun.generation == 3
        assert device.store.pins(3) == {"aa": device.store.pins(1)["aa"]}

    play(scenario)


@pytest.mark.parametrize("asked", ["restart", "rollback"])
def test_what_cannot_be_noted_is_said_to_who_asks_for_it(asked: str) -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1))
        await device.good(manifest(aa=V2))
        ids = device.ids()
        source = ManifestSource(device.store, device.reconciler, device.clock)
        ask = {"restart": lambda: source.restart("aa"), "rollback": source.rollback}[asked]
        # As a file system is after it met an error.
        device.store._db.execute("PRAGMA query_only=ON")
        verdict = ask()
        device.store._db.execute("PRAGMA query_only=OFF")
        assert verdict.code == 500
        assert "state.db" in verdict.description
        assert "free space on this disk, or check it" in verdict.description
        assert (device.ids(), device.phase()) == (ids, "good")
        assert ask().code == 200

    play(scenario)
