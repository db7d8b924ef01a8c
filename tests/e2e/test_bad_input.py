"""Whatever is wrong with a deployment: the reported state says it, and the old version serves."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gatelet.modules.oci.layout import open_layout
from gatelet.modules.oci.manifest import parse_manifest as parse_image_manifest
from gatelet.simulator.demo.dataset import model_directory

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

Deployment = Callable[..., dict[str, Any]]


async def good_deployment(device: Any, make_deployment: Deployment) -> None:
    """Bring the device to v1, whatever the test before it left."""
    image = await device.push("v1")
    version = device.desire(make_deployment(image=image))
    await device.until_good(version)
    accuracy, versions = await device.accuracy()
    assert versions == {"1"}
    assert accuracy > 0.9


async def assert_still_serving(device: Any) -> None:
    accuracy, versions = await device.accuracy()
    assert versions == {"1"}
    assert accuracy > 0.9


def edge_agent(make_deployment: Deployment) -> dict[str, Any]:
    content = make_deployment(image="127.0.0.1:1/models/digits:v1")
    return copy.deepcopy(content["modulesContent"]["$edgeAgent"]["properties.desired"])


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(desired: dict[str, Any]) -> None:
        for key in path[:-1]:
            desired = desired[key]
        del desired[path[-1]]

    return change


def having(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(desired: dict[str, Any]) -> None:
        for key in path[:-1]:
            desired = desired[key]
        desired[path[-1]] = value

    return change


MODULE = ("modules", "digits")

MALFORMED = {
    "no schema version": (without("schemaVersion"), 400, "schemaVersion"),
    "unknown schema version": (having("2.0", "schemaVersion"), 412, "2.0"),
    "no runtime": (without("runtime"), 400, "runtime"),
    "no edgeAgent": (without("systemModules", "edgeAgent"), 400, "systemModules"),
    "modules is a list": (having([], "modules"), 400, "modules"),
    "module name": (having({}, "modules", "a/b"), 400, "modules"),
    "no image": (without(*MODULE, "settings", "image"), 400, "modules.digits.settings"),
    "no status": (without(*MODULE, "status"), 400, "modules.digits"),
    "unknown status": (having("paused", *MODULE, "status"), 400, "modules.digits.status"),
    "restart policy": (
        having("sometimes", *MODULE, "restartPolicy"),
        400,
        "modules.digits.restartPolicy",
    ),
    "createOptions": (
        having("{", *MODULE, "settings", "createOptions"),
        400,
        "modules.digits.settings.createOptions",
    ),
    "chunked createOptions": (
        having("{}", *MODULE, "settings", "createOptions02"),
        400,
        "expected createOptions01 found createOptions02",
    ),
    "startup order": (having(-1, *MODULE, "startupOrder"), 400, "modules.digits.startupOrder"),
    "traffic": (
        having({"SCORING_TRAFFIC": {"value": "150"}}, *MODULE, "env"),
        400,
        "SCORING_TRAFFIC",
    ),
    "backend": (having({"SCORING_BACKENDS": {"value": "gpu"}}, *MODULE, "env"), 400, "gpu"),
}


@pytest.mark.parametrize("case", MALFORMED)
async def test_a_malformed_manifest_is_refused_with_its_place_named(
    shared_device: Any, make_deployment: Deployment, case: str
) -> None:
    change, code, words = MALFORMED[case]
    if not (shared_device.twin()["reported"].get("modules") or {}):
        await good_deployment(shared_device, make_deployment)
    desired = edge_agent(make_deployment)
    change(desired)
    version = shared_device.desire_raw(desired)
    reported = await shared_device.until_reported(
        lambda r: r.get("lastDesiredVersion") == version and r["lastDesiredStatus"]["code"] != 200
    )
    assert reported["lastDesiredStatus"]["code"] == code
    assert words in reported["lastDesiredStatus"]["description"]
    assert reported["modules"]["digits"]["runtimeStatus"] == "running"
    await assert_still_serving(shared_device)


def layers_of(device: Any, version: str) -> list[str]:
    """Digests of an image's layers, the model's own parts last."""
    layout = open_layout(device.folder / "layouts" / "digits" / version)
    raw = layout.read(layout.image, 1 << 20)
    return [layer.digest for layer in parse_image_manifest(raw, "the test's image").layers]


async def failing(device: Any, version: int, pattern: str) -> dict[str, Any]:
    """The report that says 500 with these words, about this version."""
    return await device.until_reported(
        lambda r: (
            r.get("lastDesiredVersion") == version
            and r["lastDesiredStatus"]["code"] == 500
            and re.search(pattern, r["lastDesiredStatus"]["description"]) is not None
        )
    )


async def test_an_unknown_image_is_named_and_found_once_it_is_pushed(
    shared_device: Any, make_deployment: Deployment, tmp_path: Path
) -> None:
    await good_deployment(shared_device, make_deployment)
    image = f"{shared_device.site.registry.address}/models/late:v1"
    version = shared_device.desire(make_deployment(image=image))
    reported = await failing(shared_device, version, r"models/late.*")
    assert reported["modules"]["digits"]["runtimeStatus"] == "backoff"
    await assert_still_serving(shared_device)
    await shared_device.push("v1", name="late")
    await shared_device.until_good(version)


async def test_a_flipped_byte_in_a_layer_is_never_started(
    shared_device: Any, make_deployment: Deployment
) -> None:
    await good_deployment(shared_device, make_deployment)
    image = await shared_device.push("v2")
    registry = shared_device.site.registry
    for layer in layers_of(shared_device, "v2"):
        registry.corrupt(layer)
    version = shared_device.desire(make_deployment(image=image))
    await failing(shared_device, version, r"(?i)digest|hash|sha256")
    await assert_still_serving(shared_device)
    registry.heal()
    await shared_device.until_good(version)
    assert (await shared_device.accuracy())[1] == {"2"}


async def test_a_truncated_layer_is_never_started(
    shared_device: Any, make_deployment: Deployment
) -> None:
    await good_deployment(shared_device, make_deployment)
    image = await shared_device.push("v3")
    registry = shared_device.site.registry
    for layer in layers_of(shared_device, "v3"):
        registry.truncate(layer, 100)
    version = shared_device.desire(make_deployment(image=image))
    await failing(shared_device, version, r"pull .*models/digits:v3")
    await assert_still_serving(shared_device)
    registry.heal()
    await shared_device.until_good(version)
    assert (await shared_device.accuracy())[1] == {"3"}


async def test_a_registry_that_is_down_is_waited_for(
    shared_device: Any, make_deployment: Deployment
) -> None:
    await good_deployment(shared_device, make_deployment)
    image = await shared_device.push("v2", name="unseen")
    await shared_device.site.registry.stop()
    version = shared_device.desire(make_deployment(image=image, backends="fpga,cpu"))
    await failing(shared_device, version, re.escape(shared_device.site.registry.address))
    await assert_still_serving(shared_device)
    await shared_device.site.registry.start()
    await shared_device.until_good(version)
    assert (await shared_device.accuracy())[1] == {"2"}


async def test_a_hub_that_is_down_is_said_locally_and_heals(
    shared_device: Any, make_deployment: Deployment
) -> None:
    await good_deployment(shared_device, make_deployment)
    image = await shared_device.push("v2")
    await shared_device.site.hub.pause()
    status = await shared_device.until(
        lambda s: any(n["source"] == "iothub" and not n["connected"] for n in s["links"])
    )
    (link,) = [n for n in status["links"] if n["source"] == "iothub"]
    assert link["reason"]
    await assert_still_serving(shared_device)
    version = shared_device.desire(make_deployment(image=image))
    await shared_device.site.hub.resume()
    await shared_device.until_good(version)


async def test_a_model_that_does_not_load_is_rolled_back(
    shared_device: Any, make_deployment: Deployment
) -> None:
    await good_deployment(shared_device, make_deployment)
    image = await shared_device.push("broken")
    version = shared_device.desire(make_deployment(image=image))
    reported = await failing(shared_device, version, r"load digits.*onnx/model\.onnx")
    assert "rolled back to deployment" in reported["lastDesiredStatus"]["description"]
    await assert_still_serving(shared_device)
    assert reported["modules"]["digits"]["runtimeStatus"] == "running"


async def test_an_overlay_for_another_board_is_refused_without_a_cpu_variant(
    shared_device: Any, make_deployment: Deployment, tmp_path: Path
) -> None:
    await good_deployment(shared_device, make_deployment)
    directory = tmp_path / "foreign"
    shutil.copytree(model_directory("v2"), directory)
    model = json.loads((directory / "model.json").read_text())
    model["variants"] = [
        {**variant, "board": "zcu104", "part": "xczu7ev-ffvc1156-2-e"}
        for variant in model["variants"]
        if variant["kind"] == "stream"
    ]
    (directory / "model.json").write_text(json.dumps(model))
    image = await shared_device.push("foreign", directory)
    version = shared_device.desire(make_deployment(image=image, backends="fpga,cpu"))
    reported = await failing(shared_device, version, r"zcu104")
    assert "pynq-z2" in reported["lastDesiredStatus"]["description"]
    await assert_still_serving(shared_device)


async def test_an_ordinary_image_needs_a_container_engine(
    shared_device: Any, make_deployment: Deployment
) -> None:
    await good_deployment(shared_device, make_deployment)
    image = await shared_device.push_without_model()
    version = shared_device.desire(make_deployment(image=image))
    await failing(shared_device, version, r"no container engine")
    await assert_still_serving(shared_device)
