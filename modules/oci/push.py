"""Send an image at rest to a registry, unchanged: its digest stays what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .client import RegistryClient
from .layout import ImageLayout
from .manifest import MANIFEST_TYPE, MAX_MANIFEST_BYTES
from .reference import ImageRef


@dataclass(frozen=True, slots=True)
class PushProgress:
    """`sent` and `present` count blobs uploaded and found there; `total` is how many there are."""

    total: int
    sent: int = 0
    present: int = 0


def _ignore(progress: PushProgress) -> None:
    pass


def push_image(
    client: RegistryClient,
    ref: ImageRef,
    image: ImageLayout,
    *,
    progress: Callable[[PushProgress], None] = _ignore,
    mount_from: str | None = None,
) -> ImageRef:
    """Push blobs, then the manifest, under the tag of `ref`; gives `ref` with the digest.

    Of a layout with an index, the image for amd64 or the only one is pushed. Raises ImageError.
    """
    blobs = {blob.digest: blob for blob in (image.manifest.config, *image.manifest.layers)}
    sent = 0
    progress(PushProgress(len(blobs)))
    for done, blob in enumerate(blobs.values(), 1):
        sent += client.push_blob(
            ref.repository, blob, partial(image.open_blob, blob.digest), mount_from
        )
        progress(PushProgress(len(blobs), sent, done - sent))
    raw = image.read(image.image, MAX_MANIFEST_BYTES)
    digest = client.put_manifest(
        ref.repository, ref.tag or image.image.digest, image.image.media_type or MANIFEST_TYPE, raw
    )
    return ref.pinned(digest)
