"""A download on its way into the store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from ..errors import DigestMismatch
from .unpack import sync_folder

_CHUNK = 1024 * 1024
# Bounds what a power loss can cost a long download.
_SYNC_EVERY = 32 * 1024 * 1024


class Ingest:
    """Appends to a partial file and hashes as bytes arrive; used as a context manager.

    `offset` is how many bytes there are; `resumed`, how many of them an earlier attempt left.
    """

    def __init__(
        self, partial: Path, blob: Path, digest: str, size: int, fault: Callable[[str], None]
    ) -> None:
        self._partial = partial
        self._blob = blob
        self._digest = digest
        self._size = size
        self._fault = fault
        self._hash = hashlib.sha256()
        self._unsynced = 0
        self.offset = 0
        self.resumed = 0

    def __enter__(self) -> Ingest:
        self._file = self._partial.open("a+b", buffering=0)
        try:
            self._file.seek(0)
            while chunk := self._file.read(_CHUNK):
                self._hash.update(chunk)
                self.offset += len(chunk)
            if self.offset > self._size:
                self.restart()
        except BaseException:
            # Without __enter__'s end there is no __exit__. Whatever it was is raised again.
            self._file.close()
            raise
        self.resumed = self.offset
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def restart(self) -> None:
        """Forget what was written."""
        self._file.truncate(0)
        self._hash = hashlib.sha256()
        self.offset = self.resumed = 0

    def write(self, chunk: bytes) -> None:
        """Raises DigestMismatch when there are more bytes than the manifest says; OSError."""
        if self.offset + len(chunk) > self._size:
            raise self._mismatch(f"more than {self._size} bytes came")
        self._fault("ingest.write")
        view = memoryview(chunk)
        while view:
            written = self._file.write(view) or 0
            self._hash.update(view[:written])
            self.offset += written
            view = view[written:]
        self._unsynced += len(chunk)
        if self._unsynced >= _SYNC_EVERY:
            os.fsync(self._file.fileno())
            self._unsynced = 0

    def commit(self) -> None:
        """Make the blob visible. Raises DigestMismatch (the partial is then gone), OSError."""
        if self.offset != self._size:
            raise self._mismatch(f"{self.offset} of {self._size} bytes came")
        if f"sha256:{self._hash.hexdigest()}" != self._digest:
            raise self._mismatch(f"the bytes hash to sha256:{self._hash.hexdigest()}")
        self._fault("ingest.sync")
        os.fsync(self._file.fileno())
        os.fchmod(self._file.fileno(), 0o444)
        self._fault("ingest.rename")
        self._partial.rename(self._blob)
        sync_folder(self._blob.parent)
        sync_folder(self._partial.parent)
        self._fault("ingest.done")

    def _mismatch(self, what: str) -> DigestMismatch:
        self._partial.unlink(missing_ok=True)
        return DigestMismatch(
            f"{self._digest}: {what}; nothing of it was kept, pull again, "
            "and push the image again if it stays so"
        )
