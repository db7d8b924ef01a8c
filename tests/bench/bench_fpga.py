"""What our path to the FPGA adds: `python tests/bench/bench_fpga.py [WHAT] [--json] [--seconds S]`.

WHAT is `path` (the default), `overlays` or `packing`.

path: microseconds per transfer (median and least) of as many bytes each way, on a simulated board
whose core gives back what it takes; the paths take turns, so that all see the same machine:

    bare     the registers of the AXI DMA through pynq's MMIO, buffers flushed whole, no checks
    pynq     pynq's own DMA class
    ours     our driver in process, with deadline, error bits, length check and lock
    hop      a request of the scoring process to the fabric process, through shared memory

The simulated registers take 1 to 2 us each, more than real ones, so the rows tell how many accesses
a path makes and what Python costs around them; they say nothing about a board's throughput.

overlays: two overlays with bitstreams of 4 MB (about 30 ms to configure), two clients each that ask
again as soon as they have an answer, by our rules and strictly in order of arrival: requests and
configurations a second, and the 99th percentile and the longest of the answers in milliseconds.

packing: milliseconds to encode and decode 1,048,576 elements, per datatype.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gatelet.accelerators.backend import LoadOptions, Variant
from gatelet.accelerators.fpga.backend import FpgaBackend
from gatelet.accelerators.fpga.driver import FabricDriver
from gatelet.accelerators.fpga.package import Package, Signature
from gatelet.accelerators.fpga.packages import probe
from gatelet.accelerators.tensors import TensorSpec
from gatelet.simulator.board.bitstream import DATE, TIME, header_part
from gatelet.simulator.board.boards import simulated_board
from gatelet.simulator.board.handoff import StreamDesign, encode_handoff

PACKED = (
    "BIPOLAR", "BINARY", "INT2", "INT3", "INT4", "INT5", "INT7", "INT8", "INT12", "INT16", "INT24",
    "INT32",
)  # fmt: skip
SIZES = (64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
Z2 = simulated_board("pynq-z2").part


def write_loopback(directory: Path, size: int) -> Signature:
    """An hls4ml package of floats whose core is a loopback; the tensors of one item."""
    from gatelet.accelerators.fpga.bitfile import Bitfile, encode_bitfile

    directory.mkdir(parents=True)
    design = StreamDesign("loop", Z2, 100.0, 26, dma="hier_0/axi_dma_0", core="hier_0/loop_0")
    bitfile = Bitfile("loop", header_part(Z2), DATE, TIME, bytes(64))
    (directory / "loop.bit").write_bytes(encode_bitfile(bitfile))
    (directory / "loop.hwh").write_text(encode_handoff(design))
    (directory / "hls4ml_config.yml").write_text("Backend: VivadoAccelerator\n")
    shape = (-1, size // 4)
    return Signature((TensorSpec("x", "FP32", shape),), (TensorSpec("y", "FP32", shape),))


def bare(pynq: Any, overlay: Any, device: Any, data: np.ndarray) -> Callable[[], Any]:
    send, receive = (pynq.allocate((data.size,), np.uint8, target=device) for _ in range(2))
    mmio = pynq.MMIO(overlay.ip_dict["hier_0/axi_dma_0"]["phys_addr"], 0x80, device=device)

    def step() -> Any:
        send[:] = data
        send.flush()
        mmio.write(0x48, receive.device_address)
        mmio.write(0x58, data.size)
        mmio.write(0x18, send.device_address)
        mmio.write(0x28, data.size)
        while not mmio.read(0x34) & 2:
            pass
        receive.invalidate()
        return np.array(receive)

    return step


def pynqs(pynq: Any, overlay: Any, device: Any, data: np.ndarray) -> Callable[[], Any]:
    send, receive = (pynq.allocate((data.size,), np.uint8, target=device) for _ in range(2))
    dma = overlay.hier_0.axi_dma_0

    def step() -> Any:
        send[:] = data
        dma.recvchannel.transfer(receive)
        dma.sendchannel.transfer(send)
        dma.sendchannel.wait()
        dma.recvchannel.wait()
        return np.array(receive)

    return step


def ours(driver: FabricDriver, package: Package, data: np.ndarray) -> Callable[[], Any]:
    items = [data.reshape(1, -1)]
    return lambda: driver.infer(package, items, time.monotonic() + 5)[0]


def interleaved(
    steps: dict[str, Callable[[], Any]], data: np.ndarray, seconds: float
) -> dict[str, list[float]]:
    """Sorted microseconds of each step, in short turns, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        result = np.asarray(step()).reshape(-1)
        assert np.array_equal(result.view(np.uint8), data), "the loopback gave something else"
    end = time.perf_counter() + len(steps) * seconds
    while time.perf_counter() < end:
        for name, step in steps.items():
            for _ in range(10):
                step()
            for _ in range(100):
                started = time.perf_counter()
                step()
                times[name].append((time.perf_counter() - started) * 1e6)
    return {name: sorted(found) for name, found in times.items()}


@contextmanager
def fabric(root: Path) -> Iterator[FpgaBackend]:
    command = [
        *(sys.executable, "-m", "gatelet.accelerators.fpga.fabric"),
        *("--socket", str(root / "fabric.sock"), "--lock", str(root / "hop.lock")),
        *("--board", "pynq-z2", "--device", "gatelet.simulator.board"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    backend = FpgaBackend(root / "fabric.sock", "pynq-z2", Z2)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield backend
    finally:
        backend.close()
        process.terminate()
        process.wait(20)


def measure(
    root: Path, seconds: float, sizes: Sequence[int]
) -> dict[int, dict[str, tuple[float, float]]]:
    """Per size and path the median and the least of the microseconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pynq
        import pynq.lib
    from gatelet.simulator.board.device import activate

    # Two boards, since a driver takes the registers for its own.
    activate(simulated_board("pynq-z2"))
    driver = FabricDriver(root / "lock", Z2)
    driver.open()
    device = activate(simulated_board("pynq-z2"))
    table: dict[int, dict[str, tuple[float, float]]] = {}
    with fabric(root) as backend:
        for size in sizes:
            directory = root / str(size)
            signature = write_loopback(directory, size)
            package = probe(directory, signature)
            data = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
            # Not NaN, whose bits float32 copies may change.
            data.view("<u4")[:] &= 0x3FFFFFFF
            options = LoadOptions(inputs=signature.inputs, outputs=signature.outputs)
            session = backend.load(root, Variant("hls4ml", str(size)), options)
            tensor = data.view("<f4").reshape(1, -1)

            def hop(session: Any = session, tensor: np.ndarray = tensor) -> Any:
                return session.run({"x": tensor}, None, time.monotonic() + 5)["y"].view(np.uint8)

            driver.load(package)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                overlay = pynq.Overlay(str(package.bit), device=device)
            steps = {
                "pynq": pynqs(pynq, overlay, device, data),
                "bare": bare(pynq, overlay, device, data),
                "ours": ours(driver, package, data),
                "hop": hop,
            }
            table[size] = {
                name: (statistics.median(found), found[0])
                for name, found in interleaved(steps, data, seconds).items()
            }
            driver.unload(package)
            session.close()
    driver.close()
    return table


def write_large_loopback(directory: Path, seed: int) -> Signature:
    """A loopback of 64 bytes whose bitstream is as large as a Z7020's."""
    from gatelet.accelerators.fpga.bitfile import Bitfile, encode_bitfile

    signature = write_loopback(directory, 64)
    bitfile = Bitfile(
        f"loop{seed}", header_part(Z2), DATE, TIME, bytes((seed,) * 4) + bytes(4 << 20)
    )
    (directory / "loop.bit").write_bytes(encode_bitfile(bitfile))
    return signature


def measure_overlays(root: Path, seconds: float) -> dict[str, dict[str, float]]:
    from gatelet.accelerators.fpga.board import board_named
    from gatelet.accelerators.fpga.schedule import Policy
    from gatelet.accelerators.fpga.server import FabricServer
    from gatelet.simulator.board.device import activate

    activate(simulated_board("pynq-z2"))
    signatures = [write_large_loopback(root / str(seed), seed) for seed in (1, 2)]
    table: dict[str, dict[str, float]] = {}
    arrival = Policy(patience=0.0, hold=0.0, linger=0.0)
    for name, policy in (("ours", Policy()), ("arrival", arrival)):
        driver = FabricDriver(root / "lock", Z2)
        driver.open()
        server = FabricServer(driver, root / f"{name}.sock", board_named("pynq-z2"), policy=policy)
        server.start()
        backend = FpgaBackend(root / f"{name}.sock", "pynq-z2", Z2)
        sessions = [
            backend.load(
                root,
                Variant("hls4ml", str(seed)),
                LoadOptions(inputs=signature.inputs, outputs=signature.outputs),
            )
            for seed, signature in zip((1, 2), signatures, strict=True)
        ]
        before = driver.counters.reconfigurations
        end = time.perf_counter() + seconds
        times: list[float] = []

        def ask(session: Any, end: float = end, times: list[float] = times) -> None:
            tensor = np.zeros((1, 16), np.float32)
            while (started := time.perf_counter()) < end:
                session.run({"x": tensor}, None, time.monotonic() + 10)
                times.append(time.perf_counter() - started)

        clients = [threading.Thread(target=ask, args=(session,)) for session in sessions * 2]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        times.sort()
        table[name] = {
            "requests/s": len(times) / seconds,
            "configurations/s": (driver.counters.reconfigurations - before) / seconds,
            "p99 ms": times[len(times) * 99 // 100] * 1e3,
            "longest ms": times[-1] * 1e3,
        }
        for session in sessions:
            session.close()
        backend.close()
        server.stop()
    return table


def measure_packing(seconds: float) -> dict[str, dict[str, float]]:
    from gatelet.accelerators.fpga.elements import finn_element, to_codes, to_values
    from gatelet.accelerators.fpga.packing import pack, unpack

    table: dict[str, dict[str, float]] = {}
    count = 1 << 20
    for name in PACKED:
        element = finn_element(name)
        values = np.random.default_rng(1).integers(element.low, element.high + 1, (1, count))
        values = values.astype(element.container)
        if element.kind == "bipolar":
            values[values == 0] = 1
        raw = pack(to_codes(values, element), element)

        def encode(values: Any = values, element: Any = element) -> Any:
            return pack(to_codes(values, element), element)

        def decode(raw: Any = raw, element: Any = element) -> Any:
            return to_values(unpack(raw, count, element), element, element.container)

        assert np.array_equal(decode(), values)
        table[name] = {
            what: median_of(step, seconds) * 1e3
            for what, step in (("encode ms", encode), ("decode ms", decode))
        }
    return table


def median_of(step: Callable[[], Any], seconds: float) -> float:
    times = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def print_rows(table: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(table.values())))
    print(f"{'':>10}" + "".join(f"{name:>18}" for name in names))
    for name, row in table.items():
        print(f"{name:>10}" + "".join(f"{row[column]:18.2f}" for column in names))


def main() -> None:
    parser = argparse.ArgumentParser(description="What our path to the FPGA adds.")
    parser.add_argument("what", nargs="?", choices=("path", "overlays", "packing"), default="path")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of `path`, in bytes")
    arguments = parser.parse_args()
    if arguments.what == "packing":
        rows = measure_packing(arguments.seconds / 4)
        print(json.dumps(rows)) if arguments.json else print_rows(rows)
        return
    with tempfile.TemporaryDirectory() as root:
        if arguments.what == "overlays":
            rows = measure_overlays(Path(root), 5 * arguments.seconds)
            print(json.dumps(rows)) if arguments.json else print_rows(rows)
            return
        table = measure(Path(root), arguments.seconds, arguments.sizes)
    if arguments.json:
        print(json.dumps(table))
        return
    names = ("bare", "pynq", "ours", "hop")
    print(f"{'':8}  {'median':^38}  {'least':^38}  {'hop/bare':>14}")
    print(f"{'bytes':>8}" + 2 * ("  " + "".join(f"{name:>9} " for name in names)[:-1])
          + "  median   least")  # fmt: skip
    for size, row in table.items():
        values = "  ".join(
            " ".join(f"{row[name][which]:9.1f}" for name in names) for which in (0, 1)
        )
        ratios = " ".join(f"{row['hop'][which] / row['bare'][which]:7.2f}" for which in (0, 1))
        print(f"{size:8}  {values}  {ratios}")


if __name__ == "__main__":
    main()
