"""File upload: where a device may put a file, the storage it lands in, and what it says after."""

from __future__ import annotations

import base64
import hmac
import secrets
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote, urlencode

from ...agent.clock import Clock
from .errors import HubError, invalid

CONTAINER = "uploads"
BLOB_LIMIT = 64 * 1024 * 1024
_STORED_LIMIT = 256 * 1024 * 1024
_LIFETIME = timedelta(hours=1)
_NAME_LIMIT = 1024
_UPLOADS_AT_ONCE = 10
_NOTIFICATIONS = 10_000
_BLOCKS = 50_000


@dataclass(frozen=True, slots=True)
class Blob:
    """`written` is ISO 8601 UTC."""

    body: bytes
    content_type: str
    written: str


class Uploads:
    """A hub's uploads, in memory. Blobs are named `{device}/{name the device chose}`."""

    def __init__(self, storage_host: str, clock: Clock) -> None:
        self.storage_host = storage_host
        self.notifications: deque[dict[str, Any]] = deque(maxlen=_NOTIFICATIONS)
        self.blobs: dict[str, Blob] = {}
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._finished = 0
        self._pending: dict[str, tuple[str, str, datetime]] = {}
        self._blocks: dict[tuple[str, str], bytes] = {}

    def begin(self, device: str, name: Any) -> dict[str, Any]:
        """The answer to `POST /devices/{device}/files`. Raises HubError 400 or 403."""
        if not isinstance(name, str) or not 0 < len(name) <= _NAME_LIMIT:
            raise invalid(f"blobName has 1 to {_NAME_LIMIT} characters")
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise invalid(f"blobName {name!r}: no empty part, '.' or '..' between slashes")
        now = self._clock.now()
        self._pending = {key: one for key, one in self._pending.items() if one[2] > now}
        if sum(one[0] == device for one in self._pending.values()) >= _UPLOADS_AT_ONCE:
            raise HubError(
                403,
                "DeviceMaximumActiveFileUploadLimitExceeded",
                f"{device} has {_UPLOADS_AT_ONCE} uploads that it has not finished",
            )
        correlation = secrets.token_urlsafe(24)
        blob = f"{device}/{name}"
        self._pending[correlation] = device, blob, now + _LIFETIME
        return {
            "correlationId": correlation,
            "hostName": self.storage_host,
            "containerName": CONTAINER,
            "blobName": quote(blob),
            "sasToken": self._token(blob),
        }

    def finish(self, device: str, call: Mapping[str, Any]) -> None:
        """`POST /devices/{device}/files/notifications`. Raises HubError 400 or 404."""
        correlation = call.get("correlationId")
        owner, blob, _ = self._pending.get(str(correlation), ("", "", None))
        if owner != device:
            raise HubError(404, "NotFound", f"{device} has no upload {correlation!r}")
        del self._pending[str(correlation)]
        stored = self.blobs.get(blob)
        self._finished += 1
        self.notifications.append(
            {
                "sequenceNumber": self._finished,
                "deviceId": device,
                "blobName": blob,
                "blobUri": f"https://{self.storage_host}/{CONTAINER}/{quote(blob)}",
                "blobSizeInBytes": None if stored is None else len(stored.body),
                "isSuccess": bool(call.get("isSuccess")),
                "statusCode": call.get("statusCode"),
                "statusDescription": call.get("statusDescription"),
                "enqueuedTimeUtc": self._now(),
            }
        )

    # The storage.

    def container_url(self, lifetime: timedelta = _LIFETIME) -> str:
        """The container's URL with a signature for all its blobs, as `UploadModuleLogs` takes."""
        return f"https://{self.storage_host}/{CONTAINER}{self._token('', 'c', lifetime)}"

    def check(self, blob: str, query: Mapping[str, str]) -> None:
        """Whether the query carries a token for this blob or for all. Raises HubError 403."""
        fields = {name: query.get(name, "") for name in ("sv", "sr", "sp", "se")}
        signed = "" if fields["sr"] == "c" else blob
        shown = query.get("sig", "").encode("utf-8", "surrogateescape")
        right = hmac.compare_digest(self._signature(signed, fields).encode(), shown)
        try:
            expiry = datetime.fromisoformat(fields["se"].replace("Z", "+00:00"))
        except ValueError:
            right, expiry = False, self._clock.now()
        if not right or expiry <= self._clock.now():
            raise HubError(403, "AuthenticationFailed", f"no right to {blob!r}, or not any more")

    def put(self, blob: str, body: bytes, content_type: str) -> None:
        """Put Blob. Raises HubError 413 or 507."""
        if len(body) > BLOB_LIMIT:
            raise _too_large()
        others = sum(len(b.body) for name, b in self.blobs.items() if name != blob)
        if others + len(body) > _STORED_LIMIT:
            raise HubError(507, "InsufficientStorage", "the simulated storage is full")
        self.blobs[blob] = Blob(body, content_type, self._now())

    def put_block(self, blob: str, block: str, body: bytes) -> None:
        """Put Block. Raises HubError 507."""
        full = len(self._blocks) >= _BLOCKS and (blob, block) not in self._blocks
        if full or sum(map(len, self._blocks.values())) + len(body) > _STORED_LIMIT:
            raise HubError(507, "InsufficientStorage", "the simulated storage is full")
        self._blocks[blob, block] = body

    def put_block_list(self, blob: str, blocks: list[str], content_type: str) -> None:
        """Put Block List. Raises HubError 400 for a block that was not put, 413 or 507."""
        missing = [block for block in blocks if (blob, block) not in self._blocks]
        if missing:
            raise HubError(400, "InvalidBlockList", f"unknown blocks: {', '.join(missing)}")
        # Before they are joined: a list may name one block many times.
        if sum(len(self._blocks[blob, block]) for block in blocks) > BLOB_LIMIT:
            raise _too_large()
        self.put(blob, b"".join(self._blocks[blob, block] for block in blocks), content_type)
        for key in [key for key in self._blocks if key[0] == blob]:
            del self._blocks[key]

    def get(self, blob: str) -> Blob:
        """Raises HubError 404."""
        if blob not in self.blobs:
            raise HubError(404, "BlobNotFound", f"there is no blob {blob!r}")
        return self.blobs[blob]

    def _token(self, blob: str, kind: str = "b", lifetime: timedelta = _LIFETIME) -> str:
        expiry = (self._clock.now() + lifetime).strftime("%Y-%m-%dT%H:%M:%SZ")
        fields = {"sv": "2021-10-04", "sr": kind, "sp": "rw", "se": expiry}
        return "?" + urlencode({**fields, "sig": self._signature(blob, fields)})

    def _signature(self, blob: str, fields: Mapping[str, str]) -> str:
        text = "\n".join([blob, *(f"{name}={fields[name]}" for name in sorted(fields))])
        return base64.b64encode(hmac.digest(self._key, text.encode(), "sha256")).decode()

    def _now(self) -> str:
        return self._clock.now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _too_large() -> HubError:
    return HubError(413, "RequestBodyTooLarge", f"a blob has up to {BLOB_LIMIT} bytes here")
