"""The backend of ensembles: each step is a request to an endpoint of the same data plane."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ...accelerators.backend import LoadOptions, Variant
from ...accelerators.errors import (
    BackendError,
    BackendUnavailable,
    DeadlineExceeded,
    InvalidTensor,
    LoadError,
)
from ...accelerators.tensors import Array, TensorSpec
from ...modules.errors import ImageError
from ...modules.model_json import load_model
from .ensemble import (
    KIND,
    MAX_BYTES,
    Graph,
    Signature,
    Step,
    build_graph,
    check_types,
    parse_ensemble,
)
from .errors import Code, ScoringError
from .instances import Instance
from .routing import RoutingTable, choose
from .types import InferenceRequest, InferenceResponse, Tensor

# A run waits for its steps, so this many may wait at a time.
_CONCURRENCY = 64
# A step that never answers would hold its thread for ever.
_LONGEST_SECONDS = 300.0


class Plane(Protocol):
    """What steps are asked of."""

    @property
    def table(self) -> RoutingTable[Instance]: ...

    def infer(self, request: InferenceRequest) -> InferenceResponse: ...

    def submit(self, request: InferenceRequest, done: _Done) -> object: ...


class _Done(Protocol):
    def __call__(self, answer: InferenceResponse | ScoringError, /) -> None: ...


class EnsembleBackend:
    """Runs variants of kind "ensemble": a JSON file in Triton's form of ensembles."""

    name = "ensemble"

    def __init__(self, plane: Plane) -> None:
        self._plane = plane

    def accepts(self, variant: Variant) -> str | None:
        return None if variant.kind == KIND else f"ensembles are no {variant.kind} variants"

    def load(self, directory: Path, variant: Variant, options: LoadOptions) -> EnsembleSession:
        """Raises LoadError for steps that do not make a graph. Whether they fit the models that
        serve them is seen when these are there: at the probe, and after every switch."""
        try:
            with (directory / variant.path).open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
            model = load_model(directory)
            steps = parse_ensemble(raw, variant.path)
            graph = build_graph(steps, model.inputs, model.outputs, variant.path)
        except OSError as error:
            raise LoadError(f"{variant.path} cannot be read: {error.strerror}") from None
        except ImageError as error:
            raise LoadError(str(error)) from None
        return EnsembleSession(self._plane, graph, model.inputs, model.outputs)


class EnsembleSession:
    """One ensemble. Steps that do not need each other run at the same time."""

    backend = "ensemble"
    # The steps' own models stack requests, which is where that pays.
    max_batch = 1
    concurrency = _CONCURRENCY

    def __init__(
        self,
        plane: Plane,
        graph: Graph,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
    ) -> None:
        self._plane = plane
        self._graph = graph
        self.inputs = inputs
        self.outputs = outputs
        self._checked: RoutingTable[Instance] | None = None
        self._closed = False

    @property
    def steps(self) -> tuple[Step, ...]:
        return self._graph.steps

    @property
    def endpoints(self) -> frozenset[str]:
        """That its steps ask."""
        return frozenset(step.model_name for step in self._graph.steps)

    @property
    def healthy(self) -> bool:
        return not self._closed

    def close(self) -> None:
        self._closed = True

    def run(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> dict[str, Array]:
        """As `Session.run`; a step's error is the ensemble's, with the step's name."""
        if self._closed:
            raise BackendUnavailable("the ensemble was closed")
        self._check()
        wanted = [spec.name for spec in self.outputs] if outputs is None else list(outputs)
        return _Run(self._plane, self._graph, inputs, deadline).outputs(wanted)

    def _check(self) -> None:
        table = self._plane.table
        if table is self._checked:
            return
        signatures: dict[int, Signature] = {}
        for number, step in enumerate(self._graph.steps):
            route = table.routes.get(step.model_name)
            target = None if route is None else choose(route, step.version, 1.0)
            if target is None:
                which = f"version {step.version!r} of " if route is not None else ""
                raise BackendUnavailable(
                    f"step {number + 1} asks {which}endpoint {step.model_name!r}, which is not "
                    "deployed here now; add its module to the deployment"
                )
            one = target.instance
            signatures[number] = Signature(one.inputs, one.outputs, one.optional)
        reason = check_types(self._graph, self.inputs, self.outputs, signatures)
        if reason:
            # Not for good: the deployment under way may be about to replace the step's model.
            raise BackendUnavailable(reason)
        self._checked = table


class _Run:
    """One request on its way through the steps."""

    def __init__(
        self, plane: Plane, graph: Graph, inputs: Mapping[str, Array], deadline: float | None
    ) -> None:
        self._plane = plane
        self._graph = graph
        self._known = dict(inputs)
        self._deadline = deadline
        self._finished: queue.SimpleQueue[tuple[int, InferenceResponse | ScoringError]] = (
            queue.SimpleQueue()
        )

    def outputs(self, wanted: Sequence[str]) -> dict[str, Array]:
        waiting = set(self._graph.needed(wanted))
        done: set[int] = set()
        running: set[int] = set()
        while waiting or running:
            ready = sorted(n for n in waiting if self._graph.after[n] <= done)
            waiting.difference_update(ready)
            running.update(ready)
            # The last one on this thread, which would only wait for it.
            for number in ready[:-1]:
                self._submit(number)
            if ready:
                self._infer(ready[-1])
            number, answer = self._next()
            running.discard(number)
            done.add(number)
            self._take(number, answer)
        return {name: self._known[name] for name in wanted}

    def _request(self, number: int) -> InferenceRequest:
        step = self._graph.steps[number]
        route = self._plane.table.routes.get(step.model_name)
        specs = () if route is None else route.default.instance.inputs
        datatypes = {spec.name: spec.datatype for spec in specs}
        return InferenceRequest(
            model=step.model_name,
            version=step.version,
            inputs=tuple(
                Tensor(theirs, datatypes.get(theirs, ""), self._known[ours])
                for theirs, ours in step.input_map.items()
                if ours in self._known
            ),
            outputs=tuple(step.output_map),
            deadline=self._deadline,
        )

    def _submit(self, number: int) -> None:
        def done(answer: InferenceResponse | ScoringError) -> None:
            self._finished.put((number, answer))

        try:
            self._plane.submit(self._request(number), done)
        except ScoringError as error:
            done(error)

    def _infer(self, number: int) -> None:
        answer: InferenceResponse | ScoringError
        try:
            answer = self._plane.infer(self._request(number))
        except ScoringError as error:
            answer = error
        self._finished.put((number, answer))

    def _next(self) -> tuple[int, InferenceResponse | ScoringError]:
        now = time.monotonic()
        left = _LONGEST_SECONDS if self._deadline is None else self._deadline - now
        try:
            return self._finished.get(timeout=max(0.0, min(left, _LONGEST_SECONDS)))
        except queue.Empty:
            raise DeadlineExceeded("the deadline passed while a step was running") from None

    def _take(self, number: int, answer: InferenceResponse | ScoringError) -> None:
        step = self._graph.steps[number]
        if isinstance(answer, ScoringError):
            fault = _FAULTS.get(answer.code, BackendError)
            raise fault(f"step {number + 1} ({step.model_name}): {answer.message}") from answer
        for tensor in answer.outputs:
            self._known[step.output_map[tensor.name]] = tensor.array


_FAULTS: Mapping[Code, type[BackendError]] = {
    Code.INVALID_ARGUMENT: InvalidTensor,
    Code.DEADLINE_EXCEEDED: DeadlineExceeded,
    Code.UNAVAILABLE: BackendUnavailable,
    Code.NOT_FOUND: BackendUnavailable,
    Code.RESOURCE_EXHAUSTED: BackendUnavailable,
}


def steps_of(instances: Iterable[Instance]) -> frozenset[str]:
    """The endpoints that ensembles among `instances` ask."""
    sessions = (member.session for instance in instances for member in instance.members)
    ensembles = (session for session in sessions if isinstance(session, EnsembleSession))
    return frozenset(name for session in ensembles for name in session.endpoints)


def ensemble_steps(instance: Instance) -> tuple[Step, ...]:
    """The steps of an ensemble; () of any other model."""
    for member in instance.members:
        if isinstance(member.session, EnsembleSession):
            return member.session.steps
    return ()
