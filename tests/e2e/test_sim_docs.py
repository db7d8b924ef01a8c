"""docs/simulator.md, carried out: the plugin in its own process, the shell lines in a shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gatelet.simulator.site_config import parse_settings
from required import needs

pytestmark = pytest.mark.e2e

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "simulator.md").read_text()
# What the SDK leaves behind is not the plugin's doing; everything else is an error.
STRICT = ("-W", "error", "-W", "ignore::DeprecationWarning")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)


def run_pytest(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *STRICT, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_python_examples(tmp_path: Path) -> None:
    for block in blocks("python"):
        name = re.match(r"# (secure/)?(test_\w+\.py|conftest\.py)\n", block)
        assert name, "each example starts with the name of its file"
        folder = tmp_path / (name[1] or "plain")
        folder.mkdir(exist_ok=True)
        (folder / name[2]).write_text(block)
    for folder, count in (("plain", 4), ("secure", 2)):
        done = run_pytest(tmp_path / folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f" {count} passed" in f" {done.stdout.splitlines()[-1]}"


def test_fixtures_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        """
import pytest
from gatelet.simulator.site_config import Device, SiteSettings

@pytest.fixture(scope="session")
def gatelet_site_settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    return SiteSettings(folder, devices=(Device("camera", tags={"a": 1}, desired={"x": 2}),))
"""
    )
    (tmp_path / "test_it.py").write_text(
        """
import pytest

made = []

def test_first(iot_hub, mqtt_broker, oci_registry, gatelet_site):
    made.append(iot_hub.new_device().id)
    iot_hub.set_fault("refuse_connects", 5)
    iot_hub.deploy("d", {"content": {"deviceContent": {"properties.desired.y": 3}},
                         "targetCondition": "deviceId = 'camera'"})
    assert iot_hub.device("camera").desired == {"x": 2, "y": 3}
    with pytest.raises(ValueError, match="no fault 'nonsense'"):
        iot_hub.set_fault("nonsense", 1)
    with pytest.raises(TimeoutError, match="not connected"):
        iot_hub.device("camera").wait_until(lambda device: device.connected, timeout=0.05)
    iot_hub.pause()
    mqtt_broker.publish("left/behind", b"x", retain=True)
    mqtt_broker.pause()
    oci_registry.fail_next(1)
    assert gatelet_site.control_url.startswith("http://127.0.0.1:")

def test_second(iot_hub):
    ids = iot_hub.on_hub(lambda hub: [i.client.device for i in hub.core.state.registry])
    assert made[0] not in ids and "camera" in ids
    assert not any(iot_hub.on_hub(lambda hub: hub.faults.as_json()).values())
    assert not iot_hub.on_hub(lambda hub: list(hub.core.rollout))
    assert not iot_hub.on_hub(lambda hub: hub.paused)

def test_broker(mqtt_broker):
    assert mqtt_broker.retained == {}

async def work(iot_hub):
    return iot_hub.new_device(tags={"site": "n"}).reported

def test_within_an_event_loop(iot_hub):
    import asyncio
    assert asyncio.run(work(iot_hub)) == {}
"""
    )
    done = run_pytest(tmp_path, "-p", "no:randomly")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_site_of_one_part(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        """
import pytest
from gatelet.simulator.site_config import BROKER, SiteSettings

@pytest.fixture(scope="session")
def gatelet_site_settings(tmp_path_factory):
    return SiteSettings(tmp_path_factory.mktemp("mine"), parts=frozenset({BROKER}))
"""
    )
    (tmp_path / "test_it.py").write_text(
        """
import pytest

def test_broker(mqtt_broker, gatelet_site):
    mqtt_broker.publish("a", b"x", retain=True)
    assert mqtt_broker.retained == {"a": b"x"}
    with pytest.raises(RuntimeError, match="without its hub"):
        gatelet_site.iot_hub
"""
    )
    done = run_pytest(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_plugin_costs_nothing_until_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import sys\n"
        "def test_it():\n"
        "    assert 'gatelet.simulator.pytest' in sys.modules\n"
        "    assert not {'aiohttp', 'cryptography', 'azure.iot.device'} & set(sys.modules)\n"
    )
    done = run_pytest(tmp_path, "-p", "no:hypothesispytest")
    assert done.returncode == 0, done.stdout + done.stderr


@needs("curl")
def test_the_shell_example(tmp_path: Path) -> None:
    (script,) = blocks("sh")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-m", "-c", script.replace("kill %1", "kill %1; wait %1 || true")],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"drop_before_ack": 2' in done.stdout
    assert '[{"deviceId": "edge-1"}]' in done.stdout


def test_the_ci_examples(tmp_path: Path) -> None:
    """The steps of the workflow, but for what is installed already."""
    (first, second) = blocks("yaml")
    steps = re.findall(r"^ +- run: (?!\|)(.*)$", first, re.MULTILINE)
    assert [step.split()[0] for step in steps] == ["pip", "pytest"]
    (tmp_path / "test_device.py").write_text(blocks("python")[0])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    (start,) = re.findall(r"- run: \|\n((?: {10}.*\n)+)", second)
    (use,) = re.findall(r"^ +- run: (?!\|)(.*)$", second, re.MULTILINE)
    (tmp_path / "run-tests").write_text(
        f"#!{sys.executable}\nimport json, sys\nabout = json.load(open(sys.argv[1]))\n"
        "assert about['hub']['deviceConnectionString'].startswith('HostName=')\n"
    )
    (tmp_path / "run-tests").chmod(0o755)
    for script in (steps[1], f"{start}{use}\nkill %1; wait %1"):
        done = subprocess.run(
            ["bash", "-e", "-m", "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_example(tmp_path: Path) -> None:
    (text,) = blocks("toml")
    settings = parse_settings(text, "site.toml", tmp_path)
    assert settings.devices[0].tags == {"site": "north"}
    assert settings.broker.encrypted
    assert settings.edge_modules == ("vision",)
    assert (settings.users, settings.faults) == ({"operator": "secret"}, {"refuse-connects": 1})
