"""Scoring servers beside each other: `python tests/bench/bench_scoring.py`.

Prints requests/s, p50, p99 and the server's CPU time per request at several concurrencies, under
one and the same load, for a bare onnxruntime loop, our data plane without a protocol, our server
(gRPC over its own HTTP/2 and over grpcio, and REST, requests run singly and together), the least
server that grpcio's library allows, and MLServer and KServe. These two are installed into
environments of their own when they are first measured (~/.cache/gatelet-bench), and left out, with
the reason, where that fails. Then start times and memory.

The load is nghttp2's h2load with a request encoded beforehand, since a Python client costs as much
as a server, and tritonclient as users have it. `--short` takes some four minutes instead of a
quarter of an hour. Client and server share the machine's cores, so compare rows of one run with
each other, not runs with each other.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gatelet.accelerators.cpu import CpuBackend
from gatelet.agent.scoring.dataplane import DataPlane
from gatelet.agent.scoring.errors import ScoringError
from gatelet.agent.scoring.loading import InstanceOptions, Loaded
from gatelet.agent.scoring.routing import Target, make_route
from gatelet.agent.scoring.types import InferenceRequest, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

import onnx_models
import scoring_servers
from scoring_load import CannotLoad, Load, h2load_grpc, h2load_http, request_of, tritonclient_grpc
from scoring_servers import SERVERS, NotAvailable, Running

MAX_BATCH = 32
# What people know each model as -> how it is made, and the shape of one item.
MODELS: dict[str, tuple[Callable[[], bytes], tuple[int, ...]]] = {
    "mlp": (onnx_models.mlp, (1, 64)),
    "cnn": (onnx_models.cnn, (1, 1, 28, 28)),
    "mobilenet": (onnx_models.mobilenet, (1, 3, 96, 96)),
}
BARE = "onnxruntime loop"


@dataclass(frozen=True)
class Row:
    model: str
    what: str
    concurrency: int
    load: Load


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--servers", nargs="+", choices=sorted(SERVERS), default=list(SERVERS))
    parser.add_argument(
        "--clients",
        nargs="+",
        choices=("h2load", "tritonclient"),
        default=["h2load", "tritonclient"],
    )
    parser.add_argument(
        "--short", action="store_true", help="0.8 s per measurement, and h2load only"
    )
    options = parser.parse_args()
    if options.short:
        options.seconds, options.clients = 0.8, ["h2load"]
    if "h2load" in options.clients and shutil.which("h2load") is None:
        print("h2load is not installed (Debian: nghttp2-client): only tritonclient's rows follow")
        options.clients.remove("h2load")
    with tempfile.TemporaryDirectory() as folder:
        _run(Path(folder), options)
    return 0


def _run(folder: Path, options: argparse.Namespace) -> None:
    folders = {}
    for name in options.models:
        build, shape = MODELS[name]
        folders[name] = onnx_models.write_folder(
            folder / "models" / name,
            build(),
            [("x", "FP32", (-1, *shape[1:]))],
            [("y", "FP32", (-1, 10))],
            name=name,
            batching={"max": MAX_BATCH},
        )
    rows = [Row(name, BARE, 1, _bare(name, folders[name], options.seconds)) for name in folders]
    if "gatelet" in options.servers:
        rows += [
            Row(name, f"data plane {way}", c, _data_plane(name, most, folders[name], c, options))
            for name in folders
            for c in options.concurrency
            for way, most in (("singly", 1), ("together", MAX_BATCH))
        ]
    notes = []
    for server in options.servers:
        work = folder / server
        work.mkdir()
        checks = {name: request_of(name, _input(name)) for name in folders}
        try:
            with SERVERS[server](work, folders, checks) as running:
                empty = running.memory()
                for row, refused in _measured(server, running, options):
                    if row is None:
                        notes.append(refused)
                        continue
                    rows.append(row)
                    print(f"{row.model} {row.what} {row.concurrency}", file=sys.stderr, flush=True)
                full = running.memory()
        except NotAvailable as error:
            notes.append(f"{server}: left out: {error}")
            continue
        notes.append(
            f"{server}: answers with {len(folders)} models after {running.started:.2f} s; memory "
            f"RSS {empty[0]:.0f} PSS {empty[1]:.0f} MiB, after the runs RSS {full[0]:.0f} "
            f"PSS {full[1]:.0f} MiB"
        )
    _print(rows)
    print("\n" + "\n".join(notes))


def _measured(
    server: str, running: Running, options: argparse.Namespace
) -> Iterator[tuple[Row | None, str]]:
    """Rows, or why a kind of request is left out from then on."""
    left_out: set[str] = set()
    for name in options.models:
        for concurrency in options.concurrency:
            for way, pattern in running.ways.items():
                loads = _loads(running, pattern.format(name), name, way, concurrency, options)
                for kind, load in loads:
                    if kind in left_out:
                        continue
                    transport, _, client = kind.partition(" ")
                    what = f"{server} {transport}{f' {way}' if way else ''}"
                    try:
                        row = Row(
                            name, f"{what}, {client}" if client else what, concurrency, load()
                        )
                    except CannotLoad as error:
                        left_out.add(kind)
                        yield None, f"{server} {kind}: left out: {error}"
                    else:
                        yield row, ""


def _loads(
    running: Running,
    model: str,
    name: str,
    way: str,
    concurrency: int,
    options: argparse.Namespace,
) -> Iterator[tuple[str, Callable[[], Load]]]:
    x, address, http = _input(name), running.grpc_address, running.http_address
    arguments = (concurrency, options.seconds, running.cpu_seconds)
    if "h2load" in options.clients:
        yield "gRPC", lambda: h2load_grpc(address, request_of(model, x), *arguments)
        if http:
            yield "REST", lambda: h2load_http(http, model, x, *arguments)
    if "tritonclient" in options.clients and way in ("", "together"):
        yield "gRPC tritonclient", lambda: tritonclient_grpc(address, model, x, *arguments)


def _bare(name: str, folder: Path, seconds: float) -> Load:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(scoring_servers.onnx_file(folder)), settings, providers=["CPUExecutionProvider"]
    )
    feed = {"x": _input(name)}
    for _ in range(50):
        session.run(["y"], feed)
    cpu = time.process_time()
    times = _timed(lambda: session.run(["y"], feed), seconds)
    return _load(times, seconds, time.process_time() - cpu)


def _data_plane(
    name: str, most: int, folder: Path, concurrency: int, options: argparse.Namespace
) -> Load:
    """What an event loop's transport gets: requests submitted without a thread each, `concurrency`
    of them under way all the time. Times are spread over the threads that answer."""
    backends = {"cpu": CpuBackend()}
    loaded = Loaded(folder, InstanceOptions(max_batch=most), backends, name)
    loaded.probe()
    plane = DataPlane("bench")
    plane.switch([make_route(name, Target(loaded.instance, "1", 0))])
    request = InferenceRequest(name, (Tensor("x", "FP32", _input(name)),))
    times: list[float] = []
    finished = threading.Semaphore(0)
    clock = time.perf_counter
    end = clock() + options.seconds

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
    return _load(times, options.seconds, cpu)


def _load(times: Sequence[float], seconds: float, cpu: float) -> Load:
    ordered = sorted(times)
    return Load(
        len(ordered) / seconds,
        statistics.median(ordered),
        ordered[int(len(ordered) * 0.99)],
        cpu / len(ordered),
    )


def _input(name: str) -> np.ndarray:
    return np.random.default_rng(3).random(MODELS[name][1], np.float32)


def _timed(work: Callable[[], Any], seconds: float) -> list[float]:
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


def _print(rows: Sequence[Row]) -> None:
    print(
        f"{'model':<10} {'what':<38} {'c':>3} {'req/s':>9} {'p50 us':>8} {'p99 us':>8} "
        f"{'CPU us':>7} {'of bare':>7} {'gain':>5}"
    )
    bare = {row.model: row.load for row in rows if row.what == BARE}
    singly = {
        (row.model, row.what.replace(" singly", ""), row.concurrency): row.load
        for row in rows
        if " singly" in row.what
    }
    order = {name: number for number, name in enumerate(MODELS)}
    for row in sorted(rows, key=lambda row: (order[row.model], row.what != BARE, row.concurrency)):
        load = row.load
        print(
            f"{row.model:<10} {row.what:<38} {row.concurrency:>3} {load.per_second:>9.0f} "
            f"{load.p50 * 1e6:>8.0f} {load.p99 * 1e6:>8.0f} {load.cpu * 1e6:>7.0f} "
            f"{load.per_second / bare[row.model].per_second:>7.2f} {_gain(row, singly)}"
        )


def _gain(row: Row, singly: Mapping[tuple[str, str, int], Load]) -> str:
    """Of running requests together."""
    single = singly.get((row.model, row.what.replace(" together", ""), row.concurrency))
    if single is None or " together" not in row.what:
        return ""
    return f"{row.load.per_second / single.per_second:>5.2f}"


if __name__ == "__main__":
    sys.exit(main())
