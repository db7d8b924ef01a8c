"""Layers become files: only below `model/`, only plain files and folders, within limits.

What an image holds elsewhere is skipped, so a model may also travel on top of an ordinary base
image. Every byte is hashed on the way; nothing is to be used before `unpack_layer` has returned.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from ..errors import DigestMismatch, InvalidImage
from .manifest import Descriptor
from .tar import read_tar

MODEL_FOLDER = "model"
_CHUNK = 1024 * 1024
_SMALL = 64 * 1024 * 1024
_MAX_PARTS = 32


@dataclass(frozen=True, slots=True)
class UnpackLimits:
    """`bytes` bounds an image's uncompressed layers together and `entries` one layer.

    `ratio` bounds uncompressed to compressed size, for layers of more than 64 MiB.
    """

    bytes: int = 8 * 1024**3
    entries: int = 20_000
    ratio: int = 200


class StoredFile(msgspec.Struct, frozen=True):
    """A file of an unpacked image: path below the image's folder, size in bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str


def unpack_layer(
    blob: BinaryIO,
    layer: Descriptor,
    diff_id: str,
    target: Path,
    limits: UnpackLimits,
    left: int,
    fault: Callable[[str], None],
) -> tuple[dict[str, StoredFile], int]:
    """Write the model files of one layer below `target`.

    `left` is how many uncompressed bytes the image may still have. Gives the files by path and
    the layer's uncompressed size. Files, folders and `target` are synced.
    Raises InvalidImage, DigestMismatch (the blob or its uncompressed form), OSError.
    """
    what = f"layer {layer.digest}"
    raw = _Hashed(blob, None, what)
    most = min(left, max(_SMALL, limits.ratio * layer.size))
    head = raw.peek(4)
    if head[:2] == b"\x1f\x8b":
        plain = _Hashed(gzip.GzipFile(fileobj=io.BufferedReader(raw, _CHUNK)), most, what)
    elif head == b"\x28\xb5\x2f\xfd":
        raise InvalidImage(f"{what} is compressed with zstd; push it as plain tar or with gzip")
    else:
        plain = _Hashed(io.BufferedReader(raw, _CHUNK), most, what)
    files: dict[str, StoredFile] = {}
    folders: set[Path] = {target}
    try:
        with io.BufferedReader(plain, _CHUNK) as source:
            for entry, contents in read_tar(source, what, limits.entries):
                path = _model_path(entry.name, what)
                if path is None:
                    continue
                if entry.kind == "directory":
                    _make_folder(target, path, folders, what)
                elif entry.kind == "file":
                    _make_folder(target, path.rpartition("/")[0], folders, what)
                    files[path] = _write_file(target / path, path, contents, what)
                    fault("unpack.file")
                else:
                    raise InvalidImage(
                        f"{what}: {path!r} is a {entry.kind}; a model holds plain files only"
                    )
            while source.read(_CHUNK):
                pass
        while raw.read(_CHUNK):
            pass
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        while raw.read(_CHUNK):
            pass
        # Damage on the disk and a layer that was pushed broken look the same up to here.
        if raw.digest != layer.digest:
            raise _damaged(what) from None
        raise InvalidImage(f"{what}: {error}; build and push the image again") from None
    except InvalidImage:
        while raw.read(_CHUNK):
            pass
        if raw.digest != layer.digest:
            raise _damaged(what) from None
        raise
    if raw.digest != layer.digest:
        raise _damaged(what)
    if plain.digest != diff_id:
        raise InvalidImage(
            f"{what}: uncompressed it is {plain.digest}, but the image's config says {diff_id}; "
            "build and push the image again"
        )
    for folder in sorted(folders, reverse=True):
        sync_folder(folder)
    return files, plain.count


def sync_folder(path: Path) -> None:
    """Make the names in `path` survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damaged(what: str) -> DigestMismatch:
    return DigestMismatch(f"{what}: the stored copy is damaged; pull the image again")


def _model_path(name: str, what: str) -> str | None:
    """The path to write to, None for what is not the model's."""
    parts = name.removeprefix("./").rstrip("/").split("/")
    if ".." in parts or name.startswith("/") or "\0" in name:
        raise InvalidImage(f"{what}: the name {name[:100]!r} leads out of the image")
    if parts[0] != MODEL_FOLDER:
        return None
    if "" in parts or "." in parts or len(parts) > _MAX_PARTS:
        raise InvalidImage(f"{what}: the name {name[:100]!r} is not a plain path")
    for part in parts:
        if len(part.encode()) > 255:
            raise InvalidImage(f"{what}: the name {name[:100]!r} is too long")
        if part.startswith(".wh."):
            raise InvalidImage(
                f"{what}: {name[:100]!r} deletes a file of an earlier layer; "
                "build the image without deleting files"
            )
    return "/".join(parts)


def _make_folder(target: Path, path: str, folders: set[Path], what: str) -> None:
    folder = target
    for part in path.split("/"):
        folder /= part
        if folder in folders:
            continue
        try:
            folder.mkdir()
            # The scoring process runs as another user, whatever the umask here.
            folder.chmod(0o755)
        except FileExistsError:
            if not folder.is_dir():
                raise InvalidImage(f"{what}: {path!r} is a file and a folder") from None
        folders.add(folder)


def _write_file(target: Path, path: str, contents: Iterator[bytes], what: str) -> StoredFile:
    if target.is_dir():
        raise InvalidImage(f"{what}: {path!r} is a folder and a file, or ends without a name")
    target.unlink(missing_ok=True)
    digest = hashlib.sha256()
    size = 0
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    with open(descriptor, "wb") as file:
        for chunk in contents:
            digest.update(chunk)
            size += len(chunk)
            file.write(chunk)
        file.flush()
        os.fchmod(descriptor, 0o444)
        os.fsync(descriptor)
    return StoredFile(path, size, digest.hexdigest())


class _Hashed(io.RawIOBase):
    """Hashes and counts what is read through it; refuses to give more than `most` bytes."""

    def __init__(
        self, source: BinaryIO | gzip.GzipFile | io.BufferedReader, most: int | None, what: str
    ) -> None:
        self._source = source
        self._most = most
        self._what = what
        self._hash = hashlib.sha256()
        self._ahead = b""
        self.count = 0

    def peek(self, size: int) -> bytes:
        self._ahead = self._source.read(size) or b""
        return self._ahead

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self._ahead or self._source.read(len(buffer)) or b""
        data, self._ahead = data[: len(buffer)], data[len(buffer) :] if self._ahead else b""
        self._hash.update(data)
        self.count += len(data)
        if self._most is not None and self.count > self._most:
            raise InvalidImage(
                f"{self._what}: expands to more than {self._most} bytes; "
                "use a smaller model or a larger limit"
            )
        buffer[: len(data)] = data
        return len(data)

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"
