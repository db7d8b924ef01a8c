"""Bitstreams under names of their own, expanded, for pynq to read while their packages are loaded.

pynq copies what it configures to /lib/firmware under the name of the file, once per overlay. All
packages of FINN have the same name there, so that going back to the first one of two would
configure the second.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from ..errors import LoadError
from .bitstream_file import COMPRESSIONS, plain_name, scan, stem_of

Key = tuple[object, ...]
_PREFIX = "gatelet-"


class Shelf:
    """Bitstreams in `folder`, which is this object's alone and made when it is needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[Key, Path] = {}

    def path(self, key: Key, bit: Path, sha256: str, part: str) -> Path:
        """Where pynq can read `bit`, expanded; `key` drops it again.

        What lies beside it under its name (handoff, device tree) does so here. Raises LoadError
        when the content is not what `sha256` says, or does not fit the disk.
        """
        known = self._places.get(key)
        if known is not None:
            return known
        name = f"{_PREFIX}{sha256[:16]}"
        place = self._folder / name
        target = place / f"{name}{Path(plain_name(bit)).suffix}"
        if target not in self._places.values():
            try:
                place.mkdir(mode=0o700, parents=True)
                self._fill(place, target, bit, sha256, part)
            except OSError as error:
                shutil.rmtree(place, ignore_errors=True)
                raise LoadError(
                    f"{bit}: cannot be made ready in {place} ({error.strerror or error}); make "
                    "room there"
                ) from error
            except LoadError:
                shutil.rmtree(place, ignore_errors=True)
                raise
        self._places[key] = target
        return target

    def drop(self, key: Key, firmware: str | Path = "") -> None:
        """Remove what was kept for `key`, and pynq's copy, unless another package has the same."""
        target = self._places.pop(key, None)
        if target is None or target in self._places.values():
            return
        shutil.rmtree(target.parent, ignore_errors=True)
        copy = Path(firmware)
        if copy.name == f"{target.stem}.bin":
            with contextlib.suppress(OSError):
                copy.unlink()

    def clear(self) -> None:
        """Remove everything, also what an earlier process left."""
        self._places.clear()
        # A link in its place was not made here: only the link goes.
        with contextlib.suppress(OSError):
            if self._folder.is_symlink():
                self._folder.unlink()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _fill(self, place: Path, target: Path, bit: Path, sha256: str, part: str) -> None:
        if bit.suffix in COMPRESSIONS:
            with target.open("wb") as file:
                found = scan(bit, file, part).sha256
            if found != sha256:
                raise LoadError(f"{bit}: sha256 is {found}, {sha256} when it was looked at")
        else:
            target.symlink_to(bit.resolve())
        stem = stem_of(bit)
        for other in bit.parent.iterdir():
            named = place / f"{target.stem}{other.suffix}"
            if other != bit and other.stem == stem and other.is_file() and named != target:
                named.symlink_to(other.resolve())
