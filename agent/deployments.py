"""Pure rules about deployments: what a manifest wants, and which deployment is the goal."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .manifest import Manifest
from .plan import Failure, Load, Plan, Probe, Step, Wanted, WantedModule
from .scoring_env import ScoringOptions, scoring_options
from .store import Deployment

CRASHES_TOLERATED = 2
"""Deaths of the scoring process during one probation; one more fails the deployment."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What to converge to. `rolled_back` when it is not the newest deployment."""

    wanted: Deployment
    fallback: Deployment | None
    rolled_back: bool


def choose_goal(latest: Deployment, last_good: Deployment | None) -> Goal:
    """The newest deployment, or the last good one once the newest failed.

    A failed deployment without a last good one stays the goal: its healthy modules go on.
    """
    if latest.phase == "failed" and last_good is not None:
        return Goal(last_good, None, rolled_back=True)
    return Goal(latest, last_good, rolled_back=False)


def wanted_modules(generation: int, manifest: Manifest, pins: Mapping[str, str]) -> Wanted:
    """The modules of `manifest` with the digests that `pins` (module -> digest) holds."""
    modules = []
    for spec in manifest.modules:
        options = scoring_options(spec)
        digest = pins.get(spec.name)
        modules.append(
            WantedModule(
                name=spec.name,
                image=spec.image,
                digest=digest,
                instance=None if digest is None else instance_name(spec.name, digest, options),
                options=options,
                running=spec.status == "running",
                may_pull=spec.image_pull_policy != "never",
            )
        )
    return Wanted(generation, tuple(modules))


def instance_name(module: str, digest: str, options: ScoringOptions) -> str:
    """Names a loaded model by everything that would need a new load when it changes."""
    load = (
        options.backends,
        options.max_batch,
        options.max_delay_us,
        options.timeout_ms,
    )
    tail = hashlib.sha256(repr(load).encode()).hexdigest()[:6]
    return f"{module}@{digest.removeprefix('sha256:')[:12]}.{tail}"


def inherited_pins(
    manifest: Manifest, previous: Manifest | None, pins: Mapping[str, str]
) -> dict[str, str]:
    """Pins of modules that the new manifest leaves as they were: their tag is not resolved again.

    This is edgeAgent's "on-create" pull policy: an unchanged module is not pulled.
    """
    if previous is None:
        return {}
    before = {spec.name: spec for spec in previous.modules}
    return {
        spec.name: pins[spec.name]
        for spec in manifest.modules
        if spec.name in pins and before.get(spec.name) == spec
    }


def fatal_failure(plan: Plan) -> Failure | None:
    """The first failure of the plan that no further attempt can heal."""
    return next((failure for failure in plan.blocked if not failure.retryable), None)


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


@dataclass(frozen=True, slots=True)
class Probation:
    """A deployment under watch. `since` (monotonic seconds) is None while it is not healthy."""

    generation: int
    since: float | None = None
    boot_id: str = ""
    crashes: int = 0


def watch(
    probation: Probation | None,
    generation: int,
    settled: bool,
    boot_id: str,
    now: float,
    *,
    suspect: bool = True,
) -> Probation:
    """The next state of the watch: the time starts anew whenever something is not healthy.

    A death of the scoring process counts against the deployment only if it is `suspect`: one of
    its models was given to the process at all.
    """
    if probation is None or probation.generation != generation:
        probation = Probation(generation)
    crashes = probation.crashes
    if boot_id and probation.boot_id and boot_id != probation.boot_id:
        crashes += suspect
    since = probation.since if settled and probation.since is not None else now if settled else None
    if boot_id != probation.boot_id:
        since = now if settled else None
    return Probation(generation, since, boot_id or probation.boot_id, crashes)
