"""Container modules under the real control loop: engine simulated, time virtual."""

from __future__ import annotations

import asyncio
from datetime import datetime
from itertools import pairwise

import pytest
from container_world import HEALTHCHECK, Device, manifest, play
from gatelet.agent.conditions import conditions
from gatelet.agent.plan_types import Stop
from gatelet.agent.runtime.container import RuntimeFailed
from gatelet.agent.snapshot import Snapshot

V1, V2 = "r.io/app:1", "r.io/app:2"


def publish(device: Device, *names: str, **config: object) -> None:
    for name in names:
        device.engine.publish(name, config=config or None, layers=((name, 1000),))


def status(device: Device, module: str) -> tuple[str, str]:
    (found,) = [c for c in conditions(device.snapshot, {}) if c.module == module]
    return found.status, found.description


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


def test_restarts_have_edge_agents_numbers() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        await device.good(manifest(aa=V1))
        starts: list[float] = []
        seen = ""

        async def follow() -> None:
            nonlocal seen
            while True:
                container = device.engine._named("aa")
                at = container.state["StartedAt"]
                if at != seen:
                    seen = at
                    starts.append(device.clock.monotonic())
                    await asyncio.sleep(0.2)
                    device.engine.signal("aa", "SIGKILL")
                await asyncio.sleep(0.25)

        task = asyncio.ensure_future(follow())
        await device.until(lambda: status(device, "aa")[0] == "failed", 24 * 3600)
        waits = [later - earlier for earlier, later in pairwise(starts)]
        expected = [min(10 * 2**n, 300) for n in range(20)]
        assert len(waits) == 20
        for wait, least in zip(waits, expected, strict=True):
            assert least <= wait <= least + 6, (wait, least)
        await asyncio.sleep(3600)
        assert len(starts) == 21
        assert device.phase() == "good"
        task.cancel()
        # A restart that is asked for gives it another chance.
        assert device.reconciler.restart("aa").code == 200
        await device.until(lambda: status(device, "aa")[0] == "running")

    play(scenario)


def test_counts_begin_again_after_ten_minutes() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        await device.good(manifest(aa=V1))
        for _ in range(3):
            device.engine.signal("aa", "SIGKILL")
            await device.until(lambda: status(device, "aa")[0] == "backoff")
            took = await device.until(lambda: status(device, "aa")[0] == "running")
            assert took < 20
            await asyncio.sleep(700)
        assert device.store.restarts()["aa"].count == 0

    play(scenario)


@pytest.mark.parametrize(
    ("policy", "code", "again"),
    [
        ("never", 0, False),
        ("never", 1, False),
        ("on-failure", 0, False),
        ("on-failure", 1, True),
        ("on-unhealthy", 0, False),
        ("on-unhealthy", 1, True),
        ("always", 0, True),
        ("always", 1, True),
    ],
)
def test_the_restart_policy_decides(policy: str, code: int, again: bool) -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        env = {"EXIT_AFTER_MS": "200000", "EXIT_CODE": str(code)}
        await device.good(manifest(aa={"image": V1, "restartPolicy": policy, "env": env}))
        await device.until(lambda: "exited" in device.containers()["aa"])
        await asyncio.sleep(100)
        assert ("running" in device.containers()["aa"]) is again
        if not again:
            assert status(device, "aa")[0] == ("failed" if code else "stopped")

    play(scenario)


@pytest.mark.parametrize("policy", ["never", "on-failure", "on-unhealthy", "always"])
def test_an_unhealthy_container_is_restarted_by_on_unhealthy_and_always(policy: str) -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, Healthcheck=HEALTHCHECK)
        await device.good(manifest(aa={"image": V1, "restartPolicy": policy}))
        device.engine.signal("aa", "SIGUSR1")
        await device.until(lambda: status(device, "aa")[0] == "unhealthy")
        started = device.engine._named("aa").state["StartedAt"]
        await asyncio.sleep(60)
        again = device.engine._named("aa").state["StartedAt"] != started
        assert again is (policy in ("on-unhealthy", "always"))
        if again:
            device.engine.signal("aa", "SIGUSR2")
            await device.until(lambda: status(device, "aa")[0] == "running")
            assert device.store.restarts()["aa"].count >= 1

    play(scenario)


def test_a_scoring_container_is_routed_and_restarted_when_it_does_not_answer() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, Labels={"io.gatelet.scoring": "m"})
        await device.good(manifest(aa={"image": V1, "restartPolicy": "on-unhealthy"}))
        (route,) = device.scoring.routes
        assert route.endpoint == "aa"
        (socket,) = device.scoring.sockets.values()
        assert socket.endswith("modules/aa/scoring.sock")
        started = device.engine._named("aa").state["StartedAt"]
        await asyncio.sleep(100)
        device.scoring.silent.add(socket)
        await device.until(lambda: status(device, "aa")[0] == "unhealthy")
        await device.until(lambda: device.engine._named("aa").state["StartedAt"] != started, 120)
        device.scoring.silent.clear()
        await device.until(lambda: status(device, "aa")[0] == "running")
        device.scoring.crash()
        await device.until(lambda: len(device.scoring.routes) == 1)
        await device.good(manifest())
        assert device.containers() == {}
        assert device.scoring.routes == ()
        assert device.scoring.states == {}

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


def test_stopped_modules_stop_and_start_again_without_a_restart() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        for policy in ("never", "always"):
            entry = {"image": V1, "restartPolicy": policy}
            await device.good(manifest(aa=entry))
            before = device.ids()
            await device.good(manifest(aa={**entry, "status": "stopped"}))
            assert "exited" in device.containers()["aa"]
            assert status(device, "aa")[0] == "stopped"
            await device.good(manifest(aa=entry))
            assert device.ids() == before
            assert "running" in device.containers()["aa"]
            assert device.store.restarts()["aa"].count == 0

    play(scenario)


def test_a_slow_pull_does_not_hold_back_the_restart_of_another_module() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1, bb=V1))
        device.engine.faults.pull_seconds = 2000
        device.reconciler.submit("local", 0, manifest(aa=V2, bb=V1), always=True)
        await asyncio.sleep(60)
        for name in ("aa", "bb"):
            device.engine.signal(name, "SIGKILL")
            await device.until(lambda name=name: "exited" in device.containers()[name], 5)
            took = await device.until(lambda name=name: "running" in device.containers()[name], 60)
            assert took < 20
        assert device.containers()["aa"] == f"{V1} running"

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


def test_restart_state_survives_the_agent() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        await device.good(manifest(aa=V1))
        for _ in range(4):
            device.engine.signal("aa", "SIGKILL")
            await device.until(lambda: status(device, "aa")[0] == "backoff")
            await device.until(lambda: status(device, "aa")[0] == "running")
        await device.kill()
        device.start()
        await asyncio.sleep(5)
        device.engine.signal("aa", "SIGKILL")
        await device.until(lambda: "exited" in device.containers()["aa"])
        took = await device.until(lambda: "running" in device.containers()["aa"])
        assert 160 <= took < 175

    play(scenario)


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


def test_restarts_of_a_removed_module_are_forgotten_when_nothing_returns_to_it() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        await device.good(manifest(aa=V1, bb=V1))
        device.engine.signal("aa", "SIGKILL")
        await device.until(lambda: status(device, "aa")[0] == "backoff")
        await device.until(lambda: status(device, "aa")[0] == "running")
        device.reconciler.submit("local", 0, manifest(bb=V1))
        await device.until(lambda: device.phase() == "probation")
        assert device.containers() == {"bb": f"{V1} running"}
        assert device.store.restarts()["aa"].count == 1
        await device.until(lambda: device.phase() == "good")
        await device.until(lambda: set(device.store.restarts()) == {"bb"})
        await device.good(manifest(aa=V1, bb=V1))
        assert device.store.restarts()["aa"].count == 0

    play(scenario)


def test_a_restart_on_request_restarts_once_whatever_the_policy() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1)
        await device.good(manifest(aa={"image": V1, "restartPolicy": "never"}))
        started = device.engine._named("aa").state["StartedAt"]
        ids = device.ids()
        assert device.reconciler.restart("aa").code == 200
        assert device.reconciler.restart("bb").code == 400
        await device.until(
            lambda: (
                device.engine._named("aa").state["StartedAt"] != started
                and "running" in device.containers()["aa"]
            )
        )
        again = device.engine._named("aa").state["StartedAt"]
        await asyncio.sleep(3600)
        assert device.engine._named("aa").state["StartedAt"] == again
        assert device.ids() == ids
        assert device.store.restarts()["aa"].count == 0

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


@pytest.mark.parametrize(
    ("options", "seconds", "code"),
    [
        ({}, 10, 137),
        ({"StopTimeout": 100}, 100, 137),
        ({"StopTimeout": 0}, 0, 137),
        ({"StopTimeout": -1}, 300, 137),
        ({"StopTimeout": 4000}, 300, 137),
        ({"StopTimeout": 100, "StopSignal": "SIGINT"}, 0, 0),
    ],
)
def test_a_container_ends_in_its_own_way_at_an_update_a_rollback_a_restart_and_a_stop(
    options: dict[str, object], seconds: float, code: int
) -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        env = {"IGNORE_TERM": "1"}
        entry = {"image": V1, "options": options, "env": env}
        await device.good(manifest(aa=entry))
        sick = {"Healthcheck": HEALTHCHECK, **options}
        ill = {"image": V2, "options": sick, "env": {**env, "SICK_AFTER_MS": "9000"}}
        assert "health check failed" in await device.failed(manifest(aa=ill))
        assert device.containers() == {"aa": f"{V1} running"}
        container = device.engine._named("aa")
        started = container.state["StartedAt"]
        device.reconciler.restart("aa")
        await device.until(lambda: container.state["StartedAt"] != started)
        await device.good(manifest(aa={**entry, "status": "stopped"}))
        assert container.state["ExitCode"] == code
        began, took = None, []
        for at, _, step, outcome, _ in device.store.journal_tail(200):
            if not step.startswith("stop aa"):
                continue
            assert outcome == ("started" if began is None else "done")
            if began is None:
                began = datetime.fromisoformat(at)
            else:
                took.append((datetime.fromisoformat(at) - began).total_seconds())
                began = None
        assert len(took) == 4
        assert took == pytest.approx([seconds] * 4, abs=1)

    play(scenario)


def test_the_agent_does_not_wait_for_a_container_that_takes_its_time_to_end() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        entry = {"image": V1, "options": {"StopTimeout": 290}, "env": {"IGNORE_TERM": "1"}}
        await device.good(manifest(aa=entry))
        device.reconciler.submit("local", 0, manifest(aa=V2), always=True)
        await device.until(lambda: any(isinstance(step, Stop) for step in device.snapshot.running))
        began = device.clock.monotonic()
        await device.kill()
        assert device.clock.monotonic() - began < 1
        # What it began is brought to its end by the next one.
        device.start()
        await device.until(lambda: device.phase() == "good")
        assert device.containers() == {"aa": f"{V2} running"}

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
