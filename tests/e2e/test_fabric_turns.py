"""Packages, overlays and threads that take turns at one fabric, and their deadlines."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import numpy as np
import pytest
from gatelet.accelerators.backend import LoadOptions, Variant
from gatelet.accelerators.errors import BackendError, BackendUnavailable, DeadlineExceeded
from gatelet.accelerators.fpga.backend import FpgaBackend, FpgaSession
from gatelet.accelerators.fpga.bitfile import Bitfile, encode_bitfile
from gatelet.accelerators.tensors import TensorSpec
from gatelet.simulator.board.bitstream import DATE, TIME, header_part
from gatelet.simulator.board.faults import Fault, write_fault
from gatelet.simulator.board.handoff import StreamDesign, encode_handoff

from .fabric_site import Z2, Site, batch, mapped, until
from .fabric_site import running as running
from .fabric_site import site as site

pytestmark = pytest.mark.e2e


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


def test_a_deadline_that_passes_in_the_queue_is_answered_without_the_fabric(site: Site) -> None:
    site.start(hang_after=20)
    session = site.load(1)
    before = site.status()["transfers"]
    write_fault(site.faults, Fault("slow", seconds=5, times=1))
    slow = threading.Thread(target=site.check, args=(session, 1))
    slow.start()
    until(lambda: site.status()["requests"] == 2)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        session.run({"x": batch(1)}, deadline=started + 0.5)
    assert time.monotonic() - started < 4
    slow.join(30)
    until(lambda: site.status()["expired"] == 1)
    assert site.status()["transfers"] == before + 1
    site.check(session, 1)
