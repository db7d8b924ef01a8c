"""Whether and how a model's requests are stacked, from its options and what a run costs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import numpy as np

from ...accelerators.backend import BatchLimited, Session
from ...accelerators.errors import BackendError
from ...accelerators.tensors import Array, TensorSpec
from ...modules.model_json import Batching
from .batching import BatchConfig, Overflow, normalised_priority

PROBE_SIZE = 8
# Stacking pays when an item costs at most this much of what a run for it alone costs.
WORTHWHILE = 0.75
_RUNS = 7
_SECONDS = 0.1
_RUN_DEADLINE = 30.0
_TOLERANCE = 1e-2


def has_batch_axis(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether the first dimension of every tensor is free, so that requests can be stacked."""
    return all(spec.shape and spec.shape[0] == -1 for spec in (*inputs, *outputs))


def largest_batch(
    asked: int,
    batching: Batching,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    sessions: Sequence[Session],
) -> int:
    """Items of one run: what was `asked` for (0: what model.json says) as far as it is possible."""
    if not has_batch_axis(inputs, outputs):
        return 1
    limits = [s.max_batch for s in sessions if isinstance(s, BatchLimited)]
    return max(1, min([asked or batching.max, *limits]))


def batch_config(
    max_batch: int,
    max_delay: float,
    batching: Batching,
    cores: int | None = None,
    *,
    slots: int = 0,
    priority: int = 0,
) -> BatchConfig:
    """`max_batch` 1: singly, on every core. `max_delay` 0: model.json's, in seconds. `slots` and
    `priority` 0: the defaults.

    While batches are computed the other half of the cores decodes and encodes.
    """
    cores = cores or os.cpu_count() or 1
    default = BatchConfig()
    return BatchConfig(
        max_batch=max_batch,
        max_delay=max_delay or (batching.max_delay_us or 0) / 1e6,
        preferred=tuple(size for size in batching.preferred or () if size <= max_batch),
        max_queue=batching.max_queue or default.max_queue,
        overflow=Overflow(batching.overflow) if batching.overflow else default.overflow,
        slots=slots or (max(1, cores // 2) if max_batch > 1 else cores),
        priority=normalised_priority(priority),
    )


def pays(single: float, stacked: float, items: int) -> bool:
    """Whether a run of `items` that takes `stacked` seconds beats `items` runs of `single`."""
    return stacked / items <= WORTHWHILE * single


class NotSeparable(Exception):
    """The model's answer for one item depends on the others in its batch."""


def measure(
    session: Session,
    item: Mapping[str, Array],
    size: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Seconds of a run with `item` (batch of 1) and with `size` copies of it.

    Raises NotSeparable, and BackendError where the session does.
    """
    _check_separable(session, item)
    stacked = {name: np.concatenate([array] * size) for name, array in item.items()}
    return _cost(session, item, clock), _cost(session, stacked, clock)


def _cost(session: Session, inputs: Mapping[str, Array], clock: Callable[[], float]) -> float:
    times: list[float] = []
    session.run(inputs, None, time.monotonic() + _RUN_DEADLINE)
    while len(times) < _RUNS and sum(times) < _SECONDS:
        before = clock()
        session.run(inputs, None, time.monotonic() + _RUN_DEADLINE)
        times.append(clock() - before)
    return median(times)


def _check_separable(session: Session, item: Mapping[str, Array]) -> None:
    deadline = time.monotonic() + _RUN_DEADLINE
    alone = session.run(item, None, deadline)
    # Another item beside it must not change its answer.
    other = {name: np.zeros_like(array) for name, array in item.items()}
    for name, array in item.items():
        if array.dtype == np.object_:
            other[name] = array
    try:
        session.run(other, None, deadline)
    except BackendError:
        other = dict(item)
    pair = {name: np.concatenate([item[name], other[name]]) for name in item}
    together = session.run(pair, None, deadline)
    for name, expected in alone.items():
        found = together[name][: len(expected)]
        if len(together[name]) != 2 * len(expected) or not _near(found, expected):
            raise NotSeparable(
                f"output {name!r} of an item changes with the items beside it, so requests run "
                "singly; set batching.max to 1 in model.json"
            )


def _near(found: Array, expected: Array) -> bool:
    if expected.dtype.kind != "f":
        return bool(np.array_equal(found, expected))
    have, want = found.astype(np.float64), expected.astype(np.float64)
    return bool(np.allclose(have, want, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True))
