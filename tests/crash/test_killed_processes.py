"""kill -9 at random moments: whatever dies, the deployment is found again and nothing is lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

SEED = 20261121
KILLS = 6


@pytest.mark.parametrize("role", ["agent", "scoring", "fabric"])
async def test_a_killed_process_comes_back_to_the_same_deployment(
    device: Any, make_deployment: Callable[..., dict[str, Any]], role: str
) -> None:
    image = await device.push("v2")
    version = device.desire(make_deployment(image=image, backends="fpga,cpu"))
    await device.until_good(version)
    before = await device.status()
    await device.kill(role)
    old = before["processes"][role]["pid"]
    await device.until(
        lambda s: (
            s["processes"].get(role, {}).get("pid") not in (None, old)
            and s["modules"]  # none before the agent that is new has looked around
            and s["modules"][0]["status"] == "running"
            and s["modules"][0]["backends"]["fpga"]["healthy"]
        )
    )
    after = await device.status()
    assert after["deployment"]["generation"] == before["deployment"]["generation"]
    assert after["deployment"]["phase"] == "good"
    assert after["modules"][0]["digest"] == before["modules"][0]["digest"]
    assert (await device.accuracy())[1] == {"2"}


async def test_kills_at_random_moments_of_updates_never_lose_the_deployment(
    device: Any, make_deployment: Callable[..., dict[str, Any]]
) -> None:
    chance = random.Random(SEED)
    images = {name: await device.push(name) for name in ("v1", "v2", "v3")}
    version = device.desire(make_deployment(image=images["v1"]))
    await device.until_good(version)
    for number in range(KILLS):
        name = ("v2", "v3", "v1")[number % 3]
        version = device.desire(make_deployment(image=images[name], backends="fpga,cpu"))
        # The moment is what the test is about; the outcome is waited for by condition.
        await asyncio.sleep(chance.uniform(0.0, 0.4))
        role = chance.choice(["agent", "scoring", "fabric"])
        if role in device.processes():
            await device.kill(role)
        await device.until_good(version)
        assert (await device.accuracy())[1] == {name.removeprefix("v")}


async def test_a_killed_supervisor_takes_its_processes_along_and_a_restart_needs_no_cloud(
    device: Any, make_deployment: Callable[..., dict[str, Any]]
) -> None:
    image = await device.push("v2")
    version = device.desire(make_deployment(image=image, backends="fpga,cpu"))
    await device.until_good(version)
    pids = [process["pid"] for process in device.processes().values()]
    await device.site.hub.pause()
    await device.site.broker.pause()
    await device.site.registry.stop()
    device.process.kill()
    await asyncio.to_thread(device.process.wait)
    await asyncio.wait_for(_gone(pids), 20)
    await device.start_agent(
        lambda s: bool(s["modules"]) and s["modules"][0]["status"] == "running"
    )
    assert (await device.accuracy())[1] == {"2"}
    status = await device.status()
    assert status["deployment"]["phase"] == "good"
    assert not any(link["connected"] for link in status["links"])


async def _gone(pids: list[int]) -> None:
    import psutil

    while any(psutil.pid_exists(pid) for pid in pids):
        await asyncio.sleep(0.02)
