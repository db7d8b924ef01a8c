"""What a client shows to get in, and until when that is good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cryptography import x509

from ...agent.clock import Clock
from . import sas
from .client_certificates import ClientCertificate
from .devices import ClientId, Identity
from .errors import unauthorized


@dataclass(frozen=True, slots=True)
class Login:
    """A client that got in; its token ends at `expiry` (epoch s), a certificate login never."""

    client: ClientId
    expiry: float | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """What a hub compares credentials with. `policy_key` raises HubError 401 for unknown names."""

    host_name: str
    authorities: Sequence[x509.Certificate]
    policy_key: Callable[[str | None], str]
    clock: Clock

    def check(self, identity: Identity, token: str, certificate: ClientCertificate | None) -> Login:
        """Checks a token, or a certificate where the identity logs in with one.

        Raises HubError 401.
        """
        client = identity.client
        if identity.authentication == "sas":
            signature = sas.parse(token)
            keys = [self.policy_key(signature.policy)] if signature.policy else identity.keys
            sas.verify(signature, f"{self.host_name}/{client.path}", keys, self.clock)
            return Login(client, float(signature.expiry))
        if certificate is None:
            raise unauthorized(f"{client} logs in with a certificate and has shown none")
        if identity.authentication == "selfSigned":
            if not certificate.has_thumbprint(identity.thumbprints):
                raise unauthorized(
                    f"{client}: the certificate {certificate.thumbprints[1]} is not registered"
                )
            certificate.check_time(self.clock)
            return Login(client)
        if certificate.common_name != str(client):
            raise unauthorized(
                f"the certificate is for {certificate.common_name!r}, not for {client}"
            )
        certificate.check_time(self.clock)
        if not certificate.is_issued_by(self.authorities, self.clock):
            raise unauthorized(f"{client}: no authority of this hub issued the certificate")
        return Login(client)
