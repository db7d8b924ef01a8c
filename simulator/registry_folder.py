"""The folder behind a simulated OCI registry, and how it says no.

Layout: `blobs/sha256/<hex>`, and per repository `repositories/<name>/_blobs/<hex>` (what it has),
`_manifests/<hex>` (the media type) and `_tags/<tag>` (a digest).
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from aiohttp import web

NAME = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.response = error_response(status, code, message)


def error_response(status: int, code: str, message: str) -> web.Response:
    body = json.dumps({"errors": [{"code": code, "message": message, "detail": None}]}).encode()
    return web.Response(status=status, body=body, content_type="application/json")


class RegistryFolder:
    """Blobs, and what each repository has of them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def target(self, name: str, target: str) -> str:
        self.has_repository(name)
        folder = self.repository(name)
        digest = target
        if ":" not in target:
            try:
                if not TAG.fullmatch(target):
                    raise FileNotFoundError
                digest = (folder / "_tags" / target).read_text()
            except FileNotFoundError:
                raise Refused(404, "MANIFEST_UNKNOWN", f"no tag {target}") from None
        if not DIGEST.fullmatch(digest) or not (folder / "_manifests" / hex_of(digest)).is_file():
            raise Refused(404, "MANIFEST_UNKNOWN", f"no manifest {digest}")
        return digest

    def repository(self, name: str) -> Path:
        return self.root / "repositories" / name

    def blob(self, digest: str) -> Path:
        return self.root / "blobs" / "sha256" / hex_of(digest)

    def has(self, name: str, digest: str) -> bool:
        return (
            DIGEST.fullmatch(digest) is not None
            and re.fullmatch(NAME, name) is not None
            and (self.repository(name) / "_blobs" / hex_of(digest)).is_file()
            and self.blob(digest).is_file()
        )

    def keep(self, name: str, raw: bytes, digest: str) -> None:
        blob = self.blob(digest)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(raw)
        write(self.repository(name) / "_blobs" / hex_of(digest), "")

    def has_repository(self, name: str) -> None:
        """Raises Refused 404."""
        if not self.repository(name).is_dir():
            raise Refused(404, "NAME_UNKNOWN", f"repository {name} not known to registry")

    def mark(self, name: str, digest: str) -> None:
        """The repository has this blob."""
        write(self.repository(name) / "_blobs" / hex_of(digest), "")

    def media_type(self, name: str, digest: str) -> str:
        return (self.repository(name) / "_manifests" / hex_of(digest)).read_text()

    def put_manifest(self, name: str, raw: bytes, digest: str, media_type: str, tag: str) -> None:
        """`tag` is empty for one that was pushed by its digest."""
        self.keep(name, raw, digest)
        folder = self.repository(name)
        write(folder / "_manifests" / hex_of(digest), media_type)
        if tag:
            write(folder / "_tags" / tag, digest)

    def delete_manifest(self, name: str, target: str) -> None:
        """One tag, or a manifest with all its tags. Raises Refused 404."""
        digest = self.target(name, target)
        folder = self.repository(name)
        if ":" in target:
            (folder / "_manifests" / hex_of(digest)).unlink()
        for tag in (folder / "_tags").glob("*"):
            if tag.name == target or (":" in target and tag.read_text() == digest):
                tag.unlink()

    def tags(self, name: str) -> list[str]:
        """Raises Refused 404."""
        self.has_repository(name)
        return sorted(path.name for path in (self.repository(name) / "_tags").glob("*"))


def hex_of(digest: str) -> str:
    return digest.partition(":")[2]


def flip(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
