"""The control loop: observe, plan, start what may start, and judge the deployment.

All decisions are in `plan.py`, `probation.py` and `deployments.py`; here they meet time, tasks and
the store.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from .canaries import Canaries, CanaryView
from .clock import Clock
from .deployments import (
    ContainerMaker,
    Goal,
    choose_goal,
    inherited_pins,
    wanted_modules,
)
from .image_housekeeping import ImageHousekeeping
from .manifest import Manifest, ManifestError, parse_manifest
from .plan import (
    Collect,
    Failure,
    History,
    Load,
    Observed,
    Plan,
    Pull,
    RemoveImage,
    Resolve,
    Rules,
    Step,
    UpdateMode,
    Wanted,
    describe,
    plan,
    subject,
)
from .preview import Preview, compare, steps_of
from .probation import (
    Probation,
    ProbationRules,
    deadlines,
    fatal_failure,
    given_up,
    judge,
    watch,
)
from .restart_memory import RestartMemory
from .restarts import RestartRules, RestartState
from .seams import DISK_FULL, Progress, ScoringView, StepFailed
from .startup import note_unready
from .steps import Executor
from .store import Deployment, Pin, Proof, StateStore, StoreError, document_hash
from .twin.backoff import full_jitter

log = logging.getLogger(__name__)

BUSY_POLL_SECONDS = 0.5
IDLE_POLL_SECONDS = 2.0
KEPT_WANTED = 8
ROLLBACK = "rollback"
"""The source of a deployment that was made of an earlier one."""


@dataclass(frozen=True, slots=True)
class ReconcileSettings:
    probation_seconds: float = 10.0
    retry_base_seconds: float = 1.0
    retry_cap_seconds: float = 60.0
    busy_poll_seconds: float = BUSY_POLL_SECONDS
    idle_poll_seconds: float = IDLE_POLL_SECONDS
    update_mode: UpdateMode = "NonBlocking"
    startup_wait_seconds: float = 60.0
    exits: int = 3
    healthy_deadline_seconds: float = 300.0
    restarts: RestartRules = field(default_factory=RestartRules)

    def planning(self) -> Rules:
        return Rules(self.startup_wait_seconds, self.restarts)

    def probation(self) -> ProbationRules:
        return ProbationRules(self.probation_seconds, self.exits, self.healthy_deadline_seconds)


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
    restarts: Mapping[str, RestartState] = field(default_factory=dict)
    canaries: Mapping[str, CanaryView] = field(default_factory=dict)
    rules: Rules = field(default_factory=Rules)
    now: float = 0.0


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
        *,
        maker: ContainerMaker | None = None,
        housekeeping: ImageHousekeeping | None = None,
        boot_id: str = "",
    ) -> None:
        """`maker` says what containers shall be, None where there are none; without `housekeeping`
        no image is ever removed; `boot_id` tells the starts of the host apart."""
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
        self._wanteds: dict[object, tuple[Manifest, Wanted]] = {}
        self._unstored: dict[str, tuple[int, bytes, bool, bytes | None, Proof | None]] = {}
        self._done_at: dict[Step, float] = {}
        self._exposed = 0  # the newest generation of which a model was loaded
        self._maker = maker
        self._housekeeping = housekeeping
        self._restarts = RestartMemory(store, clock, settings.restarts, boot_id)
        self._canaries = Canaries(store)
        self._unready: dict[str, float] = {}
        self._observed = Observed(frozenset(), False, {}, ())

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
        try:
            verdict = self._submit(source, version, body, always, document, proof)
        except StoreError as error:
            # A source sends a document once: it is kept in memory until it can be stored.
            log.error("%s", error)
            self._unstored[source] = (version, body, always, document, proof)
            return Verdict(500, f"{error}; it will be tried again")
        self._unstored.pop(source, None)
        return verdict

    def _submit(
        self,
        source: str,
        version: int,
        body: bytes,
        always: bool,
        document: bytes | None,
        proof: Proof | None,
    ) -> Verdict:
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
        pins = self._inherited(manifest)
        previous = self._store.last_good()
        deployment = self._store.accept(source, version, body, document=document, proof=proof)
        return self._accepted(deployment, pins, previous)

    def _inherited(self, manifest: Manifest) -> dict[str, Pin]:
        previous = self._store.last_good()
        if previous is None:
            return {}
        pins = self._store.pinned(previous.generation)
        return inherited_pins(manifest, self._manifest(previous), pins)

    def _accepted(
        self, deployment: Deployment, pins: Mapping[str, Pin], origin: Deployment | None
    ) -> Verdict:
        """`pins`: of the modules that are as they were in `origin`."""
        for module, pin in pins.items():
            self._store.pin(deployment.generation, module, pin.digest, pin.kind, pin.model)
        if origin is not None:
            self._canaries.inherit(origin.generation, deployment.generation, pins)
        log.info("deployment %d from %s accepted", deployment.generation, deployment.source)
        self._wake.set()
        return Verdict(200, "", deployment.generation)

    def refuse(self, source: str, version: int, document: bytes, error: ManifestError) -> Verdict:
        """Remember that this document is no deployment, and why; what runs goes on."""
        log.warning("manifest from %s refused (%d): %s", source, error.code, error)
        self._store.refuse(source, version, document, error.code, str(error))
        self._wake.set()
        return Verdict(error.code, str(error))

    def rollback(self, generation: int = 0) -> Verdict:
        """Deploy an earlier good deployment again, with the very images it had.

        `generation` 0: the good one before the present one. 400 when there is no such deployment.
        """
        deployments = self._store.deployments()
        latest, last_good = self._store.latest(), self._store.last_good()
        if latest is None or last_good is None:
            return Verdict(400, "there is no good deployment to return to")
        # After a failure the last good one runs already.
        present = last_good if latest.phase == "failed" else latest
        good = [
            one
            for one in deployments
            if one.phase == "good"
            and (one.generation == generation if generation else one.body != present.body)
            and (bool(generation) or one.generation < present.generation)
        ]
        if not good:
            which = f"deployment {generation} is not" if generation else "there is no earlier one"
            known = ", ".join(str(one.generation) for one in deployments if one.phase == "good")
            return Verdict(400, f"{which} among the good deployments of this device: {known}")
        target = good[0]
        pins = self._store.pinned(target.generation)
        accepted = self._store.accept(ROLLBACK, target.generation, target.body)
        return self._accepted(accepted, pins, target)

    def restart(self, module: str) -> Verdict:
        """Restart a module of the running deployment, whatever its restart policy says.

        A model is loaded anew beside the one that serves, which then ends.
        """
        latest = self._store.latest()
        if latest is None:
            return Verdict(400, "nothing is deployed yet")
        goal = choose_goal(latest, self._store.last_good()).wanted
        specs = {spec.name: spec for spec in self._manifest(goal).modules}
        if module not in specs:
            known = ", ".join(specs) or "none"
            return Verdict(400, f"there is no module {module} in the running deployment: {known}")
        if specs[module].status != "running":
            return Verdict(400, f"{module} is stopped, as its deployment asks")
        self._restarts.ask(module)
        self._wake.set()
        return Verdict(200, "", goal.generation)

    def preview(self, body: bytes = b"") -> Preview:
        """What this manifest would change, and the steps that the agent would begin with.

        Empty: the newest deployment against the device as it is.
        """
        latest, last_good = self._store.latest(), self._store.last_good()
        running = None if latest is None else choose_goal(latest, last_good).wanted
        if not body:
            if latest is None:
                return Preview(200, "nothing is deployed yet")
            body = latest.body
        try:
            manifest = parse_manifest(body)
        except ManifestError as error:
            return Preview(error.code, str(error))
        generation = 1 if latest is None else latest.generation + 1
        pins = self._inherited(manifest)
        if latest is not None and body == latest.body:
            generation, pins = latest.generation, self._store.pinned(latest.generation)
        steps, blocked = steps_of(
            plan(
                self._wanted_of(generation, manifest, pins),
                None if last_good is None else self._wanted(last_good),
                self._observed,
                {},
                self._clock.monotonic(),
                History(self._restarts.states(), self._unready),
                self._settings.planning(),
            )
        )
        return Preview(
            200,
            "",
            0 if running is None else running.generation,
            compare(() if running is None else self._manifest(running).modules, manifest.modules),
            steps,
            blocked,
        )

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
        try:
            for source, given in list(self._unstored.items()):
                self._submit(source, *given)
                del self._unstored[source]
            return await self._look_and_act()
        except StoreError as error:
            # What runs goes on; without a place to write its intents the agent changes nothing.
            log.error("%s", error)
            return self._settings.idle_poll_seconds

    async def _look_and_act(self) -> float:
        latest = self._store.latest()
        if latest is None:
            self._publish(Snapshot())
            return self._settings.idle_poll_seconds
        try:
            observed, scoring = await self._executor.observe()
        except StepFailed as error:
            log.error("cannot look at the device: %s", error)
            return self._settings.idle_poll_seconds
        # A newer one may have come while we looked.
        latest = self._store.latest() or latest
        self._observed = observed
        self._restarts.note(observed, self._executor.engine_view)
        goal, current = self._decide(latest, observed, scoring)
        wanted = self._wanted(goal.wanted)
        self._note_unready(wanted, current)
        self._forget(current)
        self._forget_removed(goal, current, observed)
        self._start(goal.wanted, current)
        now = self._clock.monotonic()
        if self._canaries.note(wanted, observed.routes, scoring, now):
            self._wake.set()
        self._publish(
            Snapshot(
                goal=goal,
                manifest=self._manifest(goal.wanted),
                wanted=wanted,
                plan=current,
                observed=observed,
                scoring=scoring,
                failures=_united(self._failures.values(), current.blocked),
                running=tuple(step for step, _ in self._tasks.values()),
                progress=tuple(sorted(self._progress.items())),
                restarts=dict(self._restarts.states()),
                canaries=self._canaries.views(wanted),
                rules=self._settings.planning(),
                now=now,
            )
        )
        return self._pause(goal, wanted, current, observed)

    def _decide(
        self, latest: Deployment, observed: Observed, scoring: ScoringView | None
    ) -> tuple[Goal, Plan]:
        """Plan for the goal; judging the deployment may change the goal, then plan again."""
        while True:
            goal = choose_goal(latest, self._store.last_good())
            current = self._plan(goal, observed)
            phase, description = self._judge(goal, current, observed, scoring)
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

    def _judge(
        self, goal: Goal, current: Plan, observed: Observed, scoring: ScoringView | None
    ) -> tuple[str, str]:
        """The phase the goal's deployment should be in, and why."""
        deployment = goal.wanted
        if goal.rolled_back or deployment.phase not in ("applying", "probation"):
            return deployment.phase, deployment.description
        fatal = fatal_failure(current)
        if fatal is not None:
            return "failed", f"{describe(fatal.step)}: {fatal.message}"
        now = self._clock.monotonic()
        wanted = self._wanted(deployment)
        self._probation = watch(
            self._probation,
            wanted,
            current,
            observed,
            scoring.boot_id if scoring is not None else "",
            now,
            suspect=self._exposed == deployment.generation,
        )
        return judge(
            self._probation,
            wanted,
            None if goal.fallback is None else self._wanted(goal.fallback),
            current,
            observed,
            History(self._restarts.states(), self._unready),
            self._settings.planning(),
            self._settings.probation(),
            now,
        )

    def _plan(self, goal: Goal, observed: Observed) -> Plan:
        fallback = None if goal.fallback is None else self._wanted(goal.fallback)
        wanted = self._wanted(goal.wanted)
        return plan(
            wanted,
            fallback,
            observed,
            given_up(self._failures) if goal.wanted.phase == "failed" else self._failures,
            self._clock.monotonic(),
            History(self._restarts.states(), self._unready, self._discard(observed)),
            self._settings.planning(),
        )

    def _discard(self, observed: Observed) -> tuple[Collect | RemoveImage, ...]:
        """The images that may go now."""
        if self._housekeeping is None:
            return ()
        needed = {view.digest for view in observed.containers.values()}
        for deployment in (self._store.last_good(), self._store.latest()):
            if deployment is not None:
                needed |= set(self._store.pins(deployment.generation).values())
        needed |= {step.digest for step, _ in self._tasks.values() if isinstance(step, Pull)}
        loaded = {name.partition("@")[2].partition(".")[0] for name in observed.instances}
        stored = self._executor.stored_images()
        needed |= {
            image.digest for image in stored if image.digest.removeprefix("sha256:")[:12] in loaded
        }
        full = frozenset(
            "store" if failure.step.kind == "model" else "engine"
            for failure in self._failures.values()
            if failure.code == DISK_FULL and isinstance(failure.step, Pull)
        )
        return self._housekeeping.look(stored, self._executor.engine_view, needed, full)

    def _note_unready(self, wanted: Wanted, current: Plan) -> None:
        arriving = {
            step.module
            for step, _ in self._tasks.values()
            if isinstance(step, (Resolve, Pull)) and step not in self._failures
        }
        arriving |= {
            step.module
            for step in current.steps
            if isinstance(step, (Resolve, Pull)) and step not in self._failures
        }
        self._unready = note_unready(
            self._unready, wanted, current.at_goal, arriving, self._clock.monotonic()
        )

    def _wanted(self, deployment: Deployment) -> Wanted:
        generation = deployment.generation
        return self._canaries.shares(
            self._wanted_of(generation, self._manifest(deployment), self._store.pinned(generation))
        )

    def _wanted_of(self, generation: int, manifest: Manifest, pins: Mapping[str, Pin]) -> Wanted:
        reloads = self._restarts.reloads()
        key = (
            generation,
            tuple(sorted((m, pin.digest, pin.kind, pin.model) for m, pin in pins.items())),
            tuple(sorted(reloads.items())),
            None if self._maker is None else self._maker.device,
        )
        known = self._wanteds.get(key)
        # A preview's manifest has no generation of its own.
        if known is None or known[0] is not manifest:
            if len(self._wanteds) >= KEPT_WANTED:
                self._wanteds.clear()
            wanted = wanted_modules(
                generation,
                manifest,
                pins,
                self._maker,
                update_mode=self._settings.update_mode,
                reloads=reloads,
            )
            known = self._wanteds[key] = (manifest, wanted)
        return known[1]

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

    def _forget_removed(self, goal: Goal, current: Plan, observed: Observed) -> None:
        """Restarts are remembered by the names of modules, which would pile up over the years."""
        if not current.settled:
            return
        kept = {view.module for view in observed.containers.values()}
        for deployment in (goal.wanted, goal.fallback):
            if deployment is not None:
                kept |= {spec.name for spec in self._manifest(deployment).modules}
        self._restarts.forget(self._restarts.states().keys() - kept)

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

        try:
            self._journal(generation, step, "started")
            self._restarts.starting(step, again=step in self._failures)
            await self._executor.run(step, credentials, on_progress)
            self._restarts.done(step)
        except StepFailed as error:
            self._note_failure(
                generation, step, str(error), retryable=error.retryable, code=error.code
            )
        except StoreError as error:
            self._note_failure(generation, step, str(error), retryable=True, code=DISK_FULL)
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
            self._journal(generation, step, "done")
        finally:
            self._progress.pop(name, None)
            self._tasks.pop(name, None)
            self._wake.set()

    def _journal(self, generation: int, step: Step, outcome: str, message: str = "") -> None:
        # Nothing is decided by the journal: a full disk must not stop what could help.
        try:
            self._store.journal(generation, describe(step), outcome, message)
        except StoreError as error:
            log.error("%s", error)

    def _note_failure(
        self, generation: int, step: Step, message: str, *, retryable: bool, code: str = ""
    ) -> None:
        try:
            self._restarts.failed(step)
        except StoreError as error:
            log.error("%s", error)
        count = self._failures[step].count + 1 if step in self._failures else 1
        delay = full_jitter(
            count - 1,
            self._settings.retry_base_seconds,
            self._settings.retry_cap_seconds,
            self._jitter,
        )
        retry_at = self._clock.monotonic() + delay
        self._failures[step] = Failure(step, count, retry_at, message, retryable, code)
        log.warning("%s failed (attempt %d): %s", describe(step), count, message)
        self._journal(generation, step, "failed", message)

    def _pause(self, goal: Goal, wanted: Wanted, current: Plan, observed: Observed) -> float:
        now = self._clock.monotonic()
        pause = self._settings.idle_poll_seconds
        canary = self._canaries.running(wanted)
        if self._tasks or not observed.scoring_up or not current.settled or canary:
            pause = self._settings.busy_poll_seconds
        times = [
            failure.retry_at
            for failure in current.blocked
            if failure.retryable and failure.step in self._failures
        ]
        if current.wake_at is not None:
            times.append(current.wake_at)
        if goal.wanted.phase in ("applying", "probation") and self._probation is not None:
            times += deadlines(self._probation, wanted, self._settings.probation())
        return max(0.01, min([pause, *(time - now for time in times)]))


def _united(noted: Iterable[Failure], blocked: Iterable[Failure]) -> tuple[Failure, ...]:
    """Failures of steps, and what holds modules up before any step."""
    found = {failure.step: failure for failure in (*blocked, *noted)}
    return tuple(found.values())
