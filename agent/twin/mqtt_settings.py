"""Where an MQTT broker is, and who the device is to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..identity.sources import CertificateFiles
from .mqtt_tls import TlsFiles


@dataclass(frozen=True, slots=True)
class MqttSettings:
    """Where the broker is and who we are. Times in seconds.

    TLS is used when any of `ca_file`, `cert_file` and `tls` is set; without `ca_file` the system's
    authorities are trusted. Files are read again for every connection; renewed ones, looked for
    every `watch_interval`, are tried out first and then lead to a new connection, before which the
    session keeps all messages. Raises ValueError for names that cannot stand in a topic.
    """

    host: str
    port: int
    device_id: str
    prefix: str = "gatelet/v1/{device}"
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | Path | None = None
    cert_file: str | Path | None = None
    key_file: str | Path | None = None
    passphrase_file: str | Path | None = None
    keepalive: int = 60
    tls: bool = False
    client_id: str = ""
    watch_interval: float = 5.0

    def __post_init__(self) -> None:
        if not self.device_id or set(self.device_id) & set("/+#\0"):
            raise ValueError(f"device id {self.device_id!r} cannot be a topic level (no / + #)")
        topics = self.topics
        if not topics or set(topics) & set("+#\0{}") or topics.startswith(("/", "$")):
            raise ValueError(
                f"topic prefix {self.prefix!r}: only {{device}} is replaced, and + # $ / "
                "may not be used as wildcards or at the start"
            )

    @property
    def topics(self) -> str:
        """The prefix with the device id filled in."""
        return self.prefix.replace("{device}", self.device_id).rstrip("/")

    @property
    def tls_files(self) -> TlsFiles | None:
        """None without TLS."""
        client = None
        if self.cert_file:
            # A file may hold both.
            word = Path(self.passphrase_file) if self.passphrase_file else None
            key = Path(self.key_file or self.cert_file)
            client = CertificateFiles(Path(self.cert_file), key, word)
        if not (self.tls or self.ca_file or client):
            return None
        return TlsFiles(Path(self.ca_file) if self.ca_file else None, client)
