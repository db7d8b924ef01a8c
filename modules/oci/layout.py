"""An image at rest: an OCI image layout in a folder or in a tar file of one.

Source: OCI image-spec v1.1, "Image Layout". `docker load` of recent engines, skopeo and podman
read it.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import DigestMismatch, InvalidImage
from .manifest import (
    INDEX_TYPE,
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    choose_platform,
    encode_json,
    parse_config,
    parse_manifest,
)
from .tar import END, directory_header, file_header, padding, read_tar

LAYOUT_FILE = "oci-layout"
_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
_CHUNK = 1024 * 1024
_MAX_ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class _Extent:
    path: Path
    offset: int
    size: int


class ImageLayout:
    """Reads the one image of a layout. Open with `open_layout`."""

    def __init__(self, source: Path, files: dict[str, _Extent]) -> None:
        self.source = source
        self._files = files
        index = parse_manifest(self._read("index.json", MAX_MANIFEST_BYTES), f"{source} index.json")
        if not isinstance(index, Index) or not index.manifests:
            raise InvalidImage(f"{source}: index.json names no image; build it again")
        if len(index.manifests) > 1:
            raise InvalidImage(f"{source}: holds {len(index.manifests)} images, expected one")
        self.top = index.manifests[0]
        self.image = self.top
        document = self._document(self.top)
        if isinstance(document, Index):
            self.image = choose_platform(document, "amd64", str(source))
            document = self._document(self.image)
        if not isinstance(document, Manifest):
            raise InvalidImage(f"{source}: an index inside an index; expected an image")
        self.manifest = document
        self.config: ImageConfig = parse_config(
            self.read(document.config, MAX_CONFIG_BYTES),
            f"{source} config",
            len(document.layers),
        )

    def _document(self, descriptor: Descriptor) -> Manifest | Index:
        raw = self.read(descriptor, MAX_MANIFEST_BYTES)
        return parse_manifest(raw, f"{self.source} {descriptor.digest}")

    @property
    def digest(self) -> str:
        """Of the image itself (inside an index, when the layout has one)."""
        return self.image.digest

    def read(self, descriptor: Descriptor, limit: int) -> bytes:
        """A small blob, verified. Raises InvalidImage, DigestMismatch."""
        raw = self._read(_blob_name(descriptor.digest), limit)
        if f"sha256:{hashlib.sha256(raw).hexdigest()}" != descriptor.digest:
            raise DigestMismatch(
                f"{self.source}: {descriptor.digest} is damaged; build the image again"
            )
        return raw

    def open_blob(self, digest: str) -> BinaryIO:
        """A blob as a file of its own, from its start. Raises InvalidImage."""
        extent = self._extent(_blob_name(digest))
        file = extent.path.open("rb")
        file.seek(extent.offset)
        return io.BufferedReader(_Window(file, extent.size), _CHUNK)

    def _read(self, name: str, limit: int) -> bytes:
        extent = self._extent(name)
        if extent.size > limit:
            raise InvalidImage(f"{self.source}: {name} is larger than {limit} bytes")
        with extent.path.open("rb") as file:
            file.seek(extent.offset)
            return file.read(extent.size)

    def _extent(self, name: str) -> _Extent:
        try:
            return self._files[name]
        except KeyError:
            raise InvalidImage(
                f"{self.source}: has no {name}: not a complete OCI image layout; "
                "make one with 'gatelet image build DIR -o FILE.tar'"
            ) from None


class _Window(io.RawIOBase):
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_layout(path: Path) -> ImageLayout:
    """The image in folder or tar file `path`. Raises InvalidImage, DigestMismatch."""
    try:
        if path.is_dir():
            found = {
                file.relative_to(path).as_posix(): _Extent(file, 0, file.stat().st_size)
                for file in (path / "index.json", *(path / "blobs" / "sha256").glob("*"))
                if file.is_file()
            }
            return ImageLayout(path, found)
        with path.open("rb") as file:
            found = {}
            for entry, _ in read_tar(file, str(path), _MAX_ENTRIES):
                if entry.kind == "file":
                    name = entry.name.removeprefix("./")
                    found[name] = _Extent(path, file.tell(), entry.size)
        return ImageLayout(path, found)
    except OSError as error:
        raise InvalidImage(f"{path} cannot be read: {error.strerror}") from None


def write_index(layout: Path, top: Descriptor) -> None:
    """Make `top` the one image of the layout folder."""
    (layout / LAYOUT_FILE).write_bytes(_LAYOUT)
    index = Index((Descriptor(top.media_type, top.digest, top.size),), INDEX_TYPE)
    (layout / "index.json").write_bytes(encode_json(index))


def write_layout_tar(layout: Path, file: BinaryIO) -> None:
    """The image of a layout folder as one reproducible tar file. Raises InvalidImage."""
    image = open_layout(layout)
    if image.image != image.top:
        raise InvalidImage(f"{layout}: holds an index; expected one image")
    digests = {part.digest for part in (image.top, image.manifest.config, *image.manifest.layers)}
    file.write(directory_header("blobs") + directory_header("blobs/sha256"))
    for name in (*sorted(map(_blob_name, digests)), "index.json", LAYOUT_FILE):
        for chunk in _tar_file(layout / name, name):
            file.write(chunk)
    file.write(END)


def _tar_file(path: Path, name: str) -> Iterator[bytes]:
    with path.open("rb") as source:
        size = os.fstat(source.fileno()).st_size
        yield file_header(name, size)
        while chunk := source.read(_CHUNK):
            yield chunk
        yield padding(size)


def _blob_name(digest: str) -> str:
    return f"blobs/sha256/{digest.partition(':')[2]}"
