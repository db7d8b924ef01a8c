"""What a peer of the HTTP/2 transport has time for, at a time that the test sets."""

from __future__ import annotations

from typing import Any

from gatelet.agent.scoring.grpc_server import GrpcLimits
from gatelet.agent.scoring.h2_core import Core
from gatelet.agent.scoring.h2_headers import HeaderReader
from gatelet.agent.scoring.h2_timeouts import Patience
from gatelet.agent.scoring.http_types import HttpLimits

HTTP = HttpLimits(stalled=5.0, linger=2.0, body_rate=1000)


class Link:
    """A connection, as far as its time-outs look at it; nothing was sent on it."""

    closing = False

    def __init__(self) -> None:
        sink: Any = None
        self.core: Core[Any] = Core(sink, HeaderReader(tuple, 65536))
        self.waiting = 0
        self.aborted = False

    def unsent(self) -> int:
        return self.waiting

    def abort(self) -> None:
        self.aborted = True


def lingering(waiting: int) -> tuple[Link, Patience, float]:
    """A connection that was ended just now, with so many bytes of its answers not yet taken."""
    link = Link()
    connection: Any = link
    patience = Patience(connection, HTTP, GrpcLimits())
    patience.lingering = True
    patience.written = link.waiting = waiting
    return link, patience, patience.since


def test_a_last_answer_that_is_taken_slowly_is_taken_whole() -> None:
    link, patience, start = lingering(100_000)
    for second in range(50):
        link.waiting -= 2000
        patience.sweep(start + second)
        assert not link.aborted
    assert link.waiting == 0
    # Time to say goodbye, from then on.
    patience.sweep(start + 49.5)
    assert not link.aborted
    patience.sweep(start + 51.5)
    assert link.aborted


def test_a_last_answer_that_nobody_takes_is_given_up() -> None:
    link, patience, start = lingering(100_000)
    patience.sweep(start)
    patience.sweep(start + 4.9)
    assert not link.aborted
    patience.sweep(start + 5.1)
    assert link.aborted
