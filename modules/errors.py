"""What can go wrong with a model image, and whether trying again can help."""

from __future__ import annotations


class ImageError(Exception):
    """Base of all image errors; the message says what happened, where, and what to do.

    `retryable` is True when the same call may succeed later (network, registry, disk space).
    """

    retryable = False


class InvalidReference(ImageError):
    """The image name cannot be parsed."""


class RegistryUnavailable(ImageError):
    """No answer, or a 5xx or 429 answer, from the registry."""

    retryable = True


class ImageNotFound(ImageError):
    """The registry has no such repository, tag or digest (it may be pushed later)."""

    retryable = True


class Unauthorized(ImageError):
    """The registry refuses these credentials."""

    retryable = True


class DigestMismatch(ImageError):
    """Bytes do not hash to the digest that names them; nothing of them was kept."""

    retryable = True


class InvalidImage(ImageError):
    """The image, one of its layers or its model.json breaks a rule; a new image is needed."""


class InvalidModel(InvalidImage):
    """model.json or its sample breaks a rule; the message has the JSON path."""


class NotAModelImage(InvalidImage):
    """The image carries no model (label `io.gatelet.model` is missing)."""


class NoSuitableVariant(InvalidImage):
    """No variant of the model can run on this device."""


class PullCancelled(ImageError):
    """The caller stopped a pull; what was downloaded stays and a later pull continues from it."""

    retryable = True


class StorageFailed(ImageError):
    """The disk refused a read or a write."""

    retryable = True


class StorageFull(StorageFailed):
    """The disk has no room for the image."""


class Unsigned(ImageError):
    """The policy wants a signature and the registry has none (it may be signed later)."""

    retryable = True


class Untrusted(ImageError):
    """There are signatures, and none that this device may trust for this image."""


class OlderGeneration(Untrusted):
    """The image is authentic but older than one that this device accepted before."""
