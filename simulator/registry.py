"""An OCI registry over a folder, for tests, demos and `gatelet sim`; it can be made to misbehave.

Source: OCI distribution-spec v1.1: pull, push (monolithic and in chunks), mount, tags, deletion.
Layout: `blobs/sha256/<hex>`, and per repository `repositories/<name>/_blobs/<hex>` (what it has),
`_manifests/<hex>` (the media type) and `_tags/<tag>` (a digest).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import re
import secrets
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

_NAME = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_ROUTES = [
    (re.compile(rf"/v2/({_NAME})/manifests/([^/]+)"), "manifests"),
    (re.compile(rf"/v2/({_NAME})/blobs/uploads/?"), "uploads"),
    (re.compile(rf"/v2/({_NAME})/blobs/uploads/([^/]+)"), "upload"),
    (re.compile(rf"/v2/({_NAME})/blobs/([^/]+)"), "blobs"),
    (re.compile(rf"/v2/({_NAME})/tags/list"), "tags"),
]
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_CHUNK = 64 * 1024
_MAX_MANIFEST = 4 * 1024 * 1024


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.response = _error(status, code, message)


def _error(status: int, code: str, message: str) -> web.Response:
    body = json.dumps({"errors": [{"code": code, "message": message, "detail": None}]}).encode()
    return web.Response(status=status, body=body, content_type="application/json")


class Registry:
    """Serves `root` over HTTP, or HTTPS with `tls`; port 0 lets the system choose.

    With `username`, everything but the certificate asks for HTTP Basic credentials. The fault
    hooks (`corrupt`, `truncate`, `drop_after`, `fail_next`, `pause`) may be called at any time from
    the event loop's thread.
    """

    def __init__(
        self,
        root: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        username: str | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.root = root
        self._host = host
        self._port = port
        self._tls = tls
        self._credentials = (
            None
            if username is None
            else base64.b64encode(f"{username}:{password or ''}".encode()).decode()
        )
        self._runner: web.AppRunner | None = None
        self._uploads: dict[str, Path] = {}
        self._corrupt: set[str] = set()
        self._truncate: dict[str, int] = {}
        self._drop_after: int | None = None
        self._failures: list[int] = []
        self._running = asyncio.Event()
        self._running.set()
        self.requests: list[tuple[str, str]] = []
        """(method, path with query) of every request so far, in order of arrival."""
        self.blob_bytes_sent = 0
        """How many bytes of blobs were sent to clients so far."""

    @property
    def address(self) -> str:
        """HOST:PORT as in an image name; valid after `start`."""
        return f"{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen. Started again after `stop`, it keeps its port. Raises OSError."""
        self.root.mkdir(parents=True, exist_ok=True)
        application = web.Application(client_max_size=2**40)
        application.router.add_route("*", "/{path:.*}", self._serve)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        self._runner = runner
        site = web.TCPSite(runner, self._host, self._port, ssl_context=self._tls)
        try:
            await site.start()
        except OSError:
            await self.stop()
            raise
        self._port = runner.addresses[0][1]

    async def stop(self) -> None:
        """Close every connection and stop listening. Idempotent."""
        self._running.set()
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()
        for path in self._uploads.values():
            path.unlink(missing_ok=True)
        self._uploads.clear()

    # Faults

    def corrupt(self, digest: str) -> None:
        """From now on, flip one bit in the middle of this blob or manifest when serving it."""
        self._corrupt.add(digest)

    def truncate(self, digest: str, at: int) -> None:
        """From now on, serve only the first `at` bytes of this blob, as if it had no more."""
        self._truncate[digest] = at

    def drop_after(self, count: int | None) -> None:
        """Cut the connection of each blob download after `count` bytes; None to stop that."""
        self._drop_after = count

    def fail_next(self, count: int, status: int = 503) -> None:
        """Answer the next `count` requests with `status`."""
        self._failures += [status] * count

    def heal(self, digest: str | None = None) -> None:
        """Take back `corrupt` and `truncate` for one digest, or every fault."""
        if digest is not None:
            self._corrupt.discard(digest)
            self._truncate.pop(digest, None)
            return
        self._corrupt.clear()
        self._truncate.clear()
        self._drop_after = None
        self._failures.clear()
        self.resume()

    def pause(self) -> None:
        """Answer nothing until `resume`: requests wait, downloads under way stand still."""
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    # Requests

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs))
        await self._running.wait()
        if self._failures:
            return _error(self._failures.pop(0), "UNAVAILABLE", "told to fail")
        try:
            self._authenticate(request)
            return await self._route(request)
        except _Refused as refused:
            return refused.response

    def _authenticate(self, request: web.Request) -> None:
        if self._credentials is None:
            return
        scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "basic" or not hmac.compare_digest(
            sent.strip().encode(), self._credentials.encode()
        ):
            refused = _Refused(401, "UNAUTHORIZED", "authentication required")
            refused.response.headers["WWW-Authenticate"] = 'Basic realm="gatelet registry"'
            raise refused

    async def _route(self, request: web.Request) -> web.StreamResponse:
        if request.path in ("/v2", "/v2/"):
            return web.json_response(
                {}, headers={"Docker-Distribution-Api-Version": "registry/2.0"}
            )
        for pattern, kind in _ROUTES:
            if match := pattern.fullmatch(request.path):
                handlers: dict[tuple[str, str], Callable[..., Awaitable[web.StreamResponse]]] = {
                    ("GET", "manifests"): self._get_manifest,
                    ("HEAD", "manifests"): self._get_manifest,
                    ("PUT", "manifests"): self._put_manifest,
                    ("DELETE", "manifests"): self._delete_manifest,
                    ("GET", "blobs"): self._get_blob,
                    ("HEAD", "blobs"): self._get_blob,
                    ("POST", "uploads"): self._begin_upload,
                    ("GET", "upload"): self._upload_status,
                    ("PATCH", "upload"): self._append,
                    ("PUT", "upload"): self._finish_upload,
                    ("DELETE", "upload"): self._cancel_upload,
                    ("GET", "tags"): self._list_tags,
                }
                handler = handlers.get((request.method, kind))
                if handler is None:
                    raise _Refused(405, "UNSUPPORTED", "the operation is unsupported")
                return await handler(request, *match.groups())
        raise _Refused(404, "NAME_INVALID", "no such path")

    # Manifests

    async def _get_manifest(
        self, request: web.Request, name: str, target: str
    ) -> web.StreamResponse:
        digest = self._target(name, target)
        raw = self._blob(digest).read_bytes()
        media_type = (self._repository(name) / "_manifests" / _hex(digest)).read_text()
        if digest in self._corrupt:
            raw = _flip(raw, len(raw) // 2)
        return web.Response(
            body=raw,
            headers={
                "Content-Type": media_type,
                "Docker-Content-Digest": digest,
                "ETag": f'"{digest}"',
            },
        )

    async def _put_manifest(self, request: web.Request, name: str, target: str) -> web.Response:
        raw = await request.content.read(_MAX_MANIFEST + 1)
        while len(raw) <= _MAX_MANIFEST and (more := await request.content.read(_MAX_MANIFEST)):
            raw += more
        digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
        if len(raw) > _MAX_MANIFEST:
            raise _Refused(413, "SIZE_INVALID", "manifest too large")
        if ":" in target and target != digest:
            raise _Refused(400, "DIGEST_INVALID", f"provided digest is not {digest}")
        if ":" not in target and not _TAG.fullmatch(target):
            raise _Refused(400, "TAG_INVALID", "manifest tag did not match the rule for tags")
        try:
            document = json.loads(raw)
            parts = document.get("manifests")
            if parts is None:
                parts = [document["config"], *document["layers"]]
            digests = [str(part["digest"]) for part in parts]
            media_type = str(document.get("mediaType") or request.content_type)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise _Refused(400, "MANIFEST_INVALID", "manifest invalid") from None
        for part in digests:
            if not self._has(name, part):
                raise _Refused(404, "MANIFEST_BLOB_UNKNOWN", f"blob unknown to registry: {part}")
        self._keep(name, raw, digest)
        folder = self._repository(name)
        _write(folder / "_manifests" / _hex(digest), media_type)
        if ":" not in target:
            _write(folder / "_tags" / target, digest)
        return web.Response(
            status=201,
            headers={
                "Location": f"/v2/{name}/manifests/{digest}",
                "Docker-Content-Digest": digest,
            },
        )

    async def _delete_manifest(self, request: web.Request, name: str, target: str) -> web.Response:
        digest = self._target(name, target)
        folder = self._repository(name)
        if ":" in target:
            (folder / "_manifests" / _hex(digest)).unlink()
        for tag in (folder / "_tags").glob("*"):
            if tag.name == target or (":" in target and tag.read_text() == digest):
                tag.unlink()
        return web.Response(status=202)

    async def _list_tags(self, request: web.Request, name: str) -> web.Response:
        folder = self._repository(name)
        if not folder.is_dir():
            raise _Refused(404, "NAME_UNKNOWN", "repository name not known to registry")
        tags = sorted(path.name for path in (folder / "_tags").glob("*"))
        last = request.query.get("last", "")
        tags = [tag for tag in tags if tag > last]
        if (limit := request.query.get("n", "")).isdecimal():
            tags = tags[: int(limit)]
        return web.json_response({"name": name, "tags": tags})

    def _target(self, name: str, target: str) -> str:
        folder = self._repository(name)
        if not folder.is_dir():
            raise _Refused(404, "NAME_UNKNOWN", f"repository {name} not known to registry")
        digest = target
        if ":" not in target:
            try:
                if not _TAG.fullmatch(target):
                    raise FileNotFoundError
                digest = (folder / "_tags" / target).read_text()
            except FileNotFoundError:
                raise _Refused(404, "MANIFEST_UNKNOWN", f"no tag {target}") from None
        if not _DIGEST.fullmatch(digest) or not (folder / "_manifests" / _hex(digest)).is_file():
            raise _Refused(404, "MANIFEST_UNKNOWN", f"no manifest {digest}")
        return digest

    # Blobs

    async def _get_blob(self, request: web.Request, name: str, digest: str) -> web.StreamResponse:
        if not _DIGEST.fullmatch(digest):
            raise _Refused(400, "DIGEST_INVALID", "provided digest is not sha256")
        if not self._has(name, digest):
            raise _Refused(404, "BLOB_UNKNOWN", f"blob unknown to registry: {digest}")
        path = self._blob(digest)
        whole = path.stat().st_size
        size = min(whole, self._truncate.get(digest, whole))
        start, end, status = 0, size, 200
        if match := _RANGE.fullmatch(request.headers.get("Range", "")):
            start = int(match[1])
            end = min(size, int(match[2]) + 1) if match[2] else size
            status = 206
            if start >= end:
                refused = _Refused(416, "RANGE_INVALID", f"the blob has {size} bytes")
                refused.response.headers["Content-Range"] = f"bytes */{size}"
                raise refused
        response = web.StreamResponse(
            status=status,
            headers={
                "Content-Type": "application/octet-stream",
                "Docker-Content-Digest": digest,
                "Accept-Ranges": "bytes",
                "ETag": f'"{digest}"',
            },
        )
        if status == 206:
            response.headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        response.content_length = end - start
        await response.prepare(request)
        if request.method == "GET":
            # A client that goes away in the middle is its own affair.
            with contextlib.suppress(ConnectionError):
                await self._stream(request, response, path, digest, whole, start, end)
        return response

    async def _stream(
        self,
        request: web.Request,
        response: web.StreamResponse,
        path: Path,
        digest: str,
        whole: int,
        start: int,
        end: int,
    ) -> None:
        sent = 0
        with path.open("rb") as file:
            file.seek(start)
            while start < end:
                await self._running.wait()
                most = min(_CHUNK, end - start)
                if self._drop_after is not None:
                    most = min(most, self._drop_after - sent)
                    if most <= 0:
                        if request.transport is not None:
                            request.transport.close()
                        return
                chunk = file.read(most)
                middle = whole // 2
                if digest in self._corrupt and start <= middle < start + len(chunk):
                    chunk = _flip(chunk, middle - start)
                await response.write(chunk)
                start += len(chunk)
                sent += len(chunk)
                self.blob_bytes_sent += len(chunk)
        await response.write_eof()

    # Uploads

    async def _begin_upload(self, request: web.Request, name: str) -> web.Response:
        mount, source = request.query.get("mount"), request.query.get("from")
        if mount and source and _DIGEST.fullmatch(mount) and self._has(source, mount):
            _write(self._repository(name) / "_blobs" / _hex(mount), "")
            return self._created(name, mount)
        identifier = secrets.token_hex(16)
        path = self.root / "uploads" / identifier
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._uploads[identifier] = path
        if "digest" in request.query:
            return await self._finish_upload(request, name, identifier)
        return self._accepted(name, identifier, 202)

    async def _upload_status(
        self, request: web.Request, name: str, identifier: str
    ) -> web.Response:
        self._upload(identifier)
        return self._accepted(name, identifier, 204)

    async def _append(self, request: web.Request, name: str, identifier: str) -> web.Response:
        path = self._upload(identifier)
        span = re.fullmatch(r"(\d+)-(\d+)", request.headers.get("Content-Range", ""))
        if span and int(span[1]) != path.stat().st_size:
            refused = _Refused(416, "RANGE_INVALID", "chunks come in order")
            refused.response.headers["Range"] = f"0-{max(0, path.stat().st_size - 1)}"
            raise refused
        await self._receive(request, path)
        return self._accepted(name, identifier, 202)

    async def _finish_upload(
        self, request: web.Request, name: str, identifier: str
    ) -> web.Response:
        path = self._upload(identifier)
        digest = request.query.get("digest", "")
        await self._receive(request, path)
        del self._uploads[identifier]
        actual = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1024 * 1024):
                actual.update(chunk)
        if digest != f"sha256:{actual.hexdigest()}":
            path.unlink()
            raise _Refused(400, "DIGEST_INVALID", "provided digest did not match the content")
        blob = self._blob(digest)
        blob.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blob)
        _write(self._repository(name) / "_blobs" / _hex(digest), "")
        return self._created(name, digest)

    async def _cancel_upload(
        self, request: web.Request, name: str, identifier: str
    ) -> web.Response:
        self._upload(identifier).unlink(missing_ok=True)
        del self._uploads[identifier]
        return web.Response(status=204)

    async def _receive(self, request: web.Request, path: Path) -> None:
        with path.open("ab") as file:
            async for chunk in request.content.iter_chunked(_CHUNK):
                await self._running.wait()
                file.write(chunk)

    def _upload(self, identifier: str) -> Path:
        try:
            return self._uploads[identifier]
        except KeyError:
            raise _Refused(404, "BLOB_UPLOAD_UNKNOWN", "blob upload unknown") from None

    def _accepted(self, name: str, identifier: str, status: int) -> web.Response:
        size = self._uploads[identifier].stat().st_size
        return web.Response(
            status=status,
            headers={
                "Location": f"/v2/{name}/blobs/uploads/{identifier}",
                "Range": f"0-{max(0, size - 1)}",
                "Docker-Upload-UUID": identifier,
            },
        )

    def _created(self, name: str, digest: str) -> web.Response:
        return web.Response(
            status=201,
            headers={"Location": f"/v2/{name}/blobs/{digest}", "Docker-Content-Digest": digest},
        )

    # The folder

    def _repository(self, name: str) -> Path:
        return self.root / "repositories" / name

    def _blob(self, digest: str) -> Path:
        return self.root / "blobs" / "sha256" / _hex(digest)

    def _has(self, name: str, digest: str) -> bool:
        return (
            _DIGEST.fullmatch(digest) is not None
            and re.fullmatch(_NAME, name) is not None
            and (self._repository(name) / "_blobs" / _hex(digest)).is_file()
            and self._blob(digest).is_file()
        )

    def _keep(self, name: str, raw: bytes, digest: str) -> None:
        blob = self._blob(digest)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(raw)
        _write(self._repository(name) / "_blobs" / _hex(digest), "")


def _hex(digest: str) -> str:
    return digest.partition(":")[2]


def _flip(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
