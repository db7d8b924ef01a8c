"""The outbox: durable, ordered, bounded, honest about what it drops."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from gatelet.agent.outbox import (
    MESSAGE_LIMIT_BYTES,
    Limits,
    Outbox,
    OutboxError,
    Telemetry,
    overflow,
)
from gatelet.agent.outbox_sender import OutboxSender
from gatelet.agent.twin.transport import TransportUnavailable, TwinSink
from gatelet.simulator.virtual_time import VirtualClock, run
from hypothesis import given, settings
from hypothesis import strategies as st

FOREVER = Limits(ttl_seconds=None)


@dataclass
class ManualClock(VirtualClock):
    time: float = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.time = 100.0

    def monotonic(self) -> float:
        return self.time


@dataclass
class LinkDouble:
    """The other side: takes messages, or fails with what `errors` say, in turn."""

    received: list[tuple[str, bytes]] = field(default_factory=list)
    errors: list[Exception | None] = field(default_factory=list)
    lose_acknowledgements: int = 0
    up: bool = True
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    name = "double"

    async def run(self, sink: TwinSink) -> None:
        await asyncio.Event().wait()

    async def report(self, patch: Mapping[str, Any]) -> None: ...

    async def send(self, body: bytes, properties: Mapping[str, str]) -> None:
        if not self.up:
            raise TransportUnavailable("down")
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        self.received.append((properties["$.mid"], body))
        self.arrived.set()
        if self.lose_acknowledgements:
            self.lose_acknowledgements -= 1
            raise TransportUnavailable("no acknowledgement")


@pytest.fixture
async def outbox(tmp_path: Path) -> AsyncIterator[Outbox]:
    outbox = Outbox(tmp_path / "outbox.db", ManualClock(), FOREVER)
    yield outbox
    await outbox.close()


def drain(outbox: Outbox) -> list[bytes]:
    bodies = []
    while (held := outbox.head()) is not None:
        bodies.append(held.body)
        outbox.acknowledge(held.sequence)
    return bodies


async def test_what_is_put_can_be_sent_with_its_type_and_a_lasting_id(
    outbox: Outbox, tmp_path: Path
) -> None:
    message_id = await outbox.put(Telemetry(b"{}", properties={"k": "v"}))
    held = outbox.head()
    assert held is not None
    assert held.body == b"{}"
    assert held.properties == {
        "k": "v",
        "$.mid": message_id,
        "$.ct": "application/json",
        "$.ce": "utf-8",
    }
    await outbox.close()
    again = Outbox(tmp_path / "outbox.db", ManualClock(), FOREVER)
    assert again.head() == held
    await again.close()


async def test_urgent_first_and_each_priority_in_its_order(outbox: Outbox) -> None:
    for priority, body in ((5, b"a"), (9, b"b"), (0, b"c"), (5, b"d"), (0, b"e")):
        await outbox.put(Telemetry(body, priority=priority))
    assert drain(outbox) == [b"c", b"e", b"a", b"d", b"b"]


async def test_many_at_once_share_commits(tmp_path: Path) -> None:
    commits: list[str] = []
    outbox = Outbox(tmp_path / "o.db", ManualClock(), FOREVER, fault=commits.append)
    ids = await asyncio.gather(*(outbox.put(Telemetry(b"%d" % n)) for n in range(200)))
    assert len(set(ids)) == 200
    assert commits.count("committed") <= 3
    assert drain(outbox) == [b"%d" % n for n in range(200)]
    await outbox.close()


async def test_a_key_is_stored_once_also_after_it_was_sent_and_after_a_restart(
    outbox: Outbox, tmp_path: Path
) -> None:
    first = await outbox.put(Telemetry(b"1", key="started/7"))
    assert drain(outbox) == [b"1"]
    await outbox.close()
    again = Outbox(tmp_path / "outbox.db", ManualClock(), FOREVER)
    assert await again.put(Telemetry(b"2", key="started/7")) == first
    assert again.head() is None
    await again.close()


async def test_ids_are_never_used_twice(outbox: Outbox) -> None:
    first = await outbox.put(Telemetry(b"1"))
    drain(outbox)
    await outbox.tidy()
    assert outbox.status().messages == 0
    assert await outbox.put(Telemetry(b"2")) != first


async def test_over_the_limit_the_oldest_of_the_lowest_priority_go_and_are_counted(
    tmp_path: Path,
) -> None:
    size = Telemetry(b"x" * 1000).size
    outbox = Outbox(tmp_path / "o.db", ManualClock(), Limits(4 * size, None))
    for priority, letter in ((3, b"a"), (7, b"b"), (7, b"c"), (3, b"d"), (0, b"e")):
        await outbox.put(Telemetry(letter * 1000, priority=priority))
    status = outbox.status()
    assert (status.messages, status.bytes, dict(status.dropped)) == (4, 4 * size, {"overflow": 1})
    # The new one is itself the least important.
    await outbox.put(Telemetry(b"f" * 1000, priority=9))
    assert [body[:1] for body in drain(outbox)] == [b"e", b"a", b"d", b"c"]
    assert outbox.status().dropped == {"overflow": 2}
    await outbox.close()
    again = Outbox(tmp_path / "o.db", ManualClock(), Limits(4 * size, None))
    assert again.status().dropped == {"overflow": 2}
    await again.close()


async def test_messages_expire_by_time_passed_not_by_the_wall_clock(tmp_path: Path) -> None:
    clock = ManualClock()
    outbox = Outbox(tmp_path / "o.db", clock, Limits(ttl_seconds=100))
    await outbox.put(Telemetry(b"default"))
    await outbox.put(Telemetry(b"own", ttl_seconds=10))
    from datetime import timedelta

    clock.skew = timedelta(days=3650)
    await outbox.tidy()
    assert outbox.status().messages == 2
    clock.time += 11
    await outbox.tidy()
    assert outbox.status().dropped == {"expired": 1}
    await outbox.close()
    # A reboot starts the monotonic clock anew; the age goes on.
    clock = ManualClock()
    again = Outbox(tmp_path / "o.db", clock, Limits(ttl_seconds=100))
    assert again.status().oldest_seconds == pytest.approx(11, abs=0.01)
    clock.time += 80
    await again.tidy()
    assert again.status().messages == 1
    clock.time += 10
    await again.tidy()
    assert again.status().dropped == {"expired": 2}
    assert again.head() is None
    await again.close()


async def test_new_limits_count_for_what_is_queued(outbox: Outbox) -> None:
    for number in range(10):
        await outbox.put(Telemetry(b"%d" % number))
    outbox.set_limits(Limits(3 * Telemetry(b"0").size, None))
    await outbox.settle()
    assert drain(outbox) == [b"7", b"8", b"9"]


async def test_what_no_retry_can_send_is_refused_at_once(outbox: Outbox) -> None:
    with pytest.raises(ValueError, match="256 KB"):
        await outbox.put(Telemetry(b"x" * MESSAGE_LIMIT_BYTES))
    with pytest.raises(ValueError, match=r"0 \(first\) to 9"):
        await outbox.put(Telemetry(b"x", priority=10))
    assert outbox.status().messages == 0


async def test_a_full_disk_is_told_and_nothing_stored_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "o.db"
    outbox = Outbox(path, ManualClock(), FOREVER)
    stored = [await outbox.put(Telemetry(b"a" * 1000)) for _ in range(3)]
    assert outbox._file._writer is not None
    (pages,) = outbox._file._writer.execute("PRAGMA page_count").fetchone()
    outbox._file._writer.execute(f"PRAGMA max_page_count={pages + 1}")
    with pytest.raises(OutboxError, match="full"):
        await outbox.put(Telemetry(b"b" * 100_000))
    assert "free some space" in outbox.status().error
    assert outbox.status().messages == 3
    held = outbox.head()
    assert held is not None
    assert held.properties["$.mid"] == stored[0]
    outbox._file._writer.execute("PRAGMA max_page_count=1073741823")
    await outbox.put(Telemetry(b"c"))
    assert outbox.status().error == ""
    assert [body[:1] for body in drain(outbox)] == [b"a", b"a", b"a", b"c"]
    await outbox.close()


async def test_a_disk_that_is_full_at_commit_keeps_what_was_acknowledged_from_being_resent(
    tmp_path: Path,
) -> None:
    broken = False

    def fault(point: str) -> None:
        if broken and point == "dropped":
            raise sqlite3.OperationalError("database or disk is full")

    outbox = Outbox(tmp_path / "o.db", ManualClock(), FOREVER, fault=fault)
    for letter in (b"a", b"b"):
        await outbox.put(Telemetry(letter))
    broken = True
    held = outbox.head()
    assert held is not None
    outbox.acknowledge(held.sequence)
    await outbox.tidy()
    assert "full" in outbox.status().error
    assert drain(outbox) == [b"b"]
    broken = False
    await outbox.tidy()
    assert (outbox.status().messages, outbox.status().error) == (0, "")
    await outbox.close()
    again = Outbox(tmp_path / "o.db", ManualClock(), FOREVER)
    assert again.head() is None
    await again.close()


async def test_a_file_that_cannot_be_opened_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "place"
    folder.write_text("a file where the folder should be")
    outbox = Outbox(folder / "o.db", ManualClock(), FOREVER)
    assert outbox.head() is None
    assert "cannot be used" in outbox.status().error
    with pytest.raises(OutboxError):
        await outbox.put(Telemetry(b"lost"))
    folder.unlink()
    await outbox.put(Telemetry(b"kept"))
    assert drain(outbox) == [b"kept"]
    await outbox.close()


async def test_a_damaged_file_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "o.db"
    path.write_bytes(b"no database at all " * 100)
    outbox = Outbox(path, ManualClock(), FOREVER)
    await outbox.put(Telemetry(b"new"))
    assert drain(outbox) == [b"new"]
    assert (tmp_path / "o.db.damaged").read_bytes().startswith(b"no database")
    await outbox.close()


async def test_an_acknowledgement_from_before_the_damage_removes_nothing_after_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "o.db"
    outbox = Outbox(path, ManualClock(), FOREVER)
    for body in (b"1", b"2"):
        await outbox.put(Telemetry(body))
    on_its_way = outbox.head()
    assert on_its_way is not None
    outbox._failed(sqlite3.DatabaseError("database disk image is malformed"))
    await outbox.put(Telemetry(b"new"))
    outbox.acknowledge(on_its_way.sequence)
    await outbox.tidy()
    assert drain(outbox) == [b"new"]
    await outbox.close()


async def test_a_newer_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "o.db"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    outbox = Outbox(path, ManualClock(), FOREVER)
    with pytest.raises(OutboxError, match="newer gatelet"):
        await outbox.put(Telemetry(b"x"))
    await outbox.close()
    assert path.exists()


async def test_the_file_shrinks_once_everything_was_sent(tmp_path: Path) -> None:
    path = tmp_path / "o.db"
    outbox = Outbox(path, ManualClock(), FOREVER)
    await asyncio.gather(*(outbox.put(Telemetry(b"x" * 10_000)) for _ in range(300)))
    drain(outbox)
    for _ in range(10):
        await outbox.tidy()
    await outbox.close()
    assert path.stat().st_size < 200_000


@given(st.lists(st.tuples(st.integers(), st.integers(1, 100))), st.integers(0, 500))
def test_no_more_is_dropped_than_needed(candidates: list[tuple[int, int]], excess: int) -> None:
    gone, freed = overflow(candidates, excess)
    sizes = [size for _, size in candidates]
    assert gone == [sequence for sequence, _ in candidates[: len(gone)]]
    assert freed == sum(sizes[: len(gone)])
    assert freed >= excess or len(gone) == len(candidates)
    assert not gone or freed - sizes[len(gone) - 1] < excess


_OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 9), st.integers(0, 400)),
        st.tuples(st.just("send"), st.integers(1, 3), st.just(0)),
        st.tuples(st.just("restart"), st.just(0), st.just(0)),
        st.tuples(st.just("crash"), st.just(0), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(_OPERATIONS)
def test_it_does_what_a_list_in_memory_would_do(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, int, int]]
) -> None:
    """Against a model; after a crash only acknowledged messages may come again."""
    folder = tmp_path_factory.mktemp("model")
    limits = Limits(2000, None)

    async def main(clock: VirtualClock) -> None:
        outbox = Outbox(folder / "o.db", clock, limits)
        model: list[tuple[int, str, int]] = []
        sent: set[str] = set()
        dropped = 0
        for operation, number, size in operations:
            if operation == "put":
                message = Telemetry(bytes(size), priority=number)
                model.append((number, await outbox.put(message), message.size))
                while sum(entry[2] for entry in model) > limits.max_bytes:
                    model.remove(max(model, key=lambda entry: entry[0]))
                    dropped += 1
            elif operation == "send":
                for _ in range(number):
                    held = outbox.head()
                    expected = min(model, key=lambda entry: entry[0], default=None)
                    if held is None:
                        assert expected is None
                        break
                    message_id = held.properties["$.mid"]
                    if expected is None or message_id != expected[1]:
                        assert message_id in sent
                    else:
                        model.remove(expected)
                    sent.add(message_id)
                    outbox.acknowledge(held.sequence)
            elif operation == "restart":
                await outbox.close()
                outbox = Outbox(folder / "o.db", clock, limits)
            else:
                outbox.abandon()
                outbox = Outbox(folder / "o.db", clock, limits)
                # What was acknowledged and not removed yet is there again, until it is sent again.
                while (held := outbox.head()) is not None and held.properties["$.mid"] in sent:
                    outbox.acknowledge(held.sequence)
            await outbox.tidy()
            assert outbox.status().bytes <= limits.max_bytes
        await outbox.tidy()
        assert outbox.status().messages == len(model)
        assert outbox.status().dropped.get("overflow", 0) >= dropped
        await outbox.close()

    run(main)


# -- sending ---------------------------------------------------------------------------------------


def deliver(folder: Path, link: LinkDouble, count: int, hours: float = 1.0) -> list[str]:
    """Put `count` messages and run a sender for `hours`; returns the ids that were put."""

    async def main(clock: VirtualClock) -> list[str]:
        outbox = Outbox(folder / "o.db", clock, FOREVER)
        sender = OutboxSender(outbox, link, lambda: link.up, Random(1))
        task = asyncio.ensure_future(sender.run())
        ids = [await outbox.put(Telemetry(b"%d" % number)) for number in range(count)]
        await asyncio.sleep(hours * 3600)
        assert outbox.status().messages == 0
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await outbox.close()
        return ids

    return run(main)


def test_a_lost_acknowledgement_means_a_duplicate_with_the_same_id(tmp_path: Path) -> None:
    link = LinkDouble(lose_acknowledgements=2)
    ids = deliver(tmp_path, link, 3)
    assert [message_id for message_id, _ in link.received] == [ids[0], ids[0], *ids]


def test_failures_keep_the_order(tmp_path: Path) -> None:
    down = TransportUnavailable("throttled")
    link = LinkDouble(errors=[None, down, down, None, down])
    ids = deliver(tmp_path, link, 4)
    assert [message_id for message_id, _ in link.received] == ids


def test_a_message_the_other_side_can_never_take_does_not_block_the_rest(tmp_path: Path) -> None:
    link = LinkDouble(errors=[ValueError("too large")])
    ids = deliver(tmp_path, link, 3)
    assert [message_id for message_id, _ in link.received] == ids[1:]


def test_sending_starts_as_soon_as_the_link_is_back(tmp_path: Path) -> None:
    async def main(clock: VirtualClock) -> None:
        link = LinkDouble()
        outbox = Outbox(tmp_path / "o.db", clock, FOREVER)
        sender = OutboxSender(outbox, link, lambda: True, Random(1))
        task = asyncio.ensure_future(sender.run())
        link.up = False
        await outbox.put(Telemetry(b"x"))
        await asyncio.sleep(7200)
        link.up = True
        sender.link_changed()
        await asyncio.wait_for(link.arrived.wait(), 0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await outbox.close()

    run(main)


# -- crashes ---------------------------------------------------------------------------------------

_CRASHING = """
import asyncio, os, signal, sys
from pathlib import Path
from gatelet.agent.clock import SystemClock
from gatelet.agent.outbox import Outbox, Telemetry

folder, point, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
seen = 0

def fault(name):
    global seen
    if name == point:
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

async def main():
    put = open(folder / "put", "a", buffering=1)
    sent = open(folder / "sent", "a", buffering=1)
    outbox = Outbox(folder / "o.db", SystemClock(), fault=fault)
    for number in range(12):
        message_id = await outbox.put(Telemetry(b"x" * 100, key=f"k{number}"))
        print(message_id, file=put)
        if number % 3 == 2:
            held = outbox.head()
            if held is not None:
                print(held.properties["$.mid"], file=sent)
                outbox.acknowledge(held.sequence)
    await outbox.close()

asyncio.run(main())
"""


@pytest.mark.parametrize("point", ["begin", "removed", "inserted", "dropped", "committed"])
@pytest.mark.parametrize("count", [1, 5])
async def test_killed_at_any_step_nothing_acknowledged_is_lost(
    tmp_path: Path, point: str, count: int
) -> None:
    script = textwrap.dedent(_CRASHING)
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), point, str(count)], env=dict(os.environ)
    )
    assert killed.returncode == -signal.SIGKILL
    finished = subprocess.run([sys.executable, "-c", script, str(tmp_path), "never", "1"])
    assert finished.returncode == 0
    put = dict.fromkeys((tmp_path / "put").read_text().split())
    sent = (tmp_path / "sent").read_text().split()
    outbox = Outbox(tmp_path / "o.db", ManualClock())
    rest = []
    while (held := outbox.head()) is not None:
        rest.append(held.properties["$.mid"])
        outbox.acknowledge(held.sequence)
    await outbox.close()
    assert len(put) == 12, "the same key got two ids"
    assert {*sent, *rest} == set(put)
    assert rest == sorted(rest, key=lambda message_id: int(message_id.rpartition("-")[2]))
