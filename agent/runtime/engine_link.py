"""The way to an engine: calls in a few threads, streams in one each, every failure explained."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .container import RuntimeFailed
from .engine_errors import explained, unreachable
from .engine_reader import EngineReader, EngineRefused, UnsupportedEngine
from .thread_stream import thread_stream

if TYPE_CHECKING:
    from .engine_connection import EngineConnection

T = TypeVar("T")

Client = Any
"""`docker.APIClient`, whose stubs leave most of what is used here untyped."""


class EngineLink:
    """Talks to the engine at `socket`: reads by `reader`, and changes by the SDK, which is not
    imported before the first `call` or `stream`. Nothing is connected before it is used."""

    def __init__(self, socket: Path, timeout: int) -> None:
        self._socket = socket
        self._timeout = timeout
        self._threads = ThreadPoolExecutor(4, "engine")
        self._lock = threading.Lock()
        self._connection: EngineConnection | None = None
        self._in_use: list[EngineConnection | EngineReader] = []
        self.reader = EngineReader(socket, timeout)

    async def close(self) -> None:
        with self._lock:
            # Also those that were given up for new calls while an old one still waits on them.
            in_use = [*self._in_use]
            connection, self._connection = self._connection, None
        for one in (*in_use, self.reader):
            one.abort()
        if connection is not None:
            connection.abort()
            connection.close()
        await asyncio.to_thread(self._threads.shutdown)

    async def read(self, doing: str, work: Callable[[EngineReader], T]) -> T:
        return await self._in_thread(doing, lambda: work(self.reader))

    async def call(self, doing: str, work: Callable[[Client], T]) -> T:
        def run() -> T:
            from .engine_connection import sdk_errors

            with sdk_errors():
                connection = self._shared()
                with self._using(connection):
                    return work(connection.client)

        return await self._in_thread(doing, run)

    async def long_call(self, doing: str, work: Callable[[Client], None]) -> None:
        """A call that may take minutes: it keeps no other waiting and ends when it is cancelled."""

        def produce(client: Client, put: Callable[[None], None]) -> None:
            work(client)

        async for _ in self.stream(doing, produce):
            raise AssertionError("it gives nothing")

    async def watch(
        self, doing: str, produce: Callable[[EngineReader, Callable[[T], None]], None]
    ) -> AsyncIterator[T]:
        """What `produce` reads on a connection of its own, which ends with it."""
        reader = EngineReader(self._socket, self._timeout)

        def run(put: Callable[[T], None]) -> None:
            with self._explaining(doing), self._using(reader):
                produce(reader, put)

        items = thread_stream(run, reader.abort)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()  # type: ignore[attr-defined]

    async def stream(
        self,
        doing: str,
        produce: Callable[[Client, Callable[[T], None]], None],
        *,
        host: str = "the registry",
    ) -> AsyncIterator[T]:
        """The same through the SDK."""
        connection: EngineConnection | None = None
        stopped = threading.Event()

        def run(put: Callable[[T], None]) -> None:
            nonlocal connection
            with self._explaining(doing, host):
                from .engine_connection import sdk_errors

                with (
                    sdk_errors(),
                    contextlib.closing(self._connect()) as connection,
                    self._using(connection),
                ):
                    if not stopped.is_set():
                        produce(connection.client, put)

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

    async def _in_thread(self, doing: str, work: Callable[[], T]) -> T:
        def run() -> T:
            with self._explaining(doing):
                return work()

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, run)
        except RuntimeError as error:
            # The executor takes nothing more after `close`.
            raise RuntimeFailed(f"cannot {doing}: {error}", retryable=True) from error

    @contextlib.contextmanager
    def _using(self, connection: EngineConnection | EngineReader) -> Iterator[None]:
        with self._lock:
            self._in_use.append(connection)
        try:
            yield
        finally:
            with self._lock:
                self._in_use.remove(connection)

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
        from .engine_connection import EngineConnection

        return EngineConnection(self._socket, self.reader.api_version(), self._timeout)

    def _forget(self) -> None:
        """Another engine, of another version, may answer next time."""
        self.reader.forget()
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            # Only of what is idle: other threads end what they have begun.
            connection.close()

    @contextlib.contextmanager
    def _explaining(self, doing: str, host: str = "the registry") -> Iterator[None]:
        """Every failure becomes RuntimeFailed."""
        try:
            yield
        except ImportError as error:
            raise RuntimeFailed(
                f"cannot {doing}: {error}; install the SDK ('pip install gatelet[docker]')",
                retryable=False,
            ) from error
        except EngineRefused as error:
            if "is too old" in error.said:
                self._forget()
            raise explained(doing, error.said, status=error.status, host=host) from error
        except UnsupportedEngine as error:
            raise RuntimeFailed(f"cannot {doing}: {error}", retryable=True) from error
        except (OSError, HTTPException) as error:
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
