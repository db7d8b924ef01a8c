"""What can be profiled: a model folder in sessions of our own, or an endpoint that is served."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from ...accelerators.backend import Backend, BatchLimited, LoadOptions, Session
from ...accelerators.errors import BackendError
from ...accelerators.tensors import NUMPY_DTYPES, Array, TensorSpec
from ...modules.errors import ImageError
from ...modules.model_json import load_model
from ...modules.sample_json import load_sample
from ..scoring.batching_choice import has_batch_axis
from ..scoring.client import ScoringClient
from ..scoring.errors import InstanceRefused, InstanceUnavailable, ScoringError
from ..scoring.loading import InstanceOptions, Loaded
from ..scoring.residency import resident_bytes
from .load import AskFailed, Timing, closed_loop
from .sweep import Setting

_SEED = 20
_REQUEST_SECONDS = 60.0


class CannotProfile(Exception):
    """There is nothing to measure; the message says why and what to do."""


def item_of(
    inputs: tuple[TensorSpec, ...], given: Mapping[str, Array], batched: bool
) -> dict[str, Array]:
    """One item for every input: what is `given`, else random numbers of a fixed seed."""
    random = np.random.default_rng(_SEED)
    item = {}
    for spec in inputs:
        if spec.name in given:
            array = given[spec.name]
            item[spec.name] = array[:1] if batched else array
            continue
        shape = tuple(1 if size == -1 else size for size in spec.shape)
        dtype = NUMPY_DTYPES[spec.datatype]
        if dtype.kind == "f":
            item[spec.name] = random.random(shape).astype(dtype)
        elif dtype.kind == "O":
            item[spec.name] = np.full(shape, b"", np.object_)
        else:
            item[spec.name] = random.integers(0, 2, shape).astype(dtype)
    return item


def stacked(item: Mapping[str, Array], size: int) -> dict[str, Array]:
    return {name: np.concatenate([array] * size) for name, array in item.items()}


class FolderSubject:
    """A model folder, run in this process: every backend that the device has for it."""

    chooses_batching = True

    def __init__(
        self,
        directory: Path,
        backends: Mapping[str, Backend],
        given: Mapping[str, Array] | None = None,
        threads: tuple[int, ...] | None = None,
    ) -> None:
        """`given`: inputs to use in place of the model's sample. Raises CannotProfile."""
        try:
            self.model = load_model(directory)
            sample = load_sample(directory, self.model)
        except ImageError as error:
            raise CannotProfile(str(error)) from error
        self._directory = directory
        self._all = backends
        self.notes: list[str] = []
        self.memory_mb: dict[str, float] = {}
        self._sessions: dict[tuple[str, int], Session] = {}
        self._instances: dict[tuple[str, int, bool], Loaded] = {}
        self.batched = has_batch_axis(self.model.inputs, self.model.outputs)
        arrays = dict(sample.inputs if sample is not None else {}) | dict(given or {})
        self._item = item_of(self.model.inputs, arrays, self.batched)
        self.backends = tuple(name for name in backends if self._try(name))
        if not self.backends:
            raise CannotProfile(
                f"{directory}: no variant runs on this device: {'; '.join(self.notes)}"
            )
        cores = os.cpu_count() or 1
        counts = threads or tuple(n for n in (1, 2, 4) if n <= cores)
        self.thread_counts: dict[str, tuple[int, ...]] = {
            name: counts if name == "cpu" else (0,) for name in self.backends
        }

    @property
    def most_batch(self) -> int:
        """The largest batch that model and sessions take; model.json's maximum is a default."""
        limits = [s.max_batch for s in self._sessions.values() if isinstance(s, BatchLimited)]
        return min([65_536, *limits]) if self.batched else 1

    def measure(self, setting: Setting, seconds: float) -> Timing:
        if setting.phase == "concurrency":
            return closed_loop(
                self._through(setting), setting.concurrency, seconds, time.process_time
            )
        ask = self._direct(setting)
        before = resident_bytes()
        timing = closed_loop(ask, setting.concurrency, seconds, time.process_time)
        if setting.threads == self.thread_counts[setting.backend][0]:
            # One session's: what larger batches need on top of what loading it took.
            grown = max(0.0, (resident_bytes() - before) / 2**20)
            self.memory_mb[setting.backend] = self.memory_mb.get(setting.backend, 0.0) + grown
        return timing

    def close(self) -> None:
        for loaded in self._instances.values():
            loaded.instance.close(1.0)
        for session in self._sessions.values():
            with suppress(BackendError):
                session.close()

    def _try(self, name: str) -> bool:
        if name == "cpu":
            # The library is paid for once, whatever it runs.
            with suppress(ImportError):
                importlib.import_module("onnxruntime")
        before = resident_bytes()
        try:
            session = self._session(name, 1 if name == "cpu" else 0)
            session.run(self._item, None, time.monotonic() + _REQUEST_SECONDS)
        except (BackendError, CannotProfile) as error:
            self.notes.append(f"{name}: {error}")
            return False
        self.memory_mb[name] = max(0.0, (resident_bytes() - before) / 2**20)
        return True

    def _session(self, backend: str, threads: int) -> Session:
        key = (backend, threads)
        if key not in self._sessions:
            for variant in self.model.variants:
                if self._all[backend].accepts(variant) is None:
                    self._sessions[key] = self._all[backend].load(
                        self._directory, variant, LoadOptions(threads=threads)
                    )
                    break
            else:
                raise CannotProfile("none of the model's variants is for it")
        return self._sessions[key]

    def _direct(self, setting: Setting) -> Callable[[], None]:
        session = self._session(setting.backend, setting.threads)
        inputs = stacked(self._item, setting.batch) if self.batched else self._item

        def ask() -> None:
            try:
                session.run(inputs, None, time.monotonic() + _REQUEST_SECONDS)
            except BackendError as error:
                raise AskFailed(str(error)) from error

        return ask

    def _through(self, setting: Setting) -> Callable[[], None]:
        """As the scoring process runs it, without a transport."""
        key = (setting.backend, setting.threads, setting.together)
        if key not in self._instances:
            options = InstanceOptions(
                backends=(setting.backend,),
                threads=setting.threads,
                max_batch=max(self.model.batching.max, 32) if setting.together else 1,
            )
            chosen = {setting.backend: self._all[setting.backend]}
            try:
                loaded = Loaded(self._directory, options, chosen, self.model.name)
                loaded.probe()
            except (InstanceRefused, InstanceUnavailable) as error:
                raise CannotProfile(str(error)) from error
            self._instances[key] = loaded
        instance = self._instances[key].instance

        def ask() -> None:
            try:
                instance.run(self._item, None, time.monotonic() + _REQUEST_SECONDS)
            except ScoringError as error:
                raise AskFailed(error.message) from error

        return ask


class EndpointSubject:
    """A model that a scoring process serves; its own options decide how."""

    chooses_batching = False
    backends: tuple[str, ...] = ("served",)
    most_batch = 65_536

    def __init__(
        self,
        client: ScoringClient,
        model: str,
        version: str = "",
        given: Mapping[str, Array] | None = None,
        pid: int | None = None,
    ) -> None:
        """`pid`: of the scoring process, for its CPU time. Raises CannotProfile."""
        try:
            self.metadata = client.metadata(model, version)
        except ScoringError as error:
            raise CannotProfile(f"{error.code.value}: {error.message}") from error
        self._client = client
        self._model = model
        self._version = version
        self._pid = pid
        self.notes: list[str] = []
        self.memory_mb: dict[str, float] = {}
        self.thread_counts: dict[str, tuple[int, ...]] = {"served": (0,)}
        self.batched = has_batch_axis(self.metadata.inputs, self.metadata.outputs)
        self._item = item_of(self.metadata.inputs, given or {}, self.batched)

    def measure(self, setting: Setting, seconds: float) -> Timing:
        inputs = stacked(self._item, setting.batch) if self.batched else self._item

        def ask() -> None:
            try:
                self._client.request(self._model, inputs, self._version)
            except ScoringError as error:
                raise AskFailed(f"{error.code.value}: {error.message}") from error

        return closed_loop(ask, setting.concurrency, seconds, self._cpu)

    def close(self) -> None:
        self._client.close()

    def _cpu(self) -> float | None:
        """User and system time of the server (proc(5), stat: fields 14 and 15, in ticks)."""
        if self._pid is None:
            return None
        try:
            text = Path(f"/proc/{self._pid}/stat").read_text("ascii")
        except OSError:
            return None
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
