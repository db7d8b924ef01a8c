"""Runs the requests of one model as `batching.decide` says: the threads around the pure core.

A caller that finds a free slot computes on its own thread, which saves two thread switches. What
arrives meanwhile queues up for the runner threads, which exist only while there is a queue.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence

from ...accelerators.tensors import Array
from .batching import BatchConfig, decide
from .batching_execution import Execution
from .batching_job import Answer, Done, Execute, Job, Results, too_late
from .batching_queue import Queue, QueueFull
from .errors import Code, ScoringError
from .statistics import Statistics

_IDLE_SECONDS = 10.0
_LONGEST_WAIT = threading.TIMEOUT_MAX
_RETRY_SECONDS = (0.01, 5.0)
_MOST_AT_ONCE = 8


class BatchRunner(Execution):
    """Thread-safe. `batched` says whether the inputs have the batch as their first dimension."""

    def __init__(
        self,
        name: str,
        execute: Execute,
        config: BatchConfig,
        statistics: Statistics,
        *,
        batched: bool,
        free_sizes: bool = True,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`free_sizes`: whether other dimensions than the first one vary between requests, or
        inputs may be left out."""
        super().__init__(name, execute, config, statistics, now)
        self._batched = batched
        self._free_sizes = free_sizes
        # Taken directly where nobody waits for a turn: a Condition's own `with` costs more.
        self._lock = threading.Lock()
        self._turn = threading.Condition(self._lock)
        self._queue = Queue()
        self._running = 0
        self._runners: set[threading.Thread] = set()
        self._closed = False

    @property
    def pending(self) -> int:
        """Requests that wait for their turn."""
        return len(self._queue.waiting)

    def call(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
        deadline: float | None = None,
        priority: int = 0,
    ) -> Results:
        """Blocks until the results are there, or until `deadline` (of `now`).

        `priority`: 1 (first) to 10, 0 for the configured one. Arrays may be views of larger ones.
        Raises ScoringError: what `execute` raises, DEADLINE_EXCEEDED, and UNAVAILABLE with
        `retry_after` when the queue is full.
        """
        arrived = self._now()
        if self._claim():
            return self._at_once(inputs, outputs, deadline, arrived)
        answer = Answer()
        job = Job(inputs, outputs, deadline, self._items(inputs), arrived, answer.set)
        self._wait(job, priority)
        wait = _LONGEST_WAIT if deadline is None else max(0.0, deadline - self._now())
        if not answer.lock.acquire(timeout=min(wait, _LONGEST_WAIT)):
            raise too_late(self._name, waited=self._withdraw(job))
        value = answer.value
        if not isinstance(value, dict):
            raise value or ScoringError(Code.INTERNAL, "a request was lost")
        took, queued = self._now() - arrived, max(0.0, job.started - arrived)
        self._statistics.succeeded(int(took * 1e9), int(queued * 1e9), job.items)
        return value

    def submit(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        deadline: float | None,
        priority: int,
        done: Done,
        wake: bool = True,
    ) -> Job:
        """As `call` for event loops: returns at once; `done` is called on a runner's thread.

        What was returned may be withdrawn. `wake` False: `serve_here` follows when more has been
        submitted. Raises ScoringError UNAVAILABLE when the queue is full.
        """
        items, arrived = self._items(inputs), self._now()
        job = Job(inputs, outputs, deadline, items, arrived, done, counted=True)
        self._wait(job, priority, wake)
        return job

    def withdraw(self, job: Job) -> bool:
        """Whether the job was still waiting: it ends with CANCELLED now, and never runs."""
        waited = self._withdraw(job)
        if waited:
            job.finish(ScoringError(Code.CANCELLED, f"{self._name}: the request was given up"))
        return waited

    def serve_here(self, longest: float) -> None:
        """Run what waits on this thread if a run takes up to `longest` seconds, as far as is known,
        and leave it to the runners otherwise: two switches of threads cost more than a short run.
        All are turned away where there is no runner and none can be started.
        """
        while True:
            with self._lock:
                queue = self._queue
                if not queue.waiting:
                    return
                decision = decide(queue.waiting, self._now(), self.config, self._pace.mean)
                batch: Sequence[Job] = decision.batch
                items = sum([job.items for job in batch])
                if self._running >= self.config.slots or not self._is_short(
                    items, len(batch), longest
                ):
                    batch = ()
                if not batch:
                    try:
                        started = self._start_runner()
                    except ScoringError as error:
                        refusal, left = error, queue.clear()
                        break
                    if not started:
                        # As many came together as there may be runs.
                        self._turn.notify(max(1, self.config.slots - self._running))
                    return
                self._running += 1
                expired, jobs = queue.take(decision.expired), queue.take(batch)
            for job in expired:
                job.finish(too_late(self._name, waited=True))
            try:
                self.execute(jobs)
            finally:
                self._leave()
        for job in left:
            job.finish(ScoringError(refusal.code, refusal.message))

    def serve_stacked(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str],
        requests: int,
        longest: float,
    ) -> Results | None:
        """As `serve_here` for requests that came together in time, stacked already, and need not
        wait for anybody: nobody else does, and a slot is free. None: `submit` them one by one."""
        items = self._items(inputs)
        with self._lock:
            if not self.may_stack(requests, items, longest):
                return None
            self._running += 1
        try:
            return self.run_stacked(inputs, outputs, requests, items)
        finally:
            self._leave()

    def may_stack(self, requests: int, items: int, longest: float) -> bool:
        """Whether `serve_stacked` would run them at this moment."""
        return not (
            self._closed
            or self._queue.waiting
            or self._running >= self.config.slots
            or (requests > 1 and not self._may_join(items))
            or not self._is_short(items, requests, longest)
        )

    def _may_join(self, items: int) -> bool:
        """Whether requests with so many items run together without waiting for others."""
        config = self.config
        return (
            self._batched
            and items <= config.max_batch
            and config.max_delay <= 0
            and (not config.preferred or items in config.preferred)
        )

    def _is_short(self, items: int, requests: int, longest: float) -> bool:
        """`longest` is for a request: several may take as much more together, within reason."""
        return 0.0 < self._pace.expected(items) <= longest * min(requests, _MOST_AT_ONCE)

    def close(self) -> None:
        """Turn away what waits, and end the threads once they have answered. Idempotent."""
        with self._lock:
            self._closed = True
            left = self._queue.clear()
            self._turn.notify_all()
            runners = tuple(self._runners)
        for job in left:
            job.finish(ScoringError(Code.UNAVAILABLE, f"{self._name} is being unloaded; try again"))
        for runner in runners:
            if runner is not threading.current_thread():
                # One that hangs in an accelerator must not hold up the others' end.
                runner.join(timeout=1.0)

    def _items(self, inputs: Mapping[str, Array]) -> int:
        if not self._batched:
            return 1
        for array in inputs.values():
            return array.shape[0] if array.ndim else 1
        return 1

    def _claim(self) -> bool:
        """Whether the caller has a slot, because nobody waits and one is free. `_leave` ends it."""
        with self._lock:
            if self._running >= self.config.slots or self._queue.waiting or self._closed:
                return False
            self._running += 1
            return True

    def _at_once(
        self,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None,
        deadline: float | None,
        arrived: float,
    ) -> Results:
        try:
            before = time.perf_counter_ns()
            results = self._execute_model(inputs, outputs, deadline, 1)
            infer_ns = time.perf_counter_ns() - before
        finally:
            self._leave()
        items = self._items(inputs)
        self._pace.ran(infer_ns / 1e9, items)
        took = int((self._now() - arrived) * 1e9)
        self._statistics.answered_alone(items, took, infer_ns)
        return results

    def _wait(self, job: Job, priority: int, wake: bool = True) -> None:
        """Put the job into the queue, if there is room for it."""
        with self._lock:
            if self._closed:
                raise ScoringError(Code.UNAVAILABLE, f"{self._name} is being unloaded; try again")
            config, queue = self.config, self._queue
            free = self._running < config.slots
            try:
                shed = queue.put(
                    job,
                    self._alike(job.inputs) if self._free_sizes else None,
                    priority,
                    config,
                    urgent=free and not queue.waiting,
                )
            except QueueFull:
                raise self._full() from None
            if wake:
                try:
                    started = self._start_runner()
                except ScoringError:
                    queue.withdraw(job)
                    if shed is not None:
                        shed.finish(self._full())
                    raise
                if not started and free:
                    self._turn.notify()
        if shed is not None:
            shed.finish(self._full())

    def _start_runner(self) -> bool:
        """One more thread if there is work for it; whether it was started."""
        if len(self._runners) >= min(self.config.slots, self._running + len(self._queue.waiting)):
            return False
        runner = threading.Thread(target=self._serve, name=f"run-{self._name}"[:15], daemon=True)
        # It looks for work only after the lock is free again.
        try:
            runner.start()
        except RuntimeError as error:
            if self._runners:
                return False
            raise ScoringError(
                Code.UNAVAILABLE, f"{self._name}: no thread can be started ({error}); try again"
            ) from error
        self._runners.add(runner)
        return True

    def _alike(self, inputs: Mapping[str, Array]) -> Hashable:
        return tuple((name, inputs[name].shape[1:]) for name in sorted(inputs))

    def _leave(self) -> None:
        with self._lock:
            self._running -= 1
            if self._queue.waiting:
                self._turn.notify()

    def _withdraw(self, job: Job) -> bool:
        """Whether the job was still waiting, and now never runs."""
        with self._lock:
            return self._queue.withdraw(job)

    def _serve(self) -> None:
        while True:
            with self._lock:
                expired, batch = self._next()
                if not expired and not batch:
                    self._runners.discard(threading.current_thread())
                    return
            for job in expired:
                job.finish(too_late(self._name, waited=True))
            if batch:
                try:
                    self.execute(batch)
                finally:
                    self._leave()

    def _next(self) -> tuple[Sequence[Job], Sequence[Job]]:
        """The next jobs of a runner, who waits for them; none when it is to end."""
        while not self._closed:
            timeout, queue = _IDLE_SECONDS, self._queue
            if queue.waiting:
                now = self._now()
                decision = decide(queue.waiting, now, self.config, self._pace.mean)
                batch = decision.batch if self._running < self.config.slots else ()
                if batch or decision.expired:
                    self._running += bool(batch)
                    return queue.take(decision.expired), queue.take(batch)
                ends = [w.deadline for w in queue.waiting if w.deadline is not None]
                if decision.again_at is not None:
                    ends.append(decision.again_at)
                timeout = max(0.0, min(ends) - now) if ends else _LONGEST_WAIT
                self._turn.wait(min(timeout, _LONGEST_WAIT))
            elif not self._turn.wait(timeout) and not queue.waiting:
                break
        return (), ()

    def _full(self) -> ScoringError:
        low, high = _RETRY_SECONDS
        waiting = len(self._queue.waiting)
        batches = waiting / max(1, self.config.max_batch * self.config.slots)
        after = min(high, max(low, batches * self._pace.mean))
        return ScoringError(
            Code.UNAVAILABLE,
            f"{self._name}: {waiting} requests are waiting already; try again in "
            f"{after:.2g} s, or send fewer at once",
            after,
        )
