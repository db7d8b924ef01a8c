"""A model folder becomes an OCI image: the same folder gives the same digest everywhere.

Layers are uncompressed by default. Deflate's output depends on the zlib a Python was built with
(zlib, zlib-ng, ...), so compressed layers of one model would have different digests on different
machines; and a device resumes, verifies and unpacks plain tar with less work. `compress=True`
trades that for fewer bytes on slow links.

The architecture of a model image means nothing, since models are data. It defaults to amd64 on
every build machine: the value must not depend on where the image is built, and engines pull a
single-manifest image whatever its architecture.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...accelerators.backend import Variant
from ..errors import InvalidImage, InvalidModel
from ..model_json import MAX_MODEL_BYTES, MODEL_FILE, Model, parse_model
from ..sample_json import load_sample
from .layout import write_index
from .manifest import (
    CONFIG_TYPE,
    LAYER_GZIP_TYPE,
    LAYER_TAR_TYPE,
    MANIFEST_TYPE,
    MODEL_LABEL,
    VARIANTS_LABEL,
    Descriptor,
    Manifest,
    digest_of,
    encode_json,
    image_config,
)
from .tar import END, directory_header, file_header, padding

DEFAULT_ARCHITECTURE = "amd64"
_CHUNK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """An image in the OCI layout folder `layout`; `size` is the sum of its blobs in bytes."""

    model: Model
    digest: str
    manifest: Manifest
    layout: Path
    size: int


def build_model_image(
    model_dir: Path,
    layout: Path,
    *,
    architecture: str = DEFAULT_ARCHITECTURE,
    compress: bool = False,
) -> BuiltImage:
    """Write the image of the model in `model_dir` as an OCI image layout into folder `layout`.

    Only what model.json names goes in: one layer per variant path, then model.json and its sample
    as the last layer. Raises InvalidImage (InvalidModel for model.json and the sample).
    """
    raw, model = _read_model(model_dir)
    parts: list[tuple[str, ...]] = [
        (path,) for path in dict.fromkeys(variant.path for variant in model.variants)
    ]
    # Last, because it tells the version: engines share a layer only when all below it are equal.
    parts.append((MODEL_FILE, *([model.sample] if model.sample else [])))

    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    layers: list[Descriptor] = []
    diff_ids: list[str] = []
    for paths in parts:
        descriptor, diff_id = _write_layer(blobs, model_dir, paths, compress)
        layers.append(descriptor)
        diff_ids.append(diff_id)

    labels = {
        MODEL_LABEL: f"{model.name}:{model.version}",
        VARIANTS_LABEL: _variants_label(model.variants, [part[0] for part in parts]),
        "org.opencontainers.image.title": model.name,
        "org.opencontainers.image.version": model.version,
    }
    config = encode_json(image_config(architecture, diff_ids, labels))
    manifest = Manifest(_write_blob(blobs, config, CONFIG_TYPE), tuple(layers))
    document = encode_json(manifest)
    top = _write_blob(blobs, document, MANIFEST_TYPE)
    write_index(layout, top)
    if (model_dir / MODEL_FILE).read_bytes() != raw:
        raise InvalidImage(f"{model_dir / MODEL_FILE} changed while it was packaged; build again")
    size = sum(part.size for part in (top, manifest.config, *layers))
    return BuiltImage(model, top.digest, manifest, layout, size)


def _read_model(model_dir: Path) -> tuple[bytes, Model]:
    path = model_dir / MODEL_FILE
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_MODEL_BYTES + 1)
    except OSError as error:
        raise InvalidModel(
            f"{path} cannot be read ({error.strerror}): a model folder holds a {MODEL_FILE}"
        ) from None
    try:
        model = parse_model(raw, strict=True)
    except InvalidModel as error:
        raise InvalidModel(f"{model_dir}: {error}") from None
    for index, variant in enumerate(model.variants):
        if not (model_dir / variant.path).exists():
            raise InvalidModel(
                f"{model_dir}: {MODEL_FILE}: $.variants[{index}].path: "
                f"there is no {model_dir / variant.path}"
            )
    load_sample(model_dir, model)
    return raw, model


def _variants_label(variants: Iterable[Variant], firsts: list[str]) -> str:
    entries = []
    for variant in variants:
        entry: dict[str, Any] = {"kind": variant.kind, "path": variant.path}
        if variant.board is not None:
            entry["board"] = variant.board
        if variant.part is not None:
            entry["part"] = variant.part
        entries.append(entry | {"layer": firsts.index(variant.path)})
    return json.dumps(entries, separators=(",", ":"), ensure_ascii=False)


def _write_layer(
    blobs: Path, model_dir: Path, paths: tuple[str, ...], compress: bool
) -> tuple[Descriptor, str]:
    """Write one layer; give its descriptor and the digest of its uncompressed tar."""
    temporary = blobs / f".{os.getpid()}.partial"
    diff = hashlib.sha256()
    try:
        with temporary.open("wb") as file:
            hashed = _Hashing(file)
            sink: Any = (
                gzip.GzipFile("", "wb", compresslevel=6, fileobj=hashed, mtime=0)
                if compress
                else hashed
            )
            for chunk in _layer(model_dir, paths):
                diff.update(chunk)
                sink.write(chunk)
            if compress:
                sink.close()
            size = file.tell()
        digest = f"sha256:{hashed.digest.hexdigest()}"
        temporary.rename(blobs / hashed.digest.hexdigest())
    finally:
        temporary.unlink(missing_ok=True)
    media_type = LAYER_GZIP_TYPE if compress else LAYER_TAR_TYPE
    return Descriptor(media_type, digest, size), f"sha256:{diff.hexdigest()}"


class _Hashing:
    """The part of a file that gzip writes to, hashing what goes by."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _layer(model_dir: Path, paths: tuple[str, ...]) -> Iterator[bytes]:
    folders: set[str] = set()
    for path in sorted(paths):
        for name in _walk(model_dir, path):
            parents = f"model/{name}".split("/")[:-1]
            for depth in range(1, len(parents) + 1):
                folder = "/".join(parents[:depth])
                if folder not in folders:
                    folders.add(folder)
                    yield directory_header(folder)
            yield from _file(model_dir / name, f"model/{name}")
    yield END


def _walk(model_dir: Path, path: str) -> Iterator[str]:
    """Files at or below `path`, in an order that is the same on every file system."""
    full = model_dir / path
    mode = full.lstat().st_mode
    if stat.S_ISREG(mode):
        yield path
    elif stat.S_ISDIR(mode):
        children = sorted(os.listdir(full), key=os.fsencode)
        if not children:
            raise InvalidImage(f"{full} is empty; put the files of the variant there")
        for child in children:
            yield from _walk(model_dir, f"{path}/{child}")
    else:
        raise InvalidImage(f"{full} is a link or a special file; put a copy of the file there")


def _file(path: Path, name: str) -> Iterator[bytes]:
    try:
        name.encode()
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            yield file_header(name, size)
            left = size
            while chunk := file.read(min(_CHUNK, left)):
                left -= len(chunk)
                yield chunk
            if left or file.read(1):
                raise InvalidImage(f"{path} changed while it was packaged; build again")
            yield padding(size)
    except OSError as error:
        raise InvalidImage(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeEncodeError:
        raise InvalidImage(f"{path!r}: the name is not UTF-8; rename it") from None


def _write_blob(blobs: Path, data: bytes, media_type: str) -> Descriptor:
    digest = digest_of(data)
    (blobs / digest.partition(":")[2]).write_bytes(data)
    return Descriptor(media_type, digest, len(data))
