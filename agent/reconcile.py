"""The control loop: observe, plan, start what may start, and judge the deployment.

All decisions are in `plan.py` and `deployments.py`; here they meet time, tasks and the store.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from .clock import Clock
from .deployments import (
    CRASHES_TOLERATED,
    Goal,
    Probation,
    choose_goal,
    fatal_failure,
    given_up,
    inherited_pins,
    wanted_modules,
    watch,
)
from .manifest import Manifest, ManifestError, parse_manifest
from .plan import Failure, Load, Observed, Plan, Pull, Step, Wanted, plan, subject
from .steps import Executor, Progress, ScoringView, StepFailed, describe
from .store import Deployment, Proof, StateStore, document_hash
from .twin.backoff import full_jitter

log = logging.getLogger(__name__)

BUSY_POLL_SECONDS = 0.5
IDLE_POLL_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ReconcileSettings:
    probation_seconds: float = 10.0
    retry_base_seconds: float = 1.0
    retry_cap_seconds: float = 60.0
    busy_poll_seconds: float = BUSY_POLL_SECONDS
    idle_poll_seconds: float = IDLE_POLL_SECONDS


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a document: edgeAgent's code, and the deployment it is (0 when refused)."""

    code: int
    description: str
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything the loop knew at the end of one pass, for reports. None before a deployment."""

    goal: Goal | None = None
    manifest: Manifest | None = None
    wanted: Wanted | None = None
    plan: Plan | None = None
    observed: Observed | None = None
    scoring: ScoringView | None = None
    failures: tuple[Failure, ...] = ()
    running: tuple[Step, ...] = ()
    progress: tuple[tuple[str, Progress], ...] = ()


class Reconciler:
    """Drives one device to its newest deployment. Runs on one event loop."""

    def __init__(
        self,
        store: StateStore,
        executor: Executor,
        clock: Clock,
        settings: ReconcileSettings,
        publish: Callable[[Snapshot], None],
        jitter: random.Random | None = None,
    ) -> None:
        self._store = store
        self._executor = executor
        self._clock = clock
        self._settings = settings
        self._publish = publish
        self._jitter = jitter or random.Random()
        self._wake = asyncio.Event()
        self._failures: dict[Step, Failure] = {}
        self._tasks: dict[str, tuple[Step, asyncio.Task[None]]] = {}
        self._progress: dict[str, Progress] = {}
        self._probation: Probation | None = None
        self._manifests: dict[int, Manifest] = {}
        self._done_at: dict[Step, float] = {}
        self._exposed = 0  # the newest generation of which a model was loaded

    # -- documents -----------------------------------------------------------------------------

    def submit(
        self,
        source: str,
        version: int,
        body: bytes,
        *,
        always: bool = False,
        document: bytes | None = None,
        proof: Proof | None = None,
    ) -> Verdict:
        """Take a manifest. A document that its source sent before changes nothing.

        With `always` the same document starts a new deployment (a person asked for it again).
        `document` is what the source sent where it only led to the manifest `body`.
        """
        sent = body if document is None else document
        before = {seen.source: seen for seen in self._store.seen()}.get(source)
        if before is not None and before.sha256 == document_hash(sent) and not always:
            if before.version != version:
                self._store.note_version(source, version)
                self._wake.set()
            return Verdict(before.code, before.description)
        try:
            manifest = parse_manifest(body)
        except ManifestError as error:
            return self.refuse(source, version, sent, error)
        previous = self._store.last_good()
        deployment = self._store.accept(source, version, body, document=document, proof=proof)
        if previous is not None:
            pins = self._store.pins(previous.generation)
            old = self._manifest(previous)
            for module, digest in inherited_pins(manifest, old, pins).items():
                self._store.pin(deployment.generation, module, digest)
        log.info("deployment %d from %s accepted", deployment.generation, source)
        self._wake.set()
        return Verdict(200, "", deployment.generation)

    def refuse(self, source: str, version: int, document: bytes, error: ManifestError) -> Verdict:
        """Remember that this document is no deployment, and why; what runs goes on."""
        log.warning("manifest from %s refused (%d): %s", source, error.code, error)
        self._store.refuse(source, version, document, error.code, str(error))
        self._wake.set()
        return Verdict(error.code, str(error))

    def wake(self) -> None:
        """Look again now; something may have changed."""
        self._wake.set()

    # -- the loop ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Reconcile until cancelled; running steps are cancelled with it."""
        try:
            while True:
                self._wake.clear()
                pause = await self._pass()
                # Not wait_for: before Python 3.12 it can swallow a cancellation that arrives
                # together with the event.
                timer = asyncio.get_running_loop().call_later(pause, self._wake.set)
                try:
                    await self._wake.wait()
                finally:
                    timer.cancel()
        finally:
            tasks = [task for _, task in self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pass(self) -> float:
        latest = self._store.latest()
        if latest is None:
            self._publish(Snapshot())
            return self._settings.idle_poll_seconds
        try:
            observed, scoring = await self._executor.observe()
        except StepFailed as error:
            log.error("cannot look at the device: %s", error)
            return self._settings.idle_poll_seconds
        goal, current = self._decide(latest, observed, scoring)
        wanted = self._wanted(goal.wanted)
        self._forget(current)
        self._start(goal.wanted, current)
        self._publish(
            Snapshot(
                goal=goal,
                manifest=self._manifest(goal.wanted),
                wanted=wanted,
                plan=current,
                observed=observed,
                scoring=scoring,
                failures=tuple(self._failures.values()),
                running=tuple(step for step, _ in self._tasks.values()),
                progress=tuple(sorted(self._progress.items())),
            )
        )
        return self._pause(goal, current, observed)

    def _decide(
        self, latest: Deployment, observed: Observed, scoring: ScoringView | None
    ) -> tuple[Goal, Plan]:
        """Plan for the goal; judging the deployment may change the goal, then plan again."""
        while True:
            goal = choose_goal(latest, self._store.last_good())
            current = self._plan(goal, observed)
            phase, description = self._judge(goal, current, scoring)
            if phase == goal.wanted.phase:
                return goal, current
            generation = goal.wanted.generation
            log.log(
                logging.WARNING if phase == "failed" else logging.INFO,
                "deployment %d is %s%s",
                generation,
                phase,
                f": {description}" if description else "",
            )
            self._store.set_phase(generation, phase, description)
            latest = replace(latest, phase=phase, description=description)

    def _judge(self, goal: Goal, current: Plan, scoring: ScoringView | None) -> tuple[str, str]:
        """The phase the goal's deployment should be in, and why."""
        deployment = goal.wanted
        if goal.rolled_back or deployment.phase not in ("applying", "probation"):
            return deployment.phase, deployment.description
        fatal = fatal_failure(current)
        if fatal is not None:
            return "failed", f"{describe(fatal.step)}: {fatal.message}"
        now = self._clock.monotonic()
        boot_id = scoring.boot_id if scoring is not None else ""
        settled = current.settled and not current.blocked
        self._probation = watch(
            self._probation,
            deployment.generation,
            settled,
            boot_id,
            now,
            suspect=self._exposed == deployment.generation,
        )
        if self._probation.crashes > CRASHES_TOLERATED:
            return "failed", (
                f"the scoring process died {self._probation.crashes} times while this deployment "
                "was being applied"
            )
        since = self._probation.since
        if since is None:
            return "applying", ""
        good = now - since >= self._settings.probation_seconds
        return ("good" if good else "probation"), ""

    def _plan(self, goal: Goal, observed: Observed) -> Plan:
        fallback = None if goal.fallback is None else self._wanted(goal.fallback)
        keep = {
            digest
            for deployment in (self._store.last_good(), self._store.latest())
            if deployment is not None
            for digest in self._store.pins(deployment.generation).values()
        }
        return plan(
            self._wanted(goal.wanted),
            fallback,
            observed,
            given_up(self._failures) if goal.wanted.phase == "failed" else self._failures,
            frozenset(keep),
            self._clock.monotonic(),
        )

    def _wanted(self, deployment: Deployment) -> Wanted:
        generation = deployment.generation
        return wanted_modules(generation, self._manifest(deployment), self._store.pins(generation))

    def _manifest(self, deployment: Deployment) -> Manifest:
        # Only manifests that parsed are stored, and a generation's body never changes.
        if deployment.generation not in self._manifests:
            self._manifests[deployment.generation] = parse_manifest(deployment.body)
        return self._manifests[deployment.generation]

    # -- steps ---------------------------------------------------------------------------------

    def _forget(self, current: Plan) -> None:
        """Drop what belongs to steps that nobody wants any more; stop their transfers."""
        planned = {*current.steps, *(failure.step for failure in current.blocked)}
        alive = planned | {step for step, _ in self._tasks.values()}
        self._failures = {s: f for s, f in self._failures.items() if s in alive}
        for step, task in list(self._tasks.values()):
            if isinstance(step, Pull) and step not in planned:
                task.cancel()

    def _start(self, deployment: Deployment, current: Plan) -> None:
        manifest = self._manifest(deployment)
        credentials = tuple(
            (c.address, c.username, c.password) for c in manifest.registry_credentials
        )
        # A step that was done and is planned again had no lasting effect (the process lost it, or
        # somebody undoes it): it must not spin.
        soonest = self._clock.monotonic() - self._settings.retry_base_seconds
        self._done_at = {step: at for step, at in self._done_at.items() if at > soonest}
        wanted = {module.instance for module in self._wanted(deployment).modules}
        for step in current.steps:
            if subject(step) not in self._tasks and step not in self._done_at:
                if isinstance(step, Load) and step.instance in wanted:
                    self._exposed = deployment.generation
                task = asyncio.get_running_loop().create_task(
                    self._carry_out(deployment.generation, step, credentials)
                )
                self._tasks[subject(step)] = (step, task)

    async def _carry_out(
        self, generation: int, step: Step, credentials: tuple[tuple[str, str, str], ...]
    ) -> None:
        name = subject(step)

        def on_progress(progress: Progress) -> None:
            self._progress[name] = progress

        self._store.journal(generation, describe(step), "started")
        try:
            await self._executor.run(step, credentials, on_progress)
        except StepFailed as error:
            self._note_failure(generation, step, str(error), retryable=error.retryable)
        except Exception as error:
            # A defect in one step must not stop the other modules: it is logged whole, reported,
            # and tried again with the usual back-off.
            log.exception("%s: unexpected error", describe(step))
            message = f"unexpected {type(error).__name__}: {error}; see the agent's log"
            self._note_failure(generation, step, message, retryable=True)
        else:
            self._failures.pop(step, None)
            self._done_at[step] = self._clock.monotonic()
            log.info("%s: done", describe(step))
            self._store.journal(generation, describe(step), "done")
        finally:
            self._progress.pop(name, None)
            self._tasks.pop(name, None)
            self._wake.set()

    def _note_failure(self, generation: int, step: Step, message: str, *, retryable: bool) -> None:
        count = self._failures[step].count + 1 if step in self._failures else 1
        delay = full_jitter(
            count - 1,
            self._settings.retry_base_seconds,
            self._settings.retry_cap_seconds,
            self._jitter,
        )
        retry_at = self._clock.monotonic() + delay
        self._failures[step] = Failure(step, count, retry_at, message, retryable)
        log.warning("%s failed (attempt %d): %s", describe(step), count, message)
        self._store.journal(generation, describe(step), "failed", message)

    def _pause(self, goal: Goal, current: Plan, observed: Observed) -> float:
        now = self._clock.monotonic()
        pause = self._settings.idle_poll_seconds
        if self._tasks or not observed.scoring_up or not current.settled:
            pause = self._settings.busy_poll_seconds
        times = [failure.retry_at for failure in current.blocked if failure.retryable]
        probation = self._probation
        if goal.wanted.phase == "probation" and probation is not None and probation.since:
            times.append(probation.since + self._settings.probation_seconds)
        return max(0.01, min([pause, *(time - now for time in times)]))
