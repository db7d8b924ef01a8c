"""Which images go: by age, by disk pressure, and never what is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from gatelet.agent.clock import SystemClock
from gatelet.agent.image_housekeeping import ImageHousekeeping
from gatelet.agent.image_retention import (
    DAY_SECONDS,
    Disk,
    HeldImage,
    RetentionRules,
    discard,
    note_images,
)
from gatelet.agent.plan import Collect, RemoveImage
from gatelet.agent.seams import EngineView, StoredView
from gatelet.agent.store import KnownImage, StateStore
from hypothesis import given
from hypothesis import strategies as st

RULES = RetentionRules(keep_days=7, min_free_percent=10, min_free_bytes=100)
ROOMY = {"store": Disk(10_000, 9_000), "engine": Disk(10_000, 9_000)}


def held(name: str, place: str = "store", size: int = 500) -> HeldImage:
    return HeldImage(name, place, name, size)


def known(name: str, days: float, place: str = "store") -> KnownImage:
    return KnownImage(name, place, name, days * DAY_SECONDS)


def chosen(
    ages: dict[str, float],
    disks: dict[str, Disk] = ROOMY,
    needed: set[str] | None = None,
    full: set[str] | None = None,
) -> list[str]:
    steps = discard(
        {name: known(name, age) for name, age in ages.items()},
        [held(name) for name in ages],
        needed or set(),
        disks,
        full or set(),
        RULES,
    )
    return [step.digest for step in steps]


@pytest.mark.parametrize(
    ("ages", "free", "needed", "expected"),
    [
        ({"a": 6.9, "b": 7.0, "c": 30}, 9_000, set(), ["c", "b"]),
        ({"a": 6.9, "b": 7.0, "c": 30}, 9_000, {"c"}, ["b"]),
        # 1,000 bytes shall be free; each image has 500.
        ({"a": 1, "b": 3, "c": 2}, 1_000, set(), []),
        ({"a": 1, "b": 3, "c": 2}, 999, set(), ["b"]),
        ({"a": 1, "b": 3, "c": 2}, 400, set(), ["b", "c"]),
        ({"a": 1, "b": 3, "c": 2}, 0, {"b"}, ["c", "a"]),
        ({"a": 0, "b": 0}, 0, {"a", "b"}, []),
        ({"a": 8, "b": 3, "c": 2}, 500, set(), ["a"]),
    ],
)
def test_the_longest_unused_go_first_and_no_more_than_needed(
    ages: dict[str, float], free: int, needed: set[str], expected: list[str]
) -> None:
    assert chosen(ages, {"store": Disk(10_000, free)}, needed) == expected


def test_a_place_that_had_no_room_gives_one_back_whatever_its_disk_says() -> None:
    assert chosen({"a": 1, "b": 2}, ROOMY, full={"store"}) == ["b"]


def test_pressure_on_one_disk_spares_the_other() -> None:
    ages = {"m": known("m", 1), "e": known("e", 1, "engine")}
    here = [held("m"), held("e", "engine")]
    disks = {"store": Disk(10_000, 9_000), "engine": Disk(10_000, 10)}
    assert discard(ages, here, set(), disks, set(), RULES) == (RemoveImage("e"),)
    disks = {"store": Disk(10_000, 10)}
    assert discard(ages, here, set(), disks, set(), RULES) == (Collect("m"),)


def test_images_of_the_engine_that_gatelet_did_not_bring_are_of_no_account() -> None:
    here = [held("mine", "engine"), held("theirs", "engine"), held("model")]
    found = note_images({"mine": known("mine", 1, "engine")}, here, set(), 10)
    assert set(found) == {"mine", "model"}
    steps = discard(found, here, set(), {"engine": Disk(1000, 0)}, set(), RULES)
    assert steps == (RemoveImage("mine"),)


def test_idle_time_is_summed_and_ends_with_use() -> None:
    images = note_images({}, [held("a")], set(), 5)
    images = note_images(images, [held("a")], set(), 7)
    assert images["a"].idle == 12
    assert note_images(images, [held("a")], {"a"}, 7)["a"].idle == 0


names = st.sampled_from("abcdef")


@given(
    st.dictionaries(names, st.floats(0, 30), max_size=6),
    st.sets(names),
    st.integers(0, 10_000),
    st.sets(st.just("store")),
)
def test_what_is_needed_never_goes(
    ages: dict[str, float], needed: set[str], free: int, full: set[str]
) -> None:
    found = chosen(ages, {"store": Disk(10_000, free)}, needed, full)
    assert not set(found) & needed
    assert {name for name, age in ages.items() if age >= 7} - needed <= set(found)
    assert found == sorted(found, key=lambda name: (-ages[name], name))


class NoDisk:
    def usage(self, path: Path) -> Disk | None:
        return None


def test_the_account_survives_a_restart_and_an_engine_that_is_away(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state.db", SystemClock())
    try:
        keeping = ImageHousekeeping(store, SystemClock(), RULES, NoDisk(), tmp_path)
        keeping.bringing("e", "engine", "r/e:1")
        away = EngineView("down", "gone")
        assert keeping.look([StoredView("m", "r/m:1", 5)], away, set(), frozenset()) == ()
        again = ImageHousekeeping(store, SystemClock(), RULES, NoDisk(), tmp_path)
        again.look([], away, set(), frozenset())
        assert set(store.known_images()) == {"e"}
    finally:
        store.close()


def test_one_image_goes_where_one_is_enough(tmp_path: Path) -> None:
    class OneIsEnough:
        free = 900

        def usage(self, path: Path) -> Disk | None:
            return Disk(10_000, self.free)

    disk, away = OneIsEnough(), EngineView("down", "gone")
    store = StateStore(tmp_path / "state.db", SystemClock())
    try:
        keeping = ImageHousekeeping(store, SystemClock(), RULES, disk, tmp_path)
        stored = [StoredView(name, f"r/{name}:1", 500) for name in "abc"]
        (first,) = keeping.look(stored, away, set(), frozenset())
        stored = [image for image in stored if image.digest != first.digest]
        disk.free += 500
        # The next pass comes at once, long before the disk would be looked at again.
        assert keeping.look(stored, away, set(), frozenset()) == ()
    finally:
        store.close()
