"""A site's certificate authority and the server certificates it issues, as PEM files."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..agent.clock import Clock, SystemClock

_CA_LIFETIME = timedelta(days=3650)
_SERVER_LIFETIME = timedelta(days=365)
_RENEW_BEFORE = timedelta(days=7)
_CLOCK_SKEW = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """PEM files: `certificate` holds the leaf followed by its issuer."""

    certificate: Path
    key: Path


class Pki:
    """Issues what a site needs, once; a second run over the same folder reuses the files.

    Several processes may share the folder. Raises OSError when it cannot be written.
    """

    def __init__(self, folder: Path, clock: Clock | None = None) -> None:
        self._folder = folder
        self._clock = clock or SystemClock()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked():
            self._ca_certificate, self._ca_key = self._authority()

    @property
    def ca_file(self) -> Path:
        """The PEM file that clients trust."""
        return self._folder / "ca.pem"

    def server(self, names: Sequence[str]) -> CertificateFiles:
        """The certificate for these DNS names and IP addresses; the first one names the files."""
        if not names:
            raise ValueError("a server certificate needs at least one name")
        files = CertificateFiles(
            self._folder / f"{_file_stem(names[0])}.pem",
            self._folder / f"{_file_stem(names[0])}.key.pem",
        )
        with self._locked():
            if not self._covers(files, names):
                self._issue_server(files, names)
        return files

    def server_context(self, names: Sequence[str]) -> ssl.SSLContext:
        """A server's TLS context, from TLS 1.2 (all that azure-iot-device 2.14 speaks)."""
        files = self.server(names)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(files.certificate, files.key)
        return context

    def client_context(self) -> ssl.SSLContext:
        """A client's TLS context that trusts this site and nothing else."""
        return ssl.create_default_context(cafile=str(self.ca_file))

    def _authority(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        key_file = self._folder / "ca.key.pem"
        if self.ca_file.exists() and key_file.exists():
            certificate = x509.load_pem_x509_certificate(self.ca_file.read_bytes())
            key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
            if isinstance(key, ec.EllipticCurvePrivateKey) and self._fresh(certificate):
                return certificate, key
        key = ec.generate_private_key(ec.SECP256R1())
        name = _common_name("gatelet simulated site CA")
        certificate = (
            self._builder(name, name, key.public_key(), _CA_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(key_cert_sign=True), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()),
                critical=False,
            )
            .sign(key, hashes.SHA256())
        )
        _write(key_file, _key_pem(key))
        _write(self.ca_file, certificate.public_bytes(serialization.Encoding.PEM))
        return certificate, key

    def _issue_server(self, files: CertificateFiles, names: Sequence[str]) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            self._builder(
                _common_name(names[0][:64]),
                self._ca_certificate.subject,
                key.public_key(),
                _SERVER_LIFETIME,
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.SubjectAlternativeName([_general_name(name) for name in names]),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._ca_key.public_key()),
                critical=False,
            )
            .sign(self._ca_key, hashes.SHA256())
        )
        chain = [certificate, self._ca_certificate]
        _write(files.key, _key_pem(key))
        _write(
            files.certificate,
            b"".join(c.public_bytes(serialization.Encoding.PEM) for c in chain),
        )

    def _builder(
        self,
        subject: x509.Name,
        issuer: x509.Name,
        key: ec.EllipticCurvePublicKey,
        lifetime: timedelta,
    ) -> x509.CertificateBuilder:
        now = self._clock.now()
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(now + lifetime)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )

    def _covers(self, files: CertificateFiles, names: Sequence[str]) -> bool:
        if not files.certificate.exists() or not files.key.exists():
            return False
        certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
        san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        issued_here = certificate.issuer == self._ca_certificate.subject and _signed_by(
            certificate, self._ca_key
        )
        return issued_here and self._fresh(certificate) and {*map(_general_name, names)} <= {*san}

    def _fresh(self, certificate: x509.Certificate) -> bool:
        return self._clock.now() + _RENEW_BEFORE < certificate.not_valid_after_utc

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _signed_by(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> bool:
    extension = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    expected = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return extension.value.key_identifier == expected.digest


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(*, key_cert_sign: bool = False, digital_signature: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=key_cert_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _file_stem(name: str) -> str:
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in name)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    temporary.replace(path)
