"""The order in which modules start: groups of equal startupOrder, one after the other."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from .plan_types import Wanted, WantedModule


def holding(
    module: WantedModule,
    wanted: Iterable[WantedModule],
    ready: Collection[str],
    unready: Mapping[str, float],
    wait: float,
    now: float,
) -> list[WantedModule]:
    """The modules of earlier groups that `module` still waits for.

    One that was not ready for `wait` seconds holds nobody back any more: a module that never gets
    ready must not keep the others from starting. `wait` 0: nobody waits.
    """
    if wait <= 0:
        return []
    return [
        other
        for other in wanted
        if other.running
        and other.order < module.order
        and other.name not in ready
        and now < unready.get(other.name, now) + wait
    ]


def note_unready(
    before: Mapping[str, float],
    wanted: Wanted,
    ready: Collection[str],
    arriving: Collection[str],
    now: float,
) -> dict[str, float]:
    """Since when each module is not ready. The images of those in `arriving` are on their way:
    for them the time has not begun."""
    return {
        module.name: before.get(module.name, now)
        for module in wanted.modules
        if module.running and module.name not in ready and module.name not in arriving
    }
