"""Connections to Docker's socket that can be broken off from another thread.

Imports the docker SDK: import it where an engine is really used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import urllib3
import urllib3.connection
from docker import APIClient
from docker.errors import APIError, DockerException, StreamParseError
from docker.transport import UnixHTTPAdapter

from .engine_reader import EngineRefused, Sockets


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
        self._adapter.sockets.abort()

    def close(self) -> None:
        self.client.close()


@contextlib.contextmanager
def sdk_errors() -> Iterator[None]:
    """What the SDK raises, as EngineRefused and OSError."""
    try:
        yield
    except APIError as error:
        raise EngineRefused(error.status_code, str(error.explanation or error)) from error
    except (DockerException, StreamParseError, urllib3.exceptions.HTTPError) as error:
        raise ConnectionError(str(error)) from error


class _Connection(urllib3.connection.HTTPConnection):
    def __init__(self, path: str, timeout: float, sockets: Sockets) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path
        self._sockets = sockets

    def connect(self) -> None:
        # The SDK's own class leaves a socket that does not connect to the collector.
        self.sock = self._sockets.open(self._path, self.timeout)


class _Pool(urllib3.HTTPConnectionPool):
    def __init__(self, path: str, timeout: float, sockets: Sockets) -> None:
        super().__init__("localhost", timeout=timeout, maxsize=8)
        self._unix = (path, timeout, sockets)

    def _new_conn(self) -> _Connection:
        return _Connection(*self._unix)


class _Adapter(UnixHTTPAdapter):
    def __init__(self, path: str, timeout: int) -> None:
        self.sockets = Sockets()
        super().__init__(f"http+unix://{path}", timeout=timeout)

    def get_connection(self, url: Any, proxies: Any = None) -> Any:
        pools: Any = self.pools
        with pools.lock:
            pool = pools.get(url)
            if pool is None:
                pool = _Pool(self.socket_path, self.timeout, self.sockets)
                pools[url] = pool
        return pool
