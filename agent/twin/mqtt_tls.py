"""TLS to an MQTT broker: its files, and trying renewed ones before they are relied on."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ..identity.certificates import Stamp, check, expiry_warning, passphrase, stamp
from ..identity.sources import CertificateFiles, IdentityError
from .transport import TransportUnavailable

_REFUSAL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. Without `ca` the system's authorities are trusted; `client` proves who we are."""

    ca: Path | None = None
    client: CertificateFiles | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        ca = () if self.ca is None else (self.ca,)
        return ca if self.client is None else (*ca, *self.client.paths)

    def context(self) -> ssl.SSLContext:
        """Raises TransportUnavailable: the files may be put right while we keep trying."""
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.client is not None:
                client = self.client
                context.load_cert_chain(client.certificate, client.key, passphrase(client))
        except (OSError, ValueError, IdentityError) as error:
            files = ", ".join(str(file) for file in self.paths)
            raise TransportUnavailable(f"cannot use the TLS files {files}: {error}") from error
        return context


def try_out(files: TlsFiles, host: str, port: int, timeout: float) -> None:
    """Shake hands and hang up; blocks. Raises TransportUnavailable when that is refused.

    A broker that refuses a client certificate under TLS 1.3 says so only after the handshake.
    """
    context = files.context()
    try:
        with (
            socket.create_connection((host, port), timeout) as plain,
            context.wrap_socket(plain, server_hostname=host) as link,
        ):
            link.settimeout(_REFUSAL_SECONDS)
            try:
                link.recv(1)
            except TimeoutError:
                return  # it waits for our CONNECT
    except OSError as error:
        raise TransportUnavailable(f"{host}:{port} refused: {error}") from error
    raise TransportUnavailable(f"{host}:{port} refused: it closed the connection")


class TlsWatch:
    """Finds renewed files, and what to warn of."""

    def __init__(self, files: TlsFiles, host: str, port: int, timeout: float) -> None:
        self._files = files
        self._broker = (host, port, timeout)
        self._used: Stamp = ()
        self._refused: Stamp = ()
        self._trouble = ""
        self._checked: tuple[Stamp, datetime | IdentityError] | None = None

    def context(self) -> ssl.SSLContext:
        """For a connection that is about to be opened. Raises TransportUnavailable."""
        self._used = self._refused = stamp(self._files.paths)
        self._trouble = ""
        return self._files.context()

    async def renewed(self, interval: float, log: Callable[[str], None]) -> None:
        """Returns when the files have changed and the broker takes them."""
        while True:
            await asyncio.sleep(interval)
            now = stamp(self._files.paths)
            if now in (self._used, self._refused):
                continue
            try:
                await asyncio.to_thread(try_out, self._files, *self._broker)
            except TransportUnavailable as error:
                self._refused = now
                self._trouble = f"the connection stays on its old certificate: {error}"
                log(self._trouble)
            else:
                self._trouble = ""
                return

    def warnings(self, now: datetime) -> tuple[str, ...]:
        found = (self._expiry(now), self._trouble)
        return tuple(text for text in found if text)

    def _expiry(self, now: datetime) -> str | None:
        client = self._files.client
        if client is None:
            return None
        seen = stamp(client.paths)
        if self._checked is None or self._checked[0] != seen:
            try:
                self._checked = seen, check(client)
            except IdentityError as error:
                self._checked = seen, error
        found = self._checked[1]
        return (
            str(found) if isinstance(found, IdentityError) else expiry_warning(client, found, now)
        )
