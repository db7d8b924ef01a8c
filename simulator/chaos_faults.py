"""What goes wrong in a chaos run: each fault takes its time and then ends by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from random import Random
from typing import Any, Protocol

from .chaos_device import MemoryImages, MemoryScoring
from .chaos_life import Life
from .chaos_link import Weather
from .virtual_time import VirtualClock

HOUR = 3600.0


class World(Protocol):
    """What faults can get at."""

    random: Random
    weather: Weather
    clock: VirtualClock
    images: MemoryImages
    scoring: MemoryScoring
    disk_full: bool

    @property
    def life(self) -> Life: ...

    def desire(self, kind: str) -> None: ...

    def start_agent(self) -> None: ...


async def _link_down(s: World) -> None:
    # Minutes to days, evenly over the magnitudes.
    seconds = 60 * (3 * 24 * 60) ** (s.random.random() ** 1.5)
    s.weather.up = False
    s.life.link.cut("the network is down")
    await asyncio.sleep(seconds)
    s.weather.up = True


async def _link_silent(s: World) -> None:
    s.weather.silent = True
    await asyncio.sleep(s.random.uniform(10, 2 * HOUR))
    s.weather.silent = False


async def _link_flaps(s: World) -> None:
    for _ in range(s.random.randint(2, 20)):
        s.life.link.cut("flapping")
        await asyncio.sleep(s.random.uniform(0.1, 30))


async def _lossy(s: World) -> None:
    w = s.weather
    w.breaks, w.acknowledgement_lost, w.answer_lost = (s.random.uniform(0, 0.2) for _ in range(3))
    w.latency = s.random.choice((0.05, 1.0, 8.0))
    await asyncio.sleep(s.random.uniform(60, 6 * HOUR))
    w.breaks = w.acknowledgement_lost = w.answer_lost = 0.0
    w.latency = 0.05


async def _bad_patches(s: World) -> None:
    w = s.weather
    w.patch_lost, w.patch_late, w.patch_twice = (s.random.uniform(0, 0.7) for _ in range(3))
    for _ in range(s.random.randint(1, 6)):
        s.desire("changed")
        await asyncio.sleep(s.random.uniform(0, 60))
    await asyncio.sleep(s.random.uniform(60, HOUR))
    w.patch_lost = w.patch_late = w.patch_twice = 0.0


async def _throttled(s: World) -> None:
    s.weather.throttled = s.random.uniform(0.3, 1.0)
    s.weather.refused = s.random.uniform(0.0, 0.7)
    await asyncio.sleep(s.random.uniform(60, 2 * HOUR))
    s.weather.throttled = s.weather.refused = 0.0


async def _registry_down(s: World) -> None:
    s.images.registry_up = False
    await asyncio.sleep(s.random.uniform(60, 8 * HOUR))
    s.images.registry_up = True


async def _registry_errors(s: World) -> None:
    s.images.errors = s.random.uniform(0.1, 0.8)
    await asyncio.sleep(s.random.uniform(60, 4 * HOUR))
    s.images.errors = 0.0


async def _scoring_crash(s: World) -> None:
    for _ in range(s.random.choice((1, 1, 2))):
        s.scoring.crash()
        await asyncio.sleep(s.random.uniform(1, 600))


async def _scoring_away(s: World) -> None:
    s.scoring.crash()
    s.scoring.up = False
    await asyncio.sleep(s.random.uniform(1, HOUR))
    s.scoring.up = True


async def _scoring_errors(s: World) -> None:
    s.scoring.errors = s.random.uniform(0.1, 0.8)
    await asyncio.sleep(s.random.uniform(60, HOUR))
    s.scoring.errors = 0.0


async def _disk_full(s: World) -> None:
    s.disk_full = True
    await asyncio.sleep(s.random.uniform(60, 4 * HOUR))
    s.disk_full = False


async def _wall_clock(s: World) -> None:
    s.clock.skew = timedelta(days=s.random.uniform(-3650, 3650))


async def restart(s: World) -> None:
    await s.life.stop()
    await asyncio.sleep(s.random.uniform(0, 10))
    s.start_agent()


async def kill(s: World) -> None:
    for _ in range(s.random.choice((1, 1, 3))):
        await s.life.kill()
        await asyncio.sleep(s.random.uniform(0, 10))
        s.start_agent()
        await asyncio.sleep(s.random.uniform(0, 100))


Fault = Callable[[Any], Coroutine[Any, Any, None]]

FAULTS: tuple[Fault, ...] = (
    _link_down,
    _link_silent,
    _link_flaps,
    _lossy,
    _bad_patches,
    _throttled,
    _registry_down,
    _registry_errors,
    _scoring_crash,
    _scoring_away,
    _scoring_errors,
    _disk_full,
    _wall_clock,
    restart,
    kill,
    kill,
)
