"""Containers when the network, the engine or the agent was away, in virtual time."""

from __future__ import annotations

import asyncio

import pytest
from container_world import V1, V2, Device, manifest, play, publish, status
from gatelet.agent.snapshot import Snapshot


def test_after_a_reboot_without_network_the_last_good_deployment_runs() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        job = {"image": V1, "restartPolicy": "never", "env": {"EXIT_AFTER_MS": "5000"}}
        job["env"]["EXIT_CODE"] = "0"
        await device.good(manifest(aa=V1, never={"image": V1, "restartPolicy": "never"}, job=job))
        device.reconciler.submit("local", 0, manifest(aa=V2, never=V2), always=True)
        device.registry.up = False
        await asyncio.sleep(0.3)
        await device.kill()
        device.engine.stop()
        device.engine.start()
        device.boot_id = "boot-2"
        device.start()
        await device.until(
            lambda: all("running" in device.containers()[name] for name in ("aa", "never"))
        )
        assert device.containers()["aa"] == f"{V1} running"
        assert "exited" in device.containers()["job"]
        assert device.store.restarts()["aa"].count == 0
        device.registry.up = True
        await device.until(lambda: device.phase() == "good")
        assert device.containers() == {"aa": f"{V2} running", "never": f"{V2} running"}

    play(scenario)


def test_an_engine_that_is_away_for_hours_is_waited_for() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa={"image": V1, "restartPolicy": "never"}))
        device.engine.stop()
        await device.until(lambda: status(device, "aa")[0] == "backoff")
        assert "does not answer" in status(device, "aa")[1]
        await asyncio.sleep(5 * 3600)
        device.reconciler.submit("local", 0, manifest(aa=V2), always=True)
        await asyncio.sleep(3600)
        assert device.phase() == "applying"
        device.engine.start()
        await device.until(lambda: device.phase() == "good")
        assert device.containers() == {"aa": f"{V2} running"}

    play(scenario)


def test_an_outage_of_hours_does_not_change_the_report_with_every_attempt() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1))
        device.registry.up = False
        told = set()
        publish_of = device.reconciler._publish

        def note(snapshot: Snapshot) -> None:
            publish_of(snapshot)
            told.add(status(device, "aa"))

        device.reconciler._publish = note  # type: ignore[method-assign]
        device.reconciler.submit("local", 0, manifest(aa=V2), always=True)
        await asyncio.sleep(12 * 3600)
        assert status(device, "aa")[0] == "backoff"
        assert "more than 300 attempts" in status(device, "aa")[1]
        assert len(told) < 12

    play(scenario)


@pytest.mark.parametrize("policy", ["never", "on-failure", "on-unhealthy", "always"])
@pytest.mark.parametrize("code", [0, 143, 137])
def test_containers_that_ended_with_an_engine_while_no_agent_looked_start_again(
    policy: str, code: int
) -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        entry = {"image": V1, "restartPolicy": policy}
        await device.good(manifest(aa=entry, bb=entry))
        await device.kill()
        for container in device.engine.containers():
            container.end(code)
        device.start()
        await device.until(lambda: set(device.containers().values()) == {f"{V1} running"}, 20)
        assert all(state.count == 0 for state in device.store.restarts().values())

    play(scenario)


def test_what_ended_by_itself_while_no_agent_looked_is_not_started_again() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        entry = {"image": V1, "restartPolicy": "on-failure"}
        await device.good(manifest(job=entry, web=V1))
        await device.kill()
        device.engine._named("job").end(0)
        device.start()
        await device.settled()
        await asyncio.sleep(3600)
        assert device.containers() == {"job": f"{V1} exited", "web": f"{V1} running"}
        # Neither is what ended alone by an error, at once and uncounted.
        await device.kill()
        for container in device.engine.containers():
            container.end(3)
        device.start()
        await device.until(
            lambda: "web" in {n for n, s in device.containers().items() if "run" in s}
        )
        assert device.store.restarts()["web"].count == 1

    play(scenario)
