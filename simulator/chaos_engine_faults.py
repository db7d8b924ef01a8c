"""What goes wrong with a container engine in a chaos run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random
from typing import Protocol

from ..agent.runtime.container import RuntimeFailed
from .chaos_faults import HOUR, Fault
from .chaos_life import Life
from .engine import SimulatedEngine
from .engine_container import SIGKILL, SimulatedContainer

FOREIGN = "r.io/somebody:1"


class EngineWorld(Protocol):
    """What faults can get at."""

    random: Random
    engine: SimulatedEngine
    boots: int
    names: Sequence[str]

    @property
    def life(self) -> Life: ...

    def start_agent(self) -> None: ...

    def ours(self) -> list[SimulatedContainer]: ...

    def hosted(self, name: str) -> bool: ...


async def _engine_restarts(s: EngineWorld) -> None:
    s.engine.stop()
    await asyncio.sleep(s.random.uniform(0, 120))
    s.engine.start()


async def _engine_away(s: EngineWorld) -> None:
    s.engine.stop()
    await asyncio.sleep(s.random.uniform(60, 8 * HOUR))
    s.engine.start()


async def _engine_silent(s: EngineWorld) -> None:
    """Its containers go on."""
    s.engine.faults.down = True
    await asyncio.sleep(s.random.uniform(1, 2 * HOUR))
    s.engine.start()


async def _engine_slow(s: EngineWorld) -> None:
    s.engine.faults.call_seconds = s.random.uniform(0.5, 40)
    await asyncio.sleep(s.random.uniform(60, HOUR))
    s.engine.faults.call_seconds = 0.05


async def _engine_replaced(s: EngineWorld) -> None:
    s.engine.stop()
    s.engine.wipe()
    await asyncio.sleep(s.random.uniform(1, 600))
    s.engine.start()


async def _events_lost(s: EngineWorld) -> None:
    s.engine.faults.events_lost = True
    await asyncio.sleep(s.random.uniform(60, 6 * HOUR))
    s.engine.faults.events_lost = False


async def _pull_errors(s: EngineWorld) -> None:
    said = s.random.choice(("the registry answered 503", "write /x: no space left on device"))
    s.engine.faults.fail_always["pull"] = RuntimeFailed(f"cannot pull: {said}", retryable=True)
    await asyncio.sleep(s.random.uniform(60, 4 * HOUR))
    s.engine.faults.fail_always.pop("pull", None)


async def _disk_full(s: EngineWorld) -> None:
    for call in ("pull", "create", "start"):
        s.engine.faults.fail_always[call] = RuntimeFailed(
            f"cannot {call}: no space left on device", retryable=True
        )
    await asyncio.sleep(s.random.uniform(60, 2 * HOUR))
    for call in ("pull", "create", "start"):
        s.engine.faults.fail_always.pop(call, None)


async def _conflicts(s: EngineWorld) -> None:
    for call in ("create", "start", "stop", "remove", "remove_image", "containers", "images"):
        failure = RuntimeFailed(f"cannot {call}: conflict, in progress", retryable=True)
        s.engine.faults.fail[call] = [failure] * s.random.randint(0, 4)
    await asyncio.sleep(s.random.uniform(60, HOUR))
    s.engine.faults.fail.clear()


async def _dies(s: EngineWorld) -> None:
    for _ in range(s.random.choice((1, 1, 2, 6))):
        for container in s.ours():
            if s.random.random() < 0.5:
                container.end(SIGKILL, oom=s.random.random() < 0.3)
        await asyncio.sleep(s.random.uniform(1, 900))


async def _falls_ill(s: EngineWorld) -> None:
    ill = [container for container in s.ours() if s.random.random() < 0.5]
    for container in ill:
        container.feel(sick=True)
    await asyncio.sleep(s.random.uniform(10, HOUR))
    for container in ill:
        container.feel(sick=False)


async def _changed_by_hand(s: EngineWorld) -> None:
    for container in s.ours():
        how = s.random.choice(("update", "rename", "pause", "remove", "stop", "", ""))
        if how == "update":
            s.engine.update(container.name, Memory=4711)
        elif how == "rename":
            s.engine.rename(container.name, f"{container.name}-{s.random.randint(0, 999)}")
        elif how == "pause":
            s.engine.pause(container.name)
        elif how == "remove":
            s.engine.remove(container.name)
        elif how == "stop":
            container.end(143)


async def _name_taken(s: EngineWorld) -> None:
    """Somebody else's container where a module's has to be."""
    name = s.random.choice([name for name in s.names if not s.hosted(name)])
    if s.engine.find(name) is not None:
        s.engine.remove(name)
    if not s.engine.image_digests():
        return
    s.engine.create_foreign(name, FOREIGN)
    foreign = s.engine.find(name)
    await asyncio.sleep(s.random.uniform(1, 2 * HOUR))
    if foreign is not None and foreign in s.engine.containers():
        s.engine.remove(foreign.name)


async def reboot(s: EngineWorld) -> None:
    await s.life.kill()
    s.engine.stop()
    s.boots += 1
    await asyncio.sleep(s.random.uniform(5, 120))
    first, later = s.random.sample((s.engine.start, s.start_agent), 2)
    first()
    await asyncio.sleep(s.random.uniform(0, 60))
    later()


async def both_die(s: EngineWorld) -> None:
    """The engine restarts while no agent looks, on the same start of the host."""
    await s.life.kill()
    s.engine.stop()
    await asyncio.sleep(s.random.uniform(1, 60))
    s.engine.start()
    s.start_agent()


ENGINE_FAULTS: tuple[Fault, ...] = (
    _engine_restarts,
    _engine_away,
    _engine_silent,
    _engine_slow,
    _engine_replaced,
    _events_lost,
    _pull_errors,
    _disk_full,
    _conflicts,
    _dies,
    _dies,
    _falls_ill,
    _changed_by_hand,
    _changed_by_hand,
    _name_taken,
    both_die,
    reboot,
)
"""Each takes its time and then ends by itself."""
