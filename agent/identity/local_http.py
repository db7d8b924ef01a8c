"""Small JSON requests over HTTP: to services on Unix sockets, and to a hub over TLS."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .sources import IdentityError

SECONDS = 10.0
_ANSWER_LIMIT = 1 << 20


class HttpRefused(IdentityError):
    """The other side answered with an error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(SECONDS)
        self.sock.connect(self._path)


def unix_request(
    path: Path, method: str, target: str, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The JSON object that a service on a Unix socket answers. Raises IdentityError."""
    return _request(_UnixConnection(str(path)), f"the service at {path}", method, target, body, {})


def https_request(
    host: str,
    method: str,
    target: str,
    *,
    body: Mapping[str, Any] | None = None,
    headers: Mapping[str, str],
    context: ssl.SSLContext,
    proxy: str | None = None,
) -> dict[str, Any]:
    """As `unix_request`, over TLS to port 443, through an HTTP CONNECT proxy "host:port"."""
    if proxy is None:
        link = http.client.HTTPSConnection(host, timeout=SECONDS, context=context)
    else:
        name, _, port = proxy.rpartition(":")
        link = http.client.HTTPSConnection(name, int(port), timeout=SECONDS, context=context)
        link.set_tunnel(host, 443)
    return _request(link, host, method, target, body, headers)


def _request(
    link: http.client.HTTPConnection,
    name: str,
    method: str,
    target: str,
    body: Mapping[str, Any] | None,
    headers: Mapping[str, str],
) -> dict[str, Any]:
    content = None if body is None else json.dumps(body)
    sent = {**headers, "User-Agent": "gatelet"}
    if content is not None:
        sent["Content-Type"] = "application/json"
    try:
        link.request(method, target, content, sent)
        answer = link.getresponse()
        text = answer.read(_ANSWER_LIMIT)
    except (OSError, http.client.HTTPException) as error:
        raise IdentityError(f"{name} cannot be asked: {error or type(error).__name__}") from error
    finally:
        link.close()
    if answer.status >= 300:
        said = text.decode("utf-8", "replace")[:300]
        raise HttpRefused(answer.status, f"{name} answered {answer.status} to {method}: {said}")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise IdentityError(f"{name} did not answer JSON to {method}") from error
    if not isinstance(value, dict):
        raise IdentityError(f"{name} did not answer a JSON object to {method}")
    return value
