"""Remembers restarts over the agent's own: which container ended, by whom, and how often."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .clock import Clock
from .plan_containers import RUNNING_STATES
from .plan_types import Create, Observed, Start, Step, Stop
from .restarts import (
    NEW,
    RestartRules,
    RestartState,
    after_start,
    ask,
    before_start,
    before_stop,
    note,
    was_stopped,
)
from .runtime.container import ContainerView
from .seams import EngineView
from .store import StateStore

BOOT = "boot-id"
READINESS_GRACE_SECONDS = 60.0
"""For which a scoring container that just started need not answer."""

_SHUTDOWN_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class _Drift:
    """The last changed container of a module, the how many-th in a row, and when it was seen."""

    container: str
    count: int
    at: float


class RestartMemory:
    """The RestartState of each container module. `boot_id` differs after each start of the host."""

    def __init__(self, store: StateStore, clock: Clock, rules: RestartRules, boot_id: str) -> None:
        self._store = store
        self._clock = clock
        self._rules = rules
        self._boot_id = boot_id
        self._states = store.restarts()
        self._outages = 0
        self._away = False
        self._looked = False
        self._drifts: dict[str, _Drift] = {}

    def states(self) -> Mapping[str, RestartState]:
        return self._states

    def patience(self) -> dict[str, float]:
        """Until when (monotonic) a changed container is left alone, by module: the first change is
        put right at once, what comes again and again at the pace of restarts."""
        return {
            module: drift.at + self._rules.wait(drift.count - 2)
            for module, drift in self._drifts.items()
            if drift.count > 1
        }

    def _note_drift(self, view: ContainerView, now: float) -> None:
        known = self._drifts.get(view.module)
        if not view.drift or (known is not None and known.container == view.id):
            return
        again = known is not None and now - known.at < self._rules.reset_after
        count = known.count + 1 if known is not None and again else 1
        self._drifts[view.module] = _Drift(view.id, count, now)

    def reloads(self) -> dict[str, int]:
        """How often each module was to be restarted on request: its model is loaded anew."""
        return {module: state.asked for module, state in self._states.items()}

    def note(self, observed: Observed, engine: EngineView) -> None:
        """Look at the containers after every observation. Raises StoreError."""
        now, wall = self._clock.monotonic(), self._clock.now()
        if engine.outages != self._outages:
            self._outages = engine.outages
            self._forgive(now)
            self._away = True
        if engine.state != "up":
            self._away = True
            return
        rebooted = bool(self._boot_id) and self._store.fact(BOOT) != self._boot_id
        revived = rebooted or self._away
        # The engine may have ended with the agent, which runs on it perhaps, and begun again.
        all_ended = not self._looked and not any(
            view.state in RUNNING_STATES for view in observed.containers.values()
        )
        self._away, self._looked = False, True
        for view in observed.containers.values():
            self._note_drift(view, now)
            before = self._states.get(view.module, NEW)
            self._set(
                view.module,
                note(
                    before,
                    view,
                    self._rules,
                    now,
                    wall,
                    unready=self._unready(view.module, before, observed, now),
                    revived=revived or (all_ended and was_stopped(view)),
                ),
            )
        if rebooted:
            self._store.note_fact(BOOT, self._boot_id)

    def _forgive(self, now: float) -> None:
        """What ended just before the engine did was ended by it."""
        for module, state in self._states.items():
            since = state.trouble_since
            if state.exit and since is not None and now - since < _SHUTDOWN_SECONDS:
                ended = replace(state, stopped=True, exits=max(0, state.exits - 1))
                self._set(module, ended)

    def _unready(self, module: str, state: RestartState, observed: Observed, now: float) -> bool:
        if not observed.scoring_up:
            return False
        silent = any(
            view.state == "ready" and not view.healthy
            for name, view in observed.instances.items()
            if name.partition("@")[0] == module
        )
        if not silent or state.trouble_since is not None:
            return silent
        return state.well_since is not None and now - state.well_since >= READINESS_GRACE_SECONDS

    def ask(self, module: str) -> None:
        """A restart is asked for. Raises StoreError."""
        self._set(module, ask(self._states.get(module, NEW)))

    def starting(self, step: Step, *, again: bool) -> None:
        """To be called before a step is carried out, `again` when it failed before."""
        if again:
            return
        wall = self._clock.now()
        if isinstance(step, Create):
            # What an earlier container of the same specification did is not this one's doing.
            asked = self._states.get(step.module, NEW).asked
            fresh = RestartState(step.container.fingerprint(), asked=asked, answered=asked)
            self._set(step.module, fresh)
        elif isinstance(step, Start):
            state = self._states.get(step.module, NEW)
            self._set(step.module, before_start(state, automatic=step.automatic, wall=wall))
        elif isinstance(step, Stop):
            state = self._states.get(step.module, NEW)
            self._set(step.module, before_stop(state, automatic=step.automatic, wall=wall))

    def done(self, step: Step) -> None:
        if isinstance(step, Start):
            self._set(step.module, after_start(self._states.get(step.module, NEW)))

    def failed(self, step: Step) -> None:
        if isinstance(step, Stop):
            state = self._states.get(step.module, NEW)
            self._set(step.module, replace(state, stopped=False))

    def forget(self, modules: Iterable[str]) -> None:
        """Nothing runs any more under these names, and no deployment has them."""
        for module in modules:
            self._drifts.pop(module, None)
            if self._states.pop(module, None) is not None:
                self._store.forget_restart(module)

    def _set(self, module: str, state: RestartState) -> None:
        before = self._states.get(module, NEW)
        if state.lasting() != before.lasting():
            self._store.set_restart(module, state)
        self._states[module] = state
