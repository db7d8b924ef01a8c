"""The units are valid and hardened, and the processes speak systemd's protocol."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gatelet.accelerators.notify import Notifier
from required import program

UNITS = Path(__file__).resolve().parents[2] / "packaging" / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))
# What systemd-analyze may say at most, in tenths: without a single protection it says 96.
EXPOSURE = {"gatelet-agent": 15, "gatelet-scoring": 16, "gatelet-fabric": 22}


@pytest.fixture
def analyze() -> str:
    return program("systemd-analyze", "systemd")


def test_the_units_are_valid(analyze: str, tmp_path: Path) -> None:
    for file in (*SERVICES, UNITS / "gatelet.target"):
        # The program is not installed where the tests run.
        text = re.sub(r"(?m)^ExecStart=.*", "ExecStart=/bin/true", file.read_text())
        (tmp_path / file.name).write_text(text)
    for drop_in in ("docker.conf",):
        folder = tmp_path / "gatelet-agent.service.d"
        folder.mkdir()
        (folder / drop_in).write_text((UNITS / drop_in).read_text())
    units = [str(path) for path in tmp_path.iterdir() if path.is_file()]
    run = subprocess.run(
        [analyze, "verify", "--man=no", *units], capture_output=True, text=True, timeout=60
    )
    ours = [line for line in run.stderr.splitlines() if "gatelet" in line]
    assert ours == []
    assert run.returncode == 0 or not ours


@pytest.mark.parametrize("service", SERVICES, ids=lambda path: path.stem)
def test_a_unit_is_hardened(analyze: str, service: Path) -> None:
    limit = EXPOSURE[service.stem]
    run = subprocess.run(
        [analyze, "security", "--offline=true", f"--threshold={limit}", "--no-pager", str(service)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stdout[-300:] + run.stderr


def test_the_fabric_may_write_where_pynq_notes_what_is_configured() -> None:
    """pynq's download writes into its own package, and fails on a file system that is read-only."""
    import importlib.util

    found = importlib.util.find_spec("pynq")
    if found is None or found.origin is None:
        # There is none for Python 3.13: see the extra `fpga`.
        pytest.skip("needs pynq")
    source = (Path(found.origin).parent / "pl_server" / "global_state.py").read_text()
    assert "STATE_DIR = os.path.dirname(__file__)" in source, "pynq writes elsewhere now"
    text = (UNITS / "gatelet-fabric.service").read_text()
    paths = re.findall(r"(?m)^ReadWritePaths=-(\S+/pynq/pl_server)$", text)
    for root in ("/usr/local/share/pynq-venv", "/opt/gatelet"):
        for minor in (10, 11, 12):
            assert f"{root}/lib/python3.{minor}/site-packages/pynq/pl_server" in paths


def test_every_unit_has_limits_and_a_watchdog() -> None:
    assert len(SERVICES) == 3
    for service in SERVICES:
        text = service.read_text()
        for key in ("MemoryMax", "TasksMax", "WatchdogSec", "Type=notify", "Restart=always"):
            assert key in text, (service.name, key)
        role = service.stem.removeprefix("gatelet-")
        assert f"run --role {role}\n" in text


# -- the protocol ------------------------------------------------------------------------------


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(path)
        server.settimeout(20)
        yield server, path


def silence(server: socket.socket) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            server.recv(100)
        except TimeoutError:
            return True
    return False


def test_a_process_says_that_it_is_ready_and_alive(listener: tuple[socket.socket, str]) -> None:
    server, path = listener
    quiet = Notifier.from_environment({})
    quiet.ready()
    quiet.alive()
    assert quiet.interval is None
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "30000000"})
    assert notifier.interval == 10
    notifier.ready()
    notifier.alive()
    notifier.stopping()
    assert [server.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]
    other = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}
    assert Notifier.from_environment(other).interval is None
    unwatched = Notifier.from_environment({"NOTIFY_SOCKET": path})
    unwatched.alive()
    unwatched.ready()
    assert server.recv(100) == b"READY=1", "no sign that nobody asked for"
    Notifier.from_environment({"NOTIFY_SOCKET": "/nobody/here"}).ready()
    assert Notifier.from_environment({"NOTIFY_SOCKET": "nonsense"}).interval is None


def test_an_abstract_address() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(f"\0gatelet-test-{os.getpid()}")
        server.settimeout(10)
        Notifier.from_environment({"NOTIFY_SOCKET": f"@gatelet-test-{os.getpid()}"}).ready()
        assert server.recv(100) == b"READY=1"


@pytest.mark.parametrize("role", ["agent", "scoring"])
def test_a_role_is_ready_lives_and_is_missed_when_it_is_blocked(
    role: str, listener: tuple[socket.socket, str], tmp_path: Path
) -> None:
    server, path = listener
    config = tmp_path / "agent.toml"
    config.write_text(
        f'[device]\nid="d"\nboard="none"\nstate-dir="{tmp_path}/s"\nrun-dir="{tmp_path}/r"\n'
        '[scoring]\ngrpc-address="127.0.0.1:0"\n'
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "gatelet.agent.main", "run", "--role", role, "--config", config],
        env={**os.environ, "NOTIFY_SOCKET": path, "WATCHDOG_USEC": "300000"},
        stderr=subprocess.DEVNULL,
    )
    try:
        seen = []
        while b"READY=1" not in seen or seen[-1] != b"WATCHDOG=1":
            seen.append(server.recv(100))
        process.send_signal(signal.SIGSTOP)
        # What was sent before it stopped; then nothing for much longer than its interval.
        server.settimeout(1.5)
        assert silence(server)
        process.send_signal(signal.SIGCONT)
        server.settimeout(20)
        assert server.recv(100) == b"WATCHDOG=1"
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
