"""`gatelet profile` on a simulated device: as it is served, and CPU against FPGA."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gatelet.simulator.demo.dataset import model_directory

pytestmark = pytest.mark.e2e


async def profile(*words: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gatelet.agent.main", "profile", *words),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, error = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), error.decode()


async def test_a_device_profiles_what_it_serves_and_what_it_could(
    device: Any, make_deployment: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    image = await device.push("v2")
    await device.until_good(device.desire(make_deployment(image=image, backends="fpga,cpu")))
    config = ("--config", str(device.folder / "agent.toml"))
    quick = ("--seconds", "0.05", "--batches", "1,8", "--callers", "1,4")

    code, out, error = await profile(
        *("digits", "--url", device.grpc_address, "-o", str(tmp_path / "served")), *config, *quick
    )
    assert code == 0, error
    assert "report: " in out
    served = json.loads((tmp_path / "served.json").read_bytes())
    # The agent tells which process to look at.
    assert all(point["cores"] is not None for point in served["points"])
    assert not any(point["errors"] for point in served["points"])
    assert served["device"]["board"] == "pynq-z2"

    code, out, error = await profile(
        *(str(model_directory("v2")), "-o", str(tmp_path / "folder"), "--threads", "1"),
        *config,
        *quick,
    )
    assert code == 0, error
    folder = json.loads((tmp_path / "folder.json").read_bytes())
    assert {point["backend"] for point in folder["points"]} == {"fpga", "cpu"}
    assert not any(point["errors"] for point in folder["points"]), folder
    assert "Backends compared" in (tmp_path / "folder.html").read_text()
    assert "against" in folder["recommendation"]["reasons"][0]
    # The device went on serving.
    right, _ = await device.accuracy(20)
    assert right > 0.9
