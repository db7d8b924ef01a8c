"""A thousand hours of bad luck: the real agent on a virtual clock, against seeded random faults.

    python -m gatelet.simulator.chaos --seeds 5 --hours 1000
    python -m gatelet.simulator.chaos --containers --seeds 5 --hours 100 --pace 4

Deployments and telemetry are produced all the time while links, hub, registry, scoring process,
disk and wall clock fail and the agent is restarted and killed; with `--containers` on a device with
a container engine, which fails too. Then the faults cease, and the device must reach what is
desired, say so, and have delivered every message it ever took. The same seed gives the same run,
event for event: `trace` is a hash over all of them.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

from .chaos_containers import ContainerScenario
from .chaos_ledger import Ledger
from .chaos_scenario import CLIENT, ChaosFailed, Outcome, Scenario
from .virtual_time import VirtualClock, run

__all__ = [
    "CLIENT",
    "ChaosFailed",
    "ContainerScenario",
    "Ledger",
    "Outcome",
    "Scenario",
    "memory_folder",
    "play",
]


def play(
    seed: int, hours: float, folder: Path, pace: float = 1.0, world: type[Scenario] = Scenario
) -> Outcome:
    """One run in an empty `folder`. Raises ChaosFailed."""

    async def main(clock: VirtualClock) -> Outcome:
        return await world(seed, hours, folder, clock, pace).play()

    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # some hundred thousand warnings, all of them on purpose
    try:
        return run(main)
    finally:
        logging.disable(level)


def memory_folder() -> str | None:
    """Where synchronous commits cost nothing, if there is such a place."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gatelet.simulator.chaos", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many runs (1)")
    parser.add_argument("--first", type=int, default=1, help="the first seed (1)")
    parser.add_argument("--hours", type=float, default=1000.0, help="virtual hours of each (1000)")
    parser.add_argument("--pace", type=float, default=1.0, help="how often things happen (1)")
    parser.add_argument("--containers", action="store_true", help="a device with an engine")
    options = parser.parse_args(arguments)
    world = ContainerScenario if options.containers else Scenario
    failed = 0
    for seed in range(options.first, options.first + options.seeds):
        began = time.monotonic()
        with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
            try:
                outcome = play(seed, options.hours, Path(folder), options.pace, world)
            except ChaosFailed as error:
                failed += 1
                print(f"seed {seed}: FAILED: {error}", flush=True)
                continue
        counts = ", ".join(f"{name} {count}" for name, count in sorted(outcome.counts.items()))
        print(
            f"seed {seed}: {options.hours:g} h in {time.monotonic() - began:.1f} s, trace "
            f"{outcome.trace}, code {outcome.code}, disk {outcome.peak_disk_bytes // 1024} KiB; "
            f"{counts}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
