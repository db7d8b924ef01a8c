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
from dataclasses import fields
from pathlib import Path

import grpc

from ...accelerators.backend import Backend
from ...accelerators.cpu import cpu_backend
from ...accelerators.notify import Notifier
from ...accelerators.numpy_backend import NumpyBackend
from ...accelerators.parent import die_with_parent
from ...protos.services import SCORING, handlers
from ..version import VERSION
from .control_service import ControlService
from .dataplane import DataPlane
from .fabric_metrics import FabricMetrics
from .grpc_server import AddressUnavailable
from .residency import BudgetedBackend, Residency
from .settings import ScoringSettings
from .transports import Transports

log = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0
# Loads and draining unloads each hold one; a status call must still get through.
_CONTROL_THREADS = 8
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# The size of sockaddr_un.sun_path, with its terminating zero.
_MAX_SOCKET_PATH = 107


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
    plane = DataPlane(VERSION)
    with ExitStack() as unused:
        fabric = fabric_of(backends)
        transports = Transports(plane, settings, metrics=() if fabric is None else (fabric,))
        unused.callback(transports.stop, 0.0)
        service = ControlService(
            plane,
            backends,
            grpc_address=transports.grpc_address,
            http_address=transports.http_address,
            metrics_address=transports.metrics_address,
            fabric=bytes if fabric is None else fabric.document,
            isolation=Path(f"{settings.control_socket}.d").absolute(),
        )
        control = ControlServer(service, Path(settings.control_socket))
        unused.pop_all()
    transports.start()
    control.start()
    log.info(
        "scoring ready: grpc %s, http %s, metrics %s, control %s, backends %s",
        transports.grpc_address or "off",
        transports.http_address or "off",
        transports.metrics_address or "off",
        settings.control_socket,
        ", ".join(backends),
    )
    ending = threading.Event()
    # Not on this thread: a hanging accelerator must not keep a signal waiting.
    threading.Thread(target=_retry, args=(service, ending), name="retry", daemon=True).start()
    notifier = Notifier.from_environment()
    if notifier.interval is not None:
        # The signals stay waited for without a pause: between two waits, a thread of some library
        # that does not block them would end the process.
        signs = (notifier, notifier.interval, ending)
        threading.Thread(target=_beat, args=signs, name="signs", daemon=True).start()
    notifier.ready()
    received = signal.sigwait(_SIGNALS)
    notifier.stopping()
    log.info("%s: draining", signal.Signals(received).name)
    ending.set()
    plane.stop()
    transports.stop(settings.drain_seconds)
    control.stop()
    service.close()
    log.info("scoring ended")
    return 0


def _beat(notifier: Notifier, interval: float, ending: threading.Event) -> None:
    while not ending.wait(interval):
        notifier.alive()


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
    here: list[Backend] = [cpu_backend(settings.threads), NumpyBackend()]
    if settings.memory_budget_mb:
        # Of the fabric process's memory this one knows nothing.
        residency = Residency(settings.memory_budget_mb * 2**20)
        here = [BudgetedBackend(backend, residency) for backend in here]
    backends.update((backend.name, backend) for backend in here)
    return backends


def fabric_of(backends: Mapping[str, Backend]) -> FabricMetrics | None:
    """What there is to tell of the fabric process; None without an FPGA."""
    fpga = backends.get("fpga")
    status = getattr(fpga, "fabric_status", None)
    return None if status is None else FabricMetrics(status)


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
    for name in ("http", "metrics"):
        parser.add_argument(
            f"--{name}-address",
            default=defaults[f"{name}_address"],
            help="as --grpc-address; an empty one turns it off (default: %(default)s)",
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
        "--grpc-transport",
        choices=("grpcio", "http2"),
        default=defaults["grpc_transport"],
        help="what speaks gRPC: grpcio's library or this package (default: %(default)s)",
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
        "--memory-budget-mb",
        type=int,
        default=0,
        metavar="MIB",
        help="memory of all models before the one longest unused leaves; 0: no limit",
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
