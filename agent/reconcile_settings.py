"""The numbers of the control loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from .plan import Rules, UpdateMode
from .probation import ProbationRules
from .restarts import RestartRules

BUSY_POLL_SECONDS = 0.5
IDLE_POLL_SECONDS = 2.0


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
