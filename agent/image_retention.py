"""Which images to remove: those that nothing needed for days, or the oldest when the disk fills up.

Never one that runs, that the newest or the last good deployment names, or that is arriving.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from .plan_types import Collect, RemoveImage
from .store_types import KnownImage

DAY_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class RetentionRules:
    """An unused image is kept for `keep_days`; less when the disk that holds it has less than
    `min_free_percent` or `min_free_bytes` free."""

    keep_days: float = 7.0
    min_free_percent: float = 10.0
    min_free_bytes: int = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes of the file system that holds a place's images."""

    total: int
    free: int


@dataclass(frozen=True, slots=True)
class HeldImage:
    """An image on this device now; `size` in bytes."""

    digest: str
    place: str
    name: str
    size: int


def note_images(
    known: Mapping[str, KnownImage],
    here: Iterable[HeldImage],
    needed: Collection[str],
    passed: float,
) -> dict[str, KnownImage]:
    """What is remembered after `passed` more seconds: images that are needed have no idle time.

    All of the model store is gatelet's own; of the engine's images only those it brought.
    """
    after = {}
    for image in here:
        before = known.get(image.digest)
        if before is None:
            if image.place == "engine":
                continue
            before = KnownImage(image.digest, image.place, image.name)
        idle = 0.0 if image.digest in needed else before.idle + passed
        after[image.digest] = replace(before, idle=idle)
    return after


def discard(
    known: Mapping[str, KnownImage],
    here: Iterable[HeldImage],
    needed: Collection[str],
    disks: Mapping[str, Disk],
    full: Collection[str],
    rules: RetentionRules,
) -> tuple[Collect | RemoveImage, ...]:
    """The images to remove, the longest unused first.

    `disks` by place ("store", "engine"), as far as they are known; `full` names places where a
    write failed for want of space, whatever the numbers say.
    """
    unused = sorted(
        (image for image in here if image.digest in known and image.digest not in needed),
        key=lambda image: (-known[image.digest].idle, image.digest),
    )
    lacking = {place: _lacking(disk, rules) for place, disk in disks.items()}
    for place in full:
        lacking[place] = max(lacking.get(place, 0), 1)
    chosen: list[Collect | RemoveImage] = []
    for image in unused:
        old = known[image.digest].idle >= rules.keep_days * DAY_SECONDS
        if not old and lacking.get(image.place, 0) <= 0:
            continue
        lacking[image.place] = lacking.get(image.place, 0) - image.size
        chosen.append(
            Collect(image.digest) if image.place == "store" else RemoveImage(image.digest)
        )
    return tuple(chosen)


def _lacking(disk: Disk, rules: RetentionRules) -> int:
    """Bytes that must become free."""
    least = max(rules.min_free_bytes, int(disk.total * rules.min_free_percent / 100))
    # On a small disk the fixed amount would leave no room for any image.
    return min(least, disk.total // 2) - disk.free
