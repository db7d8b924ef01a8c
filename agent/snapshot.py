"""What the control loop knew at the end of one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .canaries import CanaryView
from .deployments import Goal
from .manifest import Manifest
from .plan import Failure, Observed, Plan, Rules, Step, Wanted
from .restarts import RestartState
from .seams import Progress, ScoringView


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
