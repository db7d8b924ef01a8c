"""Judging a deployment: good after every module stayed healthy, failed when one cannot.

Only modules that the deployment changed can fail it. One that was deployed before and is unwell
keeps a deployment from becoming good, but to go back would not heal it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from .plan_containers import view_of
from .plan_types import (
    Failure,
    History,
    Load,
    Observed,
    Plan,
    Probe,
    Rules,
    Step,
    Wanted,
    WantedModule,
)
from .restarts import NEW, decide

CRASHES_TOLERATED = 2
"""Deaths of the scoring process during one probation; one more fails the deployment."""

Phase = Literal["applying", "probation", "good", "failed"]


@dataclass(frozen=True, slots=True)
class ProbationRules:
    """`seconds`: how long each module must be healthy, where it does not say so itself.

    `exits`: ends of a container by itself that fail the deployment. `healthy_deadline`: seconds
    within which a container must become healthy after it was made.
    """

    seconds: float = 10.0
    exits: int = 3
    healthy_deadline: float = 300.0


@dataclass(frozen=True, slots=True)
class Probation:
    """A deployment under watch; all times are monotonic seconds.

    `settled_since` is None while it is not settled. `healthy_since` has the modules that are at
    their goal, `starting_since` those whose container was made and is not healthy yet.
    """

    generation: int
    settled_since: float | None = None
    boot_id: str = ""
    crashes: int = 0
    healthy_since: Mapping[str, float] = field(default_factory=dict)
    starting_since: Mapping[str, float] = field(default_factory=dict)


def watch(
    before: Probation | None,
    wanted: Wanted,
    plan: Plan,
    observed: Observed,
    boot_id: str,
    now: float,
    *,
    suspect: bool = True,
) -> Probation:
    """The next state of the watch: a module's time starts anew whenever it is not healthy.

    A death of the scoring process counts against the deployment only if it is `suspect`: one of
    its models was given to the process at all.
    """
    if before is None or before.generation != wanted.generation:
        before = Probation(wanted.generation)
    crashes = before.crashes
    restarted = bool(boot_id) and boot_id != before.boot_id
    if restarted and before.boot_id:
        crashes += suspect
    settled = plan.settled and not plan.blocked
    since = before.settled_since if settled else None
    if settled and (since is None or restarted):
        since = now
    models = {module.name for module in wanted.modules if module.scores}
    return Probation(
        wanted.generation,
        since,
        boot_id or before.boot_id,
        crashes,
        {
            name: now if restarted and name in models else before.healthy_since.get(name, now)
            for name in plan.at_goal
        },
        {
            module.name: before.starting_since.get(module.name, now)
            for module in wanted.modules
            if module.running
            and module.name not in plan.at_goal
            and module.name not in before.healthy_since
            and observed.engine == "up"
            and _is_made(module, observed)
        },
    )


def judge(
    watched: Probation,
    wanted: Wanted,
    fallback: Wanted | None,
    plan: Plan,
    observed: Observed,
    history: History,
    planning: Rules,
    rules: ProbationRules,
    now: float,
) -> tuple[Phase, str]:
    """The phase a deployment under watch is in now, and why when it failed."""
    if watched.crashes > CRASHES_TOLERATED:
        return "failed", (
            f"the scoring process died {watched.crashes} times while this deployment was being "
            "applied"
        )
    for module in changed(wanted, fallback):
        reason = _ill(module, watched, observed, history, planning, rules, now)
        if reason:
            return "failed", f"{module.name}: {reason}"
    if watched.settled_since is None:
        return "applying", ""
    return ("good" if good_at(watched, wanted, rules) <= now else "probation"), ""


def good_at(watched: Probation, wanted: Wanted, rules: ProbationRules) -> float:
    """When a settled deployment becomes good if nothing happens (monotonic)."""
    settled = watched.settled_since or 0.0
    times = [
        watched.healthy_since.get(module.name, settled)
        + (rules.seconds if module.probation_seconds is None else module.probation_seconds)
        for module in wanted.modules
    ]
    return max(times, default=settled + rules.seconds)


def changed(wanted: Wanted, fallback: Wanted | None) -> list[WantedModule]:
    """The running modules that are other than in the deployment to fall back to."""
    old = {m.name: m for m in fallback.modules} if fallback is not None else {}
    return [
        module
        for module in wanted.modules
        if module.running and not module.runs_as(old.get(module.name))
    ]


def _ill(
    module: WantedModule,
    watched: Probation,
    observed: Observed,
    history: History,
    planning: Rules,
    rules: ProbationRules,
    now: float,
) -> str:
    """Why this container module fails its deployment; empty while it does not."""
    view = view_of(module, observed)
    if view is None or not _is_made(module, observed):
        return ""
    state = history.restarts.get(module.name, NEW)
    how = f"exit code {view.exit_code}" + (", out of memory" if view.oom_killed else "")
    how += f", {view.error}" if view.error else ""
    clean = view.exit_code == 0 and not view.oom_killed
    if view.state == "exited" and clean:
        verdict = decide(module.policy, state, view, planning.restarts, now)
        if verdict.action == "ended":
            return ""
    if state.exits >= rules.exits and state.container == view.spec:
        return f"it ended by itself {state.exits} times, the last time with {how}"
    if view.state == "exited":
        verdict = decide(module.policy, state, view, planning.restarts, now)
        if verdict.action == "failed" or (verdict.action == "ended" and not clean):
            return f"it ended with {how}, and its restart policy is {module.policy}"
    if view.state == "running" and view.health == "unhealthy":
        log = f": {view.health_log}" if view.health_log else ""
        return f"its health check failed{log}"
    if view.state == "running" and state.trouble_since is not None:
        return "what it serves does not answer any more"
    since = watched.starting_since.get(module.name)
    if since is not None and now - since >= rules.healthy_deadline:
        return f"it did not become healthy within {rules.healthy_deadline:g} s ({view.state})"
    return ""


def _is_made(module: WantedModule, observed: Observed) -> bool:
    view = view_of(module, observed)
    container = module.container
    return view is not None and container is not None and view.spec == container.fingerprint()


def deadlines(watched: Probation, wanted: Wanted, rules: ProbationRules, now: float) -> list[float]:
    """When time alone may change the judgement (monotonic): after `now`, for a module that was not
    changed may be unwell for long without failing the deployment."""
    times = [since + rules.healthy_deadline for since in watched.starting_since.values()]
    if watched.settled_since is not None:
        times.append(good_at(watched, wanted, rules))
    return [time for time in times if time > now]


def given_up(failures: Mapping[Step, Failure]) -> dict[Step, Failure]:
    """The failures of a deployment that failed and has nothing to return to.

    Its healthy modules go on, but what kept failing to load or probe is left alone: a model that
    kills the scoring process must not take the others down again and again.
    """
    return {
        step: replace(failure, retryable=False)
        if isinstance(step, (Load, Probe)) and failure.count > CRASHES_TOLERATED
        else failure
        for step, failure in failures.items()
    }
