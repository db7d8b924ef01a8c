"""The scoring process's parts, put together inside a test, and the process itself."""

from __future__ import annotations

import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from gatelet.accelerators.backend import Backend
from gatelet.accelerators.cpu import CpuBackend
from gatelet.agent.scoring.control_service import ControlService
from gatelet.agent.scoring.dataplane import DataPlane
from gatelet.agent.scoring.grpc_server import GrpcLimits
from gatelet.agent.scoring.http_types import HttpLimits
from gatelet.agent.scoring.instances import Instance
from gatelet.agent.scoring.process import ControlServer
from gatelet.agent.scoring.settings import ScoringSettings
from gatelet.agent.scoring.transports import Transports
from gatelet.protos import control_pb2 as pb
from gatelet.protos.services import ScoringStub

TIMEOUT = 20.0
TRANSPORTS = ("http2", "grpcio")
"""What gRPC may be spoken by."""


@dataclass(frozen=True)
class Site:
    """A scoring server, gRPC at `address`, controlled through `control`."""

    address: str
    control: ScoringStub
    server: Transports | None = None
    plane: DataPlane | None = None
    http: str = ""
    metrics: str = ""

    def server_instance(self, endpoint: str) -> Instance:
        """What answers at `endpoint`, of a server in this process."""
        assert self.plane is not None
        return self.plane.table.routes[endpoint].default.instance

    def load(self, instance: str, folder: Path, **options: object) -> pb.InstanceStatus:
        request = pb.LoadRequest(
            instance=instance,
            directory=str(folder),
            options=pb.ScoringOptions(**options),  # type: ignore[arg-type]
        )
        return self.control.load(request, TIMEOUT).status

    def probe(self, instance: str) -> pb.InstanceStatus:
        return self.control.probe(pb.ProbeRequest(instance=instance), TIMEOUT).status

    def switch(self, routes: Mapping[str, Sequence[tuple[str, int, bool]]]) -> None:
        """`routes`: endpoint -> (instance, percent, default)."""
        self.control.switch(
            pb.SwitchRequest(
                routes=[
                    pb.Route(
                        endpoint=endpoint,
                        targets=[
                            pb.RouteTarget(instance=i, percent=p, default=d) for i, p, d in targets
                        ],
                    )
                    for endpoint, targets in routes.items()
                ]
            ),
            TIMEOUT,
        )

    def unload(self, instance: str, drain_ms: int = 5000) -> None:
        self.control.unload(pb.UnloadRequest(instance=instance, drain_ms=drain_ms), TIMEOUT)

    def status(self) -> pb.StatusResponse:
        return self.control.status(pb.StatusRequest(), TIMEOUT)

    def deploy(self, folders: Mapping[str, Path]) -> None:
        """Serve each folder at the endpoint that is its key."""
        for endpoint, folder in folders.items():
            self.load(endpoint, folder)
            status = self.probe(endpoint)
            assert status.state == pb.InstanceStatus.READY, status.error
        self.switch({endpoint: [(endpoint, 0, True)] for endpoint in folders})


@contextmanager
def serve(
    socket: Path,
    backends: Sequence[Backend] | None = None,
    *,
    limits: GrpcLimits | None = None,
    http_limits: HttpLimits | None = None,
    address: str = "127.0.0.1:0",
    http_address: str = "127.0.0.1:0",
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Site]:
    """The server in this process, on free ports."""
    plane = DataPlane("test")
    by_name = {backend.name: backend for backend in backends or [CpuBackend()]}
    chosen = {
        "control_socket": str(socket),
        "grpc_address": address,
        "http_address": http_address,
        "metrics_address": "127.0.0.1:0",
        **(settings or {}),
    }
    server = Transports(
        plane, ScoringSettings(**chosen), grpc_limits=limits, http_limits=http_limits
    )
    addresses = (server.grpc_address, server.http_address, server.metrics_address)
    service = ControlService(
        plane,
        by_name,
        grpc_address=addresses[0],
        http_address=addresses[1],
        metrics_address=addresses[2],
    )
    control = ControlServer(service, socket)
    server.start()
    control.start()
    try:
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            yield Site(addresses[0], ScoringStub(channel), server, plane, *addresses[1:])
    finally:
        server.stop(2.0)
        control.stop()
        service.close()


@dataclass
class ScoringProcess:
    process: subprocess.Popen[str]
    site: Site

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT)


@contextmanager
def scoring_process(
    socket: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> Iterator[ScoringProcess]:
    """`python -m gatelet.agent.scoring.process` on a free port, once it says that it is ready.

    `env`: the whole environment, None for this process's."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "gatelet.agent.scoring.process"),
            *("--control-socket", str(socket), "--grpc-address", "127.0.0.1:0"),
            *("--http-address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0"),
            *("--die-with-parent", *arguments),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env=None if env is None else dict(env),
    )
    try:
        line = _line_with(process, "scoring ready")
        address, http, metrics = (
            line.split(f" {name} ", 1)[1].split(",", 1)[0] for name in ("grpc", "http", "metrics")
        )
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            site = Site(address, ScoringStub(channel), http=http, metrics=metrics)
            yield ScoringProcess(process, site)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def gone(process: psutil.Process) -> bool:
    """Whether it ended; its parent may not have looked yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        # Between the two looks.
        return True


def _line_with(process: subprocess.Popen[str], text: str) -> str:
    assert process.stderr is not None
    seen = ""
    deadline = time.monotonic() + TIMEOUT
    with selectors.DefaultSelector() as selector:
        selector.register(process.stderr, selectors.EVENT_READ)
        while selector.select(deadline - time.monotonic()):
            line = process.stderr.readline()
            seen += line
            if text in line:
                return line
            if not line:
                break
    raise AssertionError(f"the scoring process did not say {text!r}: {seen}")
