"""What fails of modules that a deployment leaves as they are: not the deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from container_world import V1, V2, Device, manifest, play, publish, status
from gatelet.agent.plan import Failure, Observed, Plan, Pull, Step, Stop, Wanted, WantedModule, plan
from gatelet.agent.runtime.container import ContainerSpec, ContainerView, RuntimeFailed
from gatelet.agent.scoring_env import ScoringOptions


def in_the_way(device: Device) -> None:
    """Somebody's container has the name of "aa": a failure that no attempt of ours can heal."""
    device.engine.remove("aa")
    device.engine.create_foreign("aa", V1)


def test_what_stands_in_the_way_of_another_module_does_not_fail_a_deployment() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1, bb=V1))
        in_the_way(device)
        await device.until(lambda: status(device, "aa")[0] == "failed")
        device.reconciler.submit("local", 0, manifest(aa=V1, bb=V2), always=True)
        await device.until(lambda: device.containers().get("bb") == f"{V2} running")
        await asyncio.sleep(3600)
        assert (device.phase(), device.description()) == ("applying", "")
        assert status(device, "aa")[0] == "failed"
        assert device.containers()["bb"] == f"{V2} running"
        # It is tried again and again, as it was before the deployment.
        device.engine.rename("aa", "theirs")
        await device.until(lambda: device.phase() == "good", 300)
        assert device.containers()["aa"] == f"{V1} running"

    play(scenario)


def test_what_stands_in_the_way_of_a_changed_module_fails_the_deployment() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1, bb=V1))
        in_the_way(device)
        device.reconciler.submit("local", 0, manifest(aa=V2, bb=V1), always=True)
        await device.until(lambda: device.phase() == "failed")
        assert "aa" in device.description()

    play(scenario)


def test_what_fails_of_the_old_version_does_not_fail_the_update_that_replaces_it() -> None:
    async def scenario(device: Device) -> None:
        publish(device, V1, V2)
        await device.good(manifest(aa=V1))
        device.engine.faults.pull_seconds = 1000
        device.reconciler.submit("local", 0, manifest(aa=V2), always=True)
        await device.until(lambda: bool(device.snapshot.progress))
        device.engine.faults.fail["create"] = [RuntimeFailed("a broken layer", retryable=False)]
        device.engine.remove("aa")
        await device.until(lambda: not device.engine.faults.fail["create"])
        await device.until(lambda: device.phase() == "good")
        assert device.containers() == {"aa": f"{V2} running"}

    play(scenario)


def wanted(name: str, **changes: object) -> WantedModule:
    digest = f"sha256:{name * 32}"
    made = ContainerSpec(name, name, f"r.io/{name}:1", digest, "{}")
    module = WantedModule(
        name,
        made.image,
        digest,
        None,
        ScoringOptions(endpoint=name),
        kind="container",
        container=made,
    )
    return replace(module, **changes)  # type: ignore[arg-type]


def planned(
    new: list[WantedModule],
    old: list[WantedModule],
    seen: Observed,
    failures: Mapping[Step, Failure] | None = None,
    now: float = 0.0,
) -> Plan:
    return plan(Wanted(2, tuple(new)), Wanted(1, tuple(old)), seen, failures or {}, now)


def seen(*modules: WantedModule) -> Observed:
    views = [
        ContainerView(
            m.name, m.name, f"id-{m.name}", m.container.fingerprint(), m.digest, "running"
        )
        for m in modules
        if m.container is not None and m.digest is not None
    ]
    return Observed(
        frozenset(),
        False,
        {},
        (),
        "up",
        containers={view.name: view for view in views},
        engine_images=frozenset(m.digest for m in modules if m.digest is not None),
    )


def test_what_the_device_refuses_of_both_deployments_holds_nothing_else_up() -> None:
    refused = wanted("bb", container=None, refused="privileged")
    gone = wanted("cc")
    current = planned([refused], [refused, gone], seen(gone, wanted("bb")))
    assert [failure.message for failure in current.blocked] == ["privileged"]
    assert current.fatal is None
    assert [step.module for step in current.steps if isinstance(step, Stop)] == ["cc"]


def test_what_the_device_refuses_of_another_image_fails_the_deployment() -> None:
    old = wanted("bb", container=None, refused="privileged")
    new = replace(old, digest=f"sha256:{'bc' * 32}")
    current = planned([new], [old], seen(wanted("bb"), replace(new, refused="")))
    assert current.fatal is not None
    assert current.fatal.message == "privileged"


def test_an_image_that_is_lost_is_tried_again_where_the_last_good_deployment_has_it_too() -> None:
    lost = wanted("bb")
    step = Pull("bb", lost.image, str(lost.digest), "container")
    failure = Failure(step, 3, 10.0, "no such image", retryable=False)
    for old, again in (([lost], True), ([], False)):
        early = planned([lost], old, seen(), {step: failure}, 9.0)
        late = planned([lost], old, seen(), {step: failure}, 11.0)
        assert (early.steps, late.steps) == ((), (step,) if again else ())
        assert early.fatal == late.fatal == (None if again else failure)
        assert early.wake_at == (10.0 if again else None)
        assert early.blocked == late.blocked == (failure,)
