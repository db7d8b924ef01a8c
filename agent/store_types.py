"""What the state store keeps."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from .plan_types import Kind


class StoreError(Exception):
    """The state database cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The last document of a source and what became of it (edgeAgent's status codes)."""

    source: str
    version: int
    sha256: str
    code: int
    description: str


@dataclass(frozen=True, slots=True)
class Deployment:
    """One accepted manifest.

    `phase`: "applying" (steps are being taken), "probation" (all modules ready, being watched),
    "good" (stayed healthy), "failed" (will not be tried again), "superseded" (a newer one came).
    """

    generation: int
    source: str
    version: int
    body: bytes
    phase: str
    description: str
    received: str


@dataclass(frozen=True, slots=True)
class Proof:
    """Something signed that was accepted: its hash, the key's fingerprint, its generation.

    `scope` is "manifest" or "image:<registry>/<repository>"; `good` tells of an image that it was
    part of a good deployment.
    """

    scope: str
    sha256: str
    key: str
    generation: int
    good: bool = False


@dataclass(frozen=True, slots=True)
class Pending:
    """A desired document that refers to a manifest which is not here yet."""

    source: str
    version: int
    document: bytes


@dataclass(frozen=True, slots=True)
class Pin:
    """What a module's image name was resolved to. `kind`: "model", "container" or "scoring";
    `model`: the one that the label of a scoring image names, "" where it names none."""

    digest: str
    kind: Kind = "model"
    model: str = ""


@dataclass(frozen=True, slots=True)
class KnownImage:
    """An image that gatelet brought here. `place` is "store" or "engine"; `idle` are the seconds
    for which nothing needed it, counted while the agent runs."""

    digest: str
    place: str
    name: str
    idle: float = 0.0


def document_hash(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
