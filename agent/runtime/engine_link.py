"""The way to an engine: calls in a few threads, streams in one each, every failure explained."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .container import RuntimeFailed
from .engine_errors import explained, unreachable
from .thread_stream import thread_stream

if TYPE_CHECKING:
    from .engine_connection import EngineConnection

T = TypeVar("T")

Client = Any
"""`docker.APIClient`, whose stubs leave most of what is used here untyped."""


class EngineLink:
    """Talks to the engine at `socket`. Nothing is imported or connected before the first call."""

    def __init__(self, socket: Path, timeout: int) -> None:
        self._socket = socket
        self._timeout = timeout
        self._threads = ThreadPoolExecutor(4, "engine")
        self._lock = threading.Lock()
        self._api_version = ""
        self._connection: EngineConnection | None = None
        self._streams: set[EngineConnection] = set()

    async def close(self) -> None:
        with self._lock:
            streams = [*self._streams]
            connection, self._connection = self._connection, None
        for stream in streams:
            stream.abort()
        if connection is not None:
            connection.abort()
            connection.close()
        await asyncio.to_thread(self._threads.shutdown)

    async def call(self, doing: str, work: Callable[[Client], T]) -> T:
        def run() -> T:
            with self._explaining(doing):
                return work(self._shared().client)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, run)
        except RuntimeError as error:
            # The executor takes nothing more after `close`.
            raise RuntimeFailed(f"cannot {doing}: {error}", retryable=True) from error

    async def stream(
        self,
        doing: str,
        produce: Callable[[Client, Callable[[T], None]], None],
        *,
        host: str = "the registry",
    ) -> AsyncIterator[T]:
        """On a connection of its own, which ends with it."""
        connection: EngineConnection | None = None
        stopped = threading.Event()

        def run(put: Callable[[T], None]) -> None:
            nonlocal connection
            with self._explaining(doing, host):
                connection = self._connect()
                with self._lock:
                    self._streams.add(connection)
                try:
                    if not stopped.is_set():
                        produce(connection.client, put)
                finally:
                    with self._lock:
                        self._streams.discard(connection)
                    connection.close()

        def abort() -> None:
            stopped.set()
            if connection is not None:
                connection.abort()

        items = thread_stream(run, abort)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()  # type: ignore[attr-defined]

    def _shared(self) -> EngineConnection:
        with self._lock:
            if self._connection is not None:
                return self._connection
        fresh = self._connect()
        with self._lock:
            if self._connection is None:
                self._connection = fresh
            # One that another thread made meanwhile is as good, and this one has no socket yet.
            return self._connection

    def _connect(self) -> EngineConnection:
        from .engine_connection import EngineConnection, negotiate

        version = self._api_version or negotiate(self._socket, self._timeout)
        self._api_version = version
        return EngineConnection(self._socket, version, self._timeout)

    def _forget(self) -> None:
        """Another engine, of another version, may answer next time."""
        self._api_version = ""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            # Only of what is idle: other threads end what they have begun.
            connection.close()

    @contextlib.contextmanager
    def _explaining(self, doing: str, host: str = "the registry") -> Iterator[None]:
        """Everything the SDK raises becomes RuntimeFailed."""
        try:
            import requests
            import urllib3
            from docker.errors import APIError, DockerException, StreamParseError
        except ImportError as error:
            raise RuntimeFailed(
                f"cannot {doing}: {error}; install the SDK ('pip install gatelet[docker]')",
                retryable=False,
            ) from error
        from .engine_connection import UnsupportedEngine

        try:
            yield
        except APIError as error:
            said = str(error.explanation or error)
            if "is too old" in said:
                self._forget()
            raise explained(doing, said, status=error.status_code, host=host) from error
        except UnsupportedEngine as error:
            raise RuntimeFailed(f"cannot {doing}: {error}", retryable=True) from error
        except (
            DockerException,
            StreamParseError,
            requests.RequestException,
            urllib3.exceptions.HTTPError,
            OSError,
        ) as error:
            self._forget()
            raise unreachable(doing, str(self._socket), _innermost(error)) from error
        except (KeyError, TypeError, ValueError) as error:
            raise RuntimeFailed(
                f"cannot {doing}: the engine's answer is not understood ({error!r})",
                retryable=True,
            ) from error


def inspected(client: Client, name: str) -> dict[str, Any] | None:
    from docker.errors import NotFound

    try:
        return dict(client.inspect_container(name))
    except NotFound:
        return None


def _innermost(error: BaseException) -> str:
    """What is wrong, without the layers of libraries around it."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = str(error) or type(error).__name__
    return re.sub(r"<[^>]*object at 0x[0-9a-f]+>", "", text)
