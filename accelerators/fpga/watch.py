"""What the fabric process tells of itself, for those who must not wait for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from ..errors import BackendError
from .client import FabricClient

_LOG = logging.getLogger(__name__)

WATCH_SECONDS = 1.0
ANSWER_SECONDS = 1.0


class FabricWatch:
    """Asks `client` again and again, once somebody wants to know.

    The client is this object's own: those of sessions may all be busy when it matters most.
    """

    def __init__(self, client: FabricClient) -> None:
        self._client = client
        self._guard = threading.Lock()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._last: Mapping[str, Any] | None = {}

    def read(self) -> Mapping[str, Any] | None:
        """Its status of a second ago; None while it is away, empty before it was asked."""
        with self._guard:
            if self._thread is None and not self._ending.is_set():
                self._thread = threading.Thread(target=self._ask, name="fpga-watch", daemon=True)
                self._thread.start()
            return self._last

    def close(self) -> None:
        """End the thread and the connection. Idempotent."""
        with self._guard:
            self._ending.set()
            thread, self._thread = self._thread, None
        self._client.close()
        if thread is not None:
            thread.join(timeout=2.0)
        self._client.close()

    def _ask(self) -> None:
        while True:
            told: Mapping[str, Any] | None = None
            try:
                answer = self._client.call({"op": "status"}, time.monotonic() + ANSWER_SECONDS)
                status = answer.get("status")
                told = status if isinstance(status, Mapping) else None
            except BackendError as error:
                _LOG.debug("the fabric process does not tell how it is: %s", error)
            self._last = told
            if self._ending.wait(WATCH_SECONDS):
                return
