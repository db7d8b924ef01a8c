"""Deployments of containers under the real control loop: engine simulated, time virtual."""

from __future__ import annotations

import asyncio

import pytest
from container_world import HEALTHCHECK, V1, V2, Device, manifest, play, publish, status


def test_a_container_is_pulled_made_started_and_becomes_good_after_its_probation() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        began = device.clock.monotonic()
        await device.good(manifest(aa=V1))
        assert device.containers() == {"aa": f"{V1} running"}
        assert status(device, "aa") == ("running", "running")
        assert 30 <= device.clock.monotonic() - began < 40

    play(scenario)


def test_a_module_may_have_its_own_probation() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        began = device.clock.monotonic()
        await device.good(manifest(aa={"image": V1, "env": {"GATELET_PROBATION_SECONDS": "300"}}))
        assert device.clock.monotonic() - began > 300
        began = device.clock.monotonic()
        await device.good(manifest(aa={"image": V1, "env": {"GATELET_PROBATION_SECONDS": "0"}}))
        assert device.clock.monotonic() - began < 25

    play(scenario)


def test_an_update_pulls_before_it_stops() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1))
        device.engine.faults.pull_seconds = 1000
        device.reconciler.submit("local", 0, manifest(aa=V2), always=True)
        await device.until(lambda: bool(device.snapshot.progress))
        await asyncio.sleep(900)
        assert device.containers() == {"aa": f"{V1} running"}
        await device.until(lambda: device.containers() == {"aa": f"{V2} running"})
        await device.until(lambda: device.phase() == "good")

    play(scenario)


def test_an_update_is_not_reported_as_running_while_the_old_container_runs() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1))
        device.engine.faults.call_seconds = 2.0
        device.reconciler.submit("local", 0, manifest(aa={"image": V1, "env": {"A": "1"}}))
        seen = []

        def looked() -> bool:
            wanted = device.snapshot.wanted
            if wanted is not None and wanted.generation == 2:
                (module,) = wanted.modules
                made = [view.spec for view in device.snapshot.observed.containers.values()]
                new = module.container is not None and made == [module.container.fingerprint()]
                seen.append((status(device, "aa")[0], new))
            return device.phase() == "good" and ("running", True) in seen

        await device.until(looked)
        assert ("running", False) not in seen
        assert len(set(seen)) > 1

    play(scenario)


def test_what_did_not_change_goes_on_untouched() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1, bb=V1))
        before = device.ids()
        await device.good(manifest(aa=V2, bb=V1))
        assert device.ids()["bb"] == before["bb"]
        assert device.ids()["aa"] != before["aa"]
        await device.good(manifest(bb={"image": V1, "startupOrder": 3, "restartPolicy": "never"}))
        assert device.ids() == {"bb": before["bb"]}

    play(scenario)


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"EXIT_AFTER_MS": "500", "EXIT_CODE": "7"}, "ended by itself 3 times.*exit code 7"),
        ({"SICK_AFTER_MS": "2000"}, "health check failed"),
        ({"HEALTHY_AFTER_MS": "900000"}, "health"),
    ],
)
def test_what_does_not_stay_well_is_rolled_back(env: dict[str, str], reason: str) -> None:
    import re

    async def scenario(device: Device) -> None:
        publish(device, V1, V2, Healthcheck={**HEALTHCHECK, "StartPeriod": 1_000_000_000})
        await device.good(manifest(aa=V1, bb=V1))
        before = device.ids()
        said = await device.failed(manifest(aa={"image": V2, "env": env}, bb=V1))
        assert re.search(f"aa: .*{reason}", said), said
        assert device.containers() == {"aa": f"{V1} running", "bb": f"{V1} running"}
        assert device.ids()["bb"] == before["bb"]
        ids = device.ids()
        await asyncio.sleep(24 * 3600)
        assert device.ids() == ids, "it flaps"
        assert device.phase() == "failed"

    play(scenario)


def test_a_scoring_container_that_falls_silent_during_probation_is_rolled_back() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2, Labels={"io.gatelet.scoring": "m"})
        await device.good(manifest(aa=V1))
        entry = {"image": V2, "env": {"GATELET_PROBATION_SECONDS": "3000"}}
        device.reconciler.submit("local", 0, manifest(aa=entry), always=True)
        await device.until(lambda: device.phase() == "probation")
        await asyncio.sleep(100)
        device.scoring.silent.update(device.scoring.sockets.values())
        await device.until(lambda: device.phase() == "failed", 1300)
        assert "does not answer" in device.description()
        device.scoring.silent.clear()
        await device.settled()
        assert device.containers() == {"aa": f"{V1} running"}

    play(scenario)


def test_what_an_earlier_container_did_is_not_held_against_a_new_one() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1))
        job = {"image": V1, "env": {"EXIT_AFTER_MS": "100", "EXIT_CODE": "0"}}
        job["restartPolicy"] = "never"
        crash = {"image": V2, "env": {"EXIT_AFTER_MS": "500", "EXIT_CODE": "7"}}
        for _ in range(4):
            await device.good(manifest(aa=V1, job=job))
            await device.good(manifest(aa=V1))
        for _ in range(2):
            began = device.clock.monotonic()
            said = await device.failed(manifest(aa=V1, bb=crash))
            assert "3 times" in said
            assert device.clock.monotonic() - began > 10 + 20, "it got its three attempts"

    play(scenario)


def test_without_anything_good_to_return_to_the_healthy_modules_go_on() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        crash = {"image": V1, "env": {"EXIT_AFTER_MS": "100"}}
        await_failed = device.reconciler.submit("local", 0, manifest(aa=V1, bad=crash))
        assert await_failed.code == 200
        await device.until(lambda: device.phase() == "failed")
        await asyncio.sleep(3 * 3600)
        assert device.containers()["aa"] == f"{V1} running"
        assert status(device, "bad")[0] == "failed"
        assert "20 restarts" in status(device, "bad")[1]

    play(scenario)


def test_what_the_policy_forbids_fails_before_anything_stops() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1))
        before = device.ids()
        forbidden = {"image": V2, "options": {"HostConfig": {"Privileged": True}}}
        said = await device.failed(manifest(aa=forbidden))
        assert "HostConfig.Privileged" in said
        assert device.ids() == before

    play(scenario)


def test_a_newer_document_stops_the_transfers_of_an_older_one() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        device.engine.faults.pull_seconds = 5000
        device.reconciler.submit("local", 0, manifest(aa=V1), always=True)
        await device.until(lambda: bool(device.snapshot.progress))
        device.engine.faults.pull_seconds = 1
        await device.good(manifest(aa=V2))
        assert device.clock.monotonic() < 200

    play(scenario)


def test_start_groups_follow_one_another_and_a_sick_one_holds_up_for_a_minute_only() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        publish(device, V2, Healthcheck={**HEALTHCHECK, "StartPeriod": 10**12})
        slow = {"image": V2, "env": {"HEALTHY_AFTER_MS": "20000"}, "startupOrder": 1}
        device.reconciler.submit("local", 0, manifest(aa=slow, bb={"image": V1, "startupOrder": 2}))
        await device.until(lambda: "running" in device.containers().get("aa", ""))
        assert "bb" not in device.containers()
        assert status(device, "bb") == ("unknown", "waits for aa, which starts before it")
        took = await device.until(lambda: "running" in device.containers().get("bb", ""))
        assert 15 < took < 30
        await device.until(lambda: device.phase() == "good")
        never = {"image": V2, "env": {"HEALTHY_AFTER_MS": "9000000"}, "startupOrder": 1}
        device.reconciler.submit(
            "local", 0, manifest(aa=never, cc={"image": V1, "startupOrder": 2}), always=True
        )
        took = await device.until(lambda: "running" in device.containers().get("cc", ""))
        assert 50 < took < 80

    play(scenario)


@pytest.mark.parametrize("wait", [False, True])
def test_update_modes(wait: bool) -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2, "r.io/big:1")
        await device.good(manifest(aa=V1, old=V1))
        device.engine.faults.pull_seconds = 1
        env = {"ModuleUpdateMode": "WaitForAllPulls"} if wait else None
        device.registry.up = True
        device.reconciler.submit(
            "local", 0, manifest(env, aa=V2, big="r.io/missing:1"), always=True
        )
        await asyncio.sleep(120)
        assert device.containers()["aa"] == f"{V1 if wait else V2} running"
        assert device.containers()["old"] == f"{V1} running"
        publish(device, "r.io/missing:1")
        await device.until(lambda: device.phase() == "good")
        assert device.containers() == {"aa": f"{V2} running", "big": "r.io/missing:1 running"}

    play(scenario)


def test_rollback_on_request_brings_the_very_images_back() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        await device.good(manifest(aa=V1))
        digest = device.store.pins(1)["aa"]
        device.engine.publish(V1, layers=(("new", 5),))
        await device.good(manifest(aa={"image": V1, "env": {"A": "1"}}))
        assert device.store.pins(2)["aa"] != digest
        assert device.reconciler.rollback().generation == 3
        await device.until(lambda: device.phase() == "good")
        assert device.store.pins(3)["aa"] == digest
        assert device.reconciler.rollback(17).code == 400

    play(scenario)


def test_a_preview_changes_nothing() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1, bb=V1))
        before = device.ids()
        found = device.reconciler.preview(manifest(aa={"image": V2, "env": {"X": "1"}}, cc=V1))
        assert found.code == 200
        changes = {change.module: change for change in found.modules}
        assert {name: change.change for name, change in changes.items()} == {
            "aa": "changed",
            "bb": "removed",
            "cc": "added",
        }
        assert [(f.path, f.before, f.after) for f in changes["aa"].fields] == [
            ("env.X.value", None, "1"),
            ("settings.image", V1, V2),
        ]
        assert f"resolve {V2} for aa" in found.steps
        assert device.reconciler.preview(b"{").code == 400
        assert device.reconciler.preview().steps == ()
        assert device.ids() == before

    play(scenario)
