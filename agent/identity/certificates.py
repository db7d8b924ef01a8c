"""Client certificates in files: whether they are usable, until when, and whether they changed."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from pathlib import Path

from .sources import CertificateFiles, IdentityError

EXPIRY_WARNING = timedelta(days=30)
_END = "-----END CERTIFICATE-----"
_SEQUENCE, _VERSION, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0xA0, 0x17, 0x18

Stamp = tuple[tuple[int, int, int], ...]
"""Inode, time of change (ns) and size of each file; zeros for a missing one."""


def stamp(paths: Iterable[Path]) -> Stamp:
    """What differs when a file was replaced or written."""
    return tuple(_stamp(path) for path in paths)


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def passphrase(files: CertificateFiles) -> str:
    """Empty without one: OpenSSL then fails instead of asking on a terminal.

    Raises IdentityError.
    """
    if files.passphrase is None:
        return ""
    try:
        return files.passphrase.read_text(encoding="utf-8").split("\n", 1)[0]
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityError(
            f"cannot read the pass phrase in {files.passphrase}: {error}"
        ) from error


def check(files: CertificateFiles) -> datetime:
    """Load certificate and key as TLS will; the end of the certificate. Raises IdentityError."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(files.certificate, files.key, passphrase(files))
        return not_after(files.certificate.read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        raise IdentityError(
            f"the certificate {files.certificate} with the key {files.key} cannot be used: {error}"
        ) from error


def expiry_warning(files: CertificateFiles, end: datetime, now: datetime) -> str | None:
    """What to tell people about a certificate that ends soon, or has ended."""
    if end <= now:
        return (
            f"the certificate {files.certificate} expired on {end:%Y-%m-%d %H:%M} UTC: replace it"
        )
    if end - now < EXPIRY_WARNING:
        days = (end - now).days
        return (
            f"the certificate {files.certificate} expires on {end:%Y-%m-%d %H:%M} UTC "
            f"(in {days} days): renew it"
        )
    return None


def not_after(pem: str) -> datetime:
    """The end of the first certificate's validity (RFC 5280, 4.1.2.5), which the ssl module tells
    of a peer's certificate only. Raises ValueError.
    """
    start, end = pem.find("-----BEGIN CERTIFICATE-----"), pem.find(_END)
    if start < 0 or end < 0:
        raise ValueError("there is no PEM certificate in it")
    der = ssl.PEM_cert_to_DER_cert(pem[start : end + len(_END)])
    try:
        body = _members(_members(der)[0][1])[0][1]
        fields = _members(body)
        # version [0] (absent in v1), serial number, signature, issuer, validity
        validity = fields[4 if fields[0][0] == _VERSION else 3][1]
        tag, text = _members(validity)[1]
    except IndexError as error:
        raise ValueError("the certificate is not one of X.509") from error
    if tag == _UTC_TIME:
        century = "20" if int(text[:2]) < 50 else "19"
        text = century.encode() + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("the certificate's validity is not a time")
    return datetime.strptime(text.decode("ascii"), "%Y%m%d%H%M%SZ").replace(tzinfo=timezone.utc)


def _members(der: bytes) -> list[tuple[int, bytes]]:
    """Tag and content of each element in a row (X.690; one-byte tags, definite lengths)."""
    members: list[tuple[int, bytes]] = []
    at = 0
    while at < len(der):
        tag, length = der[at], der[at + 1]
        at += 2
        if length & 0x80:
            octets = length & 0x7F
            length, at = int.from_bytes(der[at : at + octets], "big"), at + octets
        if at + length > len(der):
            raise ValueError("the certificate is cut short")
        members.append((tag, der[at : at + length]))
        at += length
    return members
