"""What to do next: a pure function from what is wanted and what is seen to the steps between.

Nothing here remembers a plan. Every pass plans anew from what is observed, so a step that was lost
to a crash is simply planned again; every step may therefore run twice and must be idempotent.
"""

from __future__ import annotations

from collections.abc import Mapping

from .plan_models import routes_of, wanted_routes
from .plan_types import (
    Announce,
    Collect,
    Create,
    Failure,
    History,
    InstanceView,
    Kind,
    Load,
    Observed,
    Plan,
    Probe,
    Pull,
    Remove,
    RemoveImage,
    Resolve,
    Route,
    Rules,
    Start,
    Step,
    Stop,
    Switch,
    Target,
    Unload,
    UpdateMode,
    Wanted,
    WantedEndpoint,
    WantedModule,
    describe,
    module_of,
    subject,
)
from .planning import Planning

__all__ = [
    "Announce",
    "Collect",
    "Create",
    "Failure",
    "History",
    "InstanceView",
    "Kind",
    "Load",
    "Observed",
    "Plan",
    "Probe",
    "Pull",
    "Remove",
    "RemoveImage",
    "Resolve",
    "Route",
    "Rules",
    "Start",
    "Step",
    "Stop",
    "Switch",
    "Target",
    "Unload",
    "UpdateMode",
    "Wanted",
    "WantedEndpoint",
    "WantedModule",
    "describe",
    "module_of",
    "plan",
    "routes_of",
    "subject",
    "wanted_routes",
]


def plan(
    wanted: Wanted,
    fallback: Wanted | None,
    observed: Observed,
    failures: Mapping[Step, Failure],
    now: float,
    history: History | None = None,
    rules: Rules | None = None,
) -> Plan:
    """The steps that bring `observed` to `wanted`.

    While a module of `wanted` is not there yet, what `fallback` (the last good deployment) runs in
    its place is wanted too: a restart in the middle of an update finds the old version again.
    """
    if fallback is not None and fallback.generation == wanted.generation:
        fallback = None
    return Planning(
        wanted, fallback, observed, failures, now, history or History(), rules or Rules()
    ).plan()
