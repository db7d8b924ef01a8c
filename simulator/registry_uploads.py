"""Blobs on their way into a simulated registry."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from .registry_folder import Refused, RegistryFolder

_CHUNK = 1024 * 1024


class RegistryUploads:
    """Unfinished uploads, each a file of its own below the registry's folder."""

    def __init__(self, folder: RegistryFolder) -> None:
        self._folder = folder
        self._paths: dict[str, Path] = {}

    def begin(self) -> str:
        """The identifier of a new, empty upload."""
        identifier = secrets.token_hex(16)
        path = self._folder.root / "uploads" / identifier
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._paths[identifier] = path
        return identifier

    def path(self, identifier: str) -> Path:
        """Raises Refused 404."""
        try:
            return self._paths[identifier]
        except KeyError:
            raise Refused(404, "BLOB_UPLOAD_UNKNOWN", "blob upload unknown") from None

    def finish(self, identifier: str, name: str, digest: str) -> None:
        """Gives the upload to a repository. Raises Refused 400 for another digest, or 404."""
        path = self.path(identifier)
        del self._paths[identifier]
        actual = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                actual.update(chunk)
        if digest != f"sha256:{actual.hexdigest()}":
            path.unlink()
            raise Refused(400, "DIGEST_INVALID", "provided digest did not match the content")
        blob = self._folder.blob(digest)
        blob.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blob)
        self._folder.mark(name, digest)

    def cancel(self, identifier: str) -> None:
        """Raises Refused 404."""
        self.path(identifier).unlink(missing_ok=True)
        del self._paths[identifier]

    def clear(self) -> None:
        for path in self._paths.values():
            path.unlink(missing_ok=True)
        self._paths.clear()
