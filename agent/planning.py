"""One act of planning: see `plan.plan`, which everybody else calls."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from .plan_containers import (
    RUNNING_STATES,
    Move,
    advance,
    clear,
    has_image,
    is_healthy,
    stop,
    strangers,
    view_of,
)
from .plan_models import (
    announced_endpoints,
    instance_state,
    instance_step,
    ready_endpoints,
    routes_of,
    wanted_endpoints,
    wanted_routes,
)
from .plan_types import (
    Announce,
    Create,
    Failure,
    History,
    Load,
    Observed,
    Plan,
    Probe,
    Pull,
    Resolve,
    Rules,
    Step,
    Switch,
    Unload,
    Wanted,
    WantedModule,
    subject,
)
from .runtime.container import ContainerSpec
from .startup import holding


class Planning:
    """One call of `plan`."""

    def __init__(
        self,
        wanted: Wanted,
        fallback: Wanted | None,
        observed: Observed,
        failures: Mapping[Step, Failure],
        now: float,
        history: History,
        rules: Rules,
    ) -> None:
        self.wanted = wanted
        self.fallback = fallback
        self.observed = observed
        self.failures = failures
        self.now = now
        self.history = history
        self.rules = rules
        self.running = [module for module in wanted.modules if module.running]
        self.old = {
            module.name: module
            for module in (fallback.modules if fallback is not None else ())
            if module.running
        }
        self.missing = {m.name for m in self.running if not self._is_here(m)}
        # Until all images are here, nothing that serves now is changed.
        self.frozen = wanted.update_mode == "WaitForAllPulls" and bool(self.missing)
        # What is no longer wanted goes when it is certain that the new deployment can begin.
        refused = any(module.refused and not self._is_old(module) for module in self.running)
        self.holding = self.frozen or (fallback is not None and (bool(self.missing) or refused))
        self.at_goal = frozenset(m.name for m in wanted.modules if self._at_goal(m))
        self.steps: list[Step] = []
        self.old_steps: set[Step] = set()
        self.stopped_by: list[Failure] = []
        self.waits: dict[str, str] = {}
        self.times: list[float] = []

    def plan(self) -> Plan:
        if self.observed.engine == "up" and not self.missing and not self.holding:
            self._clear_away()
        for module in self.wanted.modules:
            if not module.running:
                if self.observed.engine == "up" and not self.frozen:
                    self._add(stop(module.name, self.observed, "the deployment wants it stopped"))
                continue
            self._bring(module)
            self._run_container(module)
            self._serve(module)
        if self.missing or self.holding:
            self._keep_running()
        kept = self._keep_serving()
        self._announce()
        self._route(kept)
        settled = (
            not self.steps
            and not self.waits
            and not self.stopped_by
            and self.at_goal == {module.name for module in self.wanted.modules}
        )
        for step in self.history.discard:
            if not self._needs(step.digest):
                self._add(step)
        held = [self.failures[step] for step in self.steps if step in self.failures]
        waiting = [f for f in held if f.retry_at > self.now or not self._tries_again(f)]
        later = {failure.step for failure in waiting}
        # What is tried although it cannot succeed as things are stays a reason meanwhile.
        lost = [f for f in held if not f.retryable and f not in waiting]
        self.times += [f.retry_at for f in waiting if not f.retryable and self._tries_again(f)]
        blocked = (*self.stopped_by, *waiting, *lost)
        fatal = (f for f in blocked if not f.retryable and f.step not in self.old_steps)
        return Plan(
            tuple(step for step in self.steps if step not in later),
            blocked,
            settled,
            self.at_goal,
            tuple(sorted(self.waits.items())),
            min(self.times, default=None),
            next(fatal, None),
        )

    def _tries_again(self, failure: Failure) -> bool:
        # A model that does not load may take the scoring process with it: that is left alone.
        proven = self.history.proven or failure.step in self.old_steps
        return failure.retryable or (proven and not isinstance(failure.step, (Load, Probe)))

    def _is_old(self, module: WantedModule) -> bool:
        """Whether the last good deployment runs it just so."""
        return module.runs_as(self.old.get(module.name))

    def _add(self, step: Step | None, module: WantedModule | None = None) -> None:
        """One step per subject: the first one that was found. `module`: what it is to bring on."""
        if step is not None and subject(step) not in map(subject, self.steps):
            self.steps.append(step)
            if module is not None and self._is_old(module):
                self.old_steps.add(step)

    # -- images --------------------------------------------------------------------------------

    def _is_here(self, module: WantedModule) -> bool:
        return bool(module.digest and module.kind and has_image(module, self.observed))

    def _bring(self, module: WantedModule) -> None:
        if not module.digest or not module.kind:
            self._add(
                Resolve(self.wanted.generation, module.name, module.image, not module.may_pull)
            )
            return
        if module.contained:
            trouble = self._trouble(module)
            if trouble is not None:
                self.stopped_by.append(trouble)
                if self._is_old(module):
                    self.old_steps.add(trouble.step)
                return
        if module.name in self.missing:
            self._add(
                Pull(module.name, module.image, module.digest, module.kind, not module.may_pull),
                module,
            )

    def _trouble(self, module: WantedModule) -> Failure | None:
        """Why no container of this module can be made now, whatever is tried."""
        engine = self.observed.engine
        if module.refused:
            message, retryable, code = module.refused, False, "REFUSED"
        elif engine == "none":
            message = f"this device has no container engine: {self.observed.engine_error}"
            retryable, code = False, "NO_ENGINE"
        elif engine == "down":
            message = f"the container engine does not answer: {self.observed.engine_error}"
            retryable, code = True, "ENGINE_DOWN"
        else:
            return None
        spec = module.container or ContainerSpec(
            module.name, module.name, module.image, module.digest or "", "{}"
        )
        return Failure(Create(module.name, spec), 1, self.now, message, retryable, code)

    def _needs(self, digest: str) -> bool:
        modules = [*self.wanted.modules, *(self.fallback.modules if self.fallback else ())]
        return any(module.digest == digest for module in modules)

    # -- containers ----------------------------------------------------------------------------

    def _run_container(self, module: WantedModule) -> None:
        if self.observed.engine != "up" or module.kind == "model":
            return
        view = view_of(module, self.observed)
        there = (
            view is not None
            and module.container is not None
            and view.spec == module.container.fingerprint()
        )
        if (
            module.contained
            and module.container is not None
            and not module.refused
            and module.name not in self.missing
            and (there or not self.frozen)
        ):
            # One that was renamed, or of an earlier agent: it may hold what the new one needs.
            other = clear(module.name, self.observed, module.container.name)
            move = (
                advance(module, self.observed, self.history, self.rules, self.now)
                if other is None
                else Move(other, fresh=True)
            )
            if self._move(module, move) or there:
                return
        if module.name in self.old:
            self._move(self.old[module.name], self._advance_old(self.old[module.name]))

    def _keep_running(self) -> None:
        """What the new deployment lacks goes on until all of its images are here."""
        decided = {
            module.name
            for module in self.wanted.modules
            if module.kind != "model" and (module.running or not self.frozen)
        }
        for name, module in self.old.items():
            if name not in decided:
                self._move(module, self._advance_old(module))

    def _advance_old(self, module: WantedModule) -> Move:
        """Keeps a module of the last good deployment running in place of what is not there yet."""
        if (
            self.observed.engine != "up"
            or not module.contained
            or module.refused
            or not has_image(module, self.observed)
        ):
            return Move()
        return advance(module, self.observed, self.history, self.rules, self.now)

    def _move(self, module: WantedModule, move: Move) -> bool:
        """Whether the move may be made now; False also where there is none."""
        if move.wake_at is not None:
            self.times.append(move.wake_at)
        if move.step is None or (move.fresh and self._waits(module)):
            return False
        self._add(move.step, module)
        return True

    def _waits(self, module: WantedModule) -> bool:
        """Whether earlier start groups come first."""
        ready: Collection[str] = self.at_goal
        if self.old.get(module.name) == module:
            # It changes nothing: what runs of the last good deployment is enough for it.
            ready = self.at_goal | self._old_healthy()
        others = holding(
            module,
            self.wanted.modules,
            ready,
            self.history.unready,
            self.rules.startup_wait,
            self.now,
        )
        if others:
            names = ", ".join(sorted(other.name for other in others))
            self.waits[module.name] = f"waits for {names}, which starts before it"
            since = [self.history.unready.get(other.name, self.now) for other in others]
            self.times.append(max(since) + self.rules.startup_wait)
        return bool(others)

    def _old_healthy(self) -> set[str]:
        return {
            name
            for name, module in self.old.items()
            if (
                is_healthy(module, self.observed, self.history, self.rules, self.now)
                if module.contained
                else instance_state(self.observed, module.instance) == "ready"
            )
        }

    def _clear_away(self) -> None:
        """Containers that nobody wants; requests stop coming to them first."""
        modules = {m.name for m in self.wanted.modules if m.kind != "model"}
        wanted = {m.instance for m in self.wanted.modules}
        routed = {t.instance for route in self.observed.routes for t in route.targets}
        serving = {
            instance.partition("@")[0]
            for instance in (*self.observed.instances, *routed)
            if instance not in wanted
        }
        for name in strangers(modules, self.observed):
            if name not in serving:
                self._add(clear(name, self.observed))

    # -- the scoring process -------------------------------------------------------------------

    def _serve(self, module: WantedModule) -> None:
        if not module.scores or module.name in self.missing:
            return
        step = self._instance_step(module)
        if isinstance(step, Load):
            same = self.old.get(module.name)
            if self.frozen and (same is None or same.instance != module.instance):
                return
            if self._waits(module):
                return
        self._add(step, module)

    def _instance_step(self, module: WantedModule) -> Step | None:
        if module.contained:
            view = view_of(module, self.observed)
            if view is None or view.state != "running":
                return None
            if instance_state(self.observed, module.instance) != "ready" and not is_healthy(
                module, self.observed, self.history, self.rules, self.now
            ):
                return None
        return instance_step(module, self.observed)

    def _keep_serving(self) -> list[WantedModule]:
        """The modules of the last good deployment that are still needed; loads them again."""
        ready = ready_endpoints(self.wanted, self.observed)
        endpoints = wanted_endpoints(self.wanted)
        kept = [
            module
            for module in self.old.values()
            if module.scores
            and self._is_here(module)
            and (
                module.options.endpoint in endpoints - ready
                or (self.holding and module.options.endpoint not in endpoints)
            )
        ]
        for module in kept:
            self._add(self._instance_step(module), module)
        return kept

    def _announce(self) -> None:
        if not self.observed.scoring_up or self.observed.announced is None:
            return
        modules = list(self.running)
        if self.holding:
            # What was served goes on until the new deployment can begin.
            modules += self.old.values()
        endpoints = announced_endpoints(modules)
        if endpoints != self.observed.announced:
            self._add(Announce(endpoints))

    def _route(self, kept: Iterable[WantedModule]) -> None:
        observed = self.observed
        if not observed.scoring_up:
            return
        routes = wanted_routes(self.wanted, self.fallback, observed)
        if self.holding:
            served = {route.endpoint for route in routes} | wanted_endpoints(self.wanted)
            old = routes_of(self.fallback.modules) if self.fallback is not None else {}
            present = {**old, **{route.endpoint: route for route in observed.routes}}
            stay = [
                route
                for route in present.values()
                if route.endpoint not in served
                and all(
                    instance_state(observed, target.instance) == "ready" for target in route.targets
                )
            ]
            routes = tuple(sorted((*routes, *stay), key=lambda route: route.endpoint))
        if routes != observed.routes:
            self._add(Switch(routes))
        routed = {
            target.instance for route in (*routes, *observed.routes) for target in route.targets
        }
        needed = {module.instance for module in (*self.running, *kept)}
        for name in sorted(observed.instances):
            if name not in routed | needed:
                self._add(Unload(name))

    # -- the goal ------------------------------------------------------------------------------

    def _at_goal(self, module: WantedModule) -> bool:
        observed = self.observed
        if not module.running:
            return not any(
                view.module == module.name and view.state in RUNNING_STATES
                for view in observed.containers.values()
            )
        if not module.digest or not module.kind:
            return False
        if module.contained and not (
            observed.engine == "up"
            and is_healthy(module, observed, self.history, self.rules, self.now)
        ):
            return False
        return not module.scores or instance_state(observed, module.instance) == "ready"
