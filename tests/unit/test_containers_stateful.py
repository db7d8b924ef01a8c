"""The control loop, the simulated engine and every mishap that Hypothesis thinks of.

Whatever happened: once it is calm the device converges to the newest deployment that works, stays
there without another step, and no healthy module that did not change was ever stopped.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from container_world import HEALTHCHECK, SETTINGS, Device, manifest
from gatelet.agent.runtime.container import SPEC_LABEL
from gatelet.simulator.virtual_time import VirtualClock, VirtualTimeLoop
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

NAMES = ("aa", "bb", "cc")
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "well": {},
    "slow": {"HEALTHY_AFTER_MS": "15000"},
    "crashing": {"EXIT_AFTER_MS": "400", "EXIT_CODE": "3"},
    "sick": {"SICK_AFTER_MS": "6000"},
}
modules = st.dictionaries(
    st.sampled_from(NAMES),
    st.fixed_dictionaries(
        {
            "version": st.integers(1, 3),
            "kind": st.sampled_from(["well"] * 6 + ["slow", "crashing", "sick"]),
            "order": st.sampled_from([0, 1, 4294967295]),
            "policy": st.sampled_from(["always", "on-unhealthy", "on-failure", "never"]),
            "status": st.sampled_from(["running"] * 5 + ["stopped"]),
        }
    ),
    max_size=3,
)


class WatchedDevice(Device):
    """Notes when the agent stops what it must not stop."""

    violations: list[str]

    def start(self) -> None:
        super().start()
        runtime = self.hold.runtime
        stop = runtime.stop

        async def watched(name: str, timeout: float | None = None) -> None:
            self.judge(name)
            await stop(name, timeout)

        runtime.stop = watched  # type: ignore[method-assign]

    def judge(self, name: str) -> None:
        container = self.engine._find(name)
        if container is None or container.state["Status"] != "running":
            return
        health = container.state.get("Health", {}).get("Status", "healthy")
        drifted = container.host.get("Memory") == 4711
        latest, good = self.store.latest(), self.store.last_good()
        if health == "unhealthy" or drifted or latest is None or good is None:
            return
        spec = container.body["Labels"].get(SPEC_LABEL)
        for deployment in (latest, good):
            wanted = self.reconciler._wanted.of(deployment)
            specs = {m.container.fingerprint() for m in wanted.modules if m.container and m.running}
            if spec not in specs:
                return
        self.violations.append(f"{name} was healthy, wanted before and after, and was stopped")


class Containers(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        logging.disable(logging.CRITICAL)
        self.loop = VirtualTimeLoop()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.device = WatchedDevice(self.folder, VirtualClock(), SETTINGS)
        self.device.violations = []
        self.boots = 1
        self.up = True
        self.killed: set[str] = set()
        self.wanted: dict[str, Any] = {}

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    @initialize()
    def begin(self) -> None:
        async def work() -> None:
            for number in (1, 2, 3):
                name = f"r.io/app:{number}"
                check = {**HEALTHCHECK, "StartPeriod": 30 * 10**9}
                self.device.engine.publish(
                    name, config={"Healthcheck": check}, layers=((name, 1000),)
                )
            self.device.start()

        self.run(work())

    @rule(wanted=modules, wait=st.booleans())
    def deploy(self, wanted: dict[str, Any], wait: bool) -> None:
        self.wanted = wanted

        async def work() -> None:
            entries = {
                name: {
                    "image": f"r.io/app:{module['version']}",
                    "startupOrder": module["order"],
                    "restartPolicy": module["policy"],
                    "status": module["status"],
                    "env": ENVIRONMENTS[module["kind"]],
                }
                for name, module in wanted.items()
            }
            mode = {"ModuleUpdateMode": "WaitForAllPulls"} if wait else None
            verdict = self.device.reconciler.submit(
                "local", 0, manifest(mode, **entries), always=True
            )
            assert verdict.code == 200

        self.run(work())

    @precondition(lambda self: self.wanted)
    @rule(wait=st.booleans())
    def flip(self, wait: bool) -> None:
        """The same again, the other way round for one module."""
        name = min(self.wanted)
        status = "stopped" if self.wanted[name]["status"] == "running" else "running"
        self.deploy(
            wanted={**self.wanted, name: {**self.wanted[name], "status": status}}, wait=wait
        )

    @rule(seconds=st.sampled_from([0.1, 1, 7, 40, 400]))
    def pass_time(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @rule(name=st.sampled_from(NAMES), signal=st.sampled_from(["SIGKILL", "SIGUSR1", "SIGUSR2"]))
    def hurt(self, name: str, signal: str) -> None:
        async def work() -> None:
            container = self.device.engine._find(name)
            if container is not None and container.state["Running"]:
                self.device.engine.signal(name, signal)
                if signal == "SIGKILL":
                    self.killed.add(name)

        self.run(work())

    @rule(name=st.sampled_from(NAMES))
    def drift(self, name: str) -> None:
        async def work() -> None:
            if self.device.engine._find(name) is not None:
                self.device.engine.update(name, Memory=4711)

        self.run(work())

    @rule(up=st.booleans())
    def registry(self, up: bool) -> None:
        self.device.registry.up = up

    @precondition(lambda self: self.up)
    @rule()
    def engine_ends(self) -> None:
        async def work() -> None:
            self.device.engine.stop()

        self.up = False
        self.run(work())

    @precondition(lambda self: not self.up)
    @rule()
    def engine_begins(self) -> None:
        async def work() -> None:
            self.device.engine.start()

        self.up = True
        self.run(work())

    @rule()
    def agent_is_killed(self) -> None:
        async def work() -> None:
            await self.device.kill()
            self.device.start()

        self.run(work())

    @rule()
    def host_reboots(self) -> None:
        async def work() -> None:
            await self.device.kill()
            self.device.engine.stop()
            self.boots += 1
            self.device.boot_id = f"boot-{self.boots}"
            self.device.engine.start()
            self.device.start()

        self.up = True
        self.run(work())

    @rule(name=st.sampled_from(NAMES))
    def restart(self, name: str) -> None:
        async def work() -> None:
            # Asked for, so it may stop what is healthy.
            self.device.violations.clear()
            self.device.reconciler.restart(name)
            await asyncio.sleep(30)
            self.device.violations.clear()

        self.run(work())

    @invariant()
    def nothing_healthy_was_stopped(self) -> None:
        assert not self.device.violations

    def teardown(self) -> None:
        try:
            self.run(self.calm())
        finally:
            self.run(self.device.kill())
            self.loop.close()
            shutil.rmtree(self.folder)
            logging.disable(logging.NOTSET)

    async def calm(self) -> None:
        device = self.device
        device.registry.up = True
        if not self.up:
            device.engine.start()
        for container in device.engine._containers.values():
            if container.sick and container.state["Running"]:
                device.engine.signal(container.name, "SIGUSR2")
            container.sick = False
        latest = device.store.latest()
        if latest is None:
            return
        await device.until(lambda: device.phase() in ("good", "failed"), 4 * 3600)
        # What was given up without anything to return to may end in edgeAgent's 20 restarts.
        await asyncio.sleep(3 * 3600)
        self.nothing_healthy_was_stopped()
        before = self.picture()
        await asyncio.sleep(3 * 3600)
        assert self.picture() == before, "it flaps"
        goal = device.snapshot.goal
        plan = device.snapshot.plan
        assert goal is not None
        assert plan is not None
        if goal.wanted.phase != "good":
            assert device.store.last_good() is None
            return
        assert plan.steps == ()
        ill = {f"{reason}" for reason in plan.blocked}
        assert not ill
        wanted = device.reconciler._wanted.of(goal.wanted)
        expected = {m.name: m.image for m in wanted.modules if m.running}
        kept = {m.name for m in wanted.modules if not m.running}
        found = {}
        for container in device.engine._containers.values():
            if container.name in kept:
                assert not container.state["Running"]
            else:
                found[container.name] = container.image.name
                ends = "EXIT_AFTER_MS" in container.environment or container.name in self.killed
                assert ends or container.state["Running"], f"{container.name} does not run"
        assert found == expected

    def picture(self) -> dict[str, tuple[str, str]]:
        return {
            container.name: (container.id, container.state["StartedAt"])
            for container in self.device.engine._containers.values()
        }


TestContainers = Containers.TestCase
TestContainers.settings = settings(
    max_examples=25,
    stateful_step_count=14,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
