"""A site's certificate authority and what it issues, as PEM files.

Servers get certificates by their names, devices by their common name: from the authority, from an
intermediate of it, or signed by themselves.
"""

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
_DEVICE_LIFETIME = timedelta(days=90)
_RENEW_BEFORE = timedelta(days=7)
_CLOCK_SKEW = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """PEM files: `certificate` holds the leaf followed by its issuer.

    `passphrase` opens the key; None for a key that is not encrypted.
    """

    certificate: Path
    key: Path
    passphrase: str | None = None

    @property
    def leaf(self) -> x509.Certificate:
        return x509.load_pem_x509_certificates(self.certificate.read_bytes())[0]

    @property
    def thumbprint(self) -> str:
        """SHA-256 of the leaf, upper-case hex: as IoT Hub registers self-signed certificates."""
        return self.leaf.fingerprint(hashes.SHA256()).hex().upper()


class PkiUnreadable(Exception):
    """The folder's authority is not one of ours; the message says what to do."""


class Pki:
    """Issues what a site needs, once; a second run over the same folder reuses the files.

    Several processes may share the folder. Raises OSError when it cannot be written, and
    PkiUnreadable.
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

    def client_context(self, device: CertificateFiles | None = None) -> ssl.SSLContext:
        """A client's TLS context that trusts this site and nothing else; with `device`'s own
        certificate where one is given.
        """
        context = ssl.create_default_context(cafile=str(self.ca_file))
        if device is not None:
            context.load_cert_chain(device.certificate, device.key, device.passphrase)
        return context

    def intermediate(self, name: str) -> CertificateFiles:
        """An authority below the site's, made once; `device` issues from it."""
        files = self._files(f"intermediate.{name}", None)
        with self._locked():
            if not self._is_issued(files, "site"):
                self._issue(
                    files,
                    f"gatelet intermediate {name}"[:64],
                    self._site_issuer(),
                    _CA_LIFETIME,
                    True,
                )
        return files

    def device(
        self,
        common_name: str,
        *,
        issuer: CertificateFiles | None = None,
        self_signed: bool = False,
        passphrase: str | None = None,
        lifetime: timedelta = _DEVICE_LIFETIME,
        version: int = 1,
    ) -> CertificateFiles:
        """The certificate of a device (or "device/module"), made once per `version` and way.

        It is the site authority's, `issuer`'s or `self_signed`; `passphrase` encrypts a new key.
        """
        way = "self" if self_signed else "site" if issuer is None else issuer.certificate.stem
        files = self._files(f"device.{common_name}.{way}.{version}", passphrase)
        with self._locked():
            if not self._is_issued(files, way):
                signer = None if self_signed else self._issuer(issuer)
                self._issue(files, common_name, signer, lifetime, False)
        return files

    def _authority(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        key_file = self._folder / "ca.key.pem"
        if self.ca_file.exists() and key_file.exists():
            try:
                certificate = x509.load_pem_x509_certificate(self.ca_file.read_bytes())
                key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
            except (ValueError, TypeError) as error:
                raise PkiUnreadable(
                    f"{self.ca_file} or {key_file} is damaged ({error}): move {self._folder} away "
                    "to begin anew; clients then have to trust the new authority"
                ) from error
            if isinstance(key, ec.EllipticCurvePrivateKey) and self._fresh(certificate):
                return certificate, key
        key = ec.generate_private_key(ec.SECP256R1())
        name = _common_name("gatelet simulated site CA")
        certificate = (
            self._builder(name, name, key.public_key(), _CA_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
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

    def _files(self, name: str, passphrase: str | None) -> CertificateFiles:
        stem = _file_stem(name)
        return CertificateFiles(
            self._folder / f"{stem}.pem", self._folder / f"{stem}.key.pem", passphrase
        )

    def _site_issuer(self) -> _Issuer:
        return _Issuer((self._ca_certificate,), self._ca_key)

    def _issuer(self, files: CertificateFiles | None) -> _Issuer:
        if files is None:
            return self._site_issuer()
        key = serialization.load_pem_private_key(files.key.read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{files.key} is not an elliptic curve key")
        return _Issuer(tuple(x509.load_pem_x509_certificates(files.certificate.read_bytes())), key)

    def _issue(
        self,
        files: CertificateFiles,
        common_name: str,
        issuer: _Issuer | None,
        lifetime: timedelta,
        authority: bool,
    ) -> None:
        """Without an issuer the certificate signs itself."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _common_name(common_name)
        chain = () if issuer is None else issuer.chain
        builder = self._builder(
            subject, chain[0].subject if chain else subject, key.public_key(), lifetime
        ).add_extension(
            x509.BasicConstraints(ca=authority, path_length=0 if authority else None),
            critical=True,
        )
        if authority:
            builder = builder.add_extension(_key_usage(key_cert_sign=True), critical=True)
        else:
            builder = builder.add_extension(
                _key_usage(digital_signature=True), critical=True
            ).add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
            )
        signing_key = key if issuer is None else issuer.key
        certificate = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()),
            critical=False,
        ).sign(signing_key, hashes.SHA256())
        _write(files.key, _key_pem(key, files.passphrase))
        # The root goes along, as in the server's file: what a client sends too much harms nobody.
        _write(
            files.certificate,
            b"".join(c.public_bytes(serialization.Encoding.PEM) for c in (certificate, *chain)),
        )

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
        try:
            certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
            san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, x509.ExtensionNotFound):
            return False
        issued_here = certificate.issuer == self._ca_certificate.subject and _signed_by(
            certificate, self._ca_key
        )
        return issued_here and self._fresh(certificate) and {*map(_general_name, names)} <= {*san}

    def _is_issued(self, files: CertificateFiles, way: str) -> bool:
        """Whether it is there, and from today's authority where it is this one's."""
        if not files.certificate.exists() or not files.key.exists():
            return False
        try:
            return way != "site" or _signed_by(files.leaf, self._ca_key)
        except (ValueError, x509.ExtensionNotFound):
            return False

    def _fresh(self, certificate: x509.Certificate) -> bool:
        return self._clock.now() + _RENEW_BEFORE < certificate.not_valid_after_utc

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@dataclass(frozen=True, slots=True)
class _Issuer:
    """Its own certificate first."""

    chain: tuple[x509.Certificate, ...]
    key: ec.EllipticCurvePrivateKey


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


def _key_pem(key: ec.EllipticCurvePrivateKey, passphrase: str | None = None) -> bytes:
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
    )


def _file_stem(name: str) -> str:
    """Different for different names: `a/b` must not be given what was issued to `a_b`."""
    return "".join(c if c.isalnum() or c in ".-_" else f"%{ord(c):x}%" for c in name)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    temporary.replace(path)
