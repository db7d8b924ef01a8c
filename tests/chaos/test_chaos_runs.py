"""Seeded runs on virtual time: whatever happened, all is well in the end, and every run repeats."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from gatelet.agent.outbox import Limits, Telemetry
from gatelet.simulator.chaos import CLIENT, ChaosFailed, Ledger, memory_folder, play
from gatelet.simulator.chaos_device import MemoryImages, MemoryScoring
from gatelet.simulator.chaos_life import DEVICE, Life, register_tasks
from gatelet.simulator.chaos_link import MemoryHubLink, Weather
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.iothub.hub import Hub
from gatelet.simulator.iothub.state import HubState
from gatelet.simulator.virtual_time import VirtualClock, run

WAL_BYTES = 1_300_000

# More: python -m gatelet.simulator.chaos --seeds 20 --hours 1000


@contextmanager
def fast_folder() -> Iterator[Path]:
    with TemporaryDirectory(dir=memory_folder()) as folder:
        yield Path(folder)


def test_a_thousand_hours_end_with_desired_as_reported_and_no_lost_telemetry() -> None:
    with fast_folder() as folder:
        outcome = play(1, 1000, folder, pace=0.12)
    print(outcome)
    assert outcome.code in (200, 400, 412, 500)
    assert outcome.counts["telemetry"] > 200
    assert outcome.counts["deployments"] > 5
    assert outcome.counts["fault kill"] > 0


@pytest.mark.parametrize("seed", [2, 4])
def test_many_faults_at_once(seed: int) -> None:
    with fast_folder() as folder:
        outcome = play(seed, 12, folder, pace=4)
    print(outcome)
    assert sum(count for name, count in outcome.counts.items() if name.startswith("fault ")) > 1


def test_the_same_seed_is_the_same_run_in_another_process_too() -> None:
    with fast_folder() as folder:
        here = play(5, 3, folder, pace=3)
    with fast_folder() as folder:
        other = play(6, 1, folder, pace=3)
    command = [
        *(sys.executable, "-m", "gatelet.simulator.chaos"),
        *("--first", "5", "--hours", "3", "--pace", "3"),
    ]
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    there = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert there.returncode == 0, there.stderr
    assert f"trace {here.trace}," in there.stdout
    assert here.trace != other.trace


def test_a_link_that_loses_messages_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof can fail: one message in fifty is acknowledged and thrown away."""
    whole = MemoryHubLink.send
    sent = 0

    async def send(self: MemoryHubLink, body: bytes, properties: Mapping[str, str]) -> None:
        nonlocal sent
        sent += 1
        if sent % 50:
            await whole(self, body, properties)

    monkeypatch.setattr(MemoryHubLink, "send", send)
    with fast_folder() as folder, pytest.raises(ChaosFailed, match=r"seed 7, 8 h: .* lost"):
        play(7, 8, folder, pace=6)


def outage(folder: Path, limits: Limits, hours: float) -> tuple[dict[str, int], Ledger, Life, int]:
    """A link that is down for `hours` of virtual time while a message comes every two minutes:
    `run` moves the clock, so that no sleep below takes any time.

    Returns what was promised, what the hub got, the stopped agent, and the most bytes on disk.
    """
    ledger = Ledger(lambda event: None)

    async def main(clock: VirtualClock) -> tuple[dict[str, int], Ledger, Life, int]:
        register_tasks(asyncio.get_running_loop())
        hub = Hub("outage.azure-devices.net", HubState(), clock)
        hub.put_identity(ClientId(DEVICE), {"capabilities": {"iotEdge": True}})
        weather = Weather()
        random = Random(1)
        link = MemoryHubLink(hub, CLIENT, weather, random, ledger.take)
        images = MemoryImages(random, lambda event: None)
        scoring = MemoryScoring(random, lambda event: None)
        life = Life(folder, clock, link, images, scoring, random, limits)
        life.start()
        await asyncio.sleep(60)
        assert link is not None
        weather.up = False
        link.cut("the broker is down")
        peak = 0
        for number in range(int(hours * 30)):
            priority = number % 3
            body = json.dumps({"n": number, "x": "x" * 100}).encode()
            message = Telemetry(body, properties={"priority": str(priority)}, priority=priority)
            ledger.promised[await life.outbox.put(message)] = priority
            await asyncio.sleep(120)
            if number % 100 == 0:
                peak = max(peak, sum(f.stat().st_size for f in folder.glob("outbox.db*")))
        # Neither a jump of the clock nor a power cut changes what is stored.
        await life.kill()
        weather.up = True
        link = MemoryHubLink(hub, CLIENT, weather, random, ledger.take)
        life = Life(folder, clock, link, images, scoring, random, limits)
        life.start()
        for _ in range(3600):
            await asyncio.sleep(1)
            if not life.outbox.status().messages:
                break
        await life.stop()
        return ledger.promised, ledger, life, peak

    return run(main)


def test_after_72_hours_without_the_broker_telemetry_is_complete_and_in_order() -> None:
    with fast_folder() as folder:
        promised, ledger, life, peak = outage(folder, Limits(16 * 1024 * 1024), 72)
    assert len(promised) == 72 * 30
    assert not ledger.missing()
    assert not ledger.problems
    assert ledger.duplicates == 0
    assert dict(life.outbox.status().dropped) == {}
    assert peak < 2 * sum(350 for _ in promised) + WAL_BYTES


def test_an_outage_beyond_the_limit_keeps_the_newest_of_the_most_urgent_and_counts_the_rest() -> (
    None
):
    with fast_folder() as folder:
        promised, ledger, life, peak = outage(folder, Limits(128 * 1024), 36)
    missing = ledger.missing()
    dropped = life.outbox.status().dropped["overflow"]
    assert not ledger.problems
    assert 0 < len(missing) <= dropped <= len(missing) + 20  # the agent's own events count too
    assert peak < WAL_BYTES + 3 * 128 * 1024
    kept = [priority for message_id, priority in promised.items() if message_id in ledger.received]
    assert kept.count(0) > kept.count(2)
    for priority in (0, 1, 2):
        mine = [m for m, p in promised.items() if p == priority]
        held = [m for m in mine if m in ledger.received]
        assert held == mine[len(mine) - len(held) :], "not the oldest were dropped"
