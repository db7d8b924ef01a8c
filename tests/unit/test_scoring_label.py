"""Which containers serve a model, and which: the label of the image, and the manifest's over it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from container_world import Device, manifest, play
from gatelet.agent.clock import SystemClock
from gatelet.agent.plan_types import WantedModule
from gatelet.agent.store import Pin, StateStore

LABEL = "io.gatelet.scoring"
IMAGE, NEXT = "r.io/app:1", "r.io/app:2"


def publish(device: Device, name: str, **labels: str) -> None:
    device.engine.publish(name, config={"Labels": labels}, layers=((name, 1000),))


def module(device: Device) -> WantedModule:
    assert device.snapshot.wanted is not None
    (found,) = device.snapshot.wanted.modules
    return found


def test_the_label_of_the_image_alone_names_the_model_also_after_a_reboot_without_network() -> None:
    async def scenario(device: Device) -> None:
        publish(device, IMAGE, **{LABEL: "digits"})
        await device.good(manifest(aa=IMAGE))
        assert (module(device).kind, module(device).options.model) == ("scoring", "digits")
        before, loaded = device.ids(), dict(device.scoring.states)
        assert device.engine._named("aa").labels[LABEL] == "digits"

        await device.kill()
        device.registry.up = False
        device.engine._published.clear()
        device.scoring.crash()
        device.boot_id = "boot-2"
        device.engine.stop()
        device.engine.start()
        device.start()
        await device.until(lambda: bool(device.scoring.routes))
        assert (module(device).kind, module(device).options.model) == ("scoring", "digits")
        assert device.ids() == before
        assert device.scoring.states == loaded

    play(scenario)


def test_an_unchanged_module_and_a_rollback_keep_what_the_label_said() -> None:
    async def scenario(device: Device) -> None:
        publish(device, IMAGE, **{LABEL: "digits"})
        publish(device, NEXT, **{LABEL: "words"})
        await device.good(manifest(aa=IMAGE))
        first = device.ids()
        device.registry.up = False
        await device.good(manifest(aa={"image": IMAGE, "startupOrder": 3}))
        assert module(device).options.model == "digits"
        assert device.ids() == first
        device.registry.up = True
        await device.good(manifest(aa=NEXT))
        assert module(device).options.model == "words"
        device.registry.up = False
        assert device.reconciler.rollback().code == 200
        await device.until(lambda: device.phase() == "good")
        assert module(device).options.model == "digits"

    play(scenario)


@pytest.mark.parametrize(
    ("image", "given", "kind", "model"),
    [
        ("digits", None, "scoring", "digits"),
        ("true", None, "scoring", ""),
        ("", None, "scoring", ""),
        ("no", None, "container", ""),
        ("digits", {"Labels": {LABEL: "words"}}, "scoring", "words"),
        ("digits", {"labels": {LABEL: "words"}}, "scoring", "words"),
        ("digits", {"Labels": {LABEL: "true"}}, "scoring", ""),
        ("digits", {"Labels": {LABEL: "false"}}, "container", ""),
        ("digits", {"Labels": {"other": "x"}}, "scoring", "digits"),
        (None, {"Labels": {LABEL: "words"}}, "scoring", "words"),
        (None, {"labels": {LABEL: "words"}}, "scoring", "words"),
        (None, {"Labels": {LABEL: "0"}}, "container", ""),
    ],
)
def test_the_manifest_wins_over_the_image(
    image: str | None, given: dict[str, object] | None, kind: str, model: str
) -> None:
    async def scenario(device: Device) -> None:
        publish(device, IMAGE, **({} if image is None else {LABEL: image}))
        await device.good(manifest(aa={"image": IMAGE, "options": given or {}}))
        found = module(device)
        assert (found.kind, found.options.model) == (kind, model)
        mounts = device.engine._named("aa").host.get("Mounts") or []
        # What the planner takes for a scoring module has the folder for its socket, and no other.
        assert bool(mounts) == (kind == "scoring") == bool(device.scoring.routes)

    play(scenario)


def test_an_image_on_the_device_says_it_too() -> None:
    async def scenario(device: Device) -> None:
        publish(device, IMAGE, **{LABEL: "digits"})
        await device.good(manifest(aa=IMAGE))
        await device.good(manifest())
        await device.good(manifest(bb={"image": IMAGE, "imagePullPolicy": "never"}))
        assert (module(device).kind, module(device).options.model) == ("scoring", "digits")

    play(scenario)


def test_a_pin_of_an_earlier_gatelet_has_no_model(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = StateStore(path, SystemClock())
    made = store.accept("local", 1, b"{}")
    store.pin(made.generation, "aa", "sha256:1", "scoring", "digits")
    store.pin(made.generation, "bb", "sha256:2", "scoring")
    assert store.pinned(made.generation) == {
        "aa": Pin("sha256:1", "scoring", "digits"),
        "bb": Pin("sha256:2", "scoring", ""),
    }
    store.close()
    # As one would that does not know of models: it pins another image by the same table.
    with sqlite3.connect(path) as db:
        db.execute("UPDATE pin SET digest='sha256:3' WHERE module='aa'")
    db.close()
    store = StateStore(path, SystemClock())
    assert store.pinned(made.generation)["aa"] == Pin("sha256:3", "scoring", "")
    store.pin(made.generation, "aa", "sha256:3", "scoring", "words")
    assert store.pinned(made.generation)["aa"].model == "words"
    store.pin(made.generation, "aa", "sha256:3", "container")
    assert store.pinned(made.generation)["aa"] == Pin("sha256:3", "container", "")
    store.close()
