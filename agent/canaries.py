"""Automatic rollouts of the modules of a deployment, across restarts of anything.

The rules are in `canary.py`; here they meet what the scoring process counts, and the store.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec

from .canary import (
    Canary,
    CanaryPhase,
    CanaryRules,
    Counts,
    Sample,
    advance,
    inherited,
    percent,
)
from .plan import Route, Wanted, WantedModule
from .seams import LoadedModel, ScoringView

log = logging.getLogger(__name__)


class CanaryStore(Protocol):
    def canaries(self, generation: int) -> dict[str, Canary]: ...

    def set_canary(self, generation: int, module: str, canary: Canary) -> None: ...


@dataclass(frozen=True, slots=True)
class CanaryView:
    """For reports."""

    rules: CanaryRules
    canary: Canary

    def document(self) -> dict[str, Any]:
        """JSON-like: phase, percent, steps, and why it was rolled back."""
        document: dict[str, Any] = {
            "phase": self.canary.phase.value,
            "percent": percent(self.rules, self.canary),
            "steps": list(self.rules.steps),
        }
        if self.canary.reason:
            document["reason"] = self.canary.reason
        return document

    def sentence(self) -> str:
        """For people."""
        share = f"{percent(self.rules, self.canary)} % of the requests"
        if self.canary.phase is CanaryPhase.RUNNING:
            return f"canary with {share}"
        if self.canary.phase is CanaryPhase.PROMOTED:
            return f"canary promoted to {share}"
        return f"canary rolled back: {self.canary.reason}"


class Canaries:
    """The canaries of every deployment. Their shares are stored, their measurements are not: after
    a restart of the agent a step is measured anew."""

    def __init__(self, store: CanaryStore) -> None:
        self._store = store
        self._states: dict[int, dict[str, Canary]] = {}

    def inherit(self, old: int, new: int, unchanged: Collection[str]) -> None:
        """Generation `new` goes on where `old` is, for the modules that it leaves `unchanged`."""
        for module, canary in self._of(old).items():
            if module in unchanged:
                self._set(new, module, inherited(canary))

    def shares(self, wanted: Wanted) -> Wanted:
        """`wanted` with the present shares of its canaries."""
        if all(module.options.canary is None for module in wanted.modules):
            return wanted
        states = self._of(wanted.generation)
        modules = tuple(_shared(module, states.get(module.name)) for module in wanted.modules)
        return replace(wanted, modules=modules)

    def note(
        self, wanted: Wanted, routes: Collection[Route], scoring: ScoringView | None, now: float
    ) -> bool:
        """Judge the canaries by what `scoring` counted; whether a share is to change.

        `now`: monotonic seconds. A canary whose present share is not routed yet is left alone.
        """
        if scoring is None:
            return False
        changed = False
        states = self._of(wanted.generation)
        for module in wanted.modules:
            rules = module.options.canary
            if rules is None or not module.running or module.instance is None:
                continue
            before = states.get(module.name, Canary())
            sample = _sample(module, percent(rules, before), routes, scoring, now)
            if sample is None:
                continue
            after = advance(rules, before, sample)
            if (after.step, after.phase) != (before.step, before.phase):
                changed = True
                _tell(module.name, rules, after)
                self._set(wanted.generation, module.name, after)
            states[module.name] = after
        return changed

    def running(self, wanted: Wanted) -> bool:
        """Whether any canary of `wanted` is still under way."""
        views = self.views(wanted).values()
        return any(view.canary.phase is CanaryPhase.RUNNING for view in views)

    def views(self, wanted: Wanted) -> dict[str, CanaryView]:
        """Module -> how far its rollout is."""
        states = self._of(wanted.generation)
        return {
            module.name: CanaryView(module.options.canary, states.get(module.name, Canary()))
            for module in wanted.modules
            if module.options.canary is not None and module.running
        }

    def _of(self, generation: int) -> dict[str, Canary]:
        if generation not in self._states:
            self._states[generation] = self._store.canaries(generation)
        return self._states[generation]

    def _set(self, generation: int, module: str, canary: Canary) -> None:
        self._of(generation)[module] = canary
        self._store.set_canary(generation, module, canary)


def _shared(module: WantedModule, canary: Canary | None) -> WantedModule:
    rules = module.options.canary
    if rules is None:
        return module
    share = percent(rules, canary or Canary())
    return replace(module, options=msgspec.structs.replace(module.options, traffic=share))


def _sample(
    module: WantedModule,
    share: int,
    routes: Collection[Route],
    scoring: ScoringView,
    now: float,
) -> Sample | None:
    """What both sides answered; None while the canary does not have its share."""
    route = next((r for r in routes if r.endpoint == module.options.endpoint), None)
    if route is None:
        return None
    models: Mapping[str, LoadedModel] = {model.view.name: model for model in scoring.models}
    mine = next((t for t in route.targets if t.instance == module.instance), None)
    if mine is None or mine.percent != share or mine.instance not in models:
        return None
    stable = Counts()
    for target in route.targets:
        if target is not mine and not target.mirror and target.instance in models:
            stable += models[target.instance].counts
    return Sample(scoring.boot_id, now, models[mine.instance].counts, stable)


def _tell(module: str, rules: CanaryRules, canary: Canary) -> None:
    if canary.phase is CanaryPhase.ROLLED_BACK:
        log.warning("canary %s is rolled back: %s", module, canary.reason)
    elif canary.phase is CanaryPhase.PROMOTED:
        log.info("canary %s is promoted: it keeps %d %%", module, percent(rules, canary))
    else:
        log.info("canary %s goes on to %d %%", module, percent(rules, canary))
