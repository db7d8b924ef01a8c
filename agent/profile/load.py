"""A closed-loop load: callers that send the next request when they have their answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

_LEAST_REQUESTS = 5
_LONGEST_FACTOR = 10.0
_WARM_UP = 0.2


class AskFailed(Exception):
    """A request was not answered as it should be; the message says why."""


@dataclass(frozen=True, slots=True)
class Timing:
    """`times`: seconds of each answered request, sorted. `cpu`: seconds of the server's, or None.
    `errors`: requests that failed, `error` the first one's reason."""

    times: tuple[float, ...]
    seconds: float
    cpu: float | None
    errors: int
    error: str

    def percentile(self, percent: float) -> float:
        """Seconds; 0 without any answer."""
        if not self.times:
            return 0.0
        return self.times[min(len(self.times) - 1, int(len(self.times) * percent / 100))]


def closed_loop(
    ask: Callable[[], None],
    concurrency: int,
    seconds: float,
    cpu: Callable[[], float | None],
) -> Timing:
    """`concurrency` threads that call `ask` for `seconds`, and for five requests at least.

    `ask` raises AskFailed. `cpu`: CPU seconds that the server has spent so far.
    """
    callers = [_Caller(ask) for _ in range(concurrency)]
    for phase in (_WARM_UP * seconds, seconds):
        before, began = cpu(), time.perf_counter()
        threads = [threading.Thread(target=one.run, args=(phase,), daemon=True) for one in callers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took, after = time.perf_counter() - began, cpu()
    times = sorted(value for one in callers for value in one.times)
    failed = [one for one in callers if one.errors]
    return Timing(
        tuple(times),
        took,
        None if before is None or after is None else after - before,
        sum(one.errors for one in failed),
        failed[0].error if failed else "",
    )


class _Caller:
    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
        self.times: list[float] = []
        self.errors = 0
        self.error = ""

    def run(self, seconds: float) -> None:
        self.times, self.errors = [], 0
        clock = time.perf_counter
        began = now = clock()
        while True:
            try:
                self._ask()
            except AskFailed as error:
                self.error = self.error if self.errors else str(error)
                self.errors += 1
            else:
                self.times.append(clock() - now)
            now = clock()
            spent = now - began
            enough = len(self.times) >= _LEAST_REQUESTS or self.errors >= _LEAST_REQUESTS
            if spent >= seconds and (enough or spent >= seconds * _LONGEST_FACTOR):
                return
