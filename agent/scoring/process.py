"""The scoring process: puts backends, data plane, transports and control service together."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import grpc

from ...accelerators.backend import Backend
from ...accelerators.cpu import CpuBackend
from ...accelerators.parent import die_with_parent
from ...protos.services import SCORING, handlers
from .control_service import ControlService
from .dataplane import DataPlane
from .grpc_server import AddressUnavailable, GrpcLimits, GrpcServer

log = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0
# Loads and draining unloads each hold one; a status call must still get through.
_CONTROL_THREADS = 8
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# The size of sockaddr_un.sun_path, with its terminating zero.
_MAX_SOCKET_PATH = 107


@dataclass(frozen=True, slots=True)
class ScoringSettings:
    """`grpc_address`: host:port or unix:path. `fabric_socket` None: no FPGA; `board` and `part` say
    which one it is. `threads`: intra-op threads of a model, `grpc_threads`: calls answered at once,
    each 0 for what fits the cores. `drain_seconds`: for running requests when told to end."""

    control_socket: str
    grpc_address: str = "127.0.0.1:8001"
    fabric_socket: str | None = None
    board: str | None = None
    part: str | None = None
    threads: int = 0
    grpc_threads: int = 0
    max_message_bytes: int = 64 * 1024 * 1024
    drain_seconds: float = 10.0


class ControlServer:
    """The control service on a Unix socket that only this user can connect to."""

    def __init__(self, service: ControlService, path: Path) -> None:
        """Raises AddressUnavailable."""
        _make_room(path)
        self._path = path
        self._pool = ThreadPoolExecutor(_CONTROL_THREADS, thread_name_prefix="control")
        self._server = grpc.server(self._pool)
        self._server.add_generic_rpc_handlers((handlers(SCORING, service),))
        before = os.umask(0o177)
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            self._pool.shutdown()
            raise AddressUnavailable(f"cannot listen on {path}: {error}") from None
        finally:
            os.umask(before)
        path.chmod(0o600)

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        self._server.stop(1.0).wait()
        self._pool.shutdown()
        self._path.unlink(missing_ok=True)


def run_scoring(settings: ScoringSettings) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the exit code. Main thread only."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # Waited for below instead of handled: a handler could interrupt a thread that holds a lock.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        return _serve(settings)
    except AddressUnavailable as error:
        print(f"gatelet scoring: {error}", file=sys.stderr)
        return 1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(settings: ScoringSettings) -> int:
    with ExitStack() as cleanup:
        return _serve_with(settings, make_backends(settings, cleanup))


def _serve_with(settings: ScoringSettings, backends: Mapping[str, Backend]) -> int:
    plane = DataPlane(_version())
    limits = GrpcLimits(threads=settings.grpc_threads, max_message_bytes=settings.max_message_bytes)
    server = GrpcServer(plane, settings.grpc_address, limits)
    service = ControlService(plane, backends, grpc_address=server.address)
    try:
        control = ControlServer(service, Path(settings.control_socket))
    except AddressUnavailable:
        server.stop(0)
        raise
    server.start()
    control.start()
    log.info(
        "scoring ready: grpc %s, control %s, backends %s",
        server.address,
        settings.control_socket,
        ", ".join(backends),
    )
    ending = threading.Event()
    # Not on this thread: a hanging accelerator must not keep a signal waiting.
    threading.Thread(target=_retry, args=(service, ending), name="retry", daemon=True).start()
    received = signal.sigwait(_SIGNALS)
    log.info("%s: draining", signal.Signals(received).name)
    ending.set()
    plane.stop()
    server.stop(settings.drain_seconds)
    control.stop()
    service.close()
    log.info("scoring ended")
    return 0


def _retry(service: ControlService, ending: threading.Event) -> None:
    while not ending.wait(_RETRY_SECONDS):
        service.retry_missing()


def make_backends(settings: ScoringSettings, cleanup: ExitStack) -> Mapping[str, Backend]:
    """The backends of this device by name, in the order they are preferred."""
    backends: dict[str, Backend] = {}
    if settings.fabric_socket is not None:
        from ...accelerators.fpga.backend import FpgaBackend

        fpga = FpgaBackend(settings.fabric_socket, settings.board, settings.part)
        cleanup.callback(fpga.close)
        backends[fpga.name] = fpga
    cpu = CpuBackend(settings.threads)
    backends[cpu.name] = cpu
    return backends


def _make_room(path: Path) -> None:
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise AddressUnavailable(
            f"{path} is too long for a Unix socket (at most {_MAX_SOCKET_PATH} bytes); "
            "set a shorter run directory"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AddressUnavailable(f"cannot create {path.parent}: {error.strerror}") from None
    # grpc would take the path from a living server without asking.
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return
    raise AddressUnavailable(f"another scoring process listens on {path}; end it first")


def _version() -> str:
    try:
        return version("gatelet")
    except PackageNotFoundError:
        return "unknown"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gatelet.agent.scoring.process",
        description="Serve models over the Open Inference Protocol, under the agent's control.",
    )
    defaults = {field.name: field.default for field in fields(ScoringSettings)}
    parser.add_argument("--control-socket", required=True, help="Unix socket for the agent")
    parser.add_argument(
        "--grpc-address",
        default=defaults["grpc_address"],
        help="host:port or unix:path for clients; port 0 takes a free one (default: %(default)s)",
    )
    parser.add_argument("--fabric-socket", help="Unix socket of the fabric process")
    parser.add_argument("--board", help="FPGA board, such as pynq-z2")
    parser.add_argument("--part", help="FPGA part, such as xc7z020clg400-1")
    for name, help_text in (
        ("threads", "threads per model run"),
        ("grpc_threads", "calls answered at once"),
    ):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=0, help=f"{help_text}; 0: automatic"
        )
    parser.add_argument(
        "--max-message-bytes",
        type=int,
        default=defaults["max_message_bytes"],
        help="largest request and answer (default: %(default)s)",
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=defaults["drain_seconds"],
        help="for running requests when told to end (default: %(default)s)",
    )
    parser.add_argument(
        "--die-with-parent", action="store_true", help="end when the starting process dies"
    )
    options = vars(parser.parse_args(arguments))
    if options.pop("die_with_parent"):
        die_with_parent()
    return run_scoring(ScoringSettings(**options))


if __name__ == "__main__":
    sys.exit(main())
