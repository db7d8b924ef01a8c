"""Deployments over each source, and what clients get, through the public interfaces."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from gatelet.agent.scoring.client import ScoringClient
from gatelet.simulator.demo.cloud import publish_desired
from gatelet.simulator.demo.dataset import load_heldout, model_directory

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

Deployment = Callable[..., dict[str, Any]]
MAX_BATCH = 64


def reference(version: str) -> np.ndarray[Any, Any]:
    """Scores [n, 10] of all held-out images by onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    file = model_directory(version) / "onnx" / "model.onnx"
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    images, _ = load_heldout()
    return session.run(["scores"], {"x": images})[0]


async def scores(device: Any, batch: int) -> np.ndarray[Any, Any]:
    """Scores [n, 10] of all held-out images from the device, `batch` images a request."""

    def work() -> np.ndarray[Any, Any]:
        images, _ = load_heldout()
        with ScoringClient(device.grpc_address) as client:
            parts = [
                client.infer("digits", {"x": images[start : start + batch]})["scores"]
                for start in range(0, len(images), batch)
            ]
        return np.concatenate(parts)

    return await asyncio.to_thread(work)


def answers(status: dict[str, Any]) -> dict[str, int]:
    (module,) = status["modules"]
    return {name: backend["requests"] for name, backend in module["backends"].items()}


async def gatelet(device: Any, *words: str, stdin: bytes = b"") -> tuple[int, str, str]:
    """Run a command as a user would: (exit code, standard output, standard error)."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gatelet.agent.main", *words),
        *(("--config", str(device.folder / "agent.toml")) if words[0] != "score" else ()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate(stdin)
    return process.returncode or 0, out.decode(), err.decode()


@pytest.mark.parametrize("version", ["v2", "v3"])
async def test_the_fabric_gives_the_bits_of_onnxruntime_for_every_image(
    shared_device: Any, make_deployment: Deployment, version: str
) -> None:
    image = await shared_device.push(version)
    number = shared_device.desire(make_deployment(image=image, backends="fpga"))
    await shared_device.until_good(number)
    expected = reference(version)
    for batch in (1, MAX_BATCH):
        before = answers(await shared_device.status())
        result = await scores(shared_device, batch)
        after = answers(await shared_device.status())
        assert np.array_equal(result, expected)
        assert set(after) == {"fpga"}
        assert after["fpga"] - before["fpga"] == -(-len(expected) // batch)


async def test_a_document_over_mqtt_is_deployed_and_reported_there(
    shared_device: Any, make_deployment: Deployment
) -> None:
    image = await shared_device.push("v1")
    site = shared_device.site.describe()
    await asyncio.to_thread(publish_desired, site["broker"], make_deployment(image=image))
    status = await shared_device.until(
        lambda s: (
            s["deployment"]
            and s["deployment"]["source"] == "mqtt"
            and s["deployment"]["phase"] == "good"
        )
    )
    assert (await shared_device.accuracy())[1] == {"1"}
    topic = f"{site['broker']['prefix']}/reported"

    def reported() -> dict[str, Any]:
        return json.loads(shared_device.site.broker.retained.get(topic, b"{}"))

    await shared_device.until(
        lambda _: reported().get("modules", {}).get("digits", {}).get("runtimeStatus") == "running"
    )
    assert reported()["lastDesiredStatus"]["code"] == 200
    # The hub is told that its document no longer counts.
    other = await shared_device.until_reported(
        lambda r: (
            "replaced by" in r.get("lastDesiredStatus", {}).get("description", "")
            or not r.get("lastDesiredVersion")
        )
    )
    assert status["deployment"]["generation"] == other["gatelet"]["deployment"]["generation"]


async def test_apply_waits_until_the_deployment_is_good_or_says_why_not(
    shared_device: Any, make_deployment: Deployment, tmp_path: Path
) -> None:
    good, broken = await shared_device.push("v2"), await shared_device.push("broken")
    file = tmp_path / "deployment.json"
    file.write_text(json.dumps(make_deployment(image=good, backends="fpga,cpu")))
    code, out, err = await gatelet(shared_device, "apply", str(file), "--wait")
    assert code == 0
    assert "is good" in out
    assert "digits: " in err, "a line per change where there is no terminal"

    body = json.dumps(make_deployment(image=broken)).encode()
    code, out, err = await gatelet(shared_device, "apply", "-", "--wait", stdin=body)
    assert (code, out) == (1, "")
    assert "onnxruntime cannot load" in err
    assert "is running instead" in err

    code, out, _ = await gatelet(shared_device, "status", "--json")
    status = json.loads(out)
    assert code == 0
    assert status["deployment"]["phase"] == "failed"
    assert status["deployment"]["rolledBack"] is True
    assert [m["status"] for m in status["modules"]] == ["running"]
    code, out, _ = await gatelet(shared_device, "list")
    assert out.splitlines()[0].split() == ["NAME", "STATUS", "DESCRIPTION", "CONFIG"]
    assert re.search(r"^digits +running +Up ", out, re.MULTILINE)


async def test_apply_refuses_what_is_no_manifest(shared_device: Any, tmp_path: Path) -> None:
    code, out, err = await gatelet(shared_device, "apply", "-", stdin=b'{"modulesContent": 1}')
    assert (code, out) == (1, "")
    assert "refused (400)" in err
    assert "modulesContent" in err
    code, _, err = await gatelet(shared_device, "apply", str(tmp_path / "missing.json"))
    assert code == 1
    assert "missing.json" in err
    code, _, err = await gatelet(shared_device, "apply")
    assert code == 2
    assert "Traceback" not in err


async def test_two_modules_share_an_endpoint_by_percent(
    shared_device: Any, make_deployment: Deployment
) -> None:
    old, new = await shared_device.push("v1"), await shared_device.push("v2")
    content = make_deployment(image=old)
    modules = content["modulesContent"]["$edgeAgent"]["properties.desired"]["modules"]
    modules["canary"] = json.loads(json.dumps(modules["digits"]))
    modules["canary"]["settings"]["image"] = new
    modules["canary"]["env"] = {
        "SCORING_ENDPOINT": {"value": "digits"},
        "SCORING_TRAFFIC": {"value": "30"},
    }
    await shared_device.until_good(shared_device.desire(content))

    def work() -> dict[str, int]:
        image = load_heldout()[0][:1]
        seen = {"1": 0, "2": 0}
        with ScoringClient(shared_device.grpc_address) as client:
            for _ in range(1000):
                seen[client.request("digits", {"x": image}).version] += 1
            assert client.request("digits", {"x": image}, version="2").version == "2"
        return seen

    seen = await asyncio.to_thread(work)
    # 30 % of 1,000 with a standard deviation of 14.5: six of them either way.
    assert 213 <= seen["2"] <= 387


async def test_a_stopped_module_is_taken_off_and_comes_back(
    shared_device: Any, make_deployment: Deployment
) -> None:
    image = await shared_device.push("v1")
    content = make_deployment(image=image)
    await shared_device.until_good(shared_device.desire(content))
    modules = content["modulesContent"]["$edgeAgent"]["properties.desired"]["modules"]
    modules["digits"]["status"] = "stopped"
    version = shared_device.desire(content)
    await shared_device.until_reported(
        lambda r: (
            r.get("lastDesiredVersion") == version
            and r["modules"]["digits"]["runtimeStatus"] == "stopped"
        )
    )
    await shared_device.until(lambda s: not s["endpoints"])
    modules["digits"]["status"] = "running"
    await shared_device.until_good(shared_device.desire(content))
    assert (await shared_device.accuracy())[1] == {"1"}


async def test_a_second_agent_on_the_same_state_is_refused(shared_device: Any) -> None:
    code, _, err = await gatelet(shared_device, "run", "--role", "agent")
    assert code == 1
    assert "another agent already runs" in err


async def test_without_an_agent_the_commands_say_how_to_start_one(tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(f'[device]\nrun-dir = "{tmp_path}"\nstate-dir = "{tmp_path}"\n')
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gatelet.agent.main", "status", "--config", str(config)),
        stderr=asyncio.subprocess.PIPE,
    )
    _, err = await process.communicate()
    assert process.returncode == 1
    assert b"start it with `gatelet run`" in err
