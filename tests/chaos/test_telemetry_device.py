"""The whole device: what the real agent process tells arrives at the hub, once per event."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

EMPTY = {
    "schemaVersion": "1.1",
    "runtime": {"type": "docker", "settings": {"minDockerVersion": "v1.25"}},
    "systemModules": {"edgeAgent": {"type": "docker", "settings": {"image": "gatelet:1"}}},
    "modules": {},
}


async def test_events_reach_the_hub_also_over_a_killed_agent(device: Any) -> None:
    def events() -> Counter[str]:
        messages = {m.system["message-id"]: m for m in device.site.hub.telemetry.query()}
        return Counter(m.properties["gatelet-event"] for m in messages.values())

    await device.until(lambda status: events()["process.started"] == 1)
    device.desire_raw(EMPTY)
    await device.until(lambda status: events()["deployment.good"] == 1)
    await device.until(lambda status: events()["process.started"] == 2)  # scoring's as well
    await device.kill("agent")
    await device.until(lambda status: events()["process.started"] == 3)
    status = await device.until(lambda status: status["telemetry"]["messages"] == 0)
    assert status["telemetry"]["dropped"] == {}
    assert status["telemetry"]["error"] == ""
    assert events()["deployment.accepted"] == events()["deployment.good"] == 1
