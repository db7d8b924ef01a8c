"""A manifest that is not in the desired document itself, or that is there with its signature.

{"manifest": {"url", "sha256", "signature", "keyId"}} refers to a file; with "body" (a text, or a
list of texts to be joined) in place of "url" and "sha256" the manifest is in the document. The
signature is over the exact bytes of the manifest: readers disagree about repeated keys in JSON.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Collection
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

import msgspec

from .document import (
    MAX_DOCUMENT_BYTES,
    UNPARSABLE,
    ManifestError,
    Node,
    decoded,
    parse_json,
    shown,
)

FORBIDDEN = 403
"""Not signed, or not by a key that this device trusts."""

OLDER = 409
"""Authentic, and older than what this device accepted before."""

MAX_URL = 2048
MAX_GENERATION = 2**53 - 1
SIGNED = "signed"
"""The member of a signed manifest that holds its generation: {"signed": {"generation": 7}}."""

_WRAPPERS = ("content", "deployment")
_SHA256 = re.compile(r"(?:sha256:)?([0-9a-f]{64})")


class ManifestReference(msgspec.Struct, frozen=True):
    """`url` is "" and `body` the manifest where it came along. `sha256` is hexadecimal."""

    url: str
    sha256: str
    body: bytes = b""
    signature: str = ""
    key_id: str = ""

    @property
    def place(self) -> str:
        """The URL for people: without the query, which may hold a password."""
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))


def find_reference(document: bytes, http_hosts: Collection[str] = ()) -> ManifestReference | None:
    """The reference that a desired document holds; None when it holds anything else.

    `http_hosts` are HOST[:PORT] that plain HTTP is permitted to. Raises ManifestError 400.
    """
    if b'"manifest"' not in document:
        return None
    try:
        node = Node(parse_json(decoded(document), ""))
    except ManifestError:
        return None  # whoever reads the manifest says what is wrong with it
    while isinstance(node.value, dict) and "manifest" not in node.value:
        key = next((name for name in _WRAPPERS if name in node.value), None)
        if key is None:
            return None
        node = node.members()[key]
    if not isinstance(node.value, dict) or {"schemaVersion", "systemModules"} & set(node.value):
        return None
    node.fields(("manifest",), extra=r"\$(version|metadata)")
    return _reference(node.members()["manifest"], http_hosts)


def _reference(node: Node, http_hosts: Collection[str]) -> ManifestReference:
    members = node.members()
    if "body" in members:
        fields = node.fields(("body",), ("signature", "keyId"))
        value = fields["body"].value
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str) for part in parts):
            raise fields["body"].expected("the manifest as text, or a list of texts")
        body = "".join(parts).encode()
        url, sha256 = "", hashlib.sha256(body).hexdigest()
    else:
        fields = node.fields(("url", "sha256"), ("signature", "keyId"))
        body, url = b"", fields["url"].word()
        check_url(fields["url"], url, http_hosts)
        match = _SHA256.fullmatch(fields["sha256"].word())
        if match is None:
            raise fields["sha256"].expected("64 lower-case hexadecimal digits")
        sha256 = match[1]
    signature, key_id = fields.get("signature"), fields.get("keyId")
    return ManifestReference(
        url,
        sha256,
        body,
        "" if signature is None or signature.value is None else signature.text(),
        "" if key_id is None or key_id.value is None else key_id.text(),
    )


def check_url(node: Node, url: str, http_hosts: Collection[str]) -> None:
    """Raises ManifestError 400 unless a manifest may be fetched from `url`."""
    if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
        raise node.fail(f"expected a URL of up to {MAX_URL} printable ASCII characters")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise node.fail(f"not a URL: {error}") from None
    if parts.scheme not in ("https", "http") or not host:
        raise node.fail(f"expected https://HOST/PATH, found {shown(parts.scheme or url[:40])}")
    if parts.username is not None or parts.password is not None:
        raise node.fail("a URL with a login in it ends up in logs; use one that needs none")
    allowed = {host, parts.netloc} if port is None else {parts.netloc}
    if parts.scheme == "http" and not is_loopback(host) and not allowed & set(http_hosts):
        raise node.fail(
            f"plain HTTP from {parts.netloc}: use https, or permit it on the device with "
            "deployment.manifest-http-hosts"
        )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Verifier(Protocol):
    """A public key: see modules/signing.py."""

    def verifies(self, signature: str, data: bytes) -> bool: ...


def check_key_id(reference: ManifestReference, trusted: Collection[str]) -> None:
    """What can be said before the manifest is here. Raises ManifestError 403."""
    names = ", ".join(sorted(trusted)) or "none"
    if not reference.signature:
        raise ManifestError(
            FORBIDDEN,
            "manifest.signature",
            "missing; this device takes signed manifests only: `gatelet manifest sign`",
        )
    if reference.key_id and reference.key_id not in trusted:
        raise ManifestError(
            FORBIDDEN,
            "manifest.keyId",
            f"the key {shown(reference.key_id)} is not trusted here; trusted are: {names}",
        )


def signed_generation(body: bytes) -> int:
    """The generation in a manifest whose signature was verified. Raises ManifestError."""
    document = Node(parse_json(decoded(body), ""))
    signed = document.members().get(SIGNED)
    if signed is None:
        raise ManifestError(
            FORBIDDEN,
            SIGNED,
            'missing; a signed manifest says {"signed": {"generation": n}}, so that an older one '
            "cannot be played back: `gatelet manifest sign --generation n`",
        )
    return signed.fields(("generation",))["generation"].integer(0, MAX_GENERATION)


def check_hash(body: bytes, reference: ManifestReference) -> None:
    """Before anything reads `body`. Raises ManifestError 400."""
    actual = hashlib.sha256(body).hexdigest()
    if actual != reference.sha256:
        raise ManifestError(
            UNPARSABLE,
            "manifest.sha256",
            f"what {reference.place} gives has sha256 {actual}, not {reference.sha256}",
        )


def too_large(place: str) -> str:
    return f"{place}: larger than {MAX_DOCUMENT_BYTES:,} bytes"
