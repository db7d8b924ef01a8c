"""Images as the content store takes, keeps and gives them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..model_json import Model
from .manifest import Descriptor
from .unpack import StoredFile


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer to unpack: its blob, and the digest of its uncompressed tar."""

    blob: Descriptor
    diff_id: str


@dataclass(frozen=True, slots=True)
class ImageContents:
    """What `ContentStore.commit` makes an image of. All blobs must be in the store.

    `digest` is what the image is looked up by; `blobs` are the documents that describe it (index,
    manifest, config), kept for verifying it later.
    """

    digest: str
    reference: str
    blobs: tuple[str, ...]
    layers: tuple[Layer, ...]


class ImageRecord(msgspec.Struct, frozen=True):
    """`images/<hex>.json`: what makes an image exist. `folder` is its name below `images/`."""

    digest: str
    reference: str
    folder: str
    blobs: tuple[str, ...]
    layers: tuple[str, ...]
    files: tuple[StoredFile, ...]
    model: Model
    version: int = 1


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A whole, unpacked model image. `model_dir` holds model.json; `model` is what it says.

    `reference` is the name it was pulled by, `blobs` and `layers` the digests it consists of (only
    the layers this device chose); `size` is in bytes, without the blobs.
    """

    digest: str
    reference: str
    model_dir: Path
    model: Model
    blobs: tuple[str, ...]
    layers: tuple[str, ...]
    size: int
