"""One load on any server: h2load with requests that were encoded beforehand, and tritonclient."""

from __future__ import annotations

import json
import multiprocessing
import re
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from gatelet.protos import open_inference_pb2 as oip
from gatelet.protos.inference import InferenceStub

CONNECTIONS = 4
WARM_UP = 0.3


class CannotLoad(Exception):
    """The server does not answer this kind of request; the message says how."""


@dataclass(frozen=True)
class Load:
    """Answered requests a second, seconds of the median and the 99th percentile, CPU seconds of the
    server per request."""

    per_second: float
    p50: float
    p99: float
    cpu: float


def request_of(model: str, x: np.ndarray) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name=model, raw_input_contents=[x.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    return request


def h2load_grpc(
    address: str,
    request: oip.ModelInferRequest,
    concurrency: int,
    seconds: float,
    cpu: Callable[[], float],
) -> Load:
    with grpc.insecure_channel(address) as channel:
        answer = InferenceStub(channel).model_infer(request, timeout=10)
    body = request.SerializeToString()
    connections = min(concurrency, CONNECTIONS)
    return _h2load(
        f"http://{address}/inference.GRPCInferenceService/ModelInfer",
        b"\0" + len(body).to_bytes(4, "big") + body,
        ("-c", str(connections), "-m", str(concurrency // connections)),
        ("content-type: application/grpc", "te: trailers"),
        len(answer.SerializeToString()) + 5,
        seconds,
        cpu,
    )


def h2load_http(
    address: str,
    model: str,
    x: np.ndarray,
    concurrency: int,
    seconds: float,
    cpu: Callable[[], float],
) -> Load:
    """The binary tensor extension over HTTP/1.1, a connection for each caller."""
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "datatype": "FP32",
                    "shape": list(x.shape),
                    "parameters": {"binary_data_size": x.nbytes},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    body = head + x.tobytes()
    url = f"http://{address}/v2/models/{model}/infer"
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            size = len(answer.read())
    except OSError as error:
        raise CannotLoad(f"binary tensors over REST: {error}") from error
    return _h2load(
        url,
        body,
        ("--h1", "-c", str(concurrency), "-m", "1"),
        tuple(f"{name}: {value}" for name, value in headers.items()),
        size,
        seconds,
        cpu,
    )


def _h2load(
    url: str,
    body: bytes,
    callers: Sequence[str],
    headers: Sequence[str],
    size: int,
    seconds: float,
    cpu: Callable[[], float],
) -> Load:
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "body", Path(folder) / "log"
        file.write_bytes(body)
        before = cpu()
        run = subprocess.run(
            [
                *("h2load", *callers, "-D", f"{seconds * 1000:.0f}ms"),
                *("--warm-up-time", f"{WARM_UP * 1000:.0f}ms", "-d", str(file)),
                *(word for header in headers for word in ("-H", header)),
                *(f"--log-file={log}", url),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=60 + 5 * seconds,
        )
        spent = cpu() - before
        lines = [line.split("\t") for line in log.read_text().splitlines()]
    times = sorted(int(line[2]) / 1e6 for line in lines)
    _check_bytes(run.stdout, size, len(times))
    # The warm-up's requests cost CPU time too.
    done = len(times) * (seconds + WARM_UP) / seconds
    return Load(
        len(times) / seconds, statistics.median(times), times[int(len(times) * 0.99)], spent / done
    )


def _check_bytes(output: str, expected: int, count: int) -> None:
    """h2load takes an error for an answer; only the bytes tell."""
    found = re.search(r"traffic:.*\((\d+)\) data", output)
    data = int(found[1]) if found else 0
    if not count or data < 0.9 * count * expected:
        raise CannotLoad(f"{count} answers of {expected} bytes expected, found {data} bytes")


def tritonclient_grpc(
    address: str,
    model: str,
    x: np.ndarray,
    concurrency: int,
    seconds: float,
    cpu: Callable[[], float],
) -> Load:
    """Blocking clients, spread over two processes at most: more would only take turns."""
    context = multiprocessing.get_context("spawn")
    processes = min(2, concurrency)
    barrier = context.Barrier(processes + 1)
    results: Any = context.Queue()
    workers = [
        context.Process(
            target=_triton_process,
            args=(address, model, x, concurrency // processes, seconds, barrier, results),
        )
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    barrier.wait(60)
    before = cpu()
    times = sorted(one for _ in workers for one in results.get(timeout=60 + 5 * seconds))
    spent = cpu() - before
    for worker in workers:
        worker.join()
    return Load(
        len(times) / seconds,
        statistics.median(times),
        times[int(len(times) * 0.99)],
        spent / len(times),
    )


def _triton_process(
    address: str,
    model: str,
    x: np.ndarray,
    threads: int,
    seconds: float,
    barrier: Any,
    results: Any,
) -> None:
    import tritonclient.grpc as triton

    tensor = triton.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)

    def ask(_: int) -> list[float]:
        with triton.InferenceServerClient(address) as client:
            for _ in range(20):
                client.infer(model, [tensor])
            barrier_once()
            times = []
            now = time.perf_counter()
            end = now + seconds
            while now < end:
                client.infer(model, [tensor])
                after = time.perf_counter()
                times.append(after - now)
                now = after
            return times

    started: list[int] = []

    def barrier_once() -> None:
        started.append(1)
        if len(started) == threads:
            barrier.wait(60)

    with ThreadPoolExecutor(threads) as pool:
        results.put([one for times in pool.map(ask, range(threads)) for one in times])
