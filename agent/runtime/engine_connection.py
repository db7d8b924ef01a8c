"""Connections to Docker's socket that can be broken off from another thread.

Imports the docker SDK: import it where an engine is really used.
"""

from __future__ import annotations

import socket
import weakref
from pathlib import Path
from typing import Any

import urllib3
import urllib3.connection
from docker import APIClient
from docker.transport import UnixHTTPAdapter

NEWEST_API = (1, 44)
"""Every engine since 25 speaks it, 29 nothing older; newer ones are asked in this one."""

OLDEST_API = (1, 41)


class UnsupportedEngine(Exception):
    """The engine is too old."""


class EngineConnection:
    """`client` of the SDK. `abort` ends what other threads wait for on it, for good."""

    def __init__(self, path: Path, api_version: str, timeout: int) -> None:
        self.client = APIClient(
            f"unix://{path}", version=api_version, timeout=timeout, max_pool_size=8
        )
        # Neither a proxy nor ~/.netrc has anything to do with a Unix socket.
        self.client.trust_env = False
        self._adapter = _Adapter(str(path), timeout)
        self.client.mount("http+docker://", self._adapter)

    def abort(self) -> None:
        self._adapter.sockets.aborted = True
        for peer in list(self._adapter.sockets):
            try:
                peer.shutdown(socket.SHUT_RDWR)
            except OSError:
                # It is no longer connected, which is what is wanted.
                continue

    def close(self) -> None:
        self.client.close()


def negotiate(path: Path, timeout: int) -> str:
    """The API version to speak. Raises what the SDK raises, and UnsupportedEngine."""
    connection = EngineConnection(path, "1.41", timeout)
    try:
        offered = str(connection.client.version(api_version=False).get("ApiVersion", ""))
    finally:
        connection.close()
    major, _, minor = offered.partition(".")
    version = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
    if version < OLDEST_API:
        raise UnsupportedEngine(
            f"the engine speaks API {offered or 'of no version'}; Docker 20.10 (API 1.41) or a "
            "later one is needed"
        )
    return ".".join(map(str, min(version, NEWEST_API)))


class _Sockets(weakref.WeakSet[socket.socket]):
    """Those that are open; no more of them once `aborted`."""

    aborted = False


class _Connection(urllib3.connection.HTTPConnection):
    def __init__(self, path: str, timeout: float, sockets: _Sockets) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path
        self._sockets = sockets

    def connect(self) -> None:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            peer.settimeout(self.timeout)
            self._sockets.add(peer)
            peer.connect(self._path)
            if self._sockets.aborted:
                raise ConnectionAbortedError("no longer wanted")
        except BaseException:
            # The SDK's own class leaves it to the collector.
            peer.close()
            raise
        self.sock = peer


class _Pool(urllib3.HTTPConnectionPool):
    def __init__(self, path: str, timeout: float, sockets: _Sockets) -> None:
        super().__init__("localhost", timeout=timeout, maxsize=8)
        self._unix = (path, timeout, sockets)

    def _new_conn(self) -> _Connection:
        return _Connection(*self._unix)


class _Adapter(UnixHTTPAdapter):
    def __init__(self, path: str, timeout: int) -> None:
        self.sockets = _Sockets()
        super().__init__(f"http+unix://{path}", timeout=timeout)

    def get_connection(self, url: Any, proxies: Any = None) -> Any:
        pools: Any = self.pools
        with pools.lock:
            pool = pools.get(url)
            if pool is None:
                pool = _Pool(self.socket_path, self.timeout, self.sockets)
                pools[url] = pool
        return pool
