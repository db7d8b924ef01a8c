"""HTTP to a registry: TLS, credentials, redirects, bounded retries, errors that say what to do."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import random
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import (
    ImageError,
    ImageNotFound,
    InvalidImage,
    InvalidReference,
    RegistryUnavailable,
    Unauthorized,
)
from .auth import Challenge, basic, parse_challenges
from .reference import DEFAULT_REGISTRY, is_digest

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

_REDIRECTS = 5
_MAX_ERROR_BYTES = 64 * 1024
_MAX_TOKEN_BYTES = 256 * 1024
_RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """Where a registry is and who we are to it.

    `address` is HOST[:PORT] as in an image name. `ca_file` (PEM) is trusted in addition to the
    system's authorities. HTTPS is used, except for loopback addresses without `ca_file` and where
    `insecure` permits plain HTTP. Time-outs are in seconds, per connection and per read.
    """

    address: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    insecure: bool = False
    connect_timeout: float = 10.0
    read_timeout: float = 30.0
    attempts: int = 4

    @property
    def base_url(self) -> str:
        host = self.address
        for scheme in ("https://", "http://"):
            host = host.removeprefix(scheme)
        host = host.rstrip("/")
        if host in (DEFAULT_REGISTRY, "index.docker.io"):
            host = "registry-1.docker.io"
        plain = self.ca_file is None and (self.insecure or _is_loopback(host))
        return f"{'http' if plain else 'https'}://{host}"


class RegistryTransport:
    """Connections and credentials for one registry; thread-safe. `sleep` waits between attempts."""

    def __init__(
        self, settings: RegistrySettings, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.settings = settings
        self.base = settings.base_url
        if not urllib.parse.urlsplit(self.base).hostname:
            raise InvalidReference(f"registry address {settings.address!r}: expected HOST[:PORT]")
        self._sleep = sleep
        self._lock = threading.Lock()
        self._pools: dict[tuple[str, str | None], PoolManager] = {}
        self._tokens: dict[str, tuple[str, float]] = {}
        self._basic = False

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            for pool in self._pools.values():
                pool.clear()
            self._pools.clear()

    @contextlib.contextmanager
    def request(
        self,
        method: str,
        path: str,
        repository: str | None,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | BinaryIO | None = None,
        accept: tuple[int, ...] = (),
        push: bool = False,
        attempts: int | None = None,
    ) -> Iterator[BaseHTTPResponse]:
        """A response with a 2xx status or one in `accept`; anything else is raised as ImageError.

        `path` is a path or a full URL of this registry. `accept` adds statuses to return. `push`
        asks for permission to write. The response's body is unread.
        """
        where = self.where(repository, "")
        left = attempts or self.settings.attempts
        scope = f"repository:{repository}:{'pull,push' if push else 'pull'}" if repository else ""
        authorised = False
        attempt = 0
        while True:
            url = urllib.parse.urljoin(self.base, path)
            try:
                response = self._send(method, url, scope, headers, body, where)
            except RegistryUnavailable:
                attempt += 1
                if attempt >= left:
                    raise
                self.wait(attempt, None)
                continue
            if 200 <= response.status < 300 or response.status in accept:
                break
            detail = _detail(response)
            status = response.status
            asked = response.headers.get("WWW-Authenticate", "")
            pause = response.headers.get("Retry-After")
            response.close()
            if status == 401 and not authorised and (body is None or isinstance(body, bytes)):
                authorised = True
                self._authorise(parse_challenges(asked), scope, where)
                continue
            if status in _RETRY_STATUS and attempt + 1 < left:
                attempt += 1
                self.wait(attempt, pause)
                continue
            raise self._refusal(status, method, where, path, detail)
        try:
            yield response
        finally:
            # A response read to its end gives its connection back; any other is closed.
            if method == "HEAD" or _drained(response):
                response.release_conn()
            else:
                response.close()

    def _send(
        self,
        method: str,
        url: str,
        scope: str,
        headers: Mapping[str, str] | None,
        body: bytes | BinaryIO | None,
        where: str,
    ) -> BaseHTTPResponse:
        import urllib3
        from urllib3.exceptions import HTTPError

        timeout = urllib3.Timeout(
            connect=self.settings.connect_timeout, read=self.settings.read_timeout
        )
        for _ in range(_REDIRECTS + 1):
            sent = {"User-Agent": "gatelet", **(headers or {})}
            # A registry redirects to its storage, which must not see our credentials.
            if _origin(url) == _origin(self.base) and (token := self._authorization(scope)):
                sent["Authorization"] = token
            try:
                response = self._pool(url).request(
                    method,
                    url,
                    headers=sent,
                    body=body,
                    timeout=timeout,
                    retries=False,
                    redirect=False,
                    preload_content=False,
                    decode_content=False,
                )
            except (HTTPError, OSError, ValueError) as error:
                raise RegistryUnavailable(
                    f"{where}: {_advice(error, self.settings)} ({reason(error)})"
                ) from None
            location = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or not location:
                return response
            response.close()
            target = urllib.parse.urljoin(url, location)
            if method not in ("GET", "HEAD") or (
                url.startswith("https:") and not target.startswith("https:")
            ):
                raise RegistryUnavailable(
                    f"{where}: redirects a {method} to {_origin(target)}, which is not followed; "
                    "use that address, or the registry's own one"
                )
            url = target
        raise RegistryUnavailable(f"{where}: redirects more than {_REDIRECTS} times")

    def _pool(self, url: str) -> PoolManager:
        import urllib3

        parts = urllib.parse.urlsplit(url)
        proxy = None
        if not _is_loopback(parts.netloc) and not urllib.request.proxy_bypass(parts.netloc):
            proxy = urllib.request.getproxies().get(parts.scheme)
        with self._lock:
            key = parts.scheme, proxy
            pool = self._pools.get(key)
            if pool is None:
                options: dict[str, Any] = {"maxsize": 4}
                # Reading the system's authorities takes tens of milliseconds.
                if parts.scheme == "https":
                    options["ssl_context"] = self._tls()
                pool = (
                    urllib3.ProxyManager(proxy, **options)
                    if proxy
                    else urllib3.PoolManager(**options)
                )
                self._pools[key] = pool
            return pool

    def _tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if self.settings.ca_file is not None:
            try:
                context.load_verify_locations(self.settings.ca_file)
            except (OSError, ssl.SSLError) as error:
                raise RegistryUnavailable(
                    f"{self.settings.address}: the CA file {self.settings.ca_file} cannot be used "
                    f"({error}); it holds certificates in PEM form"
                ) from None
        return context

    # Who we are

    def _authorization(self, scope: str) -> str | None:
        with self._lock:
            token, expiry = self._tokens.get(scope, ("", 0.0))
            if token and time.monotonic() < expiry:
                return f"Bearer {token}"
            if self._basic:
                return basic(self.settings.username or "", self.settings.password or "")
            return None

    def _authorise(self, challenges: tuple[Challenge, ...], scope: str, where: str) -> None:
        settings = self.settings
        for challenge in challenges:
            if challenge.scheme == "bearer":
                self._fetch_token(challenge, scope, where)
                return
        if not challenges or settings.username is None or settings.password is None:
            how = "set a user name and password for it" if challenges else "it does not say how"
            raise Unauthorized(f"{where}: wants authentication; {how}")
        with self._lock:
            self._basic = True

    def _fetch_token(self, challenge: Challenge, scope: str, where: str) -> None:
        import urllib3
        from urllib3.exceptions import HTTPError

        realm = challenge.parameters.get("realm", "")
        if not realm.startswith("https://" if self.base.startswith("https:") else "http"):
            raise Unauthorized(f"{where}: sends us for a token to {realm!r}, which is not HTTPS")
        wanted = scope or challenge.parameters.get("scope", "")
        query = {"service": challenge.parameters.get("service", ""), "scope": wanted}
        query = {name: value for name, value in query.items() if value}
        headers = {"User-Agent": "gatelet"}
        if self.settings.username is not None:
            headers["Authorization"] = basic(self.settings.username, self.settings.password or "")
        url = f"{realm}{'&' if '?' in realm else '?'}{urllib.parse.urlencode(query)}"
        try:
            response = self._pool(url).request(
                "GET",
                url,
                headers=headers,
                timeout=urllib3.Timeout(self.settings.connect_timeout),
                retries=False,
                redirect=False,
                preload_content=False,
            )
            with response:
                data = response.read(_MAX_TOKEN_BYTES, decode_content=False)
        except (HTTPError, OSError, ValueError) as error:
            raise RegistryUnavailable(
                f"{where}: no token from {_origin(realm)} ({reason(error)}); try again later"
            ) from None
        if response.status in (400, 401, 403):
            raise Unauthorized(
                f"{where}: {_origin(realm)} refuses user {self.settings.username!r} "
                f"({response.status}); check user name and password"
            )
        try:
            answer = json.loads(data)
            token = answer.get("token") or answer.get("access_token")
            lifetime = float(answer.get("expires_in", 60))
        except (ValueError, TypeError, AttributeError, RecursionError):
            token, lifetime = None, 0.0
        if response.status != 200 or not isinstance(token, str) or not token.isprintable():
            raise RegistryUnavailable(
                f"{where}: {_origin(realm)} answered {response.status} and no token; try later"
            )
        with self._lock:
            # A little early, so that none expires between here and there.
            self._tokens[scope] = (token, time.monotonic() + max(5.0, lifetime * 0.9))

    # Waiting and saying what happened

    def wait(self, attempt: int, retry_after: str | None) -> None:
        """Pause before another attempt: jittered, or what the registry asks for up to 10 s."""
        most = min(8.0, 0.25 * 2**attempt)
        pause = random.uniform(0, most)
        if retry_after and retry_after.isdecimal() and len(retry_after) < 6:
            pause = min(10.0, float(retry_after)) + random.uniform(0, 0.5)
        self._sleep(pause)

    def where(self, repository: str | None, target: str) -> str:
        """How errors name what was asked for."""
        separator = "@" if is_digest(target) else ":"
        return (
            self.settings.address
            + (f"/{repository}" if repository else "")
            + (f"{separator}{target}" if target else "")
        )

    def _refusal(self, status: int, method: str, where: str, path: str, detail: str) -> ImageError:
        what = path.rpartition("/")[2].partition("?")[0]
        said = f"{where}: {method} {what} was answered with {status}{detail}"
        if status == 404:
            # HEAD and GET of a manifest: whoever wrote the name knows no requests.
            if "/manifests/" in path:
                said = f"{where}: the registry has no such image (404){detail}"
            return ImageNotFound(f"{said}; check the name, or push the image")
        if status in (401, 403):
            who = f"user {self.settings.username!r}" if self.settings.username else "no user name"
            return Unauthorized(f"{said}, with {who}; check user name, password and permissions")
        if status in _RETRY_STATUS or status >= 500:
            return RegistryUnavailable(f"{said}; try again later, or look at the registry's log")
        if status < 400:
            return RegistryUnavailable(f"{said}, which no registry does; check the address")
        return InvalidImage(f"{said}; the registry does not take this request")


def _is_loopback(netloc: str) -> bool:
    host = urllib.parse.urlsplit(f"//{netloc}").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # A name that only starts like an address belongs to whoever registered it.
        return host == "localhost"


def _origin(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _drained(response: BaseHTTPResponse) -> bool:
    from urllib3.exceptions import HTTPError

    try:
        # Small answers are worth reading for the sake of the connection, blobs are not.
        length = response.length_remaining
        if length is None or length > _MAX_ERROR_BYTES:
            return False
        response.drain_conn()
    except (HTTPError, OSError):
        return False
    return True


def _detail(response: BaseHTTPResponse) -> str:
    """` (CODE: message)` from the registry's error document, or nothing."""
    from urllib3.exceptions import HTTPError

    try:
        first = json.loads(response.read(_MAX_ERROR_BYTES))["errors"][0]
        text = f"{first.get('code')}: {first.get('message')}"
    except (HTTPError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""
    return f" ({''.join(filter(str.isprintable, text))[:200]})"


def reason(error: BaseException) -> str:
    from urllib3.exceptions import MaxRetryError

    if isinstance(error, MaxRetryError) and error.reason is not None:
        error = error.reason
    return str(error).rpartition(": ")[2][:200] or type(error).__name__


def _advice(error: BaseException, settings: RegistrySettings) -> str:
    from urllib3.exceptions import SSLError

    if isinstance(error, (SSLError, ssl.SSLError)):
        if "WRONG_VERSION" in str(error).upper() or "record layer" in str(error):
            return "does not speak TLS; permit plain HTTP for it (insecure), or check the port"
        return "its certificate is not trusted; check the clock and the registry's CA file"
    return "not reachable; check the address, the network and that the registry runs"
