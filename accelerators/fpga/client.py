"""The scoring process's end of the fabric protocol: a few connections, used by many threads."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BackendUnavailable, DeadlineExceeded
from ..tensors import Array
from .protocol import Frame, ProtocolError, raise_for, receive_frame, send_frame

CONNECTIONS = 4
CONNECT_SECONDS = 2.0
CALL_SECONDS = 30.0


class FabricGone(BackendUnavailable):
    """There is no connection to the fabric process (any more)."""


class FabricClient:
    """Calls to the fabric process at `path`. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._id = f"{os.getpid()}-{uuid.uuid4()}"
        self._slots = threading.BoundedSemaphore(CONNECTIONS)
        self._guard = threading.Lock()
        self._idle: list[socket.socket] = []
        self._generation = 0

    def call(
        self,
        header: Mapping[str, Any],
        tensors: Mapping[str, Array] | None = None,
        deadline: float | None = None,
    ) -> Frame:
        """Send one request and wait for its answer until `deadline` (monotonic).

        Raises FabricGone, DeadlineExceeded, or the error in the answer.
        """
        end = time.monotonic() + CALL_SECONDS if deadline is None else deadline
        if not self._slots.acquire(timeout=max(0.0, end - time.monotonic())):
            raise DeadlineExceeded("the deadline passed before the fabric was free")
        try:
            answer = self._exchange(header, tensors, end)
        except TimeoutError as error:
            raise DeadlineExceeded("the fabric did not answer within the deadline") from error
        finally:
            self._slots.release()
        raise_for(answer.header)
        return answer

    def watch(self) -> socket.socket:
        """A connection of its own, whose end tells that the fabric process is gone.

        Raises FabricGone.
        """
        return self._connect()

    def close(self) -> None:
        """Drop idle connections, and those in use when they come back."""
        with self._guard:
            idle, self._idle = self._idle, []
            self._generation += 1
        for connection in idle:
            connection.close()

    def _exchange(
        self, header: Mapping[str, Any], tensors: Mapping[str, Array] | None, end: float
    ) -> Frame:
        with self._guard:
            generation = self._generation
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = self._connect()
        try:
            # An answer may only follow its own request: after any failure the connection goes.
            with contextlib.ExitStack() as undo:
                undo.callback(connection.close)
                connection.settimeout(max(0.001, end - time.monotonic()))
                send_frame(connection, header, tensors)
                answer = receive_frame(connection, end)
                if answer is None:
                    raise ConnectionResetError("the fabric process closed the connection")
                with self._guard:
                    if generation == self._generation:
                        undo.pop_all()
                        self._idle.append(connection)
        except TimeoutError:
            raise
        except (OSError, ProtocolError) as error:
            raise FabricGone(
                f"lost the fabric process at {self._path} ({error}); it is started again by its "
                "supervisor"
            ) from error
        return answer

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(CONNECT_SECONDS)
            connection.connect(str(self._path))
            send_frame(connection, {"op": "hello", "client": self._id})
            answer = receive_frame(connection, time.monotonic() + CONNECT_SECONDS)
            if answer is None:
                raise ConnectionResetError("the fabric process closed the connection")
        except (OSError, ProtocolError) as error:
            connection.close()
            raise FabricGone(
                f"no fabric process at {self._path} ({error}); start it with gatelet run or the "
                "gatelet-fabric unit"
            ) from error
        return connection
