"""Which events the agent tells as telemetry, and that none is lost or told twice."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from gatelet.agent.config import ConfigError, parse_config
from gatelet.agent.configured import open_outbox, outbox_limits
from gatelet.agent.edge_hub import EdgeHub
from gatelet.agent.outbox import Limits, Outbox
from gatelet.agent.snapshot import Snapshot
from gatelet.agent.status import telemetry_document
from gatelet.agent.store import Deployment, StateStore
from gatelet.agent.telemetry import LifecycleEvents, Upstream, deployment_events, limits_for
from gatelet.simulator.virtual_time import VirtualClock, run


def deployment(generation: int, phase: str, description: str = "") -> Deployment:
    return Deployment(generation, "iothub", generation + 40, b"{}", phase, description, "then")


def test_events_tell_the_whole_life_of_each_deployment_in_order() -> None:
    found = deployment_events(
        [deployment(3, "failed", "no model"), deployment(1, "superseded"), deployment(2, "good")],
        rolled_back_to=deployment(2, "good"),
    )
    assert [(event.name, event.data["deployment"]["generation"]) for event in found] == [
        ("deployment.accepted", 1),
        ("deployment.accepted", 2),
        ("deployment.good", 2),
        ("deployment.accepted", 3),
        ("deployment.failed", 3),
        ("deployment.rolledBack", 3),
    ]
    assert found[4].data["deployment"]["description"] == "no model"
    assert found[5].data["deployment"]["to"] == 2
    assert len({event.key for event in found}) == len(found)


@pytest.mark.parametrize(
    ("hub", "expected"),
    [
        (None, Limits(1000, 60.0)),
        (EdgeHub("1.1"), Limits(1000, 7200.0)),
        (EdgeHub("1.1", ttl_seconds=None), Limits(1000, None)),
        (EdgeHub("1.1", ttl_seconds=5, max_size_bytes=10), Limits(10, 5.0)),
        (EdgeHub("1.1", ttl_seconds=5, max_size_bytes=10**9), Limits(1000, 5.0)),
    ],
)
def test_the_manifest_sets_the_limits_within_those_of_the_device(
    hub: EdgeHub | None, expected: Limits
) -> None:
    assert limits_for(Limits(1000, 60.0), hub) == expected


def test_events_are_told_once_over_restarts_and_also_when_a_crash_came_between(
    tmp_path: Path,
) -> None:
    async def main(clock: VirtualClock) -> list[str]:
        store = StateStore(tmp_path / "state.db", clock)
        store.set_phase(store.accept("iothub", 1, b"{}").generation, "good")
        # The agent died before it could tell; a deployment came and went meanwhile.
        store.accept("iothub", 2, b"{ }")
        store.set_phase(store.accept("iothub", 3, b"{  }").generation, "failed", "why")
        told: list[str] = []
        for _ in range(3):
            outbox = Outbox(tmp_path / "outbox.db", clock)
            events = LifecycleEvents(Upstream(outbox, "edge-1", Limits()), store, "edge-1", clock)
            for _ in range(3):
                events.note(Snapshot())
                await asyncio.sleep(1)
            while (held := outbox.head()) is not None:
                body = json.loads(held.body)
                assert body["device"] == "edge-1"
                assert held.properties["gatelet-event"] == body["event"]
                told.append(f"{body['event']} {body['deployment']['generation']}")
                outbox.acknowledge(held.sequence)
            await outbox.close()
        store.close()
        return told

    assert run(main) == [
        "deployment.accepted 1",
        "deployment.good 1",
        "deployment.accepted 2",
        "deployment.accepted 3",
        "deployment.failed 3",
    ]


def test_an_event_that_the_disk_has_no_room_for_is_told_later(tmp_path: Path) -> None:
    async def main(clock: VirtualClock) -> None:
        full = True

        def fault(point: str) -> None:
            if full and point == "begin":
                raise OSError(28, "No space left on device")

        store = StateStore(tmp_path / "state.db", clock)
        store.accept("iothub", 1, b"{}")
        outbox = Outbox(tmp_path / "outbox.db", clock, fault=fault)
        events = LifecycleEvents(Upstream(outbox, "edge-1", Limits()), store, "edge-1", clock)
        events.note(Snapshot())
        await asyncio.sleep(1)
        assert outbox.head() is None
        assert "No space left" in telemetry_document("iothub", 0, outbox.status())["error"]
        full = False
        events.note(Snapshot())
        await asyncio.sleep(1)
        held = outbox.head()
        assert held is not None
        assert json.loads(held.body)["event"] == "deployment.accepted"
        await outbox.close()
        store.close()

    run(main)


def test_configuration(tmp_path: Path) -> None:
    text = f'device.state-dir = "{tmp_path}"\ntelemetry.ttl-seconds = 0\n'
    config = parse_config(text, "agent.toml")
    assert outbox_limits(config) == Limits(64 * 1024 * 1024, None)
    outbox = open_outbox(config, VirtualClockOutsideOfALoop())
    assert outbox.limits == outbox_limits(config)
    outbox.abandon()
    with pytest.raises(ConfigError, match=r"max-size-bytes"):
        parse_config("telemetry.max-size-bytes = 1\n", "agent.toml")
    with pytest.raises(ConfigError, match="telemetry"):
        parse_config('telemetry.to = "pigeon"\n', "agent.toml")


class VirtualClockOutsideOfALoop(VirtualClock):
    def monotonic(self) -> float:
        return 0.0
