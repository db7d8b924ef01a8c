"""Restarts and stops of containers under the real control loop, in virtual time."""

from __future__ import annotations

import asyncio
from datetime import datetime
from itertools import pairwise

import pytest
from container_world import HEALTHCHECK, V1, V2, Device, manifest, play, publish, status
from gatelet.agent.plan_types import Stop


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
