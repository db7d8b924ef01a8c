"""Shadow traffic: copies of answered requests for another instance, compared and never returned.

Nothing here may cost a client anything: copies wait in a bounded queue after the answer is out, and
are scored by one thread that yields to every other.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ...accelerators.tensors import Array
from .batching import LAST_PRIORITY
from .errors import ScoringError
from .instances import Instance
from .routing import Target

log = logging.getLogger(__name__)

MOST_COPIES = 64
MOST_BYTES = 64 * 1024 * 1024
# By then the answer is on its way to the client.
_HEAD_START = 0.005
_DEADLINE = 10.0
_NICE = 10


@dataclass(frozen=True, slots=True)
class Copy:
    """A request, and what its client was answered. `at`: monotonic, when that was."""

    target: Target[Instance]
    inputs: Mapping[str, Array]
    answer: Mapping[str, Array]
    at: float

    @property
    def size(self) -> int:
        return sum(map(_bytes, (*self.inputs.values(), *self.answer.values())))


def _bytes(array: Array) -> int:
    # An array of texts holds pointers only, and they may all point to long ones.
    texts = array.ravel().tolist() if array.dtype == np.object_ else ()
    return array.nbytes + sum(map(len, texts))


def difference(answer: Mapping[str, Array], other: Mapping[str, Array]) -> float:
    """The largest difference of two answers to one request, in parts of (1 + |answer|).

    Infinity where shapes or texts differ, or only one of two numbers is finite; of an integer or
    boolean tensor as of numbers.
    """
    largest = 0.0
    for name, have in answer.items():
        found = other.get(name)
        if found is None or found.shape != have.shape:
            return float("inf")
        if have.dtype == np.object_ or found.dtype == np.object_:
            if not np.array_equal(have, found):
                return float("inf")
            continue
        one, two = have.astype(np.float64), found.astype(np.float64)
        same = (one == two) | (np.isnan(one) & np.isnan(two))
        with np.errstate(invalid="ignore", over="ignore"):
            off = np.where(same, 0.0, np.abs(one - two) / (1.0 + np.abs(one)))
        largest = max(largest, float(np.max(np.nan_to_num(off, nan=np.inf), initial=0.0)))
    return largest


class Mirror:
    """Thread-safe. Its thread starts with the first copy."""

    def __init__(self, most_copies: int = MOST_COPIES, most_bytes: int = MOST_BYTES) -> None:
        self._most_copies = most_copies
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._queue: deque[Copy] = deque()
        self._bytes = 0
        self._thread: threading.Thread | None = None
        self._busy = False
        self._closed = False

    def offer(
        self,
        targets: Sequence[Target[Instance]],
        inputs: Mapping[str, Array],
        answer: Mapping[str, Array],
    ) -> None:
        """Take a copy for each target, or count it as dropped. Returns at once, never raises."""
        for target in targets:
            copy = Copy(target, inputs, answer, time.monotonic())
            if not self._take(copy):
                target.instance.mirrored.dropped()

    def _take(self, copy: Copy) -> bool:
        with self._lock:
            if (
                self._closed
                or len(self._queue) >= self._most_copies
                or self._bytes + copy.size > self._most_bytes
            ):
                return False
            if self._thread is None:
                thread = threading.Thread(target=self._serve, name="mirror", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    return False
                self._thread = thread
            self._queue.append(copy)
            self._bytes += copy.size
            self._arrived.notify()
            return True

    def idle(self) -> bool:
        """Whether every copy taken was compared."""
        with self._lock:
            return not self._queue and not self._busy

    def close(self) -> None:
        """Drop what waits. Idempotent."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._bytes = 0
            self._arrived.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout=1.0)

    def _serve(self) -> None:
        # Of this thread alone, which on Linux is what a thread's id stands for.
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while True:
            with self._lock:
                while not self._queue and not self._closed:
                    self._arrived.wait()
                if self._closed:
                    return
                early = self._queue[0].at + _HEAD_START - time.monotonic()
                if early > 0:
                    self._arrived.wait(early)
                    continue
                copy = self._queue.popleft()
                self._bytes -= copy.size
                self._busy = True
            try:
                _score(copy)
            except Exception:
                # The next copy is as good as any: the log has this one's defect whole.
                log.exception("a mirrored request hit a defect of the server")
                copy.target.instance.mirrored.failed()
            finally:
                with self._lock:
                    self._busy = False


def _score(copy: Copy) -> None:
    instance = copy.target.instance
    if not instance.begin():
        instance.mirrored.dropped()
        return
    try:
        deadline = time.monotonic() + _DEADLINE
        answer = instance.run(copy.inputs, tuple(copy.answer), deadline, LAST_PRIORITY)
    except ScoringError:
        instance.mirrored.failed()
    else:
        off = difference(copy.answer, answer)
        instance.mirrored.compared(off, differs=off > copy.target.tolerance)
    finally:
        instance.end()
