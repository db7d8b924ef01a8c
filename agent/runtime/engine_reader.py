"""Reads from an engine by its plain HTTP API, on the standard library.

An agent at rest looks at its engine and does nothing to it, and need not hold the SDK in memory for
that: 6 MB. What changes something goes through the SDK (engine_connection.py).
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import weakref
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

NEWEST_API = (1, 44)
"""Every engine since 25 speaks it, 29 nothing older; newer ones are asked in this one."""

OLDEST_API = (1, 41)

_MAX_EVENT = 1 << 20


class UnsupportedEngine(Exception):
    """The engine is too old."""


class EngineRefused(Exception):
    """The engine's answer is an HTTP error, explained by `said`. `status` is None in a stream."""

    def __init__(self, status: int | None, said: str) -> None:
        super().__init__(said)
        self.status = status
        self.said = said


class Sockets:
    """Those that are open; no more of them once aborted. For several threads."""

    def __init__(self) -> None:
        self._open: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._aborted = False

    def open(self, path: str, timeout: float | None) -> socket.socket:
        """Raises OSError."""
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            peer.settimeout(timeout)
            with self._lock:
                self._open.add(peer)
            peer.connect(path)
            if self._aborted:
                raise ConnectionAbortedError("no longer wanted")
        except BaseException:
            # Nobody else has this socket yet. Whatever it was is raised again.
            peer.close()
            raise
        return peer

    def abort(self) -> None:
        self._aborted = True
        with self._lock:
            # What another thread opens meanwhile would end the reading of the set.
            known = list(self._open)
        for peer in known:
            try:
                peer.shutdown(socket.SHUT_RDWR)
            except OSError:
                # It is no longer connected, which is what is wanted.
                continue


class EngineReader:
    """The engine at `path`, for several threads; `timeout`: seconds that it may be silent.

    Every method raises OSError, HTTPException, EngineRefused and, when the answer is no JSON,
    ValueError. `abort` ends what other threads wait for here, for good.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self._path = str(path)
        self._timeout = timeout
        self._api_version = ""
        self._sockets = Sockets()

    def abort(self) -> None:
        self._sockets.abort()

    def api_version(self) -> str:
        """The version to speak. Raises UnsupportedEngine too."""
        known = self._api_version
        if known:
            return known
        offered = str(self._json("/version").get("ApiVersion", ""))
        major, _, minor = offered.partition(".")
        version = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
        if version < OLDEST_API:
            raise UnsupportedEngine(
                f"the engine speaks API {offered or 'of no version'}; Docker 20.10 (API 1.41) or a "
                "later one is needed"
            )
        known = self._api_version = ".".join(map(str, min(version, NEWEST_API)))
        return known

    def forget(self) -> None:
        """Another engine, of another version, may answer next time."""
        self._api_version = ""

    def version(self) -> dict[str, Any]:
        return dict(self._get("/version"))

    def info(self) -> dict[str, Any]:
        return dict(self._get("/info"))

    def containers(self, filters: Mapping[str, list[str]]) -> list[dict[str, Any]]:
        """Running or not."""
        return list(self._get("/containers/json", all="1", filters=json.dumps(filters)))

    def images(self) -> list[dict[str, Any]]:
        return list(self._get("/images/json"))

    def inspect_container(self, name: str) -> dict[str, Any] | None:
        return self._found(f"/containers/{quote(name, safe='/:')}/json")

    def inspect_image(self, name: str) -> dict[str, Any] | None:
        return self._found(f"/images/{quote(name, safe='/:')}/json")

    @contextlib.contextmanager
    def events(self, filters: Mapping[str, list[str]]) -> Iterator[Iterator[bytes]]:
        """One line for each event, from the moment that this is entered."""
        path = f"/v{self.api_version()}/events?{urlencode({'filters': json.dumps(filters)})}"
        with self._answer(path, None) as answer:
            lines = iter(lambda: answer.readline(_MAX_EVENT), b"")
            yield (line for line in lines if line.strip())

    def _found(self, path: str) -> dict[str, Any] | None:
        try:
            return dict(self._get(path))
        except EngineRefused as error:
            if error.status == 404:
                return None
            raise

    def _get(self, path: str, **query: str) -> Any:
        return self._json(f"/v{self.api_version()}{path}?{urlencode(query)}")

    def _json(self, path: str) -> Any:
        with self._answer(path, self._timeout) as answer:
            return json.loads(answer.read())

    @contextlib.contextmanager
    def _answer(self, path: str, timeout: float | None) -> Iterator[HTTPResponse]:
        connection = _Connection(self._path, timeout, self._sockets)
        try:
            connection.request("GET", path)
            with connection.getresponse() as answer:
                if answer.status >= 400:
                    raise EngineRefused(answer.status, _said(answer.read()))
                yield answer
        finally:
            connection.close()


class _Connection(HTTPConnection):
    def __init__(self, path: str, timeout: float | None, sockets: Sockets) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path
        self._sockets = sockets

    def connect(self) -> None:
        self.sock = self._sockets.open(self._path, self.timeout)


def _said(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (KeyError, TypeError, ValueError):
        return body.decode(errors="replace").strip()
