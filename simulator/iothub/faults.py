"""What can be made to go wrong in a hub, on purpose: one object, for tests and the control API.

    hub.faults.drop_before_ack = 2        # the next two PUBLISHes of clients
    hub.faults.set("delay_seconds", 0.5)  # the same by name, checked
    hub.faults.clear()

Counts say how many of the next matching events go wrong and go down by themselves; `delay_seconds`
and `clock_skew_seconds` hold until changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

from ...agent.clock import Clock

_LARGEST_SKEW = 10 * 366 * 86_400.0


@dataclass(slots=True)
class Faults:
    """Each number says how many of the next matching events go wrong; 0 is none."""

    throttle_twin_requests: int = 0
    """Twin reads and reported patches over MQTT answered 429."""
    fail_twin_requests: int = 0
    """Twin reads and reported patches over MQTT answered 500, and not carried out."""
    lose_twin_answers: int = 0
    """Twin requests taken (PUBACK) and carried out, but never answered."""
    drop_before_ack: int = 0
    """Publishes of clients carried out, then the connection dropped instead of a PUBACK."""
    drop_after_ack: int = 0
    """Publishes of clients carried out and acknowledged, then the connection dropped."""
    drop_unhandled: int = 0
    """Publishes of clients lost with their connection: neither carried out nor acknowledged."""
    lose_acks: int = 0
    """Publishes of clients carried out and never acknowledged; the connection stays."""
    drop_before_connack: int = 0
    """CONNECTs with right credentials dropped before CONNACK."""
    drop_after_connack: int = 0
    """Connections dropped right after CONNACK."""
    drop_before_suback: int = 0
    """SUBSCRIBEs carried out, then the connection dropped instead of a SUBACK."""
    drop_after_suback: int = 0
    """SUBSCRIBEs carried out and acknowledged, then the connection dropped."""
    refuse_connects: int = 0
    """CONNECTs with right credentials answered with return code 5 (not authorized)."""
    refuse_subscriptions: int = 0
    """Topic filters of SUBSCRIBEs answered with return code 0x80 (failure)."""
    forget_sessions: int = 0
    """CONNECTs whose stored subscriptions are forgotten (session present 0)."""
    expire_tokens: int = 0
    """CONNECTs with a right token that counts as expired as soon as they are connected."""
    lose_desired_patches: int = 0
    """Desired-property notifications that are never sent."""
    reorder_desired_patches: int = 0
    """Desired-property notifications held back until after the next one of the same client."""
    repeat_desired_patches: int = 0
    """Desired-property notifications sent twice."""
    lose_method_answers: int = 0
    """Answers of clients to direct methods that are thrown away: the caller times out."""
    lose_c2d_acks: int = 0
    """PUBACKs of cloud-to-device messages that do not count: the message is sent again."""
    fail_uploads: int = 0
    """File-upload requests of devices answered 503."""
    delay_seconds: float = 0.0
    """How much later everything from the hub to its clients is sent; the order stays."""
    clock_skew_seconds: float = 0.0
    """How far the hub's wall clock is ahead (behind: negative): tokens expire early (late)."""

    def take(self, name: str) -> bool:
        """Whether the event `name` (a field) goes wrong this time; counts it."""
        left: int = getattr(self, name)
        if left <= 0:
            return False
        setattr(self, name, left - 1)
        return True

    def set(self, name: str, value: float) -> None:
        """Raises ValueError for a name that is no fault or a value it cannot have."""
        kinds: dict[str, Any] = {field.name: field.default for field in fields(self)}
        if name not in kinds:
            raise ValueError(f"there is no fault {name!r}; there are {', '.join(sorted(kinds))}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} is a number, not {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} is a number, not {value}")
        if isinstance(kinds[name], int) and (value != int(value) or value < 0):
            raise ValueError(f"{name} counts events: a whole number from 0, not {value}")
        if name == "delay_seconds" and not 0 <= value <= 3600:
            raise ValueError(f"delay_seconds is from 0 to 3600, not {value}")
        if name == "clock_skew_seconds" and abs(value) > _LARGEST_SKEW:
            raise ValueError(f"clock_skew_seconds is up to ten years, not {value:g}")
        setattr(self, name, type(kinds[name])(value))

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        for field in fields(self):
            setattr(self, field.name, field.default)

    def as_json(self) -> dict[str, Any]:
        """The values now, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class SkewedClock:
    """The given clock, with the wall time as wrong as the faults say."""

    def __init__(self, clock: Clock, faults: Faults) -> None:
        self._clock = clock
        self._faults = faults

    def monotonic(self) -> float:
        return self._clock.monotonic()

    def now(self) -> datetime:
        return self._clock.now() + timedelta(seconds=self._faults.clock_skew_seconds)
