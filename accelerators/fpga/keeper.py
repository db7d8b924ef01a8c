"""Keeps sessions of the FPGA backend alive while the fabric process comes and goes."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Sequence
from typing import Protocol

from ..errors import BackendError
from .client import FabricClient, FabricGone

RETRY_SECONDS = (0.05, 0.5)
"""First and longest pause between attempts to reach or revive the fabric."""


class Revivable(Protocol):
    """What the keeper needs of a session."""

    @property
    def healthy(self) -> bool: ...

    def fail(self, why: str) -> None: ...

    def revive(self) -> None: ...


class Keeper:
    """One thread, running while there are sessions.

    It holds a connection of its own, so that the end of the fabric process is noticed at once
    and not by the next request; and it revives unhealthy sessions, with growing pauses.
    """

    def __init__(self, client: FabricClient) -> None:
        self._client = client
        self._guard = threading.Lock()
        self._sessions: list[Revivable] = []
        self._thread: threading.Thread | None = None
        self._bell: socket.socket | None = None

    def add(self, session: Revivable) -> None:
        """Look after `session` from now on."""
        with self._guard:
            self._sessions.append(session)
            if self._thread is None:
                self._bell, ear = socket.socketpair()
                self._bell.setblocking(False)
                self._thread = threading.Thread(
                    target=self._keep, args=(ear,), name="fpga-keeper", daemon=True
                )
                self._thread.start()
        self.wake()

    def remove(self, session: Revivable) -> None:
        """Look after `session` no more; the thread ends with the last one."""
        with self._guard:
            if session in self._sessions:
                self._sessions.remove(session)
            last = not self._sessions
        if last:
            self.close()

    def wake(self) -> None:
        """Have the thread look at its sessions now."""
        with self._guard:
            bell = self._bell
            if bell is not None:
                # A full buffer means that the thread has been woken already.
                with contextlib.suppress(OSError):
                    bell.send(b"!")

    def close(self) -> None:
        """End the thread. Idempotent."""
        with self._guard:
            bell, self._bell = self._bell, None
            thread, self._thread = self._thread, None
        if bell is not None:
            bell.close()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=2.0)

    def _keep(self, ear: socket.socket) -> None:
        watch: socket.socket | None = None
        pause = RETRY_SECONDS[0]
        try:
            while True:
                watch = self._connected(watch)
                well = watch is not None and self._revive()
                pause = RETRY_SECONDS[0] if well else min(pause * 2, RETRY_SECONDS[1])
                readable = _wait_for((ear, watch), None if well else pause)
                if ear in readable and not ear.recv(4096):
                    return
                if watch is not None and watch in readable:
                    watch.close()
                    watch = None
                    pause = RETRY_SECONDS[0] / 2
                    self._client.close()
                    self._fail("the fabric process ended; it is started again by its supervisor")
        finally:
            ear.close()
            if watch is not None:
                watch.close()

    def _connected(self, watch: socket.socket | None) -> socket.socket | None:
        if watch is None:
            try:
                watch = self._client.watch()
            except FabricGone as error:
                self._fail(str(error))
        return watch

    def _snapshot(self) -> list[Revivable]:
        with self._guard:
            return list(self._sessions)

    def _fail(self, why: str) -> None:
        for session in self._snapshot():
            session.fail(why)

    def _revive(self) -> bool:
        """Whether all sessions are healthy after trying those that were not."""
        well = True
        for session in self._snapshot():
            if session.healthy:
                continue
            try:
                session.revive()
            except BackendError as error:
                session.fail(str(error))
                well = False
        return well


def _wait_for(sources: Sequence[socket.socket | None], seconds: float | None) -> set[socket.socket]:
    # Not select: in a process with more than 1024 open files it fails.
    poll = select.poll()
    by_number = {source.fileno(): source for source in sources if source is not None}
    for number in by_number:
        poll.register(number, select.POLLIN)
    found = poll.poll(None if seconds is None else seconds * 1000)
    return {by_number[number] for number, _ in found}
