"""Several requests as one run of the model, and its results as an answer for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...accelerators.tensors import Array
from .batching_job import Job, Results


@dataclass(frozen=True, slots=True)
class Stacked:
    """`items`: of all of them. `deadline`: the latest, None if one has none: whoever is out of
    patience before the run ends has left by then, and the others still want their answers."""

    inputs: Mapping[str, Array]
    outputs: Sequence[str] | None
    deadline: float | None
    items: int


def stack(jobs: Sequence[Job]) -> Stacked:
    latest: float | None = 0.0
    for job in jobs:
        latest = None if latest is None or job.deadline is None else max(latest, job.deadline)
    return Stacked(
        {name: np.concatenate([job.inputs[name] for job in jobs]) for name in jobs[0].inputs},
        _union(jobs),
        latest,
        sum(job.items for job in jobs),
    )


def split(jobs: Sequence[Job], results: Results, items: int) -> list[Results] | None:
    """An answer for each job, as views of the results; None when these do not have an item for
    each that went in."""
    if any(not array.ndim or array.shape[0] != items for array in results.values()):
        return None
    answers = []
    start = 0
    for job in jobs:
        end = start + job.items
        wanted = results if job.outputs is None else job.outputs
        answers.append({name: results[name][start:end] for name in wanted})
        start = end
    return answers


def _union(jobs: Sequence[Job]) -> Sequence[str] | None:
    """The outputs that the jobs want together; None for all."""
    first = jobs[0].outputs
    if all(job.outputs == first for job in jobs):
        return first
    names: dict[str, None] = {}
    for job in jobs:
        if job.outputs is None:
            return None
        names.update(dict.fromkeys(job.outputs))
    return tuple(names)
