"""Images on the disk of a device. Nothing is visible before it is whole, verified and synced.

    blobs/sha256/<hex>        verified blobs, kept so that the next version downloads less
    ingest/<hex>.partial      downloads under way; they continue after a restart
    images/<hex>/model/...    an unpacked image (<hex>.2, .3, ... when it was unpacked again)
    images/<hex>.json         its record: an image exists if and only if it has one

One process may have a store open at a time; within it, every method may be called from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import msgspec

from ..errors import DigestMismatch, ImageError, ImageNotFound, StorageFailed, StorageFull
from ..model_json import Model, load_model
from .image import ImageContents, ImageRecord, Layer, StoredImage
from .ingest import Ingest
from .manifest import digest_of
from .unpack import MODEL_FOLDER, StoredFile, UnpackLimits, sync_folder, unpack_layer

__all__ = ["ContentStore", "ImageContents", "Layer", "StoredImage"]

_CHUNK = 1024 * 1024
_SPARE = 16 * 1024 * 1024
_log = logging.getLogger(__name__)


def _no_fault(point: str) -> None:
    pass


class ContentStore:
    """The store in folder `root`, which is made when missing; what a crash left behind is removed.

    `fault` is called with a name at each step; tests stop or fail there. Every method may raise
    StorageFull or StorageFailed.
    """

    def __init__(
        self,
        root: Path,
        *,
        limits: UnpackLimits | None = None,
        fault: Callable[[str], None] = _no_fault,
    ) -> None:
        self.root = root
        self._limits = limits or UnpackLimits()
        self._fault = fault
        self._blobs = root / "blobs" / "sha256"
        self._ingest = root / "ingest"
        self._images = root / "images"
        self._lock = threading.RLock()
        self._busy: dict[str, threading.Lock] = {}
        self._leases: Counter[str] = Counter()
        self._records: dict[str, ImageRecord] = {}
        with self._storage():
            for folder in (self._blobs, self._ingest, self._images):
                folder.mkdir(parents=True, exist_ok=True)
            self._recover()

    # Blobs

    def has_blob(self, digest: str) -> bool:
        return self._blob(digest).exists()

    def read_blob(self, digest: str, limit: int) -> bytes:
        """A small blob, verified. Raises ImageNotFound, DigestMismatch (it is then removed)."""
        path = self._blob(digest)
        with self._storage():
            try:
                with path.open("rb") as file:
                    data = file.read(limit + 1)
            except FileNotFoundError:
                raise ImageNotFound(f"{digest} is not in {self.root}; pull the image") from None
            if digest_of(data) != digest:
                path.unlink(missing_ok=True)
                raise DigestMismatch(f"{path} was damaged and is removed; pull the image again")
            return data

    def put_blob(self, data: bytes) -> str:
        """Store a small blob; gives its digest."""
        digest = digest_of(data)
        with self.ingest(digest, len(data)) as ingest:
            if ingest is not None:
                ingest.restart()
                ingest.write(data)
                ingest.commit()
        return digest

    @contextlib.contextmanager
    def ingest(self, digest: str, size: int) -> Iterator[Ingest | None]:
        """Continue or begin to store a blob; None when it is there already.

        A second caller for the same blob waits for the first. Whatever was written stays when the
        block ends without `commit`.
        """
        with self._lock:
            busy = self._busy.setdefault(digest, threading.Lock())
        with busy, self._storage():
            if self.has_blob(digest):
                yield None
                return
            with Ingest(
                self._partial(digest), self._blob(digest), digest, size, self._fault
            ) as ingest:
                yield ingest

    def require_space(self, size: int) -> None:
        """Raises StorageFull when `size` bytes would leave less than 16 MiB on the disk."""
        with self._storage():
            free = shutil.disk_usage(self.root).free
        if size + _SPARE > free:
            raise StorageFull(
                f"{self.root}: {size} bytes are needed and {max(0, free - _SPARE)} are free; "
                "remove images or files from this disk"
            )

    def ingested(self, digest: str) -> int:
        """How many bytes of a download under way are on the disk."""
        try:
            return self._partial(digest).stat().st_size
        except FileNotFoundError:
            return 0

    @contextlib.contextmanager
    def lease(self, digests: Collection[str]) -> Iterator[None]:
        """While the block runs, `remove` and `collect` keep these blobs."""
        with self._lock:
            self._leases.update(digests)
        try:
            yield
        finally:
            with self._lock:
                self._leases.subtract(digests)
                self._leases += Counter()

    # Images

    def images(self) -> tuple[StoredImage, ...]:
        """All images, ordered by digest."""
        with self._lock:
            return tuple(self._stored(record) for _, record in sorted(self._records.items()))

    def get(self, digest: str) -> StoredImage | None:
        with self._lock:
            record = self._records.get(digest)
        return None if record is None else self._stored(record)

    def commit(
        self, contents: ImageContents, accept: Callable[[Model, Path], None] = lambda *_: None
    ) -> StoredImage:
        """Unpack the layers and make the image visible.

        One that is there with these layers stays as it is. One with fewer layers is replaced: its
        `model_dir` goes away (open files stay readable), so ask `get` for the new one.
        `accept(model, model_dir)` may refuse by raising an ImageError, before anything is visible.
        Raises InvalidImage, DigestMismatch (a damaged blob is then removed) and what `accept` does.
        """
        with self._lock:
            busy = self._busy.setdefault(contents.digest + " image", threading.Lock())
        with busy, self._storage():
            old = self._records.get(contents.digest)
            layers = tuple(layer.blob.digest for layer in contents.layers)
            if old is not None and set(layers) <= set(old.layers):
                return self._stored(old)
            name = self._free_name(contents.digest, old)
            work = self._images / f"{name}.unpack"
            try:
                files = self._unpack(contents, work)
                model = load_model(work / MODEL_FOLDER)
                accept(model, work / MODEL_FOLDER)
            except (ImageError, OSError):
                shutil.rmtree(work, ignore_errors=True)
                raise
            self._fault("commit.rename")
            work.rename(self._images / name)
            sync_folder(self._images)
            record = ImageRecord(
                contents.digest,
                contents.reference,
                name,
                contents.blobs,
                layers,
                files,
                model,
            )
            self._write_record(record)
            with self._lock:
                self._records[record.digest] = record
            if old is not None:
                self._fault("commit.old")
                shutil.rmtree(self._images / old.folder, ignore_errors=True)
            self._fault("commit.done")
            return self._stored(record)

    def remove(self, digest: str) -> None:
        """Remove an image, if it is there, and the blobs that only it uses."""
        with self._lock, self._storage():
            record = self._records.pop(digest, None)
            if record is None:
                return
            self._record_path(digest).unlink(missing_ok=True)
            sync_folder(self._images)
            self._fault("remove.record")
            shutil.rmtree(self._images / record.folder, ignore_errors=True)
            self._fault("remove.folder")
            kept = self._referenced()
            for blob in {*record.blobs, *record.layers} - kept:
                self._blob(blob).unlink(missing_ok=True)
                self._fault("remove.blob")
            sync_folder(self._blobs)

    def check(self, digest: str) -> None:
        """Read an image and all of its blobs again.

        Raises ImageNotFound, or DigestMismatch when a bit has changed: damaged blobs are removed,
        and `remove` followed by a new pull mends the image.
        """
        with self._lock:
            record = self._records.get(digest)
        if record is None:
            raise ImageNotFound(f"{digest} is not in {self.root}; pull the image")
        damaged = []
        with self._storage():
            for blob in dict.fromkeys((*record.blobs, *record.layers)):
                if _hash_file(self._blob(blob)) != blob.partition(":")[2]:
                    self._blob(blob).unlink(missing_ok=True)
                    damaged.append(str(self._blob(blob)))
            folder = self._images / record.folder
            for file in record.files:
                if _hash_file(folder / file.path) != file.sha256:
                    damaged.append(str(folder / file.path))
            expected = {file.path for file in record.files}
            for path in folder.rglob("*"):
                if not path.is_dir() and path.relative_to(folder).as_posix() not in expected:
                    damaged.append(str(path))
        if damaged:
            raise DigestMismatch(
                f"{record.reference} ({digest}): changed on the disk: {', '.join(damaged)}; "
                "remove the image and pull it again"
            )

    def collect(self, keep: Collection[str] = (), before: float = math.inf) -> int:
        """Remove blobs and downloads that no image, lease or entry of `keep` names, and that were
        last written before `before` (seconds since 1970).

        Gives the number of bytes freed. Images stay: `remove` decides about them.
        """
        freed = 0
        with self._lock, self._storage():
            kept = self._referenced() | set(keep)
            names = [(path, path.name) for path in self._blobs.iterdir()]
            names += [(path, path.name.partition(".")[0]) for path in self._ingest.iterdir()]
            for path, name in names:
                found = path.stat()
                if f"sha256:{name}" not in kept and found.st_mtime < before:
                    freed += found.st_size
                    path.unlink()
        return freed

    # Inside

    def _referenced(self) -> set[str]:
        used = set(self._leases)
        for record in self._records.values():
            used.update(record.blobs, record.layers)
        return used

    def _unpack(self, contents: ImageContents, work: Path) -> tuple[StoredFile, ...]:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        work.chmod(0o755)
        files: dict[str, StoredFile] = {}
        left = self._limits.bytes
        for layer in contents.layers:
            path = self._blob(layer.blob.digest)
            try:
                with path.open("rb") as blob:
                    found, size = unpack_layer(
                        blob, layer.blob, layer.diff_id, work, self._limits, left, self._fault
                    )
            except FileNotFoundError:
                raise ImageNotFound(f"{path} is gone; pull the image again") from None
            except DigestMismatch:
                path.unlink(missing_ok=True)
                raise
            files.update(found)
            left -= size
        self._fault("unpack.done")
        return tuple(files[path] for path in sorted(files))

    def _write_record(self, record: ImageRecord) -> None:
        path = self._record_path(record.digest)
        temporary = path.with_suffix(".json.new")
        self._fault("record.write")
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(record))
            file.flush()
            os.fsync(file.fileno())
        self._fault("record.rename")
        temporary.rename(path)
        sync_folder(self._images)

    def _recover(self) -> None:
        for path in self._images.glob("*.json"):
            try:
                record = msgspec.json.decode(path.read_bytes(), type=ImageRecord)
            except (msgspec.MsgspecError, RecursionError) as error:
                # Its blobs are still there: pulling again downloads nothing.
                _log.warning("%s is damaged and dropped, pull the image again: %s", path, error)
                path.unlink()
                continue
            if self._record_path(record.digest) == path and (self._images / record.folder).is_dir():
                self._records[record.digest] = record
            else:
                path.unlink()
        known = {record.folder for record in self._records.values()}
        known |= {self._record_path(digest).name for digest in self._records}
        for path in self._images.iterdir():
            if path.name not in known:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()

    def _free_name(self, digest: str, old: ImageRecord | None) -> str:
        name = digest.partition(":")[2]
        if old is not None:
            name = f"{name}.{int(old.folder.partition('.')[2] or 1) + 1}"
        # A folder that no record names can only be what a failure left.
        shutil.rmtree(self._images / name, ignore_errors=True)
        return name

    def _stored(self, record: ImageRecord) -> StoredImage:
        return StoredImage(
            record.digest,
            record.reference,
            self._images / record.folder / MODEL_FOLDER,
            record.model,
            record.blobs,
            record.layers,
            sum(file.size for file in record.files),
        )

    def _blob(self, digest: str) -> Path:
        return self._blobs / digest.partition(":")[2]

    def _partial(self, digest: str) -> Path:
        return self._ingest / f"{digest.partition(':')[2]}.partial"

    def _record_path(self, digest: str) -> Path:
        return self._images / f"{digest.partition(':')[2]}.json"

    @contextlib.contextmanager
    def _storage(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull(
                    f"{self.root}: no space left on the disk; remove images or files from it"
                ) from error
            raise StorageFailed(
                f"{error.filename or self.root}: {error.strerror or error}; "
                "check the disk and who owns the folder"
            ) from error


def _hash_file(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError:
        return None
    return digest.hexdigest()
