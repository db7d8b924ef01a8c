"""Client certificates: asked for in every TLS handshake, required by none, judged by the hub.

A hub knows a self-signed certificate by nothing but its thumbprint, so TLS itself cannot decide
whom to trust. OpenSSL has a hook for that which Python does not offer; but Python shows handshake
messages before OpenSSL acts on them. A context from `ask_for_certificate` therefore adds each leaf
it is shown to its own trust store: the handshake proves that the client has the key (and no more),
and `ClientCertificate` says who that is.
"""

from __future__ import annotations

import hashlib
import ssl
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from ...agent.clock import Clock
from .errors import HubError, unauthorized

_HANDSHAKE, _CERTIFICATE = 22, 11
_TLS_1_3 = 0x0304
# X509_V_FLAG_NO_CHECK_TIME: the hub's clock, which tests may set, decides.
_NO_CHECK_TIME = 0x200000
_REMEMBERED = 10_000
_LONGEST_CHAIN = 8


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """A certificate whose key the client has, and what else it sent to prove where it is from."""

    leaf: x509.Certificate
    intermediates: tuple[x509.Certificate, ...] = ()

    @property
    def common_name(self) -> str:
        names = self.leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(names[0].value) if names else ""

    @property
    def thumbprints(self) -> tuple[str, str]:
        """SHA-1 and SHA-256, upper-case hex."""
        # Not for security: IoT Hub's registry names certificates by either.
        sha1, sha256 = hashes.SHA1(), hashes.SHA256()
        return self.leaf.fingerprint(sha1).hex().upper(), self.leaf.fingerprint(
            sha256
        ).hex().upper()

    def has_thumbprint(self, wanted: Iterable[str]) -> bool:
        return any(one and one.upper() in self.thumbprints for one in wanted)

    def check_time(self, clock: Clock) -> None:
        """Raises HubError 401."""
        if not _valid(self.leaf, clock):
            raise unauthorized(
                f"the certificate of {self.common_name!r} is valid from "
                f"{self.leaf.not_valid_before_utc} to {self.leaf.not_valid_after_utc}"
            )

    def is_issued_by(self, authorities: Iterable[x509.Certificate], clock: Clock) -> bool:
        """Whether the chain leads from the leaf to one of `authorities`, all valid now."""
        trusted = list(authorities)
        current, used = self.leaf, 0
        while used < _LONGEST_CHAIN and _valid(current, clock):
            if any(_issued(current, one, used) and _valid(one, clock) for one in trusted):
                return True
            issuer = next((one for one in self.intermediates if _issued(current, one, used)), None)
            if issuer is None or issuer == current:
                return False
            current, used = issuer, used + 1
        return False


def ask_for_certificate(context: ssl.SSLContext) -> PresentedCertificates:
    """Makes a server context ask its clients for a certificate and take any, or none."""
    context.verify_mode = ssl.CERT_OPTIONAL
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
    presented = PresentedCertificates(context)
    # The public property's wrapper looks every message up in enumerations first.
    hook = vars(ssl.SSLContext.__mro__[1])["_msg_callback"]
    hook.__set__(context, presented.on_message)
    return presented


class PresentedCertificates:
    """The chains that came with the leaves this context was shown, the latest of them."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._chains: OrderedDict[bytes, tuple[bytes, ...]] = OrderedDict()
        self._trusted: set[bytes] = set()

    def on_message(
        self, _: Any, direction: str, version: int, content: int, kind: int, data: bytes
    ) -> None:
        if direction != "read" or content != _HANDSHAKE or kind != _CERTIFICATE:
            return
        chain = _certificates(data, version)
        if not chain:
            return
        leaf = hashlib.sha256(chain[0]).digest()
        self._chains[leaf] = chain[1:]
        self._chains.move_to_end(leaf)
        if len(self._chains) > _REMEMBERED:
            self._chains.popitem(last=False)
        if leaf not in self._trusted:
            try:
                self._context.load_verify_locations(cadata=chain[0])
            except (ssl.SSLError, ValueError):
                return  # not a certificate: OpenSSL refuses the handshake by itself
            self._trusted.add(leaf)

    def of(self, leaf: bytes | None) -> ClientCertificate | None:
        """For the DER that `getpeercert(binary_form=True)` gave. Raises HubError 401."""
        if not leaf:
            return None
        chain = self._chains.get(hashlib.sha256(leaf).digest(), ())
        try:
            certificates = [x509.load_der_x509_certificate(der) for der in (leaf, *chain)]
        except ValueError as error:
            raise unauthorized(f"the client's certificate is not readable: {error}") from error
        return ClientCertificate(certificates[0], tuple(certificates[1:]))


def load_authorities(pem: str) -> list[x509.Certificate]:
    """Raises HubError 400."""
    try:
        return x509.load_pem_x509_certificates(pem.encode())
    except ValueError as error:
        raise HubError(400, "ArgumentInvalid", f"not a PEM certificate: {error}") from error


def _certificates(message: bytes, version: int) -> tuple[bytes, ...]:
    """The DER certificates of a Certificate message (RFC 5246 7.4.2, RFC 8446 4.4.2)."""
    position = 4
    if version == _TLS_1_3:
        position += 1 + int.from_bytes(message[position : position + 1], "big")
    end = position + 3 + int.from_bytes(message[position : position + 3], "big")
    position += 3
    found = []
    while position + 3 <= min(end, len(message)):
        size = int.from_bytes(message[position : position + 3], "big")
        found.append(bytes(message[position + 3 : position + 3 + size]))
        position += 3 + size
        if version == _TLS_1_3:
            position += 2 + int.from_bytes(message[position : position + 2], "big")
    return tuple(found)


def _valid(certificate: x509.Certificate, clock: Clock) -> bool:
    return certificate.not_valid_before_utc <= clock.now() <= certificate.not_valid_after_utc


def _issued(certificate: x509.Certificate, issuer: x509.Certificate, below: int) -> bool:
    """`below`: how many authorities stand between the issuer and the leaf."""
    try:
        constraints = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
        certificate.verify_directly_issued_by(issuer)
    except (x509.ExtensionNotFound, ValueError, TypeError, InvalidSignature):
        return False
    return constraints.ca and (constraints.path_length is None or constraints.path_length >= below)
