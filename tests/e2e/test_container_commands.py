"""Direct methods and commands for modules in containers, on a real engine."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e


async def gatelet(device: Any, *words: str) -> tuple[int, str, str]:
    """Run a command as a user would: (exit code, standard output, standard error)."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gatelet.agent.main", *words),
        *("--config", str(device.folder / "agent.toml")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert b"Traceback" not in err, err.decode()
    return process.returncode or 0, out.decode(), err.decode()


def manifest(image: str, policy: str = "always") -> dict[str, Any]:
    options = {
        "Cmd": ["lines", "20", "0", "serve"],
        "Env": ["DB_PASSWORD=hidden-in-options"],
        "HostConfig": {"NetworkMode": "none"},
    }
    return {
        "modulesContent": {
            "$edgeAgent": {
                "properties.desired": {
                    "schemaVersion": "1.1",
                    "runtime": {"type": "docker", "settings": {}},
                    "systemModules": {
                        "edgeAgent": {"type": "docker", "settings": {"image": "gatelet"}}
                    },
                    "modules": {
                        "talker": {
                            "type": "docker",
                            "status": "running",
                            "restartPolicy": policy,
                            "settings": {"image": image, "createOptions": json.dumps(options)},
                            "env": {"API_KEY": {"value": "hidden-in-env"}},
                        }
                    },
                }
            }
        }
    }


async def test_a_container_is_listed_logged_restarted_and_explained(
    engine: Any, device: Any, tmp_path: Path
) -> None:
    await device.stop_agent()
    with (device.folder / "agent.toml").open("a") as file:
        file.write(f'\n[docker]\nenabled = true\nsocket = "{engine.socket}"\n')
    await device.start_agent()
    image = engine.push("talker:1")
    deployment = tmp_path / "deployment.json"
    deployment.write_text(json.dumps(manifest(image.name)))
    try:
        code, out, err = await gatelet(device, "apply", "--wait", str(deployment))
        assert code == 0, err

        code, out, _ = await gatelet(device, "list")
        assert re.search(r"^talker +running +Up ", out, re.MULTILINE), out

        code, out, _ = await gatelet(device, "logs", "talker", "--tail", "3")
        assert len(out.splitlines()) == 3
        code, out, _ = await gatelet(device, "logs", "talker", "--json", "--since", "1h")
        lines = [json.loads(line) for line in out.splitlines()]
        # The engine may mix the two streams in another order than they were written in.
        streams = {line["text"]: line["stream"] for line in lines}
        assert len(lines) == 21
        assert (streams["line 0"], streams["line 1"]) == ("stdout", "stderr")
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", line["time"]) for line in lines)
        code, out, _ = await gatelet(device, "logs", "talker", "--until", "1h")
        assert (code, out) == (0, "")

        wanted = {"id": "^talk", "filter": {"tail": 2, "regex": "line 1[89]"}}
        payload = json.dumps({"items": [wanted], "contentType": "json"})
        code, out, _ = await gatelet(device, "method", "GetModuleLogs", payload, "--json")
        (entry,) = json.loads(out)["payload"]
        texts = sorted(line["text"] for line in json.loads(entry["payload"]))
        assert texts == ["line 18", "line 19"]

        follower = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gatelet.agent.main", "logs", "-f", "--tail", "1", "talker"),
            *("--config", str(device.folder / "agent.toml")),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert follower.stdout is not None
            assert await asyncio.wait_for(follower.stdout.readline(), 20)
            before = (await device.status())["modules"][0]["started"]
            code, out, err = await gatelet(device, "restart", "talker", "--wait")
            assert (code, out) == (0, "talker was restarted: running\n"), err
            assert await asyncio.wait_for(follower.stdout.readline(), 20) == b"ended\n"
            status = await device.status()
            assert status["modules"][0]["started"] != before
            assert status["modules"][0]["restarts"] == 0, "asked for, not counted"
        finally:
            follower.kill()
            await follower.wait()

        bundle = tmp_path / "bundle.zip"
        assert (await gatelet(device, "support-bundle", "-o", str(bundle)))[0] == 0
        inside = zipfile.ZipFile(bundle)
        assert "line 19" in inside.read("logs/modules/talker.log").decode()
        everything = "".join(inside.read(name).decode() for name in inside.namelist())
        assert "hidden-in" not in everything

        code, out, _ = await gatelet(device, "check")
        assert re.search(r"^OK +container engine: engine \d+", out, re.MULTILINE), out

        # A container that ends for good is described as iotedge does it.
        deployment.write_text(json.dumps(manifest(image.name, "never")))
        code, _, err = await gatelet(device, "apply", "--wait", str(deployment))
        assert code == 0, err
        (container,) = engine.client.containers(filters={"label": "io.gatelet.module=talker"})
        engine.client.kill(container["Id"])
        await device.until(lambda s: s["modules"] and s["modules"][0]["status"] == "failed")
        code, out, _ = await gatelet(device, "list")
        assert re.search(r"^talker +failed +Failed \(137\) .* ago ", out, re.MULTILINE), out
    finally:
        await device.stop_agent()
        for container in engine.client.containers(all=True):
            engine.client.remove_container(container["Id"], force=True)
