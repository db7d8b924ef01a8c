"""Uploads to Azure Blob Storage under a shared access signature: Put Blob, one block blob each.

A signature for a container (`sr=c`, what edgeAgent takes) gets blobs named
`{hub}/{device}/{name}-{time}.{extension}`; one for a blob (`sr=b`) is written to as it stands.
"""

from __future__ import annotations

import ipaddress
import random
import ssl
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qs, quote, urlsplit, urlunsplit

from ..redaction import redact
from ..twin.backoff import full_jitter

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

STORAGE_VERSION = "2021-10-04"
BLOB_LIMIT = 256 * 1024 * 1024
ATTEMPTS = 3
_RETRY_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_CONNECT_SECONDS, _READ_SECONDS = 10.0, 120.0
_RETRY_BASE, _RETRY_CAP = 1.0, 10.0


class UploadFailed(Exception):
    """The storage did not take it; the message holds no signature."""


@dataclass(frozen=True, slots=True)
class BlobTarget:
    """Where blobs go, from a SAS URL. Its text never shows the signature."""

    url: SplitResult
    is_blob: bool

    def __repr__(self) -> str:
        return f"BlobTarget({redact(urlunsplit(self.url))})"

    __str__ = __repr__

    @property
    def where(self) -> str:
        """For people: host and container."""
        return f"{self.url.hostname}{self.url.path}"


def parse_target(url: str) -> BlobTarget:
    """Raises ValueError, which never repeats the URL."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError("sasUrl is not a URL") from error
    if not host or not parts.path.strip("/"):
        raise ValueError(
            "sasUrl is no URL of a container, such as https://HOST/CONTAINER?SIGNATURE"
        )
    if parts.username or parts.password or parts.fragment:
        raise ValueError(
            "sasUrl has a user, a password or a fragment; it is HOST/CONTAINER?SIGNATURE"
        )
    if parts.scheme != "https" and not (parts.scheme == "http" and _loopback(host)):
        raise ValueError("sasUrl must begin with https://: logs are not sent in the clear")
    query = parse_qs(parts.query)
    if "sig" not in query:
        raise ValueError("sasUrl has no signature (sig=): create a shared access signature")
    return BlobTarget(parts, query.get("sr", [""])[0] == "b")


def blob_url(
    target: BlobTarget, hub: str, device: str, name: str, extension: str, now: datetime
) -> str:
    """The URL to put one blob to."""
    url = target.url
    if target.is_blob:
        return urlunsplit(url)
    file = f"{name}-{now:%Y-%m-%d--%H-%M-%S}.{extension}"
    path = "/".join(quote(part, safe="") for part in (hub, device, file))
    return urlunsplit(url._replace(path=f"{url.path.rstrip('/')}/{path}"))


class BlobStorage:
    """Blocking calls; `proxy` is HOST:PORT of an HTTP CONNECT proxy, `ca_file` PEM to trust beside
    the system's authorities."""

    def __init__(self, proxy: str = "", ca_file: Path | None = None) -> None:
        self._proxy = proxy
        self._ca_file = ca_file
        self._jitter = random.Random()

    def put(self, url: str, body: bytes, content_type: str, encoding: str = "") -> None:
        """Put Blob. Raises UploadFailed."""
        if len(body) > BLOB_LIMIT:
            raise UploadFailed(f"{len(body)} bytes are more than a blob of {BLOB_LIMIT}")
        import urllib3.exceptions

        headers = {
            "x-ms-blob-type": "BlockBlob",
            "x-ms-version": STORAGE_VERSION,
            "Content-Type": content_type,
            **({"x-ms-blob-content-encoding": encoding} if encoding else {}),
        }
        where = urlsplit(url).hostname
        for attempt in range(ATTEMPTS):
            try:
                with self._pool(url) as pool:
                    answer = pool.request(
                        "PUT", url, body=body, headers=headers, redirect=False, retries=False
                    )
            except (urllib3.exceptions.HTTPError, OSError) as error:
                reason = f"{where} cannot be reached: {redact(_reason(error))}"
                retryable = True
            else:
                if 200 <= answer.status < 300:
                    return
                reason, retryable = _refusal(answer, where), answer.status in _RETRY_STATUS
            if not retryable or attempt == ATTEMPTS - 1:
                raise UploadFailed(reason)
            time.sleep(full_jitter(attempt, _RETRY_BASE, _RETRY_CAP, self._jitter))

    def _pool(self, url: str) -> PoolManager:
        import urllib3

        timeout = urllib3.Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS)
        try:
            context = ssl.create_default_context()
            if self._ca_file is not None:
                context.load_verify_locations(self._ca_file)
        except (OSError, ssl.SSLError) as error:
            raise UploadFailed(f"cannot use {self._ca_file}: {error}") from error
        if self._proxy and urlsplit(url).scheme == "https":
            return urllib3.ProxyManager(
                f"http://{self._proxy}", timeout=timeout, ssl_context=context
            )
        return urllib3.PoolManager(timeout=timeout, ssl_context=context)


def _reason(error: Exception) -> str:
    # urllib3 puts the whole URL, signature included, into some messages.
    inner = getattr(error, "reason", None) or error.__cause__ or error
    return str(inner).split("(Caused by", 1)[0] or type(inner).__name__


def _refusal(answer: BaseHTTPResponse, where: str | None) -> str:
    code = answer.headers.get("x-ms-error-code", "")
    hint = (
        "; is the signature still valid, and does it permit writing (sp=rcw)?"
        if answer.status == 403
        else ""
    )
    return f"{where} answered {answer.status} {code}".rstrip() + hint


def _loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
