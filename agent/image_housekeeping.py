"""Keeps an account of the images on this device, for `image_retention` to judge."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from .clock import Clock
from .image_retention import Disk, HeldImage, RetentionRules, discard, note_images
from .plan_types import Collect, RemoveImage
from .seams import EngineView, StoredView
from .store import StateStore
from .store_types import KnownImage

LOOK_SECONDS = 10.0
SAVE_SECONDS = 600.0


class DiskUsage(Protocol):
    def usage(self, path: Path) -> Disk | None:
        """The file system that holds `path`; None when it cannot be asked."""
        ...


class HostDisk:
    """`DiskUsage` of this machine."""

    def usage(self, path: Path) -> Disk | None:
        try:
            found = shutil.disk_usage(path)
        except OSError:
            return None
        return Disk(found.total, found.free)


class ImageHousekeeping:
    """`store_path` is the folder of the model store. The time that an image is idle is counted on
    the monotonic clock, so that a wrong date removes nothing."""

    def __init__(
        self,
        store: StateStore,
        clock: Clock,
        rules: RetentionRules,
        disk: DiskUsage,
        store_path: Path,
    ) -> None:
        self._store = store
        self._clock = clock
        self._rules = rules
        self._disk = disk
        self._store_path = store_path
        self._known = store.known_images()
        self._looked_at: float | None = None
        self._saved_at = clock.monotonic()
        self._asked_at: float | None = None
        self._present: frozenset[str] = frozenset()
        self._disks: dict[str, Disk] = {}

    def bringing(self, digest: str, place: str, image: str) -> None:
        """An image is about to be brought here. Raises StoreError."""
        if digest not in self._known:
            known = KnownImage(digest, place, image)
            self._store.set_images([known])
            self._known[digest] = known

    def look(
        self,
        stored: Collection[StoredView],
        engine: EngineView,
        needed: Collection[str],
        full: frozenset[str],
    ) -> tuple[Collect | RemoveImage, ...]:
        """The images to remove now; `full` names places that had no room. Raises StoreError."""
        now = self._clock.monotonic()
        passed = 0.0 if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        here = [HeldImage(image.digest, "store", image.name, image.size) for image in stored]
        for image in engine.images:
            name = image.names[0] if image.names else image.id
            here += [
                HeldImage(digest, "engine", name, image.size)
                for digest in (*image.digests, image.id)
                if digest in self._known
            ]
        self._remember(here, engine, needed, passed, now)
        present = frozenset(image.digest for image in here)
        if present != self._present:
            # What was free before an image went would have the next one removed as well.
            self._present, self._asked_at = present, None
        return discard(self._known, here, needed, self._usage(engine, now), full, self._rules)

    def _usage(self, engine: EngineView, now: float) -> dict[str, Disk]:
        """How full the disks are, asked for now and then."""
        if self._asked_at is None or now - self._asked_at >= LOOK_SECONDS:
            self._asked_at = now
            found = {"store": self._disk.usage(self._store_path)}
            if engine.state == "up" and engine.root:
                found["engine"] = self._disk.usage(Path(engine.root))
            self._disks = {place: disk for place, disk in found.items() if disk is not None}
        return self._disks

    def _remember(
        self,
        here: list[HeldImage],
        engine: EngineView,
        needed: Collection[str],
        passed: float,
        now: float,
    ) -> None:
        after = note_images(self._known, here, needed, passed)
        # One that is arriving is not there yet, and an engine that is away shows none.
        for digest, known in self._known.items():
            if digest not in after and (
                digest in needed or (known.place == "engine" and engine.state != "up")
            ):
                after[digest] = known
        gone = self._known.keys() - after.keys()
        if gone or after.keys() - self._known.keys() or now - self._saved_at >= SAVE_SECONDS:
            self._store.set_images(after.values(), gone)
            self._saved_at = now
        self._known = after
