"""When the control loop removes images, and a disk that is full, in virtual time."""

from __future__ import annotations

import asyncio

from container_world import V1, V2, Device, manifest, play, publish, status
from gatelet.agent.conditions import conditions
from gatelet.agent.runtime.container import RuntimeFailed


def test_a_full_disk_is_said_and_the_old_version_serves_until_there_is_room() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1))
        full = RuntimeFailed("write /var/lib: no space left on device", retryable=False)
        device.engine.faults.fail_always["pull"] = full
        device.reconciler.submit("local", 0, manifest(aa=V2), always=True)
        await device.until(lambda: status(device, "aa")[0] == "backoff")
        (condition,) = conditions(device.snapshot, {})
        assert condition.details["error"] == "DISK_FULL"
        await asyncio.sleep(3600)
        assert device.containers() == {"aa": f"{V1} running"}
        del device.engine.faults.fail_always["pull"]
        await device.until(lambda: device.phase() == "good")

    play(scenario)


def test_images_that_gatelet_brought_go_after_a_week_and_others_stay() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2, "r.io/own:1")
        await device.engine.runtime("other").pull(
            "r.io/own:1",
            device.engine.publish("r.io/own:1", layers=(("o", 1),)),
            (),
            lambda p: None,
        )
        await device.good(manifest(aa=V1))
        await device.good(manifest(aa=V2))
        first = {image.name for image, _ in device.engine._present.values()}
        assert first == {V1, V2, "r.io/own:1"}
        await asyncio.sleep(6.9 * 86400)
        assert {image.name for image, _ in device.engine._present.values()} == first
        await asyncio.sleep(0.3 * 86400)
        assert {image.name for image, _ in device.engine._present.values()} == {V2, "r.io/own:1"}
        await asyncio.sleep(3 * 86400)
        assert {image.name for image, _ in device.engine._present.values()} == {V2, "r.io/own:1"}

    play(scenario)


def test_under_pressure_unused_images_go_at_once() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1))
        await device.good(manifest(aa=V2))
        device.disk.free = 0
        await device.until(lambda: len(device.engine._present) == 1)
        assert device.containers() == {"aa": f"{V2} running"}

    play(scenario)


def test_an_image_that_somebody_uses_is_asked_for_seldom() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1))
        device.engine.create_foreign("theirs", V1)
        await device.good(manifest(aa=V2))
        device.disk.free = 0
        await asyncio.sleep(4 * 24 * 3600)
        tried = [step for _, _, step, *_ in device.store.journal_tail(2000) if "remove" in step]
        assert 20 < len(tried) < 600
        device.engine.remove("theirs")
        await device.until(lambda: len(device.engine.image_digests()) == 1, 2 * 3600)

    play(scenario)
