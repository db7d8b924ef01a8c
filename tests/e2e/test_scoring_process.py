"""The scoring process as the agent runs it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from gatelet.agent.scoring.client import ScoringClient
from gatelet.agent.scoring.errors import Code, ScoringError

from ..bench import onnx_models
from ..bench.scoring_site import TIMEOUT, gone, scoring_process

pytestmark = pytest.mark.e2e

X = np.ones((1, 4), np.float32)


def test_serves_and_ends_cleanly(tmp_path: Path) -> None:
    control = tmp_path / "s"
    with scoring_process(control) as scoring:
        with (
            ScoringClient(scoring.site.address) as early,
            pytest.raises(ScoringError, match="not loaded yet") as caught,
        ):
            early.infer("e", {"x": X})
        assert caught.value.code is Code.UNAVAILABLE
        scoring.site.deploy({"e": onnx_models.scale_folder(tmp_path / "m", 2)})
        status = scoring.site.status()
        assert status.pid == scoring.process.pid
        assert status.grpc_address == scoring.site.address
        value = triton.InferInput("x", [1, 4], "FP32")
        value.set_data_from_numpy(X)
        with triton.InferenceServerClient(scoring.site.address) as client:
            assert client.infer("e", [value]).as_numpy("total").tolist() == [[8.0]]
        assert scoring.terminate() == 0
    assert not control.exists()


def test_scores_on_the_cpu_while_the_fabric_process_is_away(tmp_path: Path) -> None:
    fabric = ("--fabric-socket", str(tmp_path / "nobody"), "--board", "pynq-z2")
    with scoring_process(tmp_path / "s", *fabric) as scoring:
        scoring.site.deploy({"e": onnx_models.scale_folder(tmp_path / "m", 2)})
        with ScoringClient(scoring.site.address) as client:
            assert client.infer("e", {"x": X})["total"].tolist() == [[8.0]]
        assert scoring.terminate() == 0


def test_a_killed_process_can_be_started_again(tmp_path: Path) -> None:
    folder = onnx_models.scale_folder(tmp_path / "m", 2)
    boots = set()
    for _ in range(2):
        with scoring_process(tmp_path / "s") as scoring:
            scoring.site.deploy({"e": folder})
            boots.add(scoring.site.status().boot_id)
            scoring.process.kill()
            scoring.process.wait(TIMEOUT)
    assert len(boots) == 2


def test_a_taken_port_is_a_clear_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        run = subprocess.run(
            [
                *(sys.executable, "-m", "gatelet.agent.scoring.process"),
                *("--control-socket", str(tmp_path / "s"), "--grpc-address", address),
                *("--http-address", "", "--metrics-address", ""),
            ],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    assert run.returncode == 1
    assert f"cannot listen on {address}" in run.stderr
    assert "Traceback" not in run.stderr


def test_wrong_use_is_exit_code_2() -> None:
    command = [sys.executable, "-m", "gatelet.agent.scoring.process"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert run.returncode == 2
    assert "--control-socket" in run.stderr
    assert subprocess.run([*command, "--help"], capture_output=True).returncode == 0


def test_ends_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'gatelet.agent.scoring.process',"
        f" '--control-socket', {str(tmp_path / 's')!r}, '--grpc-address', '127.0.0.1:0',"
        " '--http-address', '', '--metrics-address', '',"
        " '--die-with-parent'], stderr=subprocess.PIPE, text=True)\n"
        "line = child.stderr.readline()\n"
        "print(child.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
    psutil.wait_procs([child], timeout=TIMEOUT)
    assert gone(child)
