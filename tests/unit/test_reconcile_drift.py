"""Containers that somebody else changes, renames or stands in the way of, in virtual time."""

from __future__ import annotations

import asyncio

from container_world import V1, V2, Device, manifest, play, publish, status
from gatelet.agent.runtime.container import RuntimeFailed


def test_drift_is_corrected() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        await device.good(manifest(aa=V1))
        before = device.ids()
        device.engine.update("aa", Memory=4711)
        await device.until(
            lambda: device.ids() != before and "running" in device.containers().get("aa", "")
        )
        assert device.phase() == "good"

    play(scenario)


def test_a_renamed_container_makes_room_before_its_successor_begins() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        await device.good(manifest(aa=V1))
        device.engine.rename("aa", "theirs")
        # As the engine says it when both want the same port.
        refused = RuntimeFailed("port is already allocated", retryable=True)
        device.engine.faults.fail_always["start"] = refused
        await device.until(lambda: "theirs" not in device.containers())
        del device.engine.faults.fail_always["start"]
        await device.until(lambda: device.containers() == {"aa": f"{V1} running"}, 120)

    play(scenario)


def drifts(device: Device) -> list[str]:
    changed = [c.host.get("Memory") == 4711 for c in device.engine.containers()]
    return ["Memory" for one in changed if one] if changed else ["Memory is not known"]


def test_what_somebody_keeps_changing_is_put_right_at_the_pace_of_restarts() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        await device.good(manifest(aa=V1))
        await asyncio.sleep(3600)
        made = {device.ids()["aa"]}
        began = device.clock.monotonic()
        device.engine.update("aa", Memory=4711)
        await device.until(lambda: "aa" in device.ids() and device.ids()["aa"] not in made, 20)
        while device.clock.monotonic() - began < 2 * 3600:
            container = device.engine.find("aa")
            if container is not None:
                made.add(container.id)
                if container.state["Running"] and container.host.get("Memory") != 4711:
                    device.engine.update("aa", Memory=4711)
            await asyncio.sleep(5)
        assert 20 < len(made) < 40
        assert device.phase() == "good"
        # Once nobody does, it is as it was made, and the next change is put right at once.
        await device.until(lambda: not any("Memory" in d for d in drifts(device)), 400)
        await device.settled()
        await asyncio.sleep(1200)
        last = device.ids()["aa"]
        device.engine.update("aa", Memory=4711)
        await device.until(lambda: device.ids().get("aa", last) != last, 20)

    play(scenario)


def test_a_good_deployment_comes_back_by_itself_when_what_had_its_name_is_gone() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        await device.good(manifest(aa=V1))
        device.engine.remove("aa")
        device.engine.create_foreign("aa", V1)
        await device.until(lambda: status(device, "aa")[0] == "failed")
        assert "docker rename aa" in status(device, "aa")[1]
        assert device.phase() == "good"
        await asyncio.sleep(3600)
        assert status(device, "aa")[0] == "failed"
        device.engine.rename("aa", "theirs")
        await device.until(lambda: status(device, "aa")[0] == "running", 150)
        assert device.containers() == {"aa": f"{V1} running", "theirs": f"{V1} created"}

    play(scenario)


def test_what_stood_in_the_way_before_does_not_fail_a_new_deployment() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1, bb=V1))
        device.engine.remove("aa")
        device.engine.create_foreign("aa", V1)
        await device.until(lambda: status(device, "aa")[0] == "failed")
        device.engine.rename("aa", "theirs")
        # The same container of "aa" is wanted again, and nobody has tried it since.
        await device.good(manifest(aa=V1, bb=V2))
        assert device.containers()["aa"] == f"{V1} running"

    play(scenario)
