"""The MQTT broker of a simulated site, as its settings want it."""

from __future__ import annotations

import ssl
from datetime import timedelta
from typing import Any

from .mqtt.broker import Broker
from .pki import CertificateFiles, Pki
from .site_config import TOPICS, SiteSettings, grants

NAMES = ("broker.gatelet.test", "localhost", "127.0.0.1")
_HOST = "127.0.0.1"
# A folder may be used for long, and nothing renews what people copied out of it.
_CERTIFICATE_LIFETIME = timedelta(days=3650)


class SiteBroker:
    """The broker and what its users need to get in. `password` is that of the site's device."""

    def __init__(self, settings: SiteSettings, pki: Pki, password: str) -> None:
        wanted = settings.broker
        self._device = settings.device
        self._folder = settings.folder / "broker" if wanted.persist else None
        self._websockets = wanted.websockets
        self._ca_file = pki.ca_file if wanted.encrypted else None
        self._users = {settings.device: password, **settings.users}
        self.certificates: dict[str, CertificateFiles] = {
            user: pki.device(user, lifetime=_CERTIFICATE_LIFETIME)
            for user in settings.certificate_users
        }
        self.server = Broker(
            _HOST,
            settings.ports.broker,
            users=self._users,
            ssl=_context(settings, pki) if wanted.encrypted else None,
            grants=grants(settings),
            folder=self._folder,
            websockets=wanted.websockets,
            websocket_port=settings.ports.broker_websockets,
        )

    def describe(self) -> dict[str, Any]:
        """For `gatelet sim up --json`; a value that does not apply is None."""
        scheme = "ws" if self._ca_file is None else "wss"
        url = f"{scheme}://{_HOST}:{self.server.websocket_port}/mqtt" if self._websockets else None
        return {
            "host": _HOST,
            "port": self.server.port,
            "username": self._device,
            "password": self._users[self._device],
            "prefix": f"{TOPICS}/{self._device}",
            "tls": self._ca_file is not None,
            "caFile": None if self._ca_file is None else str(self._ca_file),
            "users": self._users,
            "clientCertificates": {
                user: {"certFile": str(files.certificate), "keyFile": str(files.key)}
                for user, files in self.certificates.items()
            },
            "websocketUrl": url,
            "folder": None if self._folder is None else str(self._folder),
        }


def _context(settings: SiteSettings, pki: Pki) -> ssl.SSLContext:
    context = pki.server_context(NAMES)
    context.load_verify_locations(pki.ca_file)
    required = settings.broker.require_certificate
    context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    return context
