"""A model in a process of its own: what it does to that process, it does to nobody else.

The process is the scoring process itself, with this one model and without any address but two Unix
sockets. It is started again whenever it ends.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc

from ...accelerators.backend import Backend, LoadOptions, Remarked, Variant
from ...accelerators.errors import BackendUnavailable, LoadError
from ...accelerators.tensors import Array, TensorSpec
from ...modules.errors import ImageError
from ...modules.model_json import load_model
from ...protos import control_pb2 as pb
from ...protos.services import ScoringStub
from ..endings import ending
from .errors import InstanceRefused, InstanceUnavailable
from .remote import RemoteSession, Served

log = logging.getLogger(__name__)

START_SECONDS = 60.0
LOAD_SECONDS = 300.0
_LOOK_SECONDS = 0.02
_END_SECONDS = 5.0
# The connections of a process end a little before it does, on a busy machine more than a little.
_DYING_SECONDS = 2.0
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 30.0
# A process that lived so long did not die of being started.
_STEADY_SECONDS = 60.0
_INSTANCE = "model"
_IN_PROCESS = ("cpu", "numpy")
# They belong to the process that systemd knows.
_NOT_INHERITED = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")


class IsolatedBackend:
    """A backend whose sessions each compute in a process of their own."""

    def __init__(self, backend: Backend, folder: Path) -> None:
        """`folder` is for the processes' sockets."""
        self._backend = backend
        self._folder = folder
        self._numbers = itertools.count(1)
        self.name = backend.name
        self.note = backend.note if isinstance(backend, Remarked) else ""

    def accepts(self, variant: Variant) -> str | None:
        return self._backend.accepts(variant)

    def load(self, directory: Path, variant: Variant, options: LoadOptions) -> IsolatedSession:
        """Raises LoadError and BackendUnavailable."""
        folder = self._folder / f"{self.name}{next(self._numbers)}"
        try:
            model = load_model(directory).name
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (OSError, ImageError) as error:
            raise LoadError(str(error)) from error
        return IsolatedSession(self.name, model, directory, options.threads, folder)


class IsolatedSession:
    """`Session` of a model in a process of its own."""

    def __init__(
        self, backend: str, model: str, directory: Path, threads: int, folder: Path
    ) -> None:
        """Raises LoadError for a model that the process refuses or dies of, and
        BackendUnavailable."""
        self.backend = backend
        self._model = model
        self._directory = directory
        self._threads = threads
        self._folder = folder
        self._closing = threading.Event()
        self._up = False
        self._process: subprocess.Popen[bytes] | None = None
        started: queue.SimpleQueue[LoadError | BackendUnavailable | None] = queue.SimpleQueue()
        # The kernel ends the process with the thread that started it, so one thread starts all.
        self._keeper = threading.Thread(
            target=self._keep, args=(started,), name=f"process of {model}", daemon=True
        )
        self._keeper.start()
        failure = started.get()
        if failure is not None:
            self.close()
            raise failure
        try:
            self._remote = RemoteSession(Served(folder / "g", model), model)
        except InstanceRefused as error:
            self.close()
            raise LoadError(str(error)) from error
        except InstanceUnavailable as error:
            self.close()
            raise BackendUnavailable(str(error)) from error
        self._remote.watch()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._remote.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._remote.outputs

    @property
    def healthy(self) -> bool:
        return self._up and self._remote.healthy

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> dict[str, Array]:
        """As `Session.run`. Raises BackendUnavailable when the process died over it, and until
        another one has loaded the model."""
        if not self._up:
            raise BackendUnavailable(f"the process of model {self._model!r} is being started")
        return self._remote.run(inputs, outputs, deadline)

    def close(self) -> None:
        """Also ends the process, and with it calls that are under way."""
        self._closing.set()
        self._up = False
        remote = getattr(self, "_remote", None)
        if remote is not None:
            remote.close()
        self._end(self._process)
        self._keeper.join(_END_SECONDS + 1)
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- the thread that keeps the process

    def _keep(self, started: queue.SimpleQueue[LoadError | BackendUnavailable | None]) -> None:
        pause, first = _FIRST_PAUSE, True
        while not self._closing.is_set():
            began = time.monotonic()
            try:
                self._start()
            except (LoadError, BackendUnavailable) as error:
                self._end(self._process)
                if first:
                    started.put(error)
                    return
                log.error("model %s: %s", self._model, error)
            else:
                self._up = True
                if first:
                    started.put(None)
                    first = False
                assert self._process is not None
                if self._closing.is_set():
                    # Begun while `close` ended the one before.
                    self._end(self._process)
                code = self._process.wait()
                self._up = False
                if self._closing.is_set():
                    return
                log.error(
                    "the process of model %s ended %s; another one is started",
                    self._model,
                    ending(code),
                )
            if time.monotonic() - began > _STEADY_SECONDS:
                pause = _FIRST_PAUSE
            self._closing.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _start(self) -> None:
        """Raises LoadError, BackendUnavailable."""
        control, address = self._folder / "c", self._folder / "g"
        command = [
            *(sys.executable, "-m", "gatelet.agent.scoring.process", "--die-with-parent"),
            *("--control-socket", str(control), "--grpc-address", f"unix:{address}"),
            *("--http-address", "", "--metrics-address", "", "--drain-seconds", "1"),
        ]
        environment = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED}
        try:
            for path in (control, address):
                path.unlink(missing_ok=True)
            process = self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env=environment,
                # Ctrl-C is for the process before it, which drains first.
                start_new_session=True,
            )
        except OSError as error:
            raise BackendUnavailable(f"no process of its own can be started: {error}") from error
        until = time.monotonic() + START_SECONDS
        while not control.exists():
            if self._closing.wait(_LOOK_SECONDS):
                raise BackendUnavailable("it was closed while its process started")
            if process.poll() is not None:
                raise BackendUnavailable(f"its process ended {ending(process.returncode)} at once")
            if time.monotonic() > until:
                raise BackendUnavailable(f"its process was not ready in {START_SECONDS:g} s")
        with grpc.insecure_channel(
            f"unix:{control}", [("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            self._load(ScoringStub(channel), process)

    def _load(self, stub: ScoringStub, process: subprocess.Popen[bytes]) -> None:
        options = pb.ScoringOptions(backends=[self.backend], threads=self._threads)
        request = pb.LoadRequest(
            instance=_INSTANCE, directory=str(self._directory), options=options
        )
        target = pb.RouteTarget(instance=_INSTANCE, default=True)
        route = pb.Route(endpoint=self._model, targets=[target])
        try:
            stub.load(request, LOAD_SECONDS)
            probed = stub.probe(pb.ProbeRequest(instance=_INSTANCE), LOAD_SECONDS).status
            if probed.state != pb.InstanceStatus.READY:
                raise LoadError(probed.error)
            stub.switch(pb.SwitchRequest(routes=[route]), LOAD_SECONDS)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            if code is grpc.StatusCode.FAILED_PRECONDITION:
                raise LoadError(details) from error
            try:
                ended = process.wait(_DYING_SECONDS)
            except subprocess.TimeoutExpired:
                raise BackendUnavailable(f"its process: {details or code.name}") from error
            raise LoadError(f"the process that loaded the model ended {ending(ended)}") from error

    def _end(self, process: subprocess.Popen[bytes] | None) -> None:
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def isolated(backends: Mapping[str, Backend], folder: Path | None) -> Mapping[str, Backend]:
    """`backends` with those that compute in this process replaced; all as they are without
    `folder`, which is emptied."""
    if folder is None:
        return backends
    shutil.rmtree(folder, ignore_errors=True)
    return {
        name: IsolatedBackend(backend, folder) if name in _IN_PROCESS else backend
        for name, backend in backends.items()
    }
