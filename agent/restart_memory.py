"""Remembers restarts over the agent's own: which container ended, by whom, and how often."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

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
from .seams import EngineView
from .store import StateStore

BOOT = "boot-id"
READINESS_GRACE_SECONDS = 60.0
"""For which a scoring container that just started need not answer."""

_SHUTDOWN_SECONDS = 20.0


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

    def states(self) -> Mapping[str, RestartState]:
        return self._states

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
            if self._states.pop(module, None) is not None:
                self._store.forget_restart(module)

    def _set(self, module: str, state: RestartState) -> None:
        before = self._states.get(module, NEW)
        if state.lasting() != before.lasting():
            self._store.set_restart(module, state)
        self._states[module] = state
