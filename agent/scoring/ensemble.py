"""Ensembles: a small graph of models behind one endpoint, as pure checks and an order of steps.

The form is that of Triton's model configuration (`ensemble_scheduling.step` with `model_name`,
`model_version`, `input_map` and `output_map`), in a JSON file that a variant of kind "ensemble"
names. `input_map` goes from the step model's input to the ensemble's tensor that feeds it,
`output_map` from the step model's output to the name that it gets in the ensemble.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from ...accelerators.tensors import TensorSpec
from ...modules.errors import InvalidModel
from ...modules.model_json import read_json

N = TypeVar("N", bound=Hashable)

KIND = "ensemble"
MAX_BYTES = 256 * 1024
MAX_STEPS = 64


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`model_name`: an endpoint of this device. `model_version` -1 or "": by share."""

    model_name: str
    input_map: dict[str, str]
    output_map: dict[str, str]
    model_version: int | str = -1

    @property
    def version(self) -> str:
        return "" if self.model_version in (-1, "") else str(self.model_version)


class _Scheduling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    step: tuple[Step, ...]


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    ensemble_scheduling: _Scheduling


@dataclass(frozen=True, slots=True)
class Graph:
    """`after[i]`: the steps whose outputs the i-th one needs."""

    steps: tuple[Step, ...]
    after: tuple[frozenset[int], ...]

    def needed(self, outputs: Iterable[str]) -> frozenset[int]:
        """The steps that `outputs` depend on."""
        makers = _makers(self.steps)
        wanted: set[int] = set()
        waiting = [makers[name] for name in outputs if name in makers]
        while waiting:
            step = waiting.pop()
            if step not in wanted:
                wanted.add(step)
                waiting.extend(self.after[step])
        return frozenset(wanted)


@dataclass(frozen=True, slots=True)
class Signature:
    """What an endpoint takes and gives now. `optional`: inputs that may be left out."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    optional: frozenset[str] = frozenset()


def parse_ensemble(raw: bytes, what: str) -> tuple[Step, ...]:
    """The steps that `raw` (JSON) describes. Raises InvalidModel."""
    document = read_json(raw, what, MAX_BYTES, max_depth=8)
    try:
        steps = msgspec.convert(document, _Document).ensemble_scheduling.step
    except msgspec.ValidationError as error:
        raise InvalidModel(f"{what}: {error}") from None
    if not 1 <= len(steps) <= MAX_STEPS:
        raise InvalidModel(f"{what}: found {len(steps)} steps, expected 1 to {MAX_STEPS}")
    return steps


def build_graph(
    steps: Sequence[Step], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], what: str
) -> Graph:
    """The order of the steps. Raises InvalidModel for a tensor that nobody makes or two make, and
    for steps that wait for each other."""
    made = {spec.name: "an input of the ensemble" for spec in inputs}
    for number, step in enumerate(steps):
        for name in step.output_map.values():
            if name in made:
                raise InvalidModel(
                    f"{what}: tensor {name!r} is made by {_named(number, step)} and is {made[name]}"
                    " already; give it another name"
                )
            made[name] = f"made by {_named(number, step)}"
    for number, step in enumerate(steps):
        for name in step.input_map.values():
            if name not in made:
                raise InvalidModel(
                    f"{what}: {_named(number, step)} needs tensor {name!r}, which no step makes "
                    "and which is no input of the ensemble"
                )
    makers = _makers(steps)
    for spec in outputs:
        if spec.name not in makers:
            raise InvalidModel(f"{what}: no step makes the ensemble's output {spec.name!r}")
    after = tuple(
        frozenset(makers[name] for name in step.input_map.values() if name in makers)
        for step in steps
    )
    circle = find_circle(dict(enumerate(after)))
    if circle:
        names = " -> ".join(_named(number, steps[number]) for number in circle)
        raise InvalidModel(f"{what}: steps wait for each other: {names}")
    return Graph(tuple(steps), after)


def check_types(
    graph: Graph,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    signatures: Mapping[int, Signature],
) -> str:
    """What does not fit between the steps and the models that serve them now; "" when all does."""
    known: dict[str, TensorSpec] = {spec.name: spec for spec in inputs}
    for number, step in enumerate(graph.steps):
        by_name = {spec.name: spec for spec in signatures[number].outputs}
        for theirs, ours in step.output_map.items():
            if theirs not in by_name:
                return _lacks(number, step, "output", theirs, by_name)
            known[ours] = by_name[theirs]
    for number, step in enumerate(graph.steps):
        signature = signatures[number]
        takes = {spec.name: spec for spec in signature.inputs}
        for theirs, ours in step.input_map.items():
            if theirs not in takes:
                return _lacks(number, step, "input", theirs, takes)
            if not _fits(known[ours], takes[theirs]):
                return (
                    f"{_named(number, step)} takes {takes[theirs]}, but tensor {ours!r} "
                    f"is {known[ours]}"
                )
        missing = [n for n in takes if n not in step.input_map and n not in signature.optional]
        if missing:
            return f"{_named(number, step)} needs the input {missing[0]!r} too; map it"
    for spec in outputs:
        if not _fits(known[spec.name], spec):
            return f"the ensemble's output {spec} is {known[spec.name]} where it is made"
    return ""


def find_circle(after: Mapping[N, Iterable[N]]) -> list[N]:
    """Nodes that wait for each other, the first one again at the end; [] when none do."""
    left = {node: {other for other in waits if other in after} for node, waits in after.items()}
    while free := [node for node, waits in left.items() if not waits]:
        for node in free:
            del left[node]
        for waits in left.values():
            waits.difference_update(free)
    if not left:
        return []
    # Each of those left waits for another of them: whoever comes up twice closes the circle.
    path = [next(iter(left))]
    while (following := next(iter(left[path[-1]]))) not in path:
        path.append(following)
    return [*path[path.index(following) :], following]


def _makers(steps: Sequence[Step]) -> dict[str, int]:
    return {name: n for n, step in enumerate(steps) for name in step.output_map.values()}


def _fits(made: TensorSpec, wanted: TensorSpec) -> bool:
    if made.datatype != wanted.datatype or len(made.shape) != len(wanted.shape):
        return False
    return all(
        -1 in pair or pair[0] == pair[1] for pair in zip(made.shape, wanted.shape, strict=True)
    )


def _named(number: int, step: Step) -> str:
    return f"step {number + 1} ({step.model_name})"


def _lacks(number: int, step: Step, role: str, name: str, there: Mapping[str, TensorSpec]) -> str:
    names = ", ".join(repr(name) for name in there)
    return f"{_named(number, step)} has no {role} {name!r}, it has {names}"
