"""Image signatures in cosign's key format, kept in the registry under the tag `sha256-<hex>.sig`.

The image of that tag has one layer for each signature: a JSON payload that names the digest of the
signed image, with the signature over its bytes as an annotation of the layer.
Source: sigstore/cosign `specs/SIGNATURE_SPEC.md`; the payload is Red Hat's "simple signing".
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from msgspec import structs

from ..errors import (
    ImageNotFound,
    InvalidImage,
    InvalidModel,
    Unsigned,
    Untrusted,
)
from ..model_json import read_json
from ..signing import PrivateKey, PublicKey
from .client import RegistryClient
from .manifest import (
    CONFIG_TYPE,
    MANIFEST_TYPE,
    Descriptor,
    Manifest,
    digest_of,
    encode_json,
    image_config,
    parse_manifest,
)
from .reference import ImageRef

PAYLOAD_TYPE = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE = "dev.cosignproject.cosign/signature"
PAYLOAD_KIND = "cosign container image signature"
GENERATION = "io.gatelet.generation"
"""Annotation of a signature (`cosign sign -a`): a number that grows; devices refuse older ones."""

MAX_SIGNATURES = 32
MAX_PAYLOAD_BYTES = 64 * 1024
MAX_GENERATION = 2**53 - 1
_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Signature:
    """A payload and the base64 signature over its exact bytes."""

    payload: bytes
    signature: str


@dataclass(frozen=True, slots=True)
class Signer:
    """Who signed: the name and fingerprint of the key, and the generation (0 when none is said)."""

    name: str
    fingerprint: str
    generation: int


def signature_tag(digest: str) -> str:
    return digest.replace(":", "-") + ".sig"


def signed_payload(ref: ImageRef, digest: str, annotations: Mapping[str, str]) -> bytes:
    """What is signed for the image `digest`, as cosign writes it."""
    document = {
        "critical": {
            "identity": {"docker-reference": f"{ref.registry}/{ref.repository}"},
            "image": {"docker-manifest-digest": digest},
            "type": PAYLOAD_KIND,
        },
        "optional": dict(sorted(annotations.items())) or None,
    }
    return json.dumps(document, separators=(",", ":")).encode()


def trusted_signer(
    digest: str, signatures: Iterable[Signature], keys: Mapping[str, PublicKey], what: str
) -> Signer:
    """Which of `keys` signed the image `digest`; with several, the highest generation.

    Raises Unsigned when there is no signature at all, Untrusted when none of them counts: made
    with other keys, changed, or for another image.
    """
    found: list[Signer] = []
    others: list[str] = []
    for one in signatures:
        name = next(
            (n for n, key in keys.items() if key.verifies(one.signature, one.payload)), None
        )
        if name is None:
            others.append("made with a key that is not trusted here, or changed afterwards")
            continue
        try:
            found.append(Signer(name, keys[name].fingerprint, _check_payload(one.payload, digest)))
        except InvalidModel as error:
            others.append(f"of key {name}: {error}")
    if found:
        return max(found, key=lambda signer: signer.generation)
    trusted = ", ".join(sorted(keys)) or "none"
    if not others:
        raise Unsigned(
            f"{what}: is not signed; sign it with `gatelet image sign` or cosign and one of the "
            f"keys that this device trusts ({trusted})"
        )
    reasons = "; ".join(sorted(set(others), reverse=True)[:3])  # those of trusted keys first
    raise Untrusted(
        f"{what}: no trusted signature among {len(others)}: {reasons}; keys trusted: {trusted}"
    )


def _check_payload(payload: bytes, digest: str) -> int:
    """The generation in a payload that was signed by a trusted key. Raises InvalidModel."""
    document = read_json(payload, "payload", MAX_PAYLOAD_BYTES, _DEPTH)
    critical = _object(_object(document).get("critical"))
    named = _object(critical.get("image")).get("docker-manifest-digest")
    if critical.get("type") != PAYLOAD_KIND:
        raise InvalidModel(f"not a signature of an image but of {str(critical.get('type'))[:64]!r}")
    if named != digest:
        raise InvalidModel(f"it is for another image ({str(named)[:80]})")
    text = _object(document.get("optional")).get(GENERATION)
    if text is None:
        return 0
    if not isinstance(text, (str, int)) or not str(text).isdecimal() or len(str(text)) > 16:
        raise InvalidModel(f"{GENERATION} is not a number but {str(text)[:32]!r}")
    return min(int(text), MAX_GENERATION)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def fetch_signatures(client: RegistryClient, ref: ImageRef, digest: str) -> list[Signature]:
    """All signatures of the image, verified or not; none when there is no signature image.

    Raises ImageError other than ImageNotFound.
    """
    manifest = _signature_image(client, ref, digest)
    signatures = []
    for layer in () if manifest is None else manifest.layers[:MAX_SIGNATURES]:
        signature = (layer.annotations or {}).get(SIGNATURE)
        if layer.media_type == PAYLOAD_TYPE and signature is not None:
            payload = client.read_blob(ref.repository, layer, MAX_PAYLOAD_BYTES)
            signatures.append(Signature(payload, signature))
    return signatures


def sign_image(
    client: RegistryClient,
    ref: ImageRef,
    digest: str,
    key: PrivateKey,
    annotations: Mapping[str, str],
) -> str:
    """Add a signature of the image `digest` to those the registry has; gives the tag.

    Signing again with the same key and annotations replaces that signature. Raises ImageError.
    """
    payload = signed_payload(ref, digest, annotations)
    blob = Descriptor(PAYLOAD_TYPE, digest_of(payload), len(payload))
    before = _signature_image(client, ref, digest)
    layers = () if before is None else before.layers
    kept = tuple(
        layer
        for layer in layers
        if layer.digest != blob.digest
        or not key.public.verifies((layer.annotations or {}).get(SIGNATURE, ""), payload)
    )
    if len(kept) >= MAX_SIGNATURES:
        raise InvalidImage(f"{ref}: has {len(kept)} signatures; devices read {MAX_SIGNATURES}")
    signed = (*kept, structs.replace(blob, annotations={SIGNATURE: key.sign(payload)}))
    config = encode_json(image_config("", [layer.digest for layer in signed], {}))
    described = Descriptor(CONFIG_TYPE, digest_of(config), len(config))
    client.push_blob(ref.repository, blob, partial(io.BytesIO, payload))
    client.push_blob(ref.repository, described, partial(io.BytesIO, config))
    raw = encode_json(Manifest(described, signed))
    tag = signature_tag(digest)
    client.put_manifest(ref.repository, tag, MANIFEST_TYPE, raw)
    return tag


def _signature_image(client: RegistryClient, ref: ImageRef, digest: str) -> Manifest | None:
    tag = signature_tag(digest)
    try:
        raw = client.get_manifest(ref.repository, tag).raw
    except ImageNotFound:
        return None
    manifest = parse_manifest(raw, f"{ref.registry}/{ref.repository}:{tag}")
    if not isinstance(manifest, Manifest):
        raise InvalidImage(f"{ref}: {tag} is an index; expected an image of signatures")
    return manifest
