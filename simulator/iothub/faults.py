"""What can be made to go wrong in a hub, on purpose and countably."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Faults:
    """Each number says how many of the next matching events go wrong; 0 is none."""

    throttle_twin_requests: int = 0
    """Twin reads and reported patches over MQTT answered 429."""
    lose_twin_answers: int = 0
    """Twin requests taken (PUBACK) and carried out, but never answered."""
    drop_before_ack: int = 0
    """Publishes of clients carried out, then the connection dropped instead of a PUBACK."""
    drop_after_ack: int = 0
    """Publishes of clients carried out and acknowledged, then the connection dropped."""
    refuse_connects: int = 0
    """CONNECTs with right credentials answered with return code 5 (not authorized)."""
    forget_sessions: int = 0
    """CONNECTs whose stored subscriptions are forgotten (session present 0)."""
    lose_desired_patches: int = 0
    """Desired-property notifications that are never sent."""

    def take(self, name: str) -> bool:
        """Whether the event `name` (a field) goes wrong this time; counts it."""
        left: int = getattr(self, name)
        if left <= 0:
            return False
        setattr(self, name, left - 1)
        return True
