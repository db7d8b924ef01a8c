"""Runs chosen requests of one model, together or alone, and hands each its answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ...accelerators.tensors import Array
from .batching import BatchConfig
from .batching_job import Execute, Job, Results, too_late
from .batching_pace import Pace
from .batching_stack import split, stack
from .errors import DEFECT, Code, ScoringError
from .statistics import Statistics

log = logging.getLogger(__name__)


class Execution:
    """`config` is changed for a model that does not answer a batch item by item."""

    def __init__(
        self,
        name: str,
        execute: Execute,
        config: BatchConfig,
        statistics: Statistics,
        now: Callable[[], float],
    ) -> None:
        self.config = config
        self._name = name
        self._execute_model = execute
        self._statistics = statistics
        self._now = now
        self._pace = Pace()

    def execute(self, jobs: Sequence[Job]) -> None:
        """Run the jobs together and finish each. Never raises."""
        started = self._now()
        for job in jobs:
            job.started = started
        try:
            if len(jobs) == 1:
                self._alone(jobs[0])
            else:
                self._together(jobs)
        except ScoringError as error:
            for job in jobs:
                job.finish(ScoringError(error.code, error.message, error.retry_after))
        except Exception:
            # A defect must not leave callers waiting: they get INTERNAL, the log the traceback.
            log.exception("%s: a run hit a defect of the server", self._name)
            for job in jobs:
                job.finish(ScoringError(Code.INTERNAL, f"{self._name}: {DEFECT}"))
        self._pace.ran(self._now() - started, sum([job.items for job in jobs]))

    def _alone(self, job: Job) -> None:
        before = time.perf_counter_ns()
        results = self._execute_model(job.inputs, job.outputs, job.deadline, 1)
        self._statistics.executed(job.items, 1, 0, time.perf_counter_ns() - before, 0)
        self._count((job,))
        job.finish(results)

    def _count(self, jobs: Sequence[Job]) -> None:
        """In the statistics, before anybody has an answer."""
        now = self._now()
        number = items = 0
        took = queued = 0.0
        for job in jobs:
            if job.counted:
                number += 1
                items += job.items
                took += now - job.arrived
                queued += max(0.0, job.started - job.arrived)
        if number:
            self._statistics.succeeded(int(took * 1e9), int(queued * 1e9), items, number)

    def _together(self, jobs: Sequence[Job]) -> None:
        before = time.perf_counter_ns()
        stacked = stack(jobs)
        running = time.perf_counter_ns()
        try:
            results = self._execute_model(
                stacked.inputs, stacked.outputs, stacked.deadline, len(jobs)
            )
        except ScoringError as error:
            if error.code in (Code.INVALID_ARGUMENT, Code.INTERNAL):
                # One of them may be at fault: the others must not pay for it.
                self._one_by_one(jobs)
                return
            raise
        ran = time.perf_counter_ns()
        answers = split(jobs, results, stacked.items)
        if answers is None:
            log.warning(
                "%s does not answer a batch item by item; its requests run singly from now on",
                self._name,
            )
            self.config = replace(self.config, max_batch=1, max_delay=0.0, preferred=())
            self._one_by_one(jobs)
            return
        self._statistics.executed(
            stacked.items,
            len(jobs),
            running - before,
            ran - running,
            time.perf_counter_ns() - ran,
        )
        self._count(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            job.finish(answer)

    def _one_by_one(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if job.deadline is not None and job.deadline <= self._now():
                job.finish(too_late(self._name, waited=True))
                continue
            try:
                self._alone(job)
            except ScoringError as error:
                job.finish(error)

    def run_stacked(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        requests: int,
        items: int,
    ) -> Results | None:
        """Requests that were stacked before they came here; None where each has to be asked alone,
        because of an error or a model that does not answer item by item. Raises ScoringError for
        a single one."""
        started, before = self._now(), time.perf_counter_ns()
        try:
            results = self._execute_model(inputs, outputs, None, requests)
        except ScoringError:
            if requests == 1:
                raise
            return None
        if requests > 1 and any(
            not array.ndim or array.shape[0] != items for array in results.values()
        ):
            return None
        infer_ns = time.perf_counter_ns() - before
        took = self._now() - started
        self._pace.ran(took, items)
        self._statistics.executed(items, requests, 0, infer_ns, 0)
        self._statistics.succeeded(int(took * requests * 1e9), 0, items, requests)
        return results
