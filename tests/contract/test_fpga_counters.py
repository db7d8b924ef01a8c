"""What the fabric process counts and measures, told through its socket while it works and fails."""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gatelet.accelerators.backend import LoadOptions, Variant
from gatelet.accelerators.errors import BackendUnavailable
from gatelet.accelerators.fpga.backend import FpgaBackend
from gatelet.accelerators.fpga.board import board_named
from gatelet.accelerators.fpga.driver import FabricDriver
from gatelet.accelerators.fpga.packages import probe
from gatelet.accelerators.fpga.protocol import INFERRED, Inference
from gatelet.accelerators.fpga.server import FabricServer
from gatelet.accelerators.fpga.shared_memory import lay_out, make_segment
from gatelet.accelerators.tensors import TensorSpec
from gatelet.simulator.board.bitstream import DenseLayer, write_overlay_package
from gatelet.simulator.board.boards import simulated_board
from gatelet.simulator.board.faults import Fault, FaultFile, write_fault
from gatelet.simulator.board.sysfs import SimulatedSysfs

BOARD = board_named("pynq-z2")
X = np.zeros((3, 4), np.float32)


def until(condition: Callable[[], Any], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        pause.wait(0.01)


@pytest.fixture
def sysfs(tmp_path: Path) -> SimulatedSysfs:
    return SimulatedSysfs(tmp_path / "sys", simulated_board("pynq-z2"))


@pytest.fixture
def server(tmp_path: Path, sysfs: SimulatedSysfs) -> Iterator[FabricServer]:
    with warnings.catch_warnings():
        # pynq warns about x86 and about pkg_resources when it is imported.
        warnings.simplefilter("ignore")
        from gatelet.simulator.board.device import activate

    activate(simulated_board("pynq-z2"), FaultFile(tmp_path / "faults.json"), sysfs=sysfs)
    driver = FabricDriver(tmp_path / "lock", BOARD.part, hang_after=0.1)
    driver.open()
    server = FabricServer(driver, tmp_path / "fabric.sock", BOARD)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def backend(server: FabricServer, tmp_path: Path) -> Iterator[FpgaBackend]:
    backend = FpgaBackend(tmp_path / "fabric.sock", BOARD.name, BOARD.part)
    yield backend
    backend.close()


def package(directory: Path) -> None:
    layer = DenseLayer(np.ones((4, 2), np.int8), np.zeros(2, np.int32), 0.1, 0.01, 0.2)
    write_overlay_package(
        directory, name="net", board=BOARD.name, part=BOARD.part or "", clock_mhz=125.0,
        layers=[layer], input=TensorSpec("x", "FP32", (-1, 4)),
        output=TensorSpec("y", "FP32", (-1, 2)),
    )  # fmt: skip


def test_counters_and_measurements_of_a_fabric_at_work_and_in_trouble(
    server: FabricServer, backend: FpgaBackend, sysfs: SimulatedSysfs, tmp_path: Path
) -> None:
    status = server.status()
    assert (status["busySeconds"], status["manager"], status["trouble"]) == (0, "unknown", None)
    package(tmp_path / "p")
    session = backend.load(tmp_path, Variant("stream", "p"), LoadOptions())
    session.run({"x": X}, deadline=time.monotonic() + 10)
    sysfs.set_temperature(71.0)

    def told() -> dict[str, Any]:
        return dict(backend.fabric_status() or {})

    until(lambda: told().get("manager") == "operating")
    until(lambda: abs(told()["temperatures"]["xadc temp0"] - 71.0) < 0.1)
    status = told()
    assert status["clocksMhz"]["fclk0"] == pytest.approx(125, rel=0.01)
    assert 0 < status["configuringSeconds"] < status["busySeconds"] < status["uptimeSeconds"]
    assert (status["resets"], status["hangs"], status["trouble"]) == (0, 0, None)

    write_fault(tmp_path / "faults.json", Fault("error", error="decode"))
    with pytest.raises(BackendUnavailable, match="DMADecErr"):
        session.run({"x": X}, deadline=time.monotonic() + 10)
    until(lambda: "DMADecErr" in (told()["trouble"] or ""))
    assert told()["dmaErrors"] >= 1
    write_fault(tmp_path / "faults.json", Fault("none"))
    until(lambda: session.healthy)
    until(lambda: told()["trouble"] is None)
    write_fault(tmp_path / "faults.json", Fault("hang", times=1))
    with pytest.raises(BackendUnavailable):
        session.run({"x": X}, deadline=time.monotonic() + 10)
    until(lambda: session.healthy)
    until(lambda: told()["hangs"] == 1)
    assert told()["resets"] >= 2
    assert told()["reconfigurations"] >= 3


def test_a_fabric_that_went_is_not_told_of(
    server: FabricServer, backend: FpgaBackend, tmp_path: Path
) -> None:
    package(tmp_path / "p")
    session = backend.load(tmp_path, Variant("stream", "p"), LoadOptions())
    until(lambda: bool(backend.fabric_status()))
    session.close()
    server.stop()
    until(lambda: backend.fabric_status() is None)


def test_asking_never_waits_for_a_fabric_that_does_not_answer(tmp_path: Path) -> None:
    import socket

    path = tmp_path / "silent.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(str(path))
        silent.listen()
        backend = FpgaBackend(path, BOARD.name, BOARD.part)
        try:
            # Whoever had waited would know by then that nobody answers.
            assert backend.fabric_status() == {}
        finally:
            silent.close()
            backend.close()


@pytest.mark.parametrize("first", ["unload", "load"])
def test_a_package_that_is_loaded_while_its_last_user_leaves_stays(
    server: FabricServer, tmp_path: Path, first: str
) -> None:
    package(tmp_path / "p")
    service, one = server._service, probe(tmp_path / "p")
    leaving, coming = service.enter("leaving"), service.enter("coming")
    handle = service.load(leaving, one)
    work = {
        "unload": lambda: service.unload(leaving, handle),
        "load": lambda: service.load(coming, probe(tmp_path / "p")),
    }
    threads = [threading.Thread(target=work.pop(first)), *(
        threading.Thread(target=other) for other in work.values()
    )]  # fmt: skip
    # Both want the fabric while somebody else has it, and get it in this order.
    with service._fabric():
        for queued, thread in enumerate(threads, 1):
            thread.start()
            until(lambda queued=queued: service.status()["queued"] == queued)
    for thread in threads:
        thread.join(15)
    ((name, loaded),) = coming.packages.items()
    assert service._in_fabric() == loaded.overlay
    layout = lay_out(loaded.input_bytes, loaded.output_bytes, 2)
    assert layout is not None
    segment, descriptor = make_segment(layout.nbytes)
    os.close(descriptor)
    request = Inference(bytes.fromhex(name), math.inf, 2, layout.nbytes)
    answers: list[bytes] = []
    service.infer(service.work(coming, segment, request), math.inf, answers.append)
    assert answers == [INFERRED]
    for client in ("leaving", "coming"):
        service.leave(client)
    assert server.status()["loaded"] is None
