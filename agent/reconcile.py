"""The control loop: observe, plan, start what may start, and judge the deployment.

All decisions are in `plan.py`, `probation.py` and `deployments.py`; here they meet time, tasks and
the store.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from dataclasses import replace

from .canaries import Canaries
from .clock import Clock
from .deployments import (
    ContainerMaker,
    Goal,
    choose_goal,
)
from .image_housekeeping import ImageHousekeeping
from .manifest import ManifestError, parse_manifest
from .plan import (
    Collect,
    Failure,
    History,
    Observed,
    Plan,
    Pull,
    RemoveImage,
    Resolve,
    Wanted,
    describe,
    plan,
)
from .preview import Preview, compare, steps_of
from .probation import (
    Probation,
    deadlines,
    given_up,
    judge,
    watch,
)
from .reconcile_settings import ReconcileSettings
from .restart_memory import RestartMemory
from .seams import DISK_FULL, ScoringView, StepFailed
from .snapshot import Snapshot
from .startup import note_unready
from .step_tasks import StepTasks
from .steps import Executor
from .store import StateStore
from .store_types import Deployment, StoreError
from .submissions import Submissions, Verdict
from .wanted import WantedModules

__all__ = ["ReconcileSettings", "Reconciler", "Snapshot", "Verdict"]

log = logging.getLogger(__name__)


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
        self._wake = asyncio.Event()
        self._probation: Probation | None = None
        self._housekeeping = housekeeping
        self._restarts = RestartMemory(store, clock, settings.restarts, boot_id)
        self._canaries = Canaries(store)
        self._wanted = WantedModules(
            store, maker, settings.update_mode, self._restarts, self._canaries
        )
        self._submissions = Submissions(store, self._wanted, self._canaries, self.wake)
        self._steps = StepTasks(
            store,
            executor,
            clock,
            self._restarts,
            (settings.retry_base_seconds, settings.retry_cap_seconds),
            jitter or random.Random(),
            self.wake,
        )
        # Documents: see there.
        self.submit = self._submissions.submit
        self.refuse = self._submissions.refuse
        self.rollback = self._submissions.rollback
        self._unready: dict[str, float] = {}
        self._trouble = ""
        self._observed = Observed(frozenset(), False, {}, ())

    # -- requests ------------------------------------------------------------------------------

    def restart(self, module: str) -> Verdict:
        """Restart a module of the running deployment, whatever its restart policy says.

        A model is loaded anew beside the one that serves, which then ends.
        """
        latest = self._store.latest()
        if latest is None:
            return Verdict(400, "nothing is deployed yet")
        goal = choose_goal(latest, self._store.last_good()).wanted
        specs = {spec.name: spec for spec in self._wanted.manifest(goal).modules}
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
        pins = self._submissions.inherited(manifest)
        if latest is not None and body == latest.body:
            generation, pins = latest.generation, self._store.pinned(latest.generation)
        steps, blocked = steps_of(
            plan(
                self._wanted.with_pins(generation, manifest, pins),
                None if last_good is None else self._wanted.of(last_good),
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
            compare(
                () if running is None else self._wanted.manifest(running).modules, manifest.modules
            ),
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
            await self._steps.stop()

    async def _pass(self) -> float:
        trouble = ""
        try:
            self._submissions.again()
            pause = await self._look_and_act()
        except StoreError as error:
            # What runs goes on; without a place to write its intents the agent changes nothing.
            trouble, pause = str(error), self._settings.idle_poll_seconds
        except StepFailed as error:
            trouble = f"cannot look at the device: {error}"
            pause = self._settings.idle_poll_seconds
        if trouble and trouble != self._trouble:
            log.error("%s", trouble)  # once: it may last for days, with many passes in each minute
        self._trouble = trouble
        return pause

    async def _look_and_act(self) -> float:
        """Raises StoreError, StepFailed."""
        latest = self._store.latest()
        if latest is None:
            self._publish(Snapshot())
            return self._settings.idle_poll_seconds
        observed, scoring = await self._executor.observe()
        # A newer one may have come while we looked.
        latest = self._store.latest() or latest
        self._observed = observed
        self._restarts.note(observed, self._executor.engine_view)
        goal, current = self._decide(latest, observed, scoring)
        wanted = self._wanted.of(goal.wanted)
        self._note_unready(wanted, current)
        self._steps.forget(current)
        self._forget_removed(goal, current, observed)
        self._steps.start(
            goal.wanted.generation, self._wanted.manifest(goal.wanted), wanted, current.steps
        )
        now = self._clock.monotonic()
        if self._canaries.note(wanted, observed.routes, scoring, now):
            self._wake.set()
        self._publish(
            Snapshot(
                goal=goal,
                manifest=self._wanted.manifest(goal.wanted),
                wanted=wanted,
                plan=current,
                observed=observed,
                scoring=scoring,
                failures=_united(self._steps.failures.values(), current.blocked),
                running=self._steps.running(),
                progress=self._steps.progress(),
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
        self._steps.begin(latest.generation)
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
        fatal = current.fatal
        if fatal is not None:
            return "failed", f"{describe(fatal.step)}: {fatal.message}"
        now = self._clock.monotonic()
        wanted = self._wanted.of(deployment)
        self._probation = watch(
            self._probation,
            wanted,
            current,
            observed,
            scoring.boot_id if scoring is not None else "",
            now,
            suspect=self._steps.exposed == deployment.generation,
        )
        return judge(
            self._probation,
            wanted,
            None if goal.fallback is None else self._wanted.of(goal.fallback),
            current,
            observed,
            History(self._restarts.states(), self._unready),
            self._settings.planning(),
            self._settings.probation(),
            now,
        )

    def _plan(self, goal: Goal, observed: Observed) -> Plan:
        fallback = None if goal.fallback is None else self._wanted.of(goal.fallback)
        wanted = self._wanted.of(goal.wanted)
        return plan(
            wanted,
            fallback,
            observed,
            given_up(self._steps.failures)
            if goal.wanted.phase == "failed"
            else self._steps.failures,
            self._clock.monotonic(),
            History(
                self._restarts.states(),
                self._unready,
                self._discard(observed),
                proven=goal.wanted.phase == "good",
                patience=self._restarts.patience(),
            ),
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
        needed |= {step.digest for step in self._steps.running() if isinstance(step, Pull)}
        loaded = {name.partition("@")[2].partition(".")[0] for name in observed.instances}
        stored = self._executor.stored_images()
        needed |= {
            image.digest for image in stored if image.digest.removeprefix("sha256:")[:12] in loaded
        }
        full = frozenset(
            "store" if failure.step.kind == "model" else "engine"
            for failure in self._steps.failures.values()
            if failure.code == DISK_FULL and isinstance(failure.step, Pull)
        )
        return self._housekeeping.look(stored, self._executor.engine_view, needed, full)

    def _note_unready(self, wanted: Wanted, current: Plan) -> None:
        arriving = {
            step.module
            for step in self._steps.running()
            if isinstance(step, (Resolve, Pull)) and step not in self._steps.failures
        }
        arriving |= {
            step.module
            for step in current.steps
            if isinstance(step, (Resolve, Pull)) and step not in self._steps.failures
        }
        self._unready = note_unready(
            self._unready, wanted, current.at_goal, arriving, self._clock.monotonic()
        )

    def _forget_removed(self, goal: Goal, current: Plan, observed: Observed) -> None:
        """Restarts are remembered by the names of modules, which would pile up over the years."""
        if not current.settled:
            return
        kept = {view.module for view in observed.containers.values()}
        for deployment in (goal.wanted, goal.fallback):
            if deployment is not None:
                kept |= {spec.name for spec in self._wanted.manifest(deployment).modules}
        self._restarts.forget(self._restarts.states().keys() - kept)

    def _pause(self, goal: Goal, wanted: Wanted, current: Plan, observed: Observed) -> float:
        now = self._clock.monotonic()
        pause = self._settings.idle_poll_seconds
        canary = self._canaries.running(wanted)
        if self._steps.running() or not observed.scoring_up or not current.settled or canary:
            pause = self._settings.busy_poll_seconds
        times = [
            failure.retry_at
            for failure in current.blocked
            # What holds a module up before any step is no failure of that step: nothing is due.
            if failure.retryable and self._steps.failures.get(failure.step) is failure
        ]
        if current.wake_at is not None:
            times.append(current.wake_at)
        if goal.wanted.phase in ("applying", "probation") and self._probation is not None:
            times += deadlines(self._probation, wanted, self._settings.probation(), now)
        return max(0.01, min([pause, *(time - now for time in times)]))


def _united(noted: Iterable[Failure], blocked: Iterable[Failure]) -> tuple[Failure, ...]:
    """Failures of steps, and what holds modules up before any step: it is the newer truth."""
    found = {failure.step: failure for failure in (*noted, *blocked)}
    return tuple(found.values())
