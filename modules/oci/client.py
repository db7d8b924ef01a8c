"""A client of OCI registries (distribution-spec v1.1), blocking and thread-safe.

Calls retry a little by themselves (short outages, 429, 5xx, with jitter) and then raise an
ImageError that names the registry, the repository and what to do; waiting longer is for the caller.
"""

from __future__ import annotations

import contextlib
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from ..errors import DigestMismatch, InvalidImage, RegistryUnavailable
from .manifest import MANIFEST_TYPES, MAX_MANIFEST_BYTES, Descriptor, digest_of
from .reference import is_digest
from .transport import RegistrySettings, RegistryTransport, reason

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

__all__ = ["BlobStream", "FetchedManifest", "RegistryClient", "RegistrySettings"]

_CHUNK = 256 * 1024


@dataclass(frozen=True, slots=True)
class FetchedManifest:
    """A manifest's exact bytes and the digest they hash to."""

    digest: str
    media_type: str
    raw: bytes


class BlobStream:
    """A blob arriving from byte `offset` on. Iterate for chunks; iteration raises ImageError."""

    def __init__(self, response: BaseHTTPResponse, offset: int, where: str) -> None:
        self._response = response
        self._where = where
        self.offset = offset

    def __iter__(self) -> Iterator[bytes]:
        from urllib3.exceptions import HTTPError

        try:
            yield from self._response.stream(_CHUNK, decode_content=False)
        except (HTTPError, OSError) as error:
            raise RegistryUnavailable(
                f"{self._where}: the connection broke ({reason(error)}); it continues from where "
                "it stopped at the next attempt"
            ) from None


class RegistryClient:
    """Speaks to one registry. `sleep` waits between attempts."""

    def __init__(
        self, settings: RegistrySettings, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.settings = settings
        self._transport = RegistryTransport(settings, sleep=sleep)

    def close(self) -> None:
        """Close idle connections."""
        self._transport.close()

    def __enter__(self) -> RegistryClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Pulling

    def ping(self) -> None:
        """Whether the registry answers and takes our credentials. Raises ImageError."""
        with self._transport.request("GET", "/v2/", None):
            pass

    def head_manifest(self, repository: str, target: str) -> str | None:
        """The digest a tag stands for now; None when this registry does not say in a HEAD.

        Raises ImageNotFound, Unauthorized, RegistryUnavailable.
        """
        path = f"/v2/{repository}/manifests/{target}"
        headers = {"Accept": ", ".join(MANIFEST_TYPES)}
        with self._transport.request("HEAD", path, repository, headers=headers) as response:
            digest = response.headers.get("Docker-Content-Digest", "")
        return digest if is_digest(digest) else None

    def get_manifest(self, repository: str, target: str) -> FetchedManifest:
        """A manifest or index by tag or digest, verified when it is by digest.

        Raises ImageNotFound, Unauthorized, RegistryUnavailable, DigestMismatch, InvalidImage.
        """
        path = f"/v2/{repository}/manifests/{target}"
        where = self._transport.where(repository, target)
        headers = {"Accept": ", ".join(MANIFEST_TYPES)}
        with self._transport.request("GET", path, repository, headers=headers) as response:
            raw = _read_all(BlobStream(response, 0, where), MAX_MANIFEST_BYTES, where)
            media_type = response.headers.get("Content-Type", "").partition(";")[0].strip()
            claimed = response.headers.get("Docker-Content-Digest", "")
        digest = digest_of(raw)
        if is_digest(target) and digest != target:
            raise DigestMismatch(f"{where}: the manifest hashes to {digest}; push the image again")
        if is_digest(claimed) and digest != claimed:
            raise DigestMismatch(f"{where}: the manifest hashes to {digest}, but is {claimed}")
        return FetchedManifest(digest, media_type, raw)

    def read_blob(self, repository: str, blob: Descriptor, limit: int) -> bytes:
        """A small blob, verified. Raises InvalidImage, DigestMismatch and what `open_blob` does."""
        where = self._transport.where(repository, blob.digest)
        with self.open_blob(repository, blob.digest) as stream:
            raw = _read_all(stream, limit, where)
        if digest_of(raw) != blob.digest:
            raise DigestMismatch(f"{where}: hashes to {digest_of(raw)}; push the image again")
        return raw

    @contextlib.contextmanager
    def open_blob(self, repository: str, digest: str, offset: int = 0) -> Iterator[BlobStream]:
        """A blob from `offset` on, or from 0 where the registry cannot do that: see `.offset`.

        Raises ImageNotFound, Unauthorized, RegistryUnavailable.
        """
        path = f"/v2/{repository}/blobs/{digest}"
        where = self._transport.where(repository, digest)
        if offset:
            headers = {"Range": f"bytes={offset}-"}
            with self._transport.request(
                "GET", path, repository, headers=headers, accept=(416,)
            ) as response:
                if response.status == 200:
                    yield BlobStream(response, 0, where)
                    return
                span = response.headers.get("Content-Range", "")
                if response.status == 206 and span.startswith(f"bytes {offset}-"):
                    yield BlobStream(response, offset, where)
                    return
        # What we have is no beginning of what the registry has (416), or it sent another part.
        with self._transport.request("GET", path, repository) as response:
            if response.status != 200:
                raise RegistryUnavailable(f"{where}: answered {response.status} to a plain GET")
            yield BlobStream(response, 0, where)

    # Pushing

    def has_blob(self, repository: str, digest: str) -> bool:
        path = f"/v2/{repository}/blobs/{digest}"
        with self._transport.request(
            "HEAD", path, repository, accept=(404,), push=True
        ) as response:
            return response.status != 404

    def push_blob(
        self,
        repository: str,
        blob: Descriptor,
        open_blob: Callable[[], BinaryIO],
        mount_from: str | None = None,
    ) -> bool:
        """Upload a blob unless the repository has it; gives whether bytes were sent.

        `mount_from` names a repository of the same registry that has it already. Raises ImageError.
        """
        if self.has_blob(repository, blob.digest):
            return False
        path = f"/v2/{repository}/blobs/uploads/"
        if mount_from is not None:
            query = urllib.parse.urlencode({"mount": blob.digest, "from": mount_from})
            with self._transport.request(
                "POST", f"{path}?{query}", repository, accept=(404, 405), push=True
            ) as response:
                if response.status == 201:
                    return False
        for attempt in range(self.settings.attempts):
            with self._transport.request("POST", path, repository, push=True) as response:
                location = response.headers.get("Location", "")
            target = urllib.parse.urlsplit(
                urllib.parse.urljoin(self._transport.base + path, location)
            )
            query = "&".join(
                filter(None, [target.query, urllib.parse.urlencode({"digest": blob.digest})])
            )
            headers = {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(blob.size),
            }
            try:
                # A broken upload is not continued but begun anew: only the server knows how far
                # it came, and pushes run where links are good.
                with (
                    open_blob() as body,
                    self._transport.request(
                        "PUT",
                        target._replace(query=query).geturl(),
                        repository,
                        headers=headers,
                        body=body,
                        push=True,
                        attempts=1,
                    ),
                ):
                    return True
            except RegistryUnavailable:
                if attempt + 1 == self.settings.attempts:
                    raise
                self._transport.wait(attempt, None)
        raise AssertionError("unreachable")

    def put_manifest(self, repository: str, target: str, media_type: str, raw: bytes) -> str:
        """Store a manifest under a tag or its digest; gives the digest. Raises ImageError."""
        path = f"/v2/{repository}/manifests/{target}"
        headers = {"Content-Type": media_type}
        with self._transport.request(
            "PUT", path, repository, headers=headers, body=raw, push=True
        ) as response:
            stored = response.headers.get("Docker-Content-Digest", "")
        digest = digest_of(raw)
        if is_digest(stored) and stored != digest:
            where = self._transport.where(repository, target)
            raise DigestMismatch(
                f"{where}: stored as {stored}, sent as {digest}; "
                "something between here and there changes manifests"
            )
        return digest


def _read_all(stream: BlobStream, limit: int, where: str) -> bytes:
    data = bytearray()
    for chunk in stream:
        data += chunk
        if len(data) > limit:
            raise InvalidImage(f"{where}: larger than {limit} bytes; push a smaller one")
    return bytes(data)
