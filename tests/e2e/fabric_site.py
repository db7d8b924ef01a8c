"""A fabric process on a simulated board, with two packages to load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gatelet.accelerators.backend import LoadOptions, Variant
from gatelet.accelerators.fpga.backend import FpgaBackend, FpgaSession
from gatelet.accelerators.fpga.client import FabricClient
from gatelet.accelerators.fpga.packages.overlay_json import read_overlay_json
from gatelet.accelerators.fpga.wire import dequantise, quantise
from gatelet.accelerators.tensors import TensorSpec
from gatelet.simulator.board.bitstream import DenseLayer, write_overlay_package
from gatelet.simulator.board.faults import FAULTS_VARIABLE
from gatelet.simulator.board.network import run_network

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
            return process.wait(30)
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


def mapped(site: Site) -> int:
    assert site.process is not None
    maps = Path(f"/proc/{site.process.pid}/maps").read_text()
    return sum("memfd:gatelet-fabric" in line for line in maps.splitlines())
