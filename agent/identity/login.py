"""What one connection to a hub is opened with."""

from __future__ import annotations

from dataclasses import dataclass, field

from .signing import Sign
from .sources import CertificateFiles


@dataclass(frozen=True, slots=True)
class Login:
    """A resolved identity: either `sign` or `certificate` is its proof.

    `ca_pem` are the authorities its gateway is to be trusted by, empty for the configured ones.
    """

    host: str
    device: str
    module: str = ""
    gateway: str = ""
    sign: Sign | None = field(default=None, repr=False)
    certificate: CertificateFiles | None = None
    ca_pem: str = field(default="", repr=False)

    @property
    def resource(self) -> str:
        """As shared access signatures name it."""
        device = f"{self.host}/devices/{self.device}"
        return f"{device}/modules/{self.module}" if self.module else device
