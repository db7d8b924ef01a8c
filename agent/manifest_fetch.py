"""Fetching a manifest by reference: HTTPS with bounded redirects, size and time."""

from __future__ import annotations

import ssl
import time
import urllib.parse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .document import MAX_DOCUMENT_BYTES, ManifestError, Node
from .manifest_reference import check_url, is_loopback, too_large

if TYPE_CHECKING:
    from urllib3 import PoolManager

CONNECT_SECONDS = 10.0
READ_SECONDS = 10.0
WHOLE_SECONDS = 120.0
"""A server that drips bytes must not hold a deployment for ever."""

REDIRECTS = 3
_CHUNK = 64 * 1024

Fetch = Callable[[str, Callable[[], bool]], bytes]
"""(url, whether to stop) -> the bytes there; runs in a thread of its own. Raises FetchFailed."""


class FetchFailed(Exception):
    """Not fetched; worth another attempt. The message names the place, never the URL's query."""


class HttpFetch:
    """`ca_file` (PEM) is trusted in addition to the system's authorities.

    `seconds` bounds the whole of one attempt.
    """

    def __init__(
        self,
        ca_file: Path | None = None,
        http_hosts: Collection[str] = (),
        seconds: float = WHOLE_SECONDS,
    ) -> None:
        self._ca_file = ca_file
        self._http_hosts = tuple(http_hosts)
        self._seconds = seconds

    def __call__(self, url: str, stop: Callable[[], bool]) -> bytes:
        import urllib3
        from urllib3.exceptions import HTTPError

        place = _place(url)
        end = time.monotonic() + self._seconds
        try:
            for _ in range(REDIRECTS + 1):
                with self._pool(url) as pool:
                    response = pool.request(
                        "GET",
                        url,
                        headers={"User-Agent": "gatelet", "Accept": "application/json"},
                        timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
                        retries=False,
                        redirect=False,
                        preload_content=False,
                        decode_content=False,
                    )
                    try:
                        target = response.headers.get("Location")
                        if response.status not in (301, 302, 303, 307, 308) or not target:
                            return self._read(response, place, end, stop)
                    finally:
                        response.close()
                url = self._followed(url, target, place)
        except ssl.SSLError as error:
            raise FetchFailed(f"{place}: the TLS connection failed ({error.reason})") from None
        except (HTTPError, OSError, ValueError) as error:
            raise FetchFailed(f"{place}: {_reason(error)}") from None
        raise FetchFailed(f"{place}: redirects more than {REDIRECTS} times")

    def _read(self, response: Any, place: str, end: float, stop: Callable[[], bool]) -> bytes:
        if response.status != 200:
            raise FetchFailed(f"{place}: answered {response.status}")
        data = bytearray()
        # read1 gives what has arrived: a dripping server must not keep us inside one read.
        while chunk := response.read1(_CHUNK, decode_content=False):
            data += chunk
            if len(data) > MAX_DOCUMENT_BYTES:
                raise FetchFailed(too_large(place))
            if stop():
                raise FetchFailed(f"{place}: stopped")
            if time.monotonic() > end:
                raise FetchFailed(f"{place}: not finished after {self._seconds:g} s")
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) != len(data):
            raise FetchFailed(f"{place}: the connection broke at {len(data):,} of {length} bytes")
        return bytes(data)

    def _followed(self, url: str, target: str, place: str) -> str:
        joined = urllib.parse.urljoin(url, target)
        try:
            check_url(Node(None, place), joined, self._http_hosts)
        except ManifestError as error:
            raise FetchFailed(f"redirects to a place that is not allowed: {error}") from None
        if url.startswith("https:") and not joined.startswith("https:"):
            raise FetchFailed(f"{place}: redirects from https to http, which is not followed")
        return joined

    def _pool(self, url: str) -> PoolManager:
        import urllib.request

        import urllib3

        parts = urllib.parse.urlsplit(url)
        options: dict[str, Any] = {}
        if parts.scheme == "https":
            options["ssl_context"] = self._tls()
        proxy = None
        if not is_loopback(parts.hostname or "") and not urllib.request.proxy_bypass(parts.netloc):
            proxy = urllib.request.getproxies().get(parts.scheme)
        return urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)

    def _tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if self._ca_file is not None:
            try:
                context.load_verify_locations(self._ca_file)
            except (OSError, ssl.SSLError) as error:
                raise FetchFailed(
                    f"deployment.manifest-ca-file {self._ca_file} cannot be used: {error}"
                ) from None
        return context


def _place(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))


def _reason(error: BaseException) -> str:
    from urllib3.exceptions import MaxRetryError

    if isinstance(error, MaxRetryError) and error.reason is not None:
        error = error.reason
    # urllib3 puts the whole URL in front of the reason.
    return str(error).rpartition(": ")[2][:200] or type(error).__name__
