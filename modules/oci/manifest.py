"""The documents of an OCI image: index, manifest, config and gatelet's labels in it.

Sources: OCI image-spec v1.1 (manifest, image index, config), Docker image manifest v2 schema 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from ...accelerators.backend import Variant
from ..errors import InvalidImage, InvalidModel, NotAModelImage
from ..model_json import read_json
from .reference import is_digest

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TAR_TYPE = "application/vnd.oci.image.layer.v1.tar"
LAYER_GZIP_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
DOCKER_MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX_TYPE = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFEST_TYPES = (MANIFEST_TYPE, DOCKER_MANIFEST_TYPE, INDEX_TYPE, DOCKER_INDEX_TYPE)

MODEL_LABEL = "io.gatelet.model"
"""`name:version` of the model an image carries; an image without it is an ordinary container."""
VARIANTS_LABEL = "io.gatelet.variants"
"""JSON array of `{kind, path, board?, part?, layer}`, `layer` being an index into the manifest.

A label, not an annotation: `docker push` drops annotations and changes layer digests, while labels
and the order of layers stay."""

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_CONFIG_BYTES = 4 * 1024 * 1024
MAX_LAYERS = 512
_MAX_DEPTH = 32


class Platform(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Names a blob: its type, `sha256:` digest and size in bytes."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] | None = None
    platform: Platform | None = None


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """One image. `layers` apply from first to last."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    media_type: str = MANIFEST_TYPE
    schema_version: int = 2


class Index(msgspec.Struct, frozen=True, rename="camel"):
    """Several images under one name, one per platform."""

    manifests: tuple[Descriptor, ...]
    media_type: str = INDEX_TYPE
    schema_version: int = 2


class RootFs(msgspec.Struct, frozen=True):
    """`diff_ids`: digests of the uncompressed layers, in the manifest's order."""

    diff_ids: tuple[str, ...] = ()
    type: str = "layers"


class _Process(msgspec.Struct, frozen=True):
    labels: Mapping[str, str] | None = msgspec.field(default=None, name="Labels")


class ImageConfig(msgspec.Struct, frozen=True):
    architecture: str
    os: str
    rootfs: RootFs
    config: _Process | None = None
    created: str | None = None

    @property
    def labels(self) -> Mapping[str, str]:
        return (self.config and self.config.labels) or {}


class VariantLayer(msgspec.Struct, frozen=True, omit_defaults=True):
    """An entry of `io.gatelet.variants`: a variant and the index of the layer that holds it."""

    kind: str
    path: str
    layer: int
    board: str | None = None
    part: str | None = None

    @property
    def variant(self) -> Variant:
        return Variant(self.kind, self.path, self.board, self.part)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def image_config(
    architecture: str, diff_ids: Sequence[str], labels: Mapping[str, str]
) -> ImageConfig:
    """A config with a fixed date, so that equal content has an equal digest."""
    return ImageConfig(
        architecture,
        "linux",
        RootFs(tuple(diff_ids)),
        _Process(dict(sorted(labels.items()))),
        "1970-01-01T00:00:00Z",
    )


def encode_json(document: msgspec.Struct) -> bytes:
    """Compact JSON in field order: the same bytes for the same document."""
    return msgspec.json.encode(document)


_T = TypeVar("_T", bound=msgspec.Struct)


def _read(raw: bytes, what: str, limit: int) -> Any:
    try:
        return read_json(raw, what, limit, _MAX_DEPTH)
    except InvalidModel as error:
        raise InvalidImage(str(error)) from None


def _convert(document: Any, what: str, kind: type[_T]) -> _T:
    try:
        return msgspec.convert(document, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidImage(f"{what}: {error}; build and push the image again") from None


def parse_manifest(raw: bytes, what: str) -> Manifest | Index:
    """A manifest or index of OCI or Docker. `what` names it in errors. Raises InvalidImage."""
    document = _read(raw, what, MAX_MANIFEST_BYTES)
    header = _convert(document, what, _Header)
    if header.schema_version != 2:
        raise InvalidImage(
            f"{what}: schemaVersion {header.schema_version}, expected 2; push the image again "
            "with a current tool"
        )
    if header.media_type in (INDEX_TYPE, DOCKER_INDEX_TYPE) or "manifests" in document:
        index = _convert(document, what, Index)
        _check_descriptors(what, index.manifests)
        return index
    manifest = _convert(document, what, Manifest)
    _check_descriptors(what, (manifest.config, *manifest.layers))
    if len(manifest.layers) > MAX_LAYERS:
        raise InvalidImage(f"{what}: {len(manifest.layers)} layers, expected {MAX_LAYERS} at most")
    return manifest


class _Header(msgspec.Struct, frozen=True, rename="camel"):
    schema_version: int = 0
    media_type: str = ""


def _check_descriptors(what: str, descriptors: Sequence[Descriptor]) -> None:
    for descriptor in descriptors:
        # The digest becomes a file name: nothing but the exact form may pass.
        if not is_digest(descriptor.digest):
            raise InvalidImage(f"{what}: digest {descriptor.digest[:80]!r}, expected sha256")
        if not 0 <= descriptor.size < 2**53:
            raise InvalidImage(f"{what}: size {descriptor.size} of {descriptor.digest}")


def parse_config(raw: bytes, what: str, layers: int) -> ImageConfig:
    """The config of an image with `layers` layers. Raises InvalidImage."""
    config = _convert(_read(raw, what, MAX_CONFIG_BYTES), what, ImageConfig)
    diff_ids = config.rootfs.diff_ids
    if len(diff_ids) != layers or not all(map(is_digest, diff_ids)):
        raise InvalidImage(f"{what}: {len(diff_ids)} rootfs.diff_ids for {layers} layers")
    return config


def model_variants(config: ImageConfig, what: str, layers: int) -> tuple[VariantLayer, ...] | None:
    """Which layer holds which variant; None when the image does not say (built by Dockerfile).

    Raises NotAModelImage, or InvalidImage when the label is malformed.
    """
    if MODEL_LABEL not in config.labels:
        raise NotAModelImage(
            f"{what}: has no label {MODEL_LABEL}: it carries no model; "
            "run it as a container, or build it with 'gatelet image build'"
        )
    label = config.labels.get(VARIANTS_LABEL)
    if label is None:
        return None
    where = f"{what}: label {VARIANTS_LABEL}"
    try:
        entries = msgspec.convert(
            read_json(label.encode(), where, MAX_CONFIG_BYTES, _MAX_DEPTH),
            type=tuple[VariantLayer, ...],
        )
    except (InvalidModel, msgspec.ValidationError) as error:
        raise InvalidImage(f"{where}: {error}; build the image again") from None
    for entry in entries:
        if not 0 <= entry.layer < layers:
            raise InvalidImage(f"{where}: layer {entry.layer} of {layers}; build the image again")
    return entries


def choose_platform(index: Index, architecture: str, what: str) -> Descriptor:
    """The image for this architecture ("arm64"), or else the first for Linux: models are data.

    Raises InvalidImage.
    """
    images = [
        entry
        for entry in index.manifests
        if entry.media_type in (MANIFEST_TYPE, DOCKER_MANIFEST_TYPE)
        and (entry.platform is None or entry.platform.os in ("", "linux"))
    ]
    if not images:
        raise InvalidImage(f"{what}: no image for linux in this index; push one")
    own = [
        entry for entry in images if entry.platform and entry.platform.architecture == architecture
    ]
    return (own or images)[0]
