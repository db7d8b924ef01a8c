"""Certificates and sealed data for the modules of one IoT Edge device.

As the workload API of IoT Edge 1.2 and later gives them: RSA-2048 keys, certificates from the
device's own authority below the site's, and authenticated encryption that binds what is sealed to
the module and its generation.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ...agent.clock import Clock
from ..pki import CertificateFiles

COMMON_NAME_LIMIT = 64
_LIFETIME = timedelta(days=30)
_SKEW = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """PEM texts: `chain` begins with the leaf; the key is not encrypted."""

    key: str
    chain: str
    expires: datetime

    def as_json(self) -> dict[str, object]:
        return {
            "privateKey": {"type": "key", "bytes": self.key},
            "certificate": self.chain,
            "expiration": self.expires.isoformat(),
        }


class EdgeAuthority:
    """Issues for modules, in the name of `issuer`. Made anew for every request, never kept."""

    def __init__(self, issuer: CertificateFiles, clock: Clock) -> None:
        self._issuer = issuer
        self._clock = clock

    def server(self, common_name: str, module: str) -> IssuedCertificate:
        """For a TLS server that is reached by `common_name` or by the module's name.

        Takes some hundred milliseconds, like `identity`. Raises ValueError for a name that cannot
        stand in a certificate.
        """
        names = [_general_name(name) for name in dict.fromkeys((common_name, module))]
        return self._issue(common_name, names, ExtendedKeyUsageOID.SERVER_AUTH)

    def identity(self, hub: str, device: str, module: str) -> IssuedCertificate:
        """For a TLS client that is this module."""
        uri = x509.UniformResourceIdentifier(f"azureiot://{hub}/devices/{device}/modules/{module}")
        return self._issue(module, [uri], ExtendedKeyUsageOID.CLIENT_AUTH)

    def _issue(
        self, common_name: str, names: Sequence[x509.GeneralName], usage: x509.ObjectIdentifier
    ) -> IssuedCertificate:
        if not 0 < len(common_name) <= COMMON_NAME_LIMIT:
            raise ValueError(f"a common name has 1 to {COMMON_NAME_LIMIT} characters")
        chain = x509.load_pem_x509_certificates(self._issuer.certificate.read_bytes())
        signer = serialization.load_pem_private_key(self._issuer.key.read_bytes(), password=None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        key = rsa.generate_private_key(public_exponent=65_537, key_size=2048)
        now = self._clock.now()
        expires = (now + _LIFETIME).replace(microsecond=0)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(chain[0].subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(expires)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
                critical=False,
            )
            .sign(signer, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        private = key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        texts = [one.public_bytes(pem).decode() for one in (certificate, *chain)]
        return IssuedCertificate(private.decode(), "".join(texts), expires)


def seal(secret: bytes, owner: str, vector: bytes, plain: bytes) -> bytes:
    """AES-256-GCM under the device's `secret`; only the same owner and vector open it again."""
    key, nonce = _key_and_nonce(secret, vector)
    return AESGCM(key).encrypt(nonce, plain, owner.encode())


def unseal(secret: bytes, owner: str, vector: bytes, sealed: bytes) -> bytes:
    """Raises ValueError for what was sealed otherwise, or not at all."""
    key, nonce = _key_and_nonce(secret, vector)
    try:
        return AESGCM(key).decrypt(nonce, sealed, owner.encode())
    except (InvalidTag, ValueError):
        raise ValueError("this was not encrypted for this module with this vector") from None


def _key_and_nonce(secret: bytes, vector: bytes) -> tuple[bytes, bytes]:
    # Vectors of any length: callers choose them.
    key = hmac.digest(secret, b"workload encryption", "sha256")
    return key, hashlib.sha256(vector).digest()[:12]


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
