"""The planner's golden table: what is wanted and what is seen, and the steps in their order.

The words of its rows are explained in plan_rows.py.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from gatelet.agent.plan import Collect, Failure, Pull, RemoveImage, describe
from gatelet.agent.restarts import RestartState

from .plan_rows import (
    A1,
    A2,
    B1,
    B2,
    EXIT,
    FIRST,
    NOW,
    SECOND,
    WALL,
    C,
    M,
    Row,
    S,
    U,
    box,
    digest,
    ended,
    ready,
    short,
    stamp,
)

TABLE = [
    # One container module, from nothing to running.
    Row("nothing", [], [], settled=True),
    Row("unknown image", [U("a")], ["resolve a"]),
    Row("resolved", [A1], ["pull a"]),
    Row("pulled", [A1], ["create a"], engine="a1"),
    Row("created", [A1], ["start a"], boxes=[box("a", state="created")], engine="a1"),
    Row("running", [A1], [], boxes=[box("a")], engine="a1", settled=True),
    Row("starting to be healthy", [A1], [], boxes=[box("a", health="starting")], engine="a1"),
    Row("healthy", [A1], [], boxes=[box("a", health="healthy")], engine="a1", settled=True),
    Row("image removed under it", [A1], [], boxes=[box("a")], settled=True),
    Row("may not pull", [C("a", may_pull=False)], ["pull a"]),
    # Updates: pull, stop, remove, create, start.
    Row("update unresolved", [U("a", 2)], ["resolve a"], old=[A1], boxes=[box("a")], engine="a1"),
    Row("update pulls first", [A2], ["pull a"], old=[A1], boxes=[box("a")], engine="a1"),
    Row("then stops", [A2], ["stop a"], old=[A1], boxes=[box("a")], engine="a1 a2"),
    Row(
        "then removes",
        [A2],
        ["remove a"],
        old=[A1],
        boxes=[box("a", state="exited")],
        engine="a1 a2",
    ),
    Row("then creates", [A2], ["create a"], old=[A1], engine="a1 a2"),
    Row(
        "then starts",
        [A2],
        ["start a"],
        old=[A1],
        boxes=[box("a", 2, "created")],
        engine="a1 a2",
    ),
    Row(
        "other options, same image",
        [C("a", body='{"x":1}')],
        ["stop a"],
        old=[A1],
        boxes=[box("a")],
        engine="a1",
    ),
    Row(
        "the old one ends while the new one is pulled",
        [A2],
        ["pull a", "restart a"],
        old=[A1],
        boxes=[box("a", state="exited", **EXIT)],
        engine="a1",
        restarts=stamp("a", ended(10)),
    ),
    Row(
        "the old one is gone while the new one is pulled",
        [A2],
        ["pull a", "create a"],
        old=[A1],
        engine="a1",
    ),
    Row(
        "a failed pull leaves the old one",
        [A2],
        [],
        old=[A1],
        boxes=[box("a")],
        engine="a1",
        failing=[Failure(Pull("a", "r/a:2", digest("a2"), "container"), 1, NOW + 5, "down", True)],
        blocked=["down"],
    ),
    Row("rollback recreates the old one", [A1], ["stop a"], boxes=[box("a", 2)], engine="a1 a2"),
    # Drift and broken containers.
    Row("drift", [A1], ["stop a"], boxes=[box("a", drift=("Memory",))], engine="a1"),
    Row("drift, image gone", [A1], ["pull a"], boxes=[box("a", drift=("Memory",))]),
    Row(
        "drift, stopped",
        [A1],
        ["remove a"],
        boxes=[box("a", state="exited", drift=("Memory",))],
        engine="a1",
    ),
    Row("dead", [A1], ["remove a"], boxes=[box("a", state="dead")], engine="a1"),
    Row("paused from outside", [A1], ["stop a"], boxes=[box("a", state="paused")], engine="a1"),
    Row(
        "a second container of the module",
        [A1],
        ["stop a"],
        boxes=[box("a"), box("a", called="a-old")],
        engine="a1",
    ),
    # Removal.
    Row("removed runs", [], ["stop a"], boxes=[box("a")]),
    Row("removed stands", [], ["remove a"], boxes=[box("a", state="exited")]),
    Row("removed was never started", [], ["remove a"], boxes=[box("a", state="created")]),
    Row(
        "removed only when all is here",
        [U("b")],
        ["resolve b"],
        old=[A1],
        boxes=[box("a")],
        engine="a1",
    ),
    Row(
        "what is to go is restarted as long as it is needed",
        [U("b")],
        ["resolve b", "restart a"],
        old=[A1],
        boxes=[box("a", state="exited", **EXIT)],
        engine="a1",
        restarts=stamp("a", ended(11)),
    ),
    Row("now it is here", [B1], ["stop a", "create b"], boxes=[box("a")], engine="a1 b1"),
    # Desired status.
    Row("stop", [C("a", running=False)], ["stop a"], boxes=[box("a")], engine="a1"),
    Row(
        "stopped",
        [C("a", running=False)],
        [],
        boxes=[box("a", state="exited")],
        engine="a1",
        settled=True,
    ),
    Row("stopped is not pulled", [C("a", running=False)], [], settled=True),
    Row(
        "started again after it was stopped, whatever the policy",
        [C("a", policy="never")],
        ["start a"],
        boxes=[box("a", state="exited")],
        engine="a1",
        restarts=stamp("a", RestartState(stopped=True)),
    ),
    # Restart policies at the end of a container.
    *(
        Row(
            f"{policy}, exit {code}",
            [C("a", policy=policy)],
            ["restart a"] if again else [],
            boxes=[box("a", state="exited", exit_code=code)],
            engine="a1",
            restarts=stamp("a", ended(10)),
            settled=not again and code == 0,
        )
        for policy, code, again in (
            ("never", 0, False),
            ("never", 1, False),
            ("on-failure", 0, False),
            ("on-failure", 1, True),
            ("on-unhealthy", 0, False),
            ("on-unhealthy", 1, True),
            ("always", 0, True),
            ("always", 1, True),
        )
    ),
    # ... and when it is unhealthy.
    *(
        Row(
            f"{policy}, unhealthy",
            [C("a", policy=policy)],
            ["stop a"] if again else [],
            boxes=[box("a", health="unhealthy")],
            engine="a1",
            restarts=stamp("a", RestartState(trouble_since=NOW - 10)),
        )
        for policy, again in (
            ("never", False),
            ("on-failure", False),
            ("on-unhealthy", True),
            ("always", True),
        )
    ),
    # The wait before restart n + 1 is min(10 * 2^n, 300) seconds; 20 restarts are the last.
    *(
        Row(
            f"{count} restarts, ended {since} s ago",
            [C("a", policy="always")],
            ["restart a"] if wait == 0 else [],
            boxes=[box("a", state="exited", **EXIT)],
            engine="a1",
            restarts=stamp("a", ended(since, count)),
            wake_in=wait or None,
        )
        for count, since, wait in (
            (0, 9, 1),
            (0, 10, 0),
            (1, 19, 1),
            (1, 20, 0),
            (4, 159, 1),
            (5, 299, 1),
            (5, 300, 0),
            (19, 299, 1),
            (19, 300, 0),
            (20, 99_999, None),
        )
    ),
    Row(
        "out of memory counts as a failure",
        [C("a", policy="on-failure")],
        ["restart a"],
        boxes=[box("a", state="exited", oom_killed=True)],
        engine="a1",
        restarts=stamp("a", ended(10)),
    ),
    # Restarts on request.
    Row(
        "asked for, runs",
        [C("a", policy="never")],
        ["stop a"],
        boxes=[box("a")],
        engine="a1",
        restarts=stamp("a", RestartState(asked=1)),
    ),
    Row(
        "asked for, stands",
        [C("a", policy="never")],
        ["start a"],
        boxes=[box("a", state="exited")],
        engine="a1",
        restarts=stamp("a", RestartState(asked=1, stopped=True)),
    ),
    Row(
        "done",
        [C("a", policy="never")],
        [],
        boxes=[box("a")],
        engine="a1",
        restarts=stamp("a", RestartState(asked=1, answered=1)),
        settled=True,
    ),
    # Update modes: NonBlocking changes each when its image is here, WaitForAllPulls all at once.
    *(
        Row(
            f"{mode}: one of two is here",
            [A2, B2],
            steps,
            old=[A1, B1],
            boxes=[box("a"), box("b")],
            engine="a1 b1 a2",
            mode=mode,
        )
        for mode, steps in (
            ("NonBlocking", ["stop a", "pull b"]),
            ("WaitForAllPulls", ["pull b"]),
        )
    ),
    *(
        Row(
            f"{mode}: both are here",
            [A2, B2],
            ["stop a", "stop b"],
            old=[A1, B1],
            boxes=[box("a"), box("b")],
            engine="a1 b1 a2 b2",
            mode=mode,
        )
        for mode in ("NonBlocking", "WaitForAllPulls")
    ),
    Row(
        "WaitForAllPulls: a crash is no change",
        [A1, B2],
        ["restart a", "pull b"],
        old=[A1, B1],
        boxes=[box("a", state="exited", **EXIT), box("b")],
        engine="a1 b1",
        mode="WaitForAllPulls",
        restarts=stamp("a", ended(10)),
    ),
    *(
        Row(
            f"{mode}: one is to stop",
            [C("a", running=False), B2],
            steps,
            old=[A1, B1],
            boxes=[box("a"), box("b")],
            engine="a1 b1",
            mode=mode,
        )
        for mode, steps in (
            ("NonBlocking", ["stop a", "pull b"]),
            ("WaitForAllPulls", ["pull b"]),
        )
    ),
    Row(
        "WaitForAllPulls: models too",
        [M("m", 2), B1],
        ["pull b"],
        old=[M("m")],
        store="m1 m2",
        loaded=ready(M("m")),
        routes=[M("m")],
        mode="WaitForAllPulls",
    ),
    Row(
        "NonBlocking: models at once",
        [M("m", 2), B1],
        ["load m", "pull b"],
        old=[M("m")],
        store="m1 m2",
        loaded=ready(M("m")),
        routes=[M("m")],
    ),
    Row(
        "WaitForAllPulls: a removed model serves on",
        [B1],
        ["pull b"],
        old=[M("m")],
        store="m1",
        loaded=ready(M("m")),
        routes=[M("m")],
        mode="WaitForAllPulls",
    ),
    Row(
        "NonBlocking: a removed model serves until all is here",
        [B1],
        ["pull b"],
        old=[M("m")],
        store="m1",
        loaded=ready(M("m")),
        routes=[M("m")],
    ),
    Row(
        "a removed model serves until all is here, after a reboot as well",
        [U("b")],
        ["resolve b", "switch m"],
        old=[M("m")],
        store="m1",
        loaded=ready(M("m")),
    ),
    Row(
        "what a deployment that is refused does not name goes on",
        [replace(B1, refused="privileged")],
        [],
        old=[A1, M("m")],
        boxes=[box("a")],
        engine="a1 b1",
        store="m1",
        loaded=ready(M("m")),
        routes=[M("m")],
        blocked=["privileged"],
    ),
    # Start groups.
    Row(
        "both are pulled, the first is made",
        [C("a", **FIRST), C("b", **SECOND)],
        ["create a"],
        engine="a1 b1",
        waits=["b"],
        wake_in=60,
    ),
    Row(
        "the second is pulled meanwhile",
        [C("a", **FIRST), C("b", **SECOND)],
        ["create a", "pull b"],
        engine="a1",
    ),
    Row(
        "the first runs, so the second is made",
        [C("a", **FIRST), C("b", **SECOND)],
        ["create b"],
        boxes=[box("a")],
        engine="a1 b1",
    ),
    Row(
        "the first is not healthy yet",
        [C("a", **FIRST), C("b", **SECOND)],
        [],
        boxes=[box("a", health="starting")],
        engine="a1 b1",
        unready={"a": NOW - 10},
        waits=["b"],
        wake_in=50,
    ),
    Row(
        "the first is sick for too long",
        [C("a", **FIRST), C("b", **SECOND)],
        ["create b"],
        boxes=[box("a", health="starting")],
        engine="a1 b1",
        unready={"a": NOW - 60},
    ),
    Row(
        "one that was given up holds nobody back for ever",
        [C("a", **FIRST, policy="never"), C("b", **SECOND)],
        ["create b"],
        boxes=[box("a", state="exited", **EXIT)],
        engine="a1 b1",
        restarts=stamp("a", ended(70)),
        unready={"a": NOW - 70},
    ),
    Row(
        "one that has done its work does not hold up",
        [C("a", **FIRST, policy="never"), C("b", **SECOND)],
        ["create b"],
        boxes=[box("a", state="exited")],
        engine="a1 b1",
        restarts=stamp("a", ended(1)),
    ),
    Row(
        "a stopped one does not hold up",
        [C("a", **FIRST, running=False), C("b", **SECOND)],
        ["create b"],
        engine="b1",
    ),
    Row(
        "the same group starts together",
        [C("a", **FIRST), C("b", **FIRST)],
        ["create a", "create b"],
        engine="a1 b1",
    ),
    Row(
        "a restart waits for nobody",
        [C("a", **FIRST), C("b", **SECOND, policy="always")],
        ["create a", "restart b"],
        boxes=[box("b", state="exited", **EXIT)],
        engine="a1 b1",
        restarts=stamp("b", ended(10)),
    ),
    Row(
        "after a reboot the groups start in order",
        [C("a", **FIRST), C("b", **SECOND)],
        ["start a"],
        boxes=[box("a", state="exited"), box("b", state="exited")],
        engine="a1 b1",
        restarts={
            **stamp("a", RestartState(stopped=True)),
            **stamp("b", RestartState(stopped=True)),
        },
        waits=["b"],
        wake_in=60,
    ),
    Row(
        "a model waits for a container of an earlier group",
        [C("a", **FIRST), M("m")],
        ["create a"],
        engine="a1",
        store="m1",
        waits=["m"],
        wake_in=60,
    ),
    # The engine.
    Row("no engine", [A1], [], up="none", blocked=["no container engine: gone"]),
    Row("no engine needed", [], [], up="none", settled=True),
    Row("engine down", [A1], [], up="down", blocked=["engine does not answer: gone"]),
    Row(
        "engine down, models go on",
        [A1, M("m")],
        ["load m"],
        up="down",
        store="m1",
        blocked=["engine does not answer: gone"],
    ),
    Row("engine down, resolving goes on", [U("a")], ["resolve a"], up="down"),
    Row(
        "what the device forbids is not made",
        [replace(A1, container=None, refused="Privileged is not allowed")],
        [],
        engine="a1",
        blocked=["Privileged is not allowed"],
    ),
    # Models and scoring containers.
    Row("model resolved", [M("m")], ["pull m"]),
    Row("model pulled", [M("m")], ["load m"], store="m1"),
    Row("model loaded", [M("m")], ["probe m"], store="m1", loaded=ready(M("m"), state="loaded")),
    Row("model probed", [M("m")], ["switch m"], store="m1", loaded=ready(M("m"))),
    Row(
        "model replaced",
        [M("m", 2)],
        ["unload m"],
        store="m2",
        loaded=ready(M("m"), M("m", 2)),
        routes=[M("m", 2)],
    ),
    Row("scoring process away", [M("m")], [], store="m1", scoring=False),
    Row("scoring container is made", [S("s")], ["create s"], engine="s1"),
    Row("... and attached", [S("s")], ["load s"], boxes=[box("s")], engine="s1"),
    Row(
        "... when it is healthy",
        [S("s")],
        [],
        boxes=[box("s", health="starting")],
        engine="s1",
    ),
    Row(
        "... and routed",
        [S("s")],
        ["switch s"],
        boxes=[box("s")],
        engine="s1",
        loaded=ready(S("s")),
    ),
    Row(
        "a removed scoring container loses its requests first",
        [],
        ["switch "],
        boxes=[box("s")],
        engine="s1",
        routes=[S("s")],
    ),
    Row(
        "... and its instance",
        [],
        ["switch "],
        boxes=[box("s")],
        engine="s1",
        loaded=ready(S("s")),
        routes=[S("s")],
    ),
    Row(
        "a container becomes a model",
        [M("a", 2)],
        ["stop a"],
        old=[A1],
        boxes=[box("a")],
        engine="a1",
        store="a2",
    ),
    # Images that may go.
    Row(
        "unused images go",
        [A1],
        ["discard", "discard"],
        boxes=[box("a")],
        engine="a1 x1",
        store="y1",
        discard=(RemoveImage(digest("x1")), Collect(digest("y1"))),
        settled=True,
    ),
    Row(
        "wanted images stay",
        [A1],
        [],
        old=[A2],
        boxes=[box("a")],
        engine="a1 a2",
        discard=(RemoveImage(digest("a1")), RemoveImage(digest("a2"))),
        settled=True,
    ),
]


def test_the_table_is_long_enough_and_its_rows_have_names_of_their_own() -> None:
    assert len(TABLE) >= 60
    assert len({row.name for row in TABLE}) == len(TABLE)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_table(row: Row) -> None:
    found = row.plan()
    assert [short(step) for step in found.steps] == row.steps
    assert found.settled is row.settled
    assert [module for module, _ in found.waits] == row.waits
    said = [failure.message for failure in found.blocked]
    assert len(said) == len(row.blocked)
    assert all(text in message for text, message in zip(row.blocked, said, strict=True))
    assert (found.wake_at is None) == (row.wake_in is None)
    if row.wake_in is not None and found.wake_at is not None:
        assert found.wake_at - NOW == pytest.approx(row.wake_in)
    assert all(describe(step) for step in found.steps)


def test_a_wall_clock_is_no_part_of_a_plan() -> None:
    past = box("a", state="exited", exit_code=1, finished_at=WALL - timedelta(days=4000))
    row = Row("", [C("a", policy="always")], [], boxes=[past], engine="a1")
    row.restarts = stamp("a", ended(9))
    assert row.plan().steps == ()
