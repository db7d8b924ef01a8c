"""kill -9 at every system call of a deployment that changes files: old or new, nothing between.

strace injects the signal on entry to the n-th call of its kind, in the event loop's thread or in
the one that pulls. Then the device starts twice: without a registry, where the old or the new
version must serve, and with it, where the deployment must come to its end. What the outbox had
acknowledged is there. Every tenth point runs; all of them:

    GATELET_CRASH_EVERY=1 python -m pytest tests/crash/test_every_call.py -s
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from every_call import CHANGING, SmallDevice, Supplies, calls, fresh

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

EVERY = int(os.environ.get("GATELET_CRASH_EVERY", "10"))


@dataclass(frozen=True)
class Scenario:
    """From a device that serves `before` to the document `wanted`, and how that must end."""

    before: str | None
    wanted: str | None
    ends: dict[str, Any]
    serving_offline: tuple[dict[str, str], ...]


SCENARIOS = {
    "install": Scenario(None, "1", {"serving": {"digits": "1"}, "good": 2}, ({}, {"digits": "1"})),
    "update": Scenario(
        "1", "2", {"serving": {"digits": "2"}, "good": 2}, ({"digits": "1"}, {"digits": "2"})
    ),
    "failed update": Scenario(
        "1",
        "broken",
        {"serving": {"digits": "1"}, "latest": [2, "failed"], "good": 1},
        ({"digits": "1"},),
    ),
    "removal": Scenario("1", None, {"serving": {}, "good": 2}, ({}, {"digits": "1"})),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_at_any_call_leaves_the_old_or_the_new(
    world: tuple[SmallDevice, Supplies], tmp_path: Path, name: str
) -> None:
    device, found = world
    scenario = SCENARIOS[name]
    template = tmp_path / "before"
    template.mkdir()
    if scenario.before is not None:
        serving = {"serving": {"digits": scenario.before}, "good": 1}
        device.live(template, scenario.before, number=1, until=serving, send="before")

    points = []
    for thread in ("ready", "worker"):
        log = tmp_path / f"{thread}.log"
        folder = fresh(template, tmp_path / "device")
        recording = ["-e", f"trace={CHANGING}", "-o", str(log)]
        life = device.live(
            folder,
            scenario.wanted,
            until=scenario.ends,
            send="now",
            strace=recording,
            thread=thread,
        )
        assert life.ended == "exit 0"
        assert "late" not in life.outcome, life.outcome
        points += [
            (thread, call, number)
            for call, count in sorted(calls(log).items())
            for number in range(1, count + 1)
        ]

    killed = 0
    chosen = points[sum(map(ord, name)) % EVERY :: EVERY]
    for thread, call, number in chosen:
        where = f"{name}: {call} number {number} of the {thread} thread"
        folder = fresh(template, tmp_path / "device")
        life = device.live(
            folder,
            scenario.wanted,
            until=scenario.ends,
            send="now",
            strace=[
                *("-e", f"trace={call}", "-o", os.devnull),
                *("-e", f"inject={call}:signal=KILL:when={number}"),
            ],
            thread=thread,
        )
        killed += life.ended == "signal 9"
        _comes_back(device, found, scenario, folder, life.acknowledged, where)
    # Threads share the work a little differently each time, so a few points are past the end.
    assert killed > 0.8 * len(chosen)
    print(f"\n{name}: {len(points)} points, {len(chosen)} run, {killed} killed, all recovered")


def _comes_back(
    device: SmallDevice,
    found: Supplies,
    scenario: Scenario,
    folder: Path,
    acknowledged: list[str],
    where: str,
) -> None:
    with found.away():
        endpoints = [[*state] for state in scenario.serving_offline]
        if [] not in endpoints:
            life = device.live(folder, until={"endpoints": ["digits"]})
            assert life.outcome is not None, where
            assert life.outcome["serving"] in scenario.serving_offline, f"{where}: {life}"
            assert not life.outcome["damaged"], f"{where}: {life}"
    life = device.live(folder, scenario.wanted, until=scenario.ends, read=True)
    assert life.outcome is not None, where
    assert "late" not in life.outcome, f"{where}: {life}"
    assert not life.outcome["damaged"], f"{where}: {life}"
    missing = set(acknowledged) - set(life.outcome["held"])
    assert not missing, f"{where}: acknowledged and lost: {sorted(missing)}"
