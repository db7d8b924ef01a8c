"""What our gRPC server costs beside a bare onnxruntime loop: `python tests/bench/bench_scoring.py`.

Prints requests/s, p50 and p99 at several concurrencies, requests run singly and together, first of
the data plane without a protocol, then over gRPC; `gain` is together against singly. Then the start
time and the memory of the scoring process. The client is nghttp2's h2load with a request
encoded beforehand where it is installed, since a Python client costs as much as the server; else
blocking Python clients in processes of their own. Client and server share the machine's cores, so
compare rows of one run with each other, not runs with each other.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from gatelet.accelerators.cpu import CpuBackend
from gatelet.agent.scoring.dataplane import DataPlane
from gatelet.agent.scoring.errors import ScoringError
from gatelet.agent.scoring.loading import InstanceOptions, Loaded
from gatelet.agent.scoring.routing import Target, make_route
from gatelet.agent.scoring.types import InferenceRequest, Tensor
from gatelet.protos import open_inference_pb2 as oip
from gatelet.protos.services import InferenceStub

sys.path.insert(0, str(Path(__file__).resolve().parent))

import onnx_models
import scoring_site

MAX_BATCH = 32
CONNECTIONS = 4
# How an instance answers what comes at the same time -> its option max_batch.
WAYS = {"singly": 1, "together": MAX_BATCH}
MODELS = {
    "mlp": (onnx_models.mlp, (1, 64)),
    "cnn": (onnx_models.cnn, (1, 1, 28, 28)),
}


@dataclass(frozen=True)
class Row:
    """One measurement; times in seconds. `cpu`: of the serving process, per request."""

    model: str
    what: str
    concurrency: int
    per_second: float
    p50: float
    p99: float
    cpu: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--client", choices=("h2load", "python"), default=_client_of_choice())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _run(Path(folder), options)
    return 0


def _client_of_choice() -> str:
    return "h2load" if shutil.which("h2load") else "python"


def _run(folder: Path, options: argparse.Namespace) -> None:
    seconds = options.seconds
    folders = {}
    for name in options.models:
        build, shape = MODELS[name]
        inputs = [("x", "FP32", (-1, *shape[1:]))]
        folders[name] = onnx_models.write_folder(
            folder / name,
            build(),
            inputs,
            [("y", "FP32", (-1, 10))],
            name=name,
            batching={"max": MAX_BATCH},
        )
    rows = [_bare(name, folders[name], seconds) for name in options.models]
    for name in options.models:
        for c in options.concurrency:
            rows += [_data_plane(name, way, folders[name], c, seconds) for way in WAYS]
    served = _with_h2load if options.client == "h2load" else _served
    print(f"client: {options.client}")
    started = time.perf_counter()
    with scoring_site.scoring_process(folder / "s") as scoring:
        start_time = time.perf_counter() - started
        empty = _memory(scoring.process.pid)
        _deploy(scoring.site, folders)
        deployed = time.perf_counter() - started
        for name in options.models:
            for c in options.concurrency:
                rows += [served(name, way, scoring, c, seconds) for way in WAYS]
        full = _memory(scoring.process.pid)
        scoring.terminate()
    _print(rows)
    print(f"\nscoring process: ready after {start_time:.2f} s, with both models {deployed:.2f} s")
    for state, memory in (("before models", empty), ("after the runs", full)):
        print(f"memory {state}: RSS {memory[0]:.0f} MiB, PSS {memory[1]:.0f} MiB")


def _deploy(site: scoring_site.Site, folders: Mapping[str, Path]) -> None:
    routes = {}
    for name, folder in folders.items():
        for way, max_batch in WAYS.items():
            instance = f"{name}-{way}"
            site.load(instance, folder, max_batch=max_batch)
            site.probe(instance)
            routes[instance] = [(instance, 0, True)]
    site.switch(routes)


def _request(name: str, way: str) -> oip.ModelInferRequest:
    x = _input(name)
    request = oip.ModelInferRequest(model_name=f"{name}-{way}", raw_input_contents=[x.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    return request


def _with_h2load(
    name: str, way: str, scoring: scoring_site.ScoringProcess, concurrency: int, seconds: float
) -> Row:
    request = _request(name, way)
    with grpc.insecure_channel(scoring.site.address) as channel:
        answer = InferenceStub(channel).model_infer(request, timeout=10)
    body = request.SerializeToString()
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "body", Path(folder) / "log"
        file.write_bytes(b"\0" + len(body).to_bytes(4, "big") + body)
        connections = min(concurrency, CONNECTIONS)
        before = _cpu_seconds(scoring.process.pid)
        run = subprocess.run(
            [
                *("h2load", "-c", str(connections), "-m", str(concurrency // connections)),
                *("-D", f"{seconds * 1000:.0f}ms", "--warm-up-time", "500ms", "-d", str(file)),
                *("-H", "content-type: application/grpc", "-H", "te: trailers"),
                f"--log-file={log}",
                f"http://{scoring.site.address}/inference.GRPCInferenceService/ModelInfer",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        cpu = _cpu_seconds(scoring.process.pid) - before
        lines = [line.split("\t") for line in log.read_text().splitlines()]
    times = sorted(int(line[2]) / 1e6 for line in lines)
    _check_bytes(run.stdout, answer.ByteSize(), len(times))
    # The warm-up's requests cost CPU time too.
    done = len(times) * (seconds + 0.5) / seconds
    return Row(
        name,
        f"gatelet gRPC {way}",
        concurrency,
        len(times) / seconds,
        statistics.median(times),
        times[int(len(times) * 0.99)],
        cpu / done,
    )


def _check_bytes(output: str, expected: int, count: int) -> None:
    """h2load takes an error for an answer; only the bytes tell."""
    found = re.search(r"traffic:.*\((\d+)\) data", output)
    data = int(found[1]) if found else 0
    if data < 0.9 * count * (expected + 5):
        raise SystemExit(f"{count} answers of {expected} bytes expected:\n{output}")


def _bare(name: str, folder: Path, seconds: float) -> Row:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(folder / "onnx/model.onnx"), settings, providers=["CPUExecutionProvider"]
    )
    x = _input(name)
    feed = {"x": x}
    for _ in range(200):
        session.run(["y"], feed)
    cpu = time.process_time()
    times = _timed(lambda: session.run(["y"], feed), seconds)
    cpu = time.process_time() - cpu
    return _row(name, "onnxruntime loop", 1, [times], cpu)


def _data_plane(name: str, way: str, folder: Path, concurrency: int, seconds: float) -> Row:
    """What an event loop's transport gets: requests submitted without a thread each, `concurrency`
    of them under way all the time. Times are spread over the threads that answer."""
    options = InstanceOptions(max_batch=WAYS[way])
    loaded = Loaded(folder, options, {"cpu": CpuBackend()}, name)
    loaded.probe()
    plane = DataPlane("bench")
    plane.switch([make_route(name, Target(loaded.instance, "1", 0))])
    request = InferenceRequest(name, (Tensor("x", "FP32", _input(name)),))
    times: list[float] = []
    finished = threading.Semaphore(0)
    clock = time.perf_counter
    end = clock() + seconds

    def ask() -> None:
        began = clock()

        def done(value: object) -> None:
            if isinstance(value, ScoringError):
                raise SystemExit(f"data plane: {value}")
            now = clock()
            times.append(now - began)
            if now < end:
                ask()
            else:
                finished.release()

        plane.submit(request, done)

    cpu = time.process_time()
    for _ in range(concurrency):
        ask()
    for _ in range(concurrency):
        finished.acquire()
    cpu = time.process_time() - cpu
    loaded.instance.close(1.0)
    times.sort()
    return Row(
        name,
        f"data plane {way}",
        concurrency,
        len(times) / seconds,
        statistics.median(times),
        times[int(len(times) * 0.99)],
        cpu / len(times),
    )


def _served(
    name: str, way: str, scoring: scoring_site.ScoringProcess, concurrency: int, seconds: float
) -> Row:
    context = multiprocessing.get_context("spawn")
    # Two processes at most: more would only take turns on a small machine.
    processes = min(2, concurrency)
    barrier = context.Barrier(processes + 1)
    results: Any = context.Queue()
    workers = [
        context.Process(
            target=_client,
            args=(
                name,
                way,
                scoring.site.address,
                concurrency // processes,
                seconds,
                barrier,
                results,
            ),
        )
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    before = _cpu_seconds(scoring.process.pid)
    times = [one for _ in workers for one in results.get()]
    cpu = _cpu_seconds(scoring.process.pid) - before
    for worker in workers:
        worker.join()
    return _row(name, f"gatelet gRPC {way}", concurrency, times, cpu)


def _client(
    name: str, way: str, address: str, threads: int, seconds: float, barrier: Any, results: Any
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    request = _request(name, way)
    with grpc.insecure_channel(address) as channel, ThreadPoolExecutor(threads) as pool:
        infer = InferenceStub(channel).model_infer
        for _ in range(100):
            infer(request)
        barrier.wait()
        runs = [pool.submit(_timed, lambda: infer(request), seconds) for _ in range(threads)]
        results.put([run.result() for run in runs])


def _input(name: str) -> np.ndarray:
    return np.random.default_rng(3).random(MODELS[name][1], np.float32)


def _timed(work: Any, seconds: float) -> list[float]:
    times = []
    clock = time.perf_counter
    now = clock()
    end = now + seconds
    while now < end:
        work()
        after = clock()
        times.append(after - now)
        now = after
    return times


def _row(
    name: str, what: str, concurrency: int, per_thread: Sequence[Sequence[float]], cpu: float
) -> Row:
    times = sorted(one for thread in per_thread for one in thread)
    rate = sum(len(thread) / sum(thread) for thread in per_thread)
    return Row(
        name,
        what,
        concurrency,
        rate,
        statistics.median(times),
        times[int(len(times) * 0.99)],
        cpu / len(times),
    )


def _print(rows: Sequence[Row]) -> None:
    print(
        f"{'model':<6} {'what':<22} {'c':>3} {'req/s':>9} {'p50 us':>8} {'p99 us':>8} "
        f"{'CPU us':>7} {'rate/bare':>9} {'p50/bare':>9} {'gain':>5}"
    )
    bare = {row.model: row for row in rows if row.what == "onnxruntime loop"}
    singly = {
        (row.model, row.what.removesuffix("singly"), row.concurrency): row
        for row in rows
        if row.what.endswith("singly")
    }
    for row in sorted(rows, key=lambda row: (row.model, row.what != "onnxruntime loop")):
        reference = bare[row.model]
        single = singly.get((row.model, row.what.removesuffix("together"), row.concurrency))
        gain = (
            f"{row.per_second / single.per_second:>5.2f}"
            if single is not None and row.what.endswith("together")
            else ""
        )
        print(
            f"{row.model:<6} {row.what:<22} {row.concurrency:>3} {row.per_second:>9.0f} "
            f"{row.p50 * 1e6:>8.0f} {row.p99 * 1e6:>8.0f} {row.cpu * 1e6:>7.0f} "
            f"{row.per_second / reference.per_second:>9.2f} {row.p50 / reference.p50:>9.1f} {gain}"
        )


def _cpu_seconds(pid: int) -> float:
    import psutil

    spent = psutil.Process(pid).cpu_times()
    return float(spent.user + spent.system)


def _memory(pid: int) -> tuple[float, float]:
    """RSS and PSS in MiB."""
    import psutil

    full = psutil.Process(pid).memory_full_info()
    return full.rss / 2**20, full.pss / 2**20


if __name__ == "__main__":
    sys.exit(main())
