"""An OCI registry over a folder, for tests, demos and `gatelet sim`; it can be made to misbehave.

Source: OCI distribution-spec v1.1: pull, push (monolithic and in chunks), mount, tags, deletion.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

from .registry_faults import RegistryFaults
from .registry_folder import DIGEST, NAME, TAG, Refused, RegistryFolder, error_response, flip
from .registry_uploads import RegistryUploads

_ROUTES = [
    (re.compile(rf"/v2/({NAME})/manifests/([^/]+)"), "manifests"),
    (re.compile(rf"/v2/({NAME})/blobs/uploads/?"), "uploads"),
    (re.compile(rf"/v2/({NAME})/blobs/uploads/([^/]+)"), "upload"),
    (re.compile(rf"/v2/({NAME})/blobs/([^/]+)"), "blobs"),
    (re.compile(rf"/v2/({NAME})/tags/list"), "tags"),
]
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})", re.ASCII)
_COUNT = re.compile(r"\d{1,18}", re.ASCII)
_CHUNK = 64 * 1024
_MAX_MANIFEST = 4 * 1024 * 1024


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
        self._folder = RegistryFolder(root)
        self._host = host
        self._port = port
        self._tls = tls
        self._credentials = (
            None
            if username is None
            else base64.b64encode(f"{username}:{password or ''}".encode()).decode()
        )
        self._runner: web.AppRunner | None = None
        self._listening: socket.socket | None = None
        self._uploads = RegistryUploads(self._folder)
        self._faults = RegistryFaults()
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
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            self._listening = socket.create_server((self._host, self._port), family=family)
        except OSError:
            await self.stop()
            raise
        self._port = self._listening.getsockname()[1]
        await web.SockSite(runner, self._listening, ssl_context=self._tls).start()

    async def stop(self) -> None:
        """Close every connection and stop listening. Idempotent."""
        self._running.set()
        runner, self._runner = self._runner, None
        listening, self._listening = self._listening, None
        if runner is not None:
            if listening is not None:
                # Before Python 3.12 a connection is forgotten and left open when the server is
                # closed in the turn of the loop after it was taken.
                asyncio.get_running_loop().remove_reader(listening)
                await asyncio.sleep(0)
            await runner.cleanup()
        self._uploads.clear()

    # Faults

    def corrupt(self, digest: str) -> None:
        """From now on, flip one bit in the middle of this blob or manifest when serving it."""
        self._faults.corrupted.add(digest)

    def truncate(self, digest: str, at: int) -> None:
        """From now on, serve only the first `at` bytes of this blob, as if it had no more.

        Raises ValueError for a negative number.
        """
        self._faults.truncate(digest, at)

    def drop_after(self, count: int | None) -> None:
        """Cut the connection of each blob download after `count` bytes; None to stop that."""
        self._faults.drop_after = count

    def fail_next(self, count: int, status: int = 503) -> None:
        """Answer the next `count` requests with `status`. Raises ValueError for one below 400."""
        self._faults.fail_next(count, status)

    def heal(self, digest: str | None = None) -> None:
        """Take back `corrupt` and `truncate` for one digest, or every fault."""
        self._faults.heal(digest)
        if digest is None:
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
        if (status := self._faults.failure()) is not None:
            return error_response(status, "UNAVAILABLE", "told to fail")
        try:
            self._authenticate(request)
            return await self._route(request)
        except Refused as refused:
            return refused.response

    def _authenticate(self, request: web.Request) -> None:
        if self._credentials is None:
            return
        scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "basic" or not hmac.compare_digest(
            sent.strip().encode("utf-8", "surrogateescape"), self._credentials.encode()
        ):
            refused = Refused(401, "UNAUTHORIZED", "authentication required")
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
                    raise Refused(405, "UNSUPPORTED", "the operation is unsupported")
                return await handler(request, *match.groups())
        raise Refused(404, "NAME_INVALID", "no such path")

    # Manifests

    async def _get_manifest(
        self, request: web.Request, name: str, target: str
    ) -> web.StreamResponse:
        digest = self._folder.target(name, target)
        raw = self._folder.blob(digest).read_bytes()
        media_type = self._folder.media_type(name, digest)
        if digest in self._faults.corrupted:
            raw = flip(raw, len(raw) // 2)
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
            raise Refused(413, "SIZE_INVALID", "manifest too large")
        if ":" in target and target != digest:
            raise Refused(400, "DIGEST_INVALID", f"provided digest is not {digest}")
        if ":" not in target and not TAG.fullmatch(target):
            raise Refused(400, "TAG_INVALID", "manifest tag did not match the rule for tags")
        try:
            document = json.loads(raw)
            parts = document.get("manifests")
            if parts is None:
                parts = [document["config"], *document["layers"]]
            digests = [str(part["digest"]) for part in parts]
            media_type = str(document.get("mediaType") or request.content_type)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Refused(400, "MANIFEST_INVALID", "manifest invalid") from None
        for part in digests:
            if not self._folder.has(name, part):
                raise Refused(404, "MANIFEST_BLOB_UNKNOWN", f"blob unknown to registry: {part}")
        tag = "" if ":" in target else target
        self._folder.put_manifest(name, raw, digest, media_type, tag)
        return web.Response(
            status=201,
            headers={
                "Location": f"/v2/{name}/manifests/{digest}",
                "Docker-Content-Digest": digest,
            },
        )

    async def _delete_manifest(self, request: web.Request, name: str, target: str) -> web.Response:
        self._folder.delete_manifest(name, target)
        return web.Response(status=202)

    async def _list_tags(self, request: web.Request, name: str) -> web.Response:
        tags = self._folder.tags(name)
        last = request.query.get("last", "")
        tags = [tag for tag in tags if tag > last]
        if _COUNT.fullmatch(limit := request.query.get("n", "")):
            tags = tags[: int(limit)]
        return web.json_response({"name": name, "tags": tags})

    # Blobs

    async def _get_blob(self, request: web.Request, name: str, digest: str) -> web.StreamResponse:
        if not DIGEST.fullmatch(digest):
            raise Refused(400, "DIGEST_INVALID", "provided digest is not sha256")
        if not self._folder.has(name, digest):
            raise Refused(404, "BLOB_UNKNOWN", f"blob unknown to registry: {digest}")
        path = self._folder.blob(digest)
        whole = path.stat().st_size
        size = min(whole, self._faults.truncated.get(digest, whole))
        start, end, status = 0, size, 200
        if match := _RANGE.fullmatch(request.headers.get("Range", "")):
            start = int(match[1])
            end = min(size, int(match[2]) + 1) if match[2] else size
            status = 206
            if start >= end:
                refused = Refused(416, "RANGE_INVALID", f"the blob has {size} bytes")
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
                if self._faults.drop_after is not None:
                    most = min(most, self._faults.drop_after - sent)
                    if most <= 0:
                        if request.transport is not None:
                            request.transport.close()
                        return
                chunk = file.read(most)
                middle = whole // 2
                if digest in self._faults.corrupted and start <= middle < start + len(chunk):
                    chunk = flip(chunk, middle - start)
                await response.write(chunk)
                start += len(chunk)
                sent += len(chunk)
                self.blob_bytes_sent += len(chunk)
        await response.write_eof()

    # Uploads

    async def _begin_upload(self, request: web.Request, name: str) -> web.Response:
        mount, source = request.query.get("mount"), request.query.get("from")
        if mount and source and DIGEST.fullmatch(mount) and self._folder.has(source, mount):
            self._folder.mark(name, mount)
            return self._created(name, mount)
        identifier = self._uploads.begin()
        if "digest" in request.query:
            return await self._finish_upload(request, name, identifier)
        return self._accepted(name, identifier, 202)

    async def _upload_status(
        self, request: web.Request, name: str, identifier: str
    ) -> web.Response:
        self._uploads.path(identifier)
        return self._accepted(name, identifier, 204)

    async def _append(self, request: web.Request, name: str, identifier: str) -> web.Response:
        path = self._uploads.path(identifier)
        span = re.fullmatch(r"(\d+)-(\d+)", request.headers.get("Content-Range", ""))
        if span and int(span[1]) != path.stat().st_size:
            refused = Refused(416, "RANGE_INVALID", "chunks come in order")
            refused.response.headers["Range"] = f"0-{max(0, path.stat().st_size - 1)}"
            raise refused
        await self._receive(request, path)
        return self._accepted(name, identifier, 202)

    async def _finish_upload(
        self, request: web.Request, name: str, identifier: str
    ) -> web.Response:
        digest = request.query.get("digest", "")
        await self._receive(request, self._uploads.path(identifier))
        self._uploads.finish(identifier, name, digest)
        return self._created(name, digest)

    async def _cancel_upload(
        self, request: web.Request, name: str, identifier: str
    ) -> web.Response:
        self._uploads.cancel(identifier)
        return web.Response(status=204)

    async def _receive(self, request: web.Request, path: Path) -> None:
        with path.open("ab") as file:
            async for chunk in request.content.iter_chunked(_CHUNK):
                await self._running.wait()
                file.write(chunk)

    def _accepted(self, name: str, identifier: str, status: int) -> web.Response:
        size = self._uploads.path(identifier).stat().st_size
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
