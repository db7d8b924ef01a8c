"""How often the control loop looks: waiting must not keep a processor busy, nor fill a log."""

from __future__ import annotations

import asyncio
import logging

import pytest
from container_world import HEALTHCHECK, V1, V2, Device, manifest, play
from gatelet.agent.runtime.container import RuntimeFailed


def count_passes(device: Device) -> list[float]:
    passes: list[float] = []
    publish = device.reconciler._publish

    def counting(snapshot: object) -> None:
        passes.append(device.clock.monotonic())
        publish(snapshot)

    device.reconciler._publish = counting
    return passes


def test_an_engine_that_dies_while_a_container_is_made_is_waited_for_in_peace() -> None:
    async def scenario(device: Device) -> None:
        device.engine.publish(V1, layers=((V1, 1000),))
        device.engine.faults.fail_always["create"] = RuntimeFailed("EOF", retryable=True)
        device.reconciler.submit("local", 0, manifest(aa=V1))
        await device.until(lambda: any(f.count > 2 for f in device.snapshot.failures))
        device.engine.stop()
        await device.until(lambda: "does not answer" in str(device.snapshot.failures))
        passes = count_passes(device)
        await asyncio.sleep(3600)
        assert 10 < len(passes) < 1000

    play(scenario)


def test_a_disk_that_stays_full_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(device: Device) -> None:
        device.engine.publish(V1, layers=((V1, 1000),))
        await device.good(manifest(aa=V1))
        (pages,) = device.store._db.execute("PRAGMA page_count").fetchone()
        device.store._db.execute(f"PRAGMA max_page_count={pages}")
        device.engine.publish(V2, layers=((V2, 1000),))
        body = manifest(aa=V2, bb={"image": V1, "env": {"X": "x" * 100_000}})
        assert device.reconciler.submit("local", 0, body).code == 500
        caplog.clear()
        await asyncio.sleep(24 * 3600)
        told = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert 1 <= len(told) <= 3, [record.message for record in told][:5]
        device.store._db.execute("PRAGMA max_page_count=1000000")
        await device.until(lambda: device.phase() == "good" and len(device.containers()) == 2)

    play(scenario)


def test_manifests_of_long_ago_are_not_kept_in_memory() -> None:
    async def scenario(device: Device) -> None:
        device.engine.publish(V1, layers=((V1, 1000),))
        for number in range(30):
            await device.good(manifest(aa={"image": V1, "env": {"N": str(number)}}))
        assert len(device.reconciler._wanted._manifests) < 10

    play(scenario)


def test_a_module_that_stays_unwell_while_another_one_is_deployed_keeps_nobody_busy() -> None:
    async def scenario(device: Device) -> None:
        device.engine.publish(V1, layers=((V1, 1000),))
        ill = {"image": V1, "restartPolicy": "on-failure", "options": {"Healthcheck": HEALTHCHECK}}
        await device.good(manifest(aa=ill))
        device.engine.signal("aa", "SIGUSR1")
        await asyncio.sleep(60)
        device.reconciler.submit("local", 0, manifest(aa=ill, bb=V1), always=True)
        await device.until(lambda: "running" in device.containers().get("bb", ""))
        # More than the time within which a container that was changed has to be healthy.
        await asyncio.sleep(400)
        passes = count_passes(device)
        await asyncio.sleep(3600)
        assert 10 < len(passes) < 1000
        device.engine.signal("aa", "SIGUSR2")
        await device.until(lambda: device.phase() == "good", 60)

    play(scenario)
