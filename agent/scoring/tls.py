"""TLS of the scoring process's listeners; certificates are replaced by replacing their files."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

log = logging.getLogger(__name__)


class TlsUnusable(Exception):
    """The files cannot be used; the message names them."""


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """PEM files, the leaf certificate first. `client_ca_file` None: clients need no certificate."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None
    require_client_certificate: bool = False


Stamp = tuple[tuple[int, int], ...]


class TlsFiles:
    """What one listener serves with. Files that cannot be used leave the old ones in place."""

    def __init__(self, settings: TlsSettings, alpn: str = "http/1.1") -> None:
        """Raises TlsUnusable."""
        if settings.require_client_certificate and settings.client_ca_file is None:
            raise TlsUnusable("require-client-certificate needs client-ca-file")
        self._settings = settings
        self._alpn = alpn
        self._stamp = self._look()
        self._context = self._load()

    def context(self) -> ssl.SSLContext:
        return self._context

    def renewed(self) -> ssl.SSLContext | None:
        """A context of the files of now if they changed since the last one."""
        if not self._changed():
            return None
        try:
            self._context = self._load()
        except TlsUnusable as error:
            log.warning("the certificates stay as they were: %s", error)
            return None
        log.info("serving with the certificates of now in %s", self._settings.cert_file)
        return self._context

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC, which asks for the files' state at every handshake."""
        settings = self._settings

        def configuration() -> grpc.ServerCertificateConfiguration:
            authority = settings.client_ca_file
            return grpc.ssl_server_certificate_configuration(
                [(settings.key_file.read_bytes(), settings.cert_file.read_bytes())],
                None if authority is None else authority.read_bytes(),
            )

        def newer() -> grpc.ServerCertificateConfiguration | None:
            try:
                return None if self.renewed() is None else configuration()
            except OSError as error:
                log.warning("the certificates stay as they were: %s", error)
                return None

        return grpc.dynamic_ssl_server_credentials(
            configuration(),
            newer,  # type: ignore[arg-type]  # None: nothing changed
            settings.require_client_certificate,
        )

    def _changed(self) -> bool:
        stamp = self._look()
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        return True

    def _look(self) -> Stamp:
        made = []
        for file in (
            self._settings.cert_file,
            self._settings.key_file,
            self._settings.client_ca_file,
        ):
            try:
                status = None if file is None else file.stat()
            except OSError:
                status = None
            made.append((0, 0) if status is None else (status.st_mtime_ns, status.st_ino))
        return tuple(made)

    def _load(self) -> ssl.SSLContext:
        settings = self._settings
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols([self._alpn])
        try:
            context.load_cert_chain(settings.cert_file, settings.key_file)
            if settings.client_ca_file is not None:
                context.load_verify_locations(settings.client_ca_file)
        except (OSError, ssl.SSLError) as error:
            raise TlsUnusable(
                f"cannot use {settings.cert_file}, {settings.key_file} and "
                f"{settings.client_ca_file or 'no client authority'}: {error}"
            ) from None
        if settings.client_ca_file is not None:
            required = settings.require_client_certificate
            context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
        return context
