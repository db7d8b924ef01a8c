"""Automatic deployments of the simulated hub carried out by a real agent, and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from gatelet.simulator.iothub.devices import ClientId
from gatelet.simulator.site import EDGE_AGENT

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

AGENT = ClientId("edge-1", EDGE_AGENT)


async def test_a_layer_replaces_the_model_until_it_goes(
    shared_device: Any, make_deployment: Callable[..., dict[str, Any]]
) -> None:
    rollout = shared_device.site.hub.core.rollout
    old, new = [await shared_device.push(version) for version in ("v1", "v2")]
    content = make_deployment(image=old)

    async def until_running(image: str) -> None:
        desired = shared_device.twin()["desired"]
        assert desired["modules"]["digits"]["settings"]["image"] == image
        await shared_device.until_good(desired["$version"])

    rollout.put("base", {"content": content, "targetCondition": "*", "priority": 1}, None)
    await until_running(old)
    _, (before,) = await shared_device.accuracy()

    module = content["modulesContent"]["$edgeAgent"]["properties.desired"]["modules"]["digits"]
    layer = {"properties.desired.modules.digits": {**module, "settings": {"image": new}}}
    body = {
        "content": {"modulesContent": {"$edgeAgent": layer}},
        "targetCondition": "tags.ring = 'early'",
        "priority": 2,
    }
    rollout.put("early", body, None)
    assert shared_device.site.hub.core.twin(AGENT).desired.value["modules"]["digits"] == module
    device = ClientId("edge-1")
    shared_device.site.hub.core.update_twin(device, {"tags": {"ring": "early"}})
    await until_running(new)
    _, (after,) = await shared_device.accuracy()
    assert after != before
    for name in ("base", "early"):
        assert rollout.view(rollout.get(name))["systemMetrics"]["results"] == {
            "targetedCount": 1,
            "appliedCount": 1,
            "reportedSuccessfulCount": 1,
            "reportedFailedCount": 0,
        }

    shared_device.site.hub.core.update_twin(device, {"tags": {"ring": None}})
    await until_running(old)
    _, answered_by = await shared_device.accuracy()
    assert answered_by == {before}
    assert rollout.view(rollout.get("early"))["systemMetrics"]["results"]["appliedCount"] == 0
