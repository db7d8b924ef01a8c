"""The fabric process on a simulated board, used through the backend, killed, and broken."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from gatelet.accelerators.fpga.backend import FpgaBackend, FpgaSession
from gatelet.accelerators.fpga.bitfile import Bitfile, encode_bitfile
from gatelet.accelerators.fpga.client import FabricClient
from gatelet.accelerators.fpga.machine import take_lock
from gatelet.accelerators.fpga.packages.overlay_json import read_overlay_json
from gatelet.accelerators.fpga.protocol import (
    INFERRED,
    Inference,
    decode_message,
    encode_message,
    send_packet,
)
from gatelet.accelerators.fpga.shared_memory import lay_out, make_segment
from gatelet.accelerators.fpga.wire import dequantise, quantise
from gatelet.accelerators.tensors import TensorSpec
from gatelet.simulator.board.bitstream import (
    DATE,
    TIME,
    DenseLayer,
    header_part,
    write_overlay_package,
)
from gatelet.simulator.board.faults import FAULTS_VARIABLE, Fault, write_fault
from gatelet.simulator.board.handoff import StreamDesign, encode_handoff
from gatelet.simulator.board.network import run_network

pytestmark = pytest.mark.e2e

Z2 = "xc7z020clg400-1"
X = TensorSpec("x", "FP32", (-1, 16))


def layers(seed: int) -> tuple[DenseLayer, ...]:
    rng = np.random.default_rng(seed)
    return (
        DenseLayer(
            rng.integers(-128, 128, (16, 6), dtype=np.int8),
            rng.integers(-900, 900, 6, dtype=np.int32),
            0.05, 0.01, 0.2, input_zero_point=3, output_zero_point=-5,
        ),
    )  # fmt: skip


def batch(seed: int, count: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (count, 16)).astype(np.float32)


def expected(directory: Path, seed: int, x: np.ndarray) -> np.ndarray:
    package = read_overlay_json(directory)
    items = run_network(layers(seed), quantise(x, package.inputs[0].wire))
    return dequantise(items, package.outputs[0].wire, (-1, 6))


def until(condition: Callable[[], Any], seconds: float = 15.0) -> None:
    pause, end = threading.Event(), time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        pause.wait(0.005)


class Site:
    """A directory with two packages, and a fabric process that can be started and killed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.socket, self.lock = root / "fabric.sock", root / "fabric.lock"
        self.faults = root / "faults.json"
        self.process: subprocess.Popen[str] | None = None
        self.backends: list[FpgaBackend] = []
        for seed in (1, 2):
            write_overlay_package(
                root / f"p{seed}", name=f"net{seed}", board="pynq-z2", part=Z2, clock_mhz=100.0,
                layers=layers(seed), input=X, output=TensorSpec("y", "FP32", (-1, 6)),
            )  # fmt: skip

    def command(self, *more: str) -> list[str]:
        return [
            *(sys.executable, "-m", "gatelet.accelerators.fpga.fabric"),
            *("--socket", str(self.socket), "--lock", str(self.lock)),
            *("--board", "pynq-z2", "--device", "gatelet.simulator.board", *more),
        ]

    def start(self, hang_after: float = 0.2) -> None:
        self.process = subprocess.Popen(
            self.command("--hang-after", str(hang_after)),
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, FAULTS_VARIABLE: str(self.faults)},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("fabric ready: board=pynq-z2 part=xc7z020")

    def end(self, number: int = signal.SIGTERM) -> int:
        process, self.process = self.process, None
        assert process is not None
        assert process.stdout is not None
        process.send_signal(number)
        try:
            return process.wait(10)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    def backend(self) -> FpgaBackend:
        backend = FpgaBackend(self.socket, "pynq-z2", Z2)
        self.backends.append(backend)
        return backend

    def load(self, seed: int, backend: FpgaBackend | None = None) -> FpgaSession:
        variant = Variant("stream", f"p{seed}", "pynq-z2", Z2)
        return (backend or self.backend()).load(self.root, variant, LoadOptions())

    def check(self, session: FpgaSession, seed: int, count: int = 5) -> None:
        x = batch(seed, count)
        result = session.run({"x": x}, deadline=time.monotonic() + 10)["y"]
        np.testing.assert_array_equal(result, expected(self.root / f"p{seed}", seed, x))

    def status(self) -> dict[str, Any]:
        client = FabricClient(self.socket)
        try:
            return client.call({"op": "status"})["status"]
        finally:
            client.close()

    def close(self) -> None:
        for backend in self.backends:
            backend.close()
        if self.process is not None:
            self.end(signal.SIGKILL)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    threads = set(threading.enumerate())
    site = Site(tmp_path)
    try:
        yield site
    finally:
        site.close()
    until(lambda: set(threading.enumerate()) <= threads)


@pytest.fixture
def running(site: Site) -> Site:
    site.start()
    return site


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
    assert answered.wait(10)
    killed = time.monotonic()
    running.end(signal.SIGKILL)
    for thread in streams:
        thread.join(10)
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


def test_two_packages_share_the_fabric(running: Site) -> None:
    backend = running.backend()
    sessions = {seed: running.load(seed, backend) for seed in (1, 2)}
    for _ in range(5):
        for seed, session in sessions.items():
            running.check(session, seed)
    errors: list[Exception] = []

    def use(seed: int) -> None:
        try:
            for _ in range(20):
                running.check(sessions[seed], seed)
        except (BackendError, AssertionError) as error:
            errors.append(error)

    users = [threading.Thread(target=use, args=(seed,)) for seed in (1, 2, 1, 2)]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join(30)
    assert not errors
    assert running.status()["reconfigurations"] >= 10


def test_more_threads_than_connections_wait_for_one(running: Site) -> None:
    session = running.load(1)
    errors: list[Exception] = []

    def use() -> None:
        try:
            for count in range(1, 11):
                running.check(session, 1, count)
        except (BackendError, AssertionError) as error:
            errors.append(error)

    users = [threading.Thread(target=use) for _ in range(12)]
    for thread in users:
        thread.start()
    for thread in users:
        thread.join(60)
    assert not errors
    assert mapped(running) <= 4


def test_no_connection_until_the_deadline(running: Site) -> None:
    session = running.load(1)
    assert running.process is not None
    running.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, running.process.pid, os.WSTOPPED | os.WNOWAIT)

    def use() -> None:
        # Whoever makes its connection now may give up on that before the process goes on.
        with contextlib.suppress(BackendUnavailable):
            running.check(session, 1)

    users = [threading.Thread(target=use) for _ in range(4)]
    try:
        for thread in users:
            thread.start()
        until(lambda: not session._client._free)
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="before the fabric was free"):
            session.run({"x": batch(1)}, deadline=started + 0.05)
        assert time.monotonic() - started < 10
    finally:
        running.process.send_signal(signal.SIGCONT)
        for thread in users:
            thread.join(20)


def slow_to_configure(site: Site, size: int = 4 << 20) -> None:
    """Both bitstreams get `size` bytes: as large as a Z7020's, about 30 ms of configuration."""
    for seed in (1, 2):
        design = StreamDesign(
            f"net{seed}", Z2, 100.0, 26, dma="hier_0/axi_dma_0", core="hier_0/loop_0"
        )
        folder = site.root / f"p{seed}"
        for file in folder.iterdir():
            file.unlink()
        bitfile = Bitfile(
            f"net{seed}", header_part(Z2), DATE, TIME, bytes((seed,) * 4) + bytes(size)
        )
        (folder / "loop.bit").write_bytes(encode_bitfile(bitfile))
        (folder / "loop.hwh").write_text(encode_handoff(design))
        (folder / "hls4ml_config.yml").write_text("Backend: VivadoAccelerator\n")


def loopback(site: Site, seed: int, backend: FpgaBackend) -> FpgaSession:
    spec = (TensorSpec("x", "FP32", (-1, 16)),), (TensorSpec("y", "FP32", (-1, 16)),)
    options = LoadOptions(inputs=spec[0], outputs=spec[1])
    return backend.load(site.root, Variant("hls4ml", f"p{seed}"), options)


def echo(session: FpgaSession, seconds: float) -> None:
    x = batch(1, 2)
    result = session.run({"x": x}, deadline=time.monotonic() + seconds)["y"]
    np.testing.assert_array_equal(result, x)


def test_overlays_under_load_take_turns_and_none_starves(site: Site) -> None:
    slow_to_configure(site)
    site.start()
    backend = site.backend()
    sessions = [loopback(site, seed, backend) for seed in (1, 2)]
    before = site.status()
    stop = threading.Event()
    served: list[tuple[int, float]] = []
    errors: list[Exception] = []

    def use(number: int) -> None:
        try:
            while not stop.is_set():
                started = time.monotonic()
                echo(sessions[number], 30)
                served.append((number, time.monotonic() - started))
        except (BackendError, AssertionError) as error:
            errors.append(error)

    users = [threading.Thread(target=use, args=(number,)) for number in (0, 1, 0, 1)]
    for thread in users:
        thread.start()
    try:
        until(lambda: errors or site.status()["swaps"] >= before["swaps"] + 6, 20)
    finally:
        stop.set()
        for thread in users:
            thread.join(20)
    assert not errors
    after = site.status()
    counts = [sum(number == which for number, _ in served) for which in (0, 1)]
    swaps = after["swaps"] - before["swaps"]
    # Hundreds for each time it comes in, but fewer the busier the machine; in order of arrival one.
    assert min(counts) >= 3
    assert sum(counts) > 2 * swaps
    assert after["swapsAvoided"] > swaps / 2
    assert after["refused"] == before["refused"]
    # Patience and one turn of the other one, 0.4 s; the rest is for the machine.
    assert max(seconds for _, seconds in served) < 15


def test_too_short_for_a_swap_is_refused_at_once_and_brings_the_overlay_in(site: Site) -> None:
    # A quarter of a second of configuration, which no pause of this machine is mistaken for.
    slow_to_configure(site, 32 << 20)
    short = 0.15
    site.start()
    backend = site.backend()
    first, second = (loopback(site, seed, backend) for seed in (1, 2))
    echo(second, 5)
    refusals: list[tuple[float, str]] = []

    def served() -> bool:
        started = time.monotonic()
        try:
            echo(first, short)
        except BackendUnavailable as error:
            refusals.append((time.monotonic() - started, str(error)))
            return False
        except DeadlineExceeded:
            # Asked for while it was being configured; three in a row would count as sick.
            until(configured)
            return False
        return True

    def configured() -> bool:
        status = site.status()
        return bool(status["reconfigurations"] == 2 + status["prefetches"])

    until(served)
    assert len(refusals) >= 3
    assert all("configuring takes longer" in why for _, why in refusals)
    assert min(refusals)[0] < short, "at once"
    assert first.healthy
    status = site.status()
    assert status["refused"] == len(refusals)
    assert status["prefetches"] == 1


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


def test_a_deadline_that_passes_in_the_queue_is_answered_without_the_fabric(site: Site) -> None:
    site.start(hang_after=20)
    session = site.load(1)
    before = site.status()["transfers"]
    write_fault(site.faults, Fault("slow", seconds=3, times=1))
    slow = threading.Thread(target=site.check, args=(session, 1))
    slow.start()
    until(lambda: site.status()["requests"] == 2)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        session.run({"x": batch(1)}, deadline=started + 0.5)
    assert time.monotonic() - started < 2
    slow.join(10)
    until(lambda: site.status()["expired"] == 1)
    assert site.status()["transfers"] == before + 1
    site.check(session, 1)


def test_a_hang_costs_one_deadline_and_no_more(site: Site) -> None:
    site.start(hang_after=3)
    session = site.load(1)
    write_fault(site.faults, Fault("hang", times=1))
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        session.run({"x": batch(1)}, deadline=started + 0.5)
    assert time.monotonic() - started < 2
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


def connected(site: Site, *packets: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(5)
    connection.connect(str(site.socket))
    for packet in packets:
        connection.sendall(packet)
    return connection


def is_ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1 << 16) == b""
    except ConnectionResetError:
        return True


def test_hostile_bytes_end_only_their_own_connection(running: Site) -> None:
    session = running.load(1)
    for junk in (
        b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, INFERRED, b"GLJ2", b"GLJ2[]", bytes(100_000),
        Inference(bytes(16), 0.0, 1, 64).encode(),
    ):  # fmt: skip
        with connected(running, junk) as hostile:
            assert is_ended(hostile)
    running.check(session, 1)


HELLO = encode_message({"op": "hello", "client": "hostile"})


def loaded_by_hand(site: Site) -> tuple[socket.socket, bytes]:
    load = {"op": "load", "directory": str(site.root / "p1"), "kind": "stream"}
    connection = connected(site, HELLO)
    assert connection.recv(1 << 16)
    connection.sendall(encode_message(load))
    answer = decode_message(connection.recv(1 << 16))
    assert not isinstance(answer, Inference)
    return connection, bytes.fromhex(answer["handle"])


def test_a_request_that_lies_about_its_memory_reaches_no_memory(running: Site) -> None:
    session = running.load(1)
    connection, handle = loaded_by_hand(running)
    layout = lay_out((16,), (6,), 2)
    assert layout is not None
    _, descriptor = make_segment(layout.nbytes)
    honest = Inference(handle, math.inf, 2, layout.nbytes)
    with connection:
        connection.send(honest.encode())
        assert b"INVALID" in connection.recv(1 << 16), "there is no memory yet"
        send_packet(connection, honest.encode(), descriptor)
        assert connection.recv(1 << 16) == INFERRED
        for lie in (
            replace(honest, items=5),
            replace(honest, nbytes=2**63),
            replace(honest, items=2**32 - 1, nbytes=0),
            replace(honest, items=100_000, nbytes=lay_out((16,), (6,), 100_000).nbytes),
        ):
            connection.send(lie.encode())
            assert b"INVALID" in connection.recv(1 << 16)
        connection.send(replace(honest, handle=bytes(16)).encode())
        assert b"UNKNOWN_HANDLE" in connection.recv(1 << 16)
        connection.send(honest.encode())
        assert connection.recv(1 << 16) == INFERRED
    os.close(descriptor)
    running.check(session, 1)


def test_what_was_asked_for_before_is_checked_again_once_a_handle_goes(running: Site) -> None:
    connection, handle = loaded_by_hand(running)
    layout = lay_out((16,), (6,), 2)
    assert layout is not None
    _, descriptor = make_segment(layout.nbytes)
    request = Inference(handle, math.inf, 2, layout.nbytes).encode()
    with connection:
        send_packet(connection, request, descriptor)
        assert connection.recv(1 << 16) == INFERRED
        unload = {"op": "unload", "handle": handle.hex()}
        with connected(running, HELLO, encode_message(unload)) as other:
            assert other.recv(1 << 16)
            assert b'"ok":true' in other.recv(1 << 16)
            connection.send(request)
            assert b"UNKNOWN_HANDLE" in connection.recv(1 << 16)
    os.close(descriptor)


def test_memory_that_is_not_sealed_ends_the_connection(running: Site) -> None:
    connection, handle = loaded_by_hand(running)
    descriptor = os.memfd_create("hostile")
    os.ftruncate(descriptor, 4096)
    with connection:
        send_packet(connection, Inference(handle, math.inf, 1, 128).encode(), descriptor)
        assert is_ended(connection)
    os.close(descriptor)
    running.check(running.load(1), 1)


def mapped(site: Site) -> int:
    assert site.process is not None
    maps = Path(f"/proc/{site.process.pid}/maps").read_text()
    return sum("memfd:gatelet-fabric" in line for line in maps.splitlines())


def test_a_client_that_dies_leaves_nothing_mapped(running: Site) -> None:
    session = running.load(1)
    running.check(session, 1)
    before = mapped(running)
    assert before == 1
    code = (
        "import os, sys, time, numpy as np\n"
        "from pathlib import Path\n"
        "from gatelet.accelerators.fpga.client import FabricClient, Form, prepare\n"
        "client = FabricClient(Path(sys.argv[1]))\n"
        "load = {'op': 'load', 'directory': sys.argv[2], 'kind': 'stream'}\n"
        "handle = client.call(load)['handle']\n"
        "x, y = (Form(np.dtype(np.uint8), (size,)) for size in (16, 6))\n"
        "request = prepare(handle, 5, (x,), (y,))\n"
        "print(len(client.infer(request, [np.zeros((5, 16), np.uint8)])[0]), flush=True)\n"
        "while True: client.infer(request, [np.zeros((5, 16), np.uint8)])"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(running.socket), str(running.root / "p2")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "5\n"
        assert mapped(running) == before + 1
        other.kill()
    until(lambda: mapped(running) == before)
    running.check(session, 1)


def test_the_memory_of_a_large_batch_goes_again(running: Site) -> None:
    session = running.load(1)
    for count in (5, 200_000, 600_000, 5):
        x = np.zeros((count, 16), np.float32)
        assert len(session.run({"x": x}, deadline=time.monotonic() + 20)["y"]) == count
    until(lambda: mapped(running) == 1)


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


def _free(lock: Path) -> bool:
    try:
        take_lock(lock).close()
    except BackendUnavailable:
        return False
    return True
