"""The servers that the scoring bench compares, each started on free ports with the same models."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc
import psutil
import scoring_site
from gatelet.protos import open_inference_pb2 as oip
from gatelet.protos.inference import InferenceStub

PEERS = Path(__file__).resolve().parent / "peers"
VENVS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gatelet-bench"
START_SECONDS = 60.0
INSTALL_SECONDS = 900.0


class NotAvailable(Exception):
    """This server cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Running:
    """A server that answers. `ways`: how it was told to run a model -> that model's name there,
    with `{}` for the model; `started`: seconds until all models answered."""

    grpc_address: str
    http_address: str
    pid: int
    started: float
    ways: Mapping[str, str] = field(default_factory=lambda: {"": "{}"})

    def cpu_seconds(self) -> float:
        """Of all its processes."""
        return sum(t.user + t.system for t in (p.cpu_times() for p in self._processes()))

    def memory(self) -> tuple[float, float]:
        """RSS and PSS in MiB."""
        full = [p.memory_full_info() for p in self._processes()]
        return sum(one.rss for one in full) / 2**20, sum(one.pss for one in full) / 2**20

    def _processes(self) -> list[psutil.Process]:
        top = psutil.Process(self.pid)
        return [top, *top.children(recursive=True)]


# (folder for its files, model name -> folder with model.json, requests to check it with)
Start = Callable[[Path, Mapping[str, Path], Mapping[str, oip.ModelInferRequest]], object]


def onnx_file(folder: Path) -> Path:
    return folder / "onnx" / "model.onnx"


@contextmanager
def gatelet(
    work: Path,
    models: Mapping[str, Path],
    checks: Mapping[str, oip.ModelInferRequest],
    transport: str = "http2",
) -> Iterator[Running]:
    """The scoring process, with each model once run singly and once together."""
    ways = {"singly": 1, "together": 32}
    began = time.perf_counter()
    http = free_port()
    arguments = (
        *("--http-address", f"127.0.0.1:{http}", "--metrics-address", ""),
        *("--grpc-transport", transport),
    )
    with scoring_site.scoring_process(work / "s", *arguments) as scoring:
        routes = {}
        for name, folder in models.items():
            for way, most in ways.items():
                instance = f"{name}-{way}"
                scoring.site.load(instance, folder, max_batch=most)
                scoring.site.probe(instance)
                routes[instance] = [(instance, 0, True)]
        scoring.site.switch(routes)
        yield Running(
            scoring.site.address,
            f"127.0.0.1:{http}",
            scoring.process.pid,
            time.perf_counter() - began,
            {way: f"{{}}-{way}" for way in ways},
        )
        scoring.terminate()


@contextmanager
def minimal(
    work: Path, models: Mapping[str, Path], checks: Mapping[str, oip.ModelInferRequest]
) -> Iterator[Running]:
    """grpcio's synchronous server with nothing around it."""
    port = free_port()
    command = [
        *(sys.executable, str(PEERS / "minimal_grpcio.py"), str(port)),
        *(f"{name}={onnx_file(folder)}" for name, folder in models.items()),
    ]
    with _running(command, work, port, 0, checks) as running:
        yield running


@contextmanager
def mlserver(
    work: Path, models: Mapping[str, Path], checks: Mapping[str, oip.ModelInferRequest]
) -> Iterator[Running]:
    """MLServer without worker processes, which are slower for models as small as these."""
    python = _environment("mlserver", "mlserver", "onnxruntime")
    grpc_port, http_port = free_port(), free_port()
    settings = {
        "host": "127.0.0.1",
        "grpc_port": grpc_port,
        "http_port": http_port,
        "metrics_endpoint": None,
        "parallel_workers": 0,
        "debug": False,
    }
    (work / "settings.json").write_text(json.dumps(settings))
    for name, folder in models.items():
        (work / name).mkdir()
        (work / name / "model-settings.json").write_text(
            json.dumps(
                {
                    "name": name,
                    "implementation": "mlserver_onnx.OnnxModel",
                    "parameters": {"uri": str(onnx_file(folder))},
                }
            )
        )
    command = [str(python.with_name("mlserver")), "start", str(work)]
    with _running(command, work, grpc_port, http_port, checks, PYTHONPATH=str(PEERS)) as running:
        yield running


@contextmanager
def kserve(
    work: Path, models: Mapping[str, Path], checks: Mapping[str, oip.ModelInferRequest]
) -> Iterator[Running]:
    python = _environment("kserve", "kserve", "onnxruntime")
    grpc_port, http_port = free_port(), free_port()
    command = [
        *(str(python), str(PEERS / "kserve_onnx.py"), str(grpc_port), str(http_port)),
        *(f"{name}={onnx_file(folder)}" for name, folder in models.items()),
    ]
    with _running(command, work, grpc_port, http_port, checks) as running:
        yield running


SERVERS = {
    "gatelet": gatelet,
    "gatelet-grpcio": partial(gatelet, transport="grpcio"),
    "grpcio": minimal,
    "mlserver": mlserver,
    "kserve": kserve,
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(name: str, *packages: str) -> Path:
    """The Python of a virtual environment with these packages, made when it is first needed."""
    folder = VENVS / name
    python = folder / "bin" / "python"
    if (folder / "complete").exists():
        return python
    print(f"installing {', '.join(packages)} into {folder} ...", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        venv.create(folder, with_pip=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "--prefer-binary", *packages],
            check=True,
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
        raise NotAvailable(f"it cannot be installed: {lines[-1] if lines else error}") from error
    (folder / "complete").touch()
    return python


@contextmanager
def _running(
    command: list[str],
    work: Path,
    grpc_port: int,
    http_port: int,
    checks: Mapping[str, oip.ModelInferRequest],
    **environment: str,
) -> Iterator[Running]:
    began = time.perf_counter()
    log = work / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=work,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
        )
    try:
        address = f"127.0.0.1:{grpc_port}"
        _until_answered(address, checks, process, log)
        http = f"127.0.0.1:{http_port}" if http_port else ""
        yield Running(address, http, process.pid, time.perf_counter() - began)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until_answered(
    address: str,
    checks: Mapping[str, oip.ModelInferRequest],
    process: subprocess.Popen[bytes],
    log: Path,
) -> None:
    end = time.monotonic() + START_SECONDS
    reason = "nothing answered"
    while time.monotonic() < end and process.poll() is None:
        try:
            with grpc.insecure_channel(address) as channel:
                for request in checks.values():
                    InferenceStub(channel).model_infer(request, timeout=5)
            return
        except grpc.RpcError as error:
            reason = f"{error.code().name}: {error.details()}"  # type: ignore[attr-defined]
            time.sleep(0.05)
    tail = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise NotAvailable(f"it did not start ({reason}): {' '.join(tail)[:200]}")
