"""How long to wait before the next attempt."""

from __future__ import annotations

from random import Random


def full_jitter(attempt: int, base: float, cap: float, random: Random) -> float:
    """Seconds before retry number `attempt` (0 is the first).

    Uniform in [0, min(cap, base * 2**attempt)].
    The whole interval is random, not only its end: a fleet that lost its server at one instant
    comes back spread over the interval instead of in waves.
    Source: M. Brooker, "Exponential Backoff And Jitter", 2015 ("full jitter").
    Raises ValueError when an argument is negative.
    """
    if attempt < 0 or base < 0 or cap < 0:
        raise ValueError(f"attempt={attempt}, base={base}, cap={cap}: none may be negative")
    if base == 0:
        return 0.0
    # Past 2**64 the cap has long won; without the limit a float would overflow after 1024 attempts.
    return random.uniform(0.0, min(cap, base * 2.0 ** min(attempt, 64)))
