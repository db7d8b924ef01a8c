"""The fabric process on a simulated board, used through the backend, killed, and broken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from gatelet.accelerators.backend import LoadOptions, Variant
from gatelet.accelerators.errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    InvalidTensor,
    LoadError,
)
from gatelet.accelerators.fpga.backend import FpgaBackend
from gatelet.accelerators.fpga.machine import take_lock
from gatelet.accelerators.tensors import TensorSpec
from gatelet.simulator.board.bitstream import write_overlay_package
from gatelet.simulator.board.faults import Fault, write_fault

from .fabric_site import Z2, Site, X, batch, layers, until
from .fabric_site import running as running
from .fabric_site import site as site

pytestmark = pytest.mark.e2e


def test_inference_is_exact_and_reported(running: Site) -> None:
    session = running.load(1)
    assert (session.backend, session.healthy) == ("fpga", True)
    assert session.inputs == (X,)
    for count in (1, 5, 100):
        running.check(session, 1, count)
    status = running.status()
    assert status["board"] == "pynq-z2"
    assert status["part"] == Z2
    assert status["loaded"] == "net1"
    assert status["reconfigurations"] == 1
    assert status["requests"] == 4, "three, and the probe"
    assert status["dmaErrors"] == 0
    assert status["pid"] == running.process.pid
    session.close()
    assert running.status()["loaded"] is None
    with pytest.raises(BackendUnavailable, match="closed"):
        session.run({"x": batch(1)})
    assert running.end() == 0
    assert not running.socket.exists()


def test_a_wrong_request_does_not_reach_the_fabric(running: Site) -> None:
    session = running.load(1)
    before = running.status()["transfers"]
    for inputs, outputs in (
        ({"z": batch(1)}, None),
        ({"x": batch(1)[:, :3]}, None),
        ({"x": batch(1).astype(np.float64)}, None),
        ({"x": batch(1)}, ["nope"]),
        ({"x": np.broadcast_to(np.float32(0), (5 << 20, 16))}, None),
    ):
        with pytest.raises(InvalidTensor):
            session.run(inputs, outputs)
    with pytest.raises(DeadlineExceeded):
        session.run({"x": batch(1)}, deadline=time.monotonic() - 1)
    assert running.status()["transfers"] == before
    assert session.healthy


def test_what_does_not_fit_the_board_is_refused_with_a_reason(site: Site) -> None:
    backend = site.backend()
    good = Variant("stream", "p1", "pynq-z2", Z2)
    assert backend.accepts(good) is None
    assert FpgaBackend("/none", None, None).accepts(good) == "this device has no FPGA board"
    for variant, words in (
        (Variant("onnx", "p1"), "onnx"),
        (Variant("stream", "p1", "zcu104", Z2), "zcu104.*pynq-z2"),
        (Variant("stream", "p1", "pynq-z2", "xczu7ev-ffvc1156-2-e"), "xczu7ev.*xc7z020"),
    ):
        assert backend.accepts(variant)
        with pytest.raises(LoadError, match=words):
            backend.load(site.root, variant, LoadOptions())
    write_overlay_package(
        site.root / "p3", name="other", board="pynq-z2", part="xc7z010clg400-1", clock_mhz=100.0,
        layers=layers(3), input=X, output=TensorSpec("y", "FP32", (-1, 6)),
    )  # fmt: skip
    with pytest.raises(LoadError, match=r"7z010clg400 .* xc7z020clg400-1"):
        backend.load(site.root, Variant("stream", "p3"), LoadOptions())


def test_killed_in_mid_stream_it_fails_at_once_and_heals_by_itself(running: Site) -> None:
    session = running.load(1)
    failures: list[tuple[float, BackendError]] = []
    answered = threading.Event()

    def stream() -> None:
        while True:
            try:
                running.check(session, 1)
                answered.set()
            except BackendError as error:
                failures.append((time.monotonic(), error))
                return

    streams = [threading.Thread(target=stream) for _ in range(3)]
    for thread in streams:
        thread.start()
    assert answered.wait(15)
    killed = time.monotonic()
    running.end(signal.SIGKILL)
    for thread in streams:
        thread.join(30)
        assert not thread.is_alive()
    assert len(failures) == 3
    for moment, error in failures:
        assert isinstance(error, BackendUnavailable)
        assert moment - killed < 10
    until(lambda: not session.healthy)
    started = time.monotonic()
    with pytest.raises(BackendUnavailable):
        session.run({"x": batch(1)})
    # Whoever had asked would have waited three times as long.
    assert time.monotonic() - started < 10
    running.start()
    until(lambda: session.healthy)
    running.check(session, 1)


def test_a_death_while_idle_is_noticed_without_a_request(running: Site) -> None:
    session = running.load(1)
    running.end(signal.SIGKILL)
    until(lambda: not session.healthy)


def test_a_fabric_that_is_not_running_yet_is_no_reason_not_to_load(site: Site) -> None:
    session = site.load(1)
    assert not session.healthy
    with pytest.raises(BackendUnavailable, match="no fabric process at"):
        session.run({"x": batch(1)})
    site.start()
    until(lambda: session.healthy)
    site.check(session, 1)


def test_a_hang_costs_one_deadline_and_no_more(site: Site) -> None:
    site.start(hang_after=5)
    session = site.load(1)
    write_fault(site.faults, Fault("hang", times=1))
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        session.run({"x": batch(1)}, deadline=started + 0.5)
    assert time.monotonic() - started < 4
    site.check(session, 1)
    status = site.status()
    assert status["hangs"] == 1
    assert status["reconfigurations"] == 2


def test_a_dma_error_puts_the_session_out_of_use_until_a_probe_passes(running: Site) -> None:
    session = running.load(1)
    write_fault(running.faults, Fault("error", error="decode"))
    with pytest.raises(BackendUnavailable, match="decode error"):
        session.run({"x": batch(1)}, deadline=time.monotonic() + 5)
    assert not session.healthy
    until(lambda: running.status()["dmaErrors"] >= 3)
    assert not session.healthy
    write_fault(running.faults, Fault())
    until(lambda: session.healthy)
    running.check(session, 1)


@pytest.mark.parametrize("seconds", [0.05, 0.4])
def test_a_stopped_process_costs_the_deadline_and_no_more(running: Site, seconds: float) -> None:
    session = running.load(1)
    assert running.process is not None
    running.process.send_signal(signal.SIGSTOP)
    # Its threads go on until the signal has reached one of them.
    os.waitid(os.P_PID, running.process.pid, os.WSTOPPED | os.WNOWAIT)
    try:
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            session.run({"x": batch(1)}, deadline=started + seconds)
        assert seconds <= time.monotonic() - started < seconds + 10
    finally:
        running.process.send_signal(signal.SIGCONT)

    def answers() -> bool:
        try:
            running.check(session, 1)
        except BackendUnavailable:
            return False  # the keeper's connection had no time to be made: it loads again
        return True

    until(answers)


def test_a_second_process_does_not_get_the_fabric(running: Site) -> None:
    other = subprocess.run(
        running.command(), capture_output=True, text=True, timeout=30, check=False
    )
    assert other.returncode == 1
    assert f"belongs to process {running.process.pid}" in other.stderr
    assert "Traceback" not in other.stderr
    running.check(running.load(1), 1)


@pytest.mark.parametrize(
    ("options", "blocked", "words"),
    [
        (["--board", "pynq-z2"], "", "finds no FPGA"),
        (["--board", "pynq-z2"], "pynq", "gatelet[fpga]"),
        (["--board", "pynq-z2", "--device", "gatelet.simulator.board"], "pynq", "gatelet[fpga]"),
        (["--board", "zx81", "--device", "gatelet.simulator.board"], "", "no simulated board"),
        (["--device", "gatelet.simulator.board"], "", "--device needs --board"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, options: list[str], blocked: str, words: str
) -> None:
    code = (
        f"import sys; blocked = {blocked!r}\n"
        "if blocked: sys.modules[blocked] = None\n"
        "from gatelet.accelerators.fpga.fabric import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    paths = ["--socket", str(tmp_path / "s"), "--lock", str(tmp_path / "l")]
    environment = {key: value for key, value in os.environ.items() if key != "BOARD"}
    done = subprocess.run(
        [sys.executable, "-c", code, *paths, *options],
        capture_output=True, text=True, timeout=30, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def _free(lock: Path) -> bool:
    try:
        take_lock(lock).close()
    except BackendUnavailable:
        return False
    return True


def test_it_ends_with_its_parent(site: Site) -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True)\n"
        "print(child.stdout.readline(), flush=True)\n"
        "sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, *site.command("--die-with-parent")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().startswith("fabric ready")
        with pytest.raises(BackendUnavailable):
            take_lock(site.lock)
        parent.kill()
    until(lambda: _free(site.lock))
