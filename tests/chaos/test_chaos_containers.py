"""Seeded runs with a container engine: it restarts, is away for hours, fails and is tampered with.

In the end what is desired is what is reported and what runs, whatever happened. More seeds:
GATELET_CHAOS_SEEDS=200, or `python -m gatelet.simulator.chaos --containers --seeds 200 --hours 12
--pace 4`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from gatelet.agent.runtime.container import ContainerSpec
from gatelet.simulator.chaos import (
    ChaosFailed,
    ContainerScenario,
    Outcome,
    memory_folder,
    play,
)
from gatelet.simulator.chaos_containers import WatchedRuntime

HOURS, PACE = 12, 4.0
SEEDS = (3, 6, 17)
ASKED = range(1, int(os.environ.get("GATELET_CHAOS_SEEDS", "0")) + 1)


@contextmanager
def fast_folder() -> Iterator[Path]:
    with TemporaryDirectory(dir=memory_folder()) as folder:
        yield Path(folder)


def run(seed: int, hours: float = HOURS) -> Outcome:
    with fast_folder() as folder:
        return play(seed, hours, folder, PACE, ContainerScenario)


@pytest.mark.parametrize("seed", sorted({*SEEDS, *ASKED}))
def test_the_running_set_is_the_desired_one_in_the_end(seed: int) -> None:
    outcome = run(seed)
    print(outcome)
    assert outcome.counts["deployments"] > 1
    assert outcome.counts["started"] > 5


def test_the_same_seed_is_the_same_run() -> None:
    first, again, other = run(17, 3), run(17, 3), run(3, 3)
    assert first == again
    assert first.trace != other.trace


def test_a_stop_of_what_nobody_changed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof can fail."""
    whole = WatchedRuntime.create

    async def create(self: WatchedRuntime, spec: ContainerSpec) -> None:
        await whole(self, spec)
        # Every module that is made costs another one its life.
        for container in self._scenario.ours():
            if container.state["Running"]:
                await self.stop(container.name)

    monkeypatch.setattr(WatchedRuntime, "create", create)
    with pytest.raises(ChaosFailed, match="was well and wanted before and after, and was ended"):
        run(5, 12)
