"""From a model directory to an `Instance`: which backend opens which variant, and the first run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...accelerators.backend import (
    Backend,
    Concurrent,
    LoadOptions,
    Remarked,
    Session,
    Variant,
    WithOptionalInputs,
)
from ...accelerators.errors import BackendError, BackendUnavailable, LoadError
from ...accelerators.tensors import NUMPY_DTYPES, Array, TensorSpec, shape_matches
from ...modules.errors import ImageError
from ...modules.model_json import Model, load_model
from ...modules.sample_json import Sample, load_sample
from .batching_choice import PROBE_SIZE, NotSeparable, batch_config, largest_batch, measure, pays
from .errors import InstanceRefused, InstanceUnavailable
from .instances import Instance, Member, State

PREFERENCE = ("fpga", "cpu")
# Computes only where a model asks for it by name.
_ON_REQUEST = ("numpy",)
_COMPUTING = (*PREFERENCE, *_ON_REQUEST)
PROBE_SECONDS = 30.0

# Relative and absolute tolerance of the sample's outputs. An overlay computes in a few bits.
_TOLERANCES = {"cpu": (1e-3, 1e-4), "numpy": (1e-3, 1e-4)}
_QUANTISED = (5e-2, 5e-2)
_HALF = (1e-2, 1e-3)

_PLATFORMS = {"onnx": "onnxruntime_onnx", "ensemble": "ensemble"}


@dataclass(frozen=True, slots=True)
class InstanceOptions:
    """How to serve a model. `backends` (): all that fit, FPGA first. `timeout` and `max_delay` in
    seconds. `max_batch`: 0 for model.json's where stacking requests pays, 1 for never. `slots`:
    runs at the same time, 0 for what fits the cores. `priority`: of requests that name none.
    `auth`: what clients must show: none, key or token. `isolate`: whether the CPU computes it in a
    process of its own. `clients`: common names of the certificates that may call, () for any."""

    backends: tuple[str, ...] = ()
    threads: int = 0
    timeout: float | None = None
    max_batch: int = 0
    max_delay: float = 0.0
    slots: int = 0
    priority: int = 0
    auth: str = "none"
    isolate: bool = False
    clients: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Missing:
    """A backend that may open its variant later."""

    backend: Backend
    variant: Variant
    reason: str


class Loaded:
    """An instance with what is needed to look after it: its model, sample and missing backends."""

    def __init__(
        self, directory: Path, options: InstanceOptions, backends: Mapping[str, Backend], name: str
    ) -> None:
        """Raises InstanceRefused, InstanceUnavailable."""
        self.directory = directory
        self.options = options
        try:
            self.model = load_model(directory)
            self._sample = load_sample(directory, self.model)
        except ImageError as error:
            raise InstanceRefused(str(error)) from error
        every = sorted(backends, key=lambda n: PREFERENCE.index(n) if n in PREFERENCE else len(n))
        # Preferences are among what computes; what only passes on fits any of them.
        self._order = (
            *(options.backends or [name for name in every if name in PREFERENCE]),
            *(name for name in every if name not in _COMPUTING),
        )
        self._missing: dict[str, _Missing] = {}
        self._left_out: list[str] = []
        members = self._open_all(backends)
        self.instance = Instance(
            name,
            self.model.name,
            self.model.version,
            self.model.inputs,
            self.model.outputs,
            members,
            platform=_platform(members, backends),
            timeout=options.timeout,
            optional=_optional(self.model, members),
        )
        self.instance.auth = options.auth
        self.instance.clients = frozenset(options.clients)

    @property
    def notes(self) -> tuple[str, ...]:
        """Why a variant or backend is not in use."""
        waiting = (f"{name}: {m.reason}" for name, m in self._missing.items())
        return (*self._left_out, *waiting)

    @property
    def missing(self) -> bool:
        """Whether a backend may still join."""
        unproven = any(not member.proven for member in self.instance.members)
        return bool(self._missing) or (unproven and self.instance.state is State.READY)

    def _open_all(self, backends: Mapping[str, Backend]) -> list[Member]:
        members: list[Member] = []
        reasons: dict[Variant, list[str]] = {variant: [] for variant in self.model.variants}
        used: set[Variant] = set()
        for name in self._order:
            backend = backends.get(name)
            if backend is None:
                self._left_out.append(
                    f"{name}: this device does not offer it (it offers {', '.join(backends)})"
                )
                continue
            for variant in self.model.variants:
                reason = backend.accepts(variant)
                if reason is not None and name not in _COMPUTING:
                    continue
                if reason is None:
                    try:
                        members.append(self._open(backend, variant))
                        used.add(variant)
                        self._missing.pop(name, None)
                        if isinstance(backend, Remarked) and backend.note:
                            self._note(f"{name}: {backend.note}")
                        break
                    except LoadError as error:
                        reason = str(error)
                    except BackendUnavailable as error:
                        self._missing.setdefault(name, _Missing(backend, variant, str(error)))
                        used.add(variant)
                        continue
                    except InstanceRefused:
                        for member in members:
                            member.session.close()
                        raise
                reasons[variant].append(f"{name}: {reason}")
        details = [
            f"{variant.kind} {variant.path}: {'; '.join(reasons[variant]) or 'not needed'}"
            for variant in self.model.variants
            if variant not in used
        ]
        if members:
            self._left_out += details
            return members
        waiting = [f"{m.variant.kind} {m.variant.path}: {m.reason}" for m in self._missing.values()]
        fault = InstanceUnavailable if waiting else InstanceRefused
        raise fault(
            f"model {self.model.name!r} version {self.model.version}: no variant can run on this "
            f"device: {' | '.join([*self._left_out, *waiting, *details])}"
        )

    def _open(self, backend: Backend, variant: Variant) -> Member:
        options = LoadOptions(
            threads=self.options.threads, inputs=self.model.inputs, outputs=self.model.outputs
        )
        session = backend.load(self.directory, variant, options)
        try:
            check_signature(self.model, variant, session)
        except InstanceRefused:
            session.close()
            raise
        return Member(session, f"{variant.kind} {variant.path}", time.monotonic, proven=False)

    def retry_missing(self) -> list[str]:
        """Open and prove what was away before; the names of the backends that joined.

        Once the instance is ready, a backend joins only after it answered the sample rightly.
        """
        for name, missing in list(self._missing.items()):
            try:
                member = self._open(missing.backend, missing.variant)
            except BackendUnavailable as error:
                self._missing[name] = _Missing(missing.backend, missing.variant, str(error))
                continue
            except (BackendError, InstanceRefused) as error:
                self._left_out.append(f"{name}: {error}")
            else:
                before = self._order[: self._order.index(name)]
                place = sum(one.name in before for one in self.instance.members)
                self.instance.add(member, place)
            del self._missing[name]
        if self.instance.state is not State.READY:
            return []
        joined = [member.name for member in self.instance.members if self._prove_late(member)]
        if joined:
            self._choose_batching()
        return joined

    def _prove_late(self, member: Member) -> bool:
        if member.proven or not member.session.healthy:
            return False
        try:
            self._try(member)
        except BackendUnavailable:
            return False
        except (BackendError, InstanceRefused) as error:
            self._left_out.append(f"{member.name} ({member.variant}): {error}")
            self.instance.remove(member)
            return False
        member.proven = True
        return True

    def probe(self) -> None:
        """Run the sample, or zeros, once on every backend and set the instance's state.

        READY when one answered and none answered wrongly; FAILED when one did. Raises
        InstanceUnavailable, with the state unchanged, when no backend could be asked.
        """
        unavailable = []
        answered = 0
        for member in self.instance.members:
            try:
                self._try(member)
                member.proven = True
                answered += 1
            except BackendUnavailable as error:
                unavailable.append(f"{member.name}: {error}")
            except (BackendError, InstanceRefused) as error:
                self.instance.error = f"{member.name} ({member.variant}): {error}"
                self.instance.state = State.FAILED
                return
        if not answered:
            raise InstanceUnavailable(
                f"model {self.model.name!r}: no backend could be probed: {'; '.join(unavailable)}"
            )
        self._choose_batching()
        self.instance.error = ""
        self.instance.state = State.READY

    def _choose_batching(self) -> None:
        """Stack requests where the model allows it and, unless asked for, where it pays."""
        options, batching, members = self.options, self.model.batching, self.instance.members
        size = largest_batch(
            options.max_batch,
            batching,
            self.model.inputs,
            self.model.outputs,
            [member.session for member in members],
        )
        if size == 1 and options.max_batch > 1:
            self._note(
                "batching: requests run singly: not every tensor has a free first dimension, "
                "or the backend takes one at a time"
            )
        member = next((one for one in members if one.usable), None)
        if size > 1 and member is not None:
            size = size if self._stacking_pays(member, size) else 1
        self.instance.batching = batch_config(
            size,
            options.max_delay,
            batching,
            slots=options.slots or self._concurrency(),
            priority=options.priority,
        )

    def _concurrency(self) -> int:
        """Of sessions that wait for others to compute; 0 where this process computes itself."""
        sessions = [member.session for member in self.instance.members]
        return max((s.concurrency for s in sessions if isinstance(s, Concurrent)), default=0)

    def _stacking_pays(self, member: Member, size: int) -> bool:
        sample = self._sample or zeros(self.model)
        item = {name: array[:1] for name, array in sample.inputs.items()}
        items = min(size, PROBE_SIZE)
        try:
            single, stacked = measure(member.session, item, items)
        except (BackendError, NotSeparable) as error:
            self._note(f"batching: {error}")
            return False
        return self.options.max_batch > 1 or pays(single, stacked, items)

    def _note(self, text: str) -> None:
        if text not in self._left_out:
            self._left_out.append(text)

    def _try(self, member: Member) -> None:
        """Raises BackendError when the session fails, InstanceRefused for a wrong answer."""
        sample = self._sample or zeros(self.model)
        try:
            results = member.session.run(sample.inputs, None, time.monotonic() + PROBE_SECONDS)
        except BackendUnavailable:
            raise
        except BackendError as error:
            if self._sample is None:
                raise InstanceRefused(
                    f"{error} (inputs were zeros because model.json names no sample; add one)"
                ) from error
            raise
        for spec in self.model.outputs:
            array = results[spec.name]
            if array.dtype != NUMPY_DTYPES[spec.datatype] or not shape_matches(
                spec.shape, array.shape
            ):
                raise InstanceRefused(
                    f"output {spec} came as {array.dtype} {list(array.shape)}; correct model.json"
                )
        for name, expected in sample.outputs.items():
            difference = compare(results[name], expected, member.name)
            if difference is not None:
                raise InstanceRefused(f"output {name!r} of the sample: {difference}")


def check_signature(model: Model, variant: Variant, session: Session) -> None:
    """Raises InstanceRefused when model.json promises another signature than the variant has.

    Names, datatypes, ranks and fixed sizes must agree. A variant may have more outputs than
    model.json tells, and sizes may be free on either side.
    """
    where = f"model.json does not fit {variant.kind} {variant.path}"
    pairs = (("input", model.inputs, session.inputs), ("output", model.outputs, session.outputs))
    optional = session.optional_inputs if isinstance(session, WithOptionalInputs) else ()
    for role, promised, actual in pairs:
        found = {spec.name: spec for spec in actual}
        if role == "input":
            found = {spec.name: spec for spec in (*optional, *actual)}
        names = {spec.name for spec in promised}
        surplus = [str(spec) for spec in actual if spec.name not in names]
        if role == "input" and surplus:
            raise InstanceRefused(f"{where}: it lacks the input {', '.join(surplus)}")
        for spec in promised:
            other = found.get(spec.name)
            if other is None:
                raise InstanceRefused(
                    f"{where}: {role} {spec} is not among {', '.join(map(str, actual))}"
                )
            if spec.datatype != other.datatype or not _shapes_agree(spec, other):
                raise InstanceRefused(f"{where}: {role} {spec} is {other} there")


def _shapes_agree(promised: TensorSpec, actual: TensorSpec) -> bool:
    # onnxruntime tells an unknown rank as ().
    if not actual.shape:
        return True
    return len(promised.shape) == len(actual.shape) and all(
        -1 in (mine, other) or mine == other
        for mine, other in zip(promised.shape, actual.shape, strict=True)
    )


def zeros(model: Model) -> Sample:
    """Inputs of zeros (BYTES: empty), every free size 1."""
    arrays: dict[str, Array] = {}
    for spec in model.inputs:
        shape = tuple(1 if size == -1 else size for size in spec.shape)
        if spec.datatype == "BYTES":
            arrays[spec.name] = np.full(shape, b"", np.object_)
        else:
            arrays[spec.name] = np.zeros(shape, NUMPY_DTYPES[spec.datatype])
    return Sample(arrays, {})


def compare(actual: Array, expected: Array, backend: str) -> str | None:
    """None when `actual` is near enough to `expected` for this backend, else the difference."""
    if actual.shape != expected.shape:
        return f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    if expected.dtype.kind != "f":
        wrong = int(np.count_nonzero(actual != expected))
        return f"{wrong} of {expected.size} elements differ" if wrong else None
    relative, absolute = _TOLERANCES.get(backend, _QUANTISED)
    if expected.dtype.itemsize == 2:
        relative, absolute = max(relative, _HALF[0]), max(absolute, _HALF[1])
    have, want = actual.astype(np.float64), expected.astype(np.float64)
    if np.allclose(have, want, rtol=relative, atol=absolute, equal_nan=True):
        return None
    error = float(np.max(np.abs(have - want), initial=0.0))
    return f"off by up to {error:.3g}, allowed are {absolute:g} + {relative:g} of the value"


def _optional(model: Model, members: Sequence[Member]) -> frozenset[str]:
    """Inputs that every backend has a default for."""
    names = {spec.name for spec in model.inputs}
    for member in members:
        session = member.session
        own = session.optional_inputs if isinstance(session, WithOptionalInputs) else ()
        names &= {spec.name for spec in own}
    return frozenset(names)


def _platform(members: Sequence[Member], backends: Mapping[str, Backend]) -> str:
    kinds = [member.variant.split(" ", 1)[0] for member in members]
    first = members[0].name
    stand_ins = {name for name, one in backends.items() if isinstance(one, Remarked) and one.note}
    if first in (*_ON_REQUEST, *stand_ins):
        return f"numpy_{kinds[0]}"
    return _PLATFORMS.get(kinds[0], f"{members[0].name}_{kinds[0]}")
