"""Contract tests with a pre-release: the newest azure-iot-device that is on paho-mqtt 2.

The environment of the tests has the last stable SDK, and with it paho-mqtt 1; a folder with the
newer ones lies in front of it. SDK 3.0.0b2 has a higher number but is older and on paho-mqtt 1.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from required import unavailable

REPOSITORY = Path(__file__).parents[2]
RELEASES = {"azure-iot-device": "2.15.0rc1", "paho-mqtt": "2.2.0"}
FILES = (
    "test_iothub_matrix.py",  # device and module, key and certificate, sync and aio, websockets
    "test_iothub_dps.py",
    "test_iothub_c2d.py",
    "test_iothub_workload.py",
    "test_iothub_transport.py",  # the agent on the SDK
    "test_mqtt_interop.py",  # paho with our broker and with mosquitto
    "test_mqtt_transport.py",  # the agent on paho
    "test_mqtt_transport_faults.py",
    "test_mqtt_transport_tls.py",
)
# The SDK asks for version 1 of paho's callbacks itself.
CALLBACKS = (
    "ignore:Callback API version 1:DeprecationWarning:azure.iot.device.common.mqtt_transport"
)

# What was imported and how each file fared, told by the process itself.
PLUGIN = """
import collections
import json
import os
import sys

outcomes = collections.defaultdict(collections.Counter)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid.split("::")[0].rpartition("/")[2]][report.outcome] += 1


def pytest_sessionfinish():
    loaded = {
        "azure-iot-device": sys.modules["azure.iot.device.constant"].VERSION,
        "paho-mqtt": sys.modules["paho.mqtt"].__version__,
    }
    with open(os.environ["RELEASES_REPORT"], "w") as file:
        json.dump({"releases": loaded, "outcomes": outcomes}, file)
"""


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the newer releases and nothing else: the rest is what the tests use anyway."""
    folder = tmp_path_factory.mktemp("newer")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    wanted = [f"{name}=={version}" for name, version in RELEASES.items()]
    install = ["install", "--quiet", "--progress-bar", "off", "--retries", "1", "--timeout", "10"]
    to = ["--no-deps", "--only-binary", ":all:", "--target", str(folder)]
    command, problem = [*pip, *install, *to, *wanted], ""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    except subprocess.CalledProcessError as error:
        problem = error.stderr.strip()[-300:]
    except subprocess.TimeoutExpired:
        problem = "the package index does not answer"
    if problem:
        unavailable(f"{' and '.join(wanted)} cannot be installed: {problem}")
    (folder / "releases_report.py").write_text(PLUGIN)
    return folder


def run_tests(folder: Path, report: Path) -> tuple[int, str]:
    """The tests' exit code and output; they and what they started have ended."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    plugin = ["-p", "releases_report", "--timeout", "60", "-W", CALLBACKS]
    process = subprocess.Popen(
        [*command, *plugin, *(f"tests/contract/{name}" for name in FILES)],
        cwd=REPOSITORY,
        env={**inherited, "PYTHONPATH": path, "RELEASES_REPORT": str(report)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            output, _ = process.communicate(timeout=200)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.mark.timeout(300)
def test_sdk_and_paho_2(newer: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code, output = run_tests(newer, report)
    assert code == 0, output[-8000:]
    told: dict[str, Any] = json.loads(report.read_text())
    assert told["releases"] == RELEASES
    assert set(told["outcomes"]) == set(FILES)
    for name, outcomes in told["outcomes"].items():
        assert outcomes.get("passed", 0) > 0, (name, outcomes)
        assert "failed" not in outcomes, (name, outcomes)
