"""Keys and signatures in cosign's format: ECDSA on P-256 with SHA-256, base64 of the DER form.

What is signed is always the exact bytes: readers of JSON disagree about repeated keys.
`cryptography` is imported when a key is read, since most devices and commands need none.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )

MAX_KEY_BYTES = 64 * 1024
MAX_SIGNATURE_CHARACTERS = 512


class KeyUnusable(Exception):
    """A key file is not what it should be; the message names it and the remedy."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """`fingerprint` is the SHA-256 (hex) of the key itself (DER), whatever file it came from."""

    fingerprint: str
    _key: EllipticCurvePublicKey

    def verifies(self, signature: str, data: bytes) -> bool:
        """Whether `signature` (base64) over `data` was made with the private half of this key."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

        if len(signature) > MAX_SIGNATURE_CHARACTERS:
            return False
        try:
            raw = base64.b64decode(signature, validate=True)
            # Python takes more padding than there is to fill: one signature has one spelling here.
            if base64.b64encode(raw).decode() != signature:
                return False
            self._key.verify(raw, data, ECDSA(hashes.SHA256()))
        except (binascii.Error, ValueError, InvalidSignature):
            return False
        return True


@dataclass(frozen=True, slots=True)
class PrivateKey:
    _key: EllipticCurvePrivateKey

    def sign(self, data: bytes) -> str:
        """The signature over `data`, as base64."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

        return base64.b64encode(self._key.sign(data, ECDSA(hashes.SHA256()))).decode()

    @property
    def public(self) -> PublicKey:
        return _public(self._key.public_key())


def read_public_key(pem: bytes, where: str) -> PublicKey:
    """The P-256 key in a PEM file such as cosign.pub. Raises KeyUnusable."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if b"PRIVATE KEY" in pem:
        raise KeyUnusable(f"{where}: holds a private key; a device needs the public one only")
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyUnusable(
            f"{where}: not a public key in PEM form ({error}); make one with "
            "`openssl ec -in cosign.key -pubout`"
        ) from None
    return _public(_on_p256(key, where))


def read_private_key(pem: bytes, password: bytes | None, where: str) -> PrivateKey:
    """The P-256 key in a PEM file, plain or encrypted (PKCS#8), cosign's own form too.

    Raises KeyUnusable.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    from .cosign_key import is_cosign_key, opened

    try:
        if is_cosign_key(pem):
            from cryptography.hazmat.primitives.serialization import load_der_private_key

            if password is None:
                raise KeyUnusable(f"{where}: the key is encrypted; its password is needed")
            key = load_der_private_key(opened(pem, password), None)
        else:
            key = load_pem_private_key(pem, password)
    except TypeError as error:  # encrypted and no password, or the other way round
        raise KeyUnusable(f"{where}: {str(error).lower()}") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyUnusable(
            f"{where}: cannot be opened ({error}); wrong password, or not a private key in PEM "
            "form: make one with `openssl ecparam -name prime256v1 -genkey -noout`"
        ) from None
    _on_p256(key.public_key(), where)
    return PrivateKey(key)  # type: ignore[arg-type]


def _on_p256(key: object, where: str) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey

    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise KeyUnusable(f"{where}: expected an ECDSA key on P-256, as cosign makes them")
    return key


def _public(key: EllipticCurvePublicKey) -> PublicKey:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return PublicKey(hashlib.sha256(der).hexdigest(), key)
