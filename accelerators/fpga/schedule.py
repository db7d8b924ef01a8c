"""Which overlay has the fabric next, who is served, and who is refused.

Pure: moments are arguments, in seconds of one clock. A swap costs what configuring takes (tens of
milliseconds), so work for the loaded overlay goes first, within limits:

- hysteresis: an overlay keeps the fabric for `hold` as long as there is work for it, and a moment
  (`linger`) beyond its last request, since the client that got the answer may send the next one;
- no starvation: with K overlays, the oldest request of each is served at most
  `patience + K * (hold + configuration + one request)` after it came first in its overlay's line;
- deadlines: a request that configuring would make late is refused at once, so that the CPU can
  answer it. An overlay that was refused several times is configured without a request (prefetch),
  at once when the fabric is idle, after `patience` when it is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

_T = TypeVar("_T")
Overlay = int
"""What stands for an overlay here; packages with the same identity have the same."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits in seconds; see above. `prefetch_after` is a number of refusals."""

    patience: float = 0.25
    hold: float = 0.1
    linger: float = 0.002
    prefetch_after: int = 3


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in line. `overlay` None: work on the fabric as such, which goes first."""

    ticket: int
    overlay: Overlay | None
    arrived: float
    deadline: float = math.inf


@dataclass(frozen=True, slots=True)
class Demand:
    """Refusals for the sake of configuring, since the overlay was loaded last."""

    since: float
    latest: float
    refusals: int


@dataclass(frozen=True, slots=True)
class Fabric:
    """What is loaded since when, when it was last used, and who waits, in order of arrival.

    `costs` are seconds that configuring took; `left` says when an overlay was last taken out.
    Overlays with one of `statics` in common follow each other by partial bitstreams, for
    `partial_costs`.
    """

    loaded: Overlay | None = None
    since: float = -math.inf
    used: float = -math.inf
    waiting: tuple[Waiting, ...] = ()
    costs: Mapping[Overlay, float] = field(default_factory=dict)
    left: Mapping[Overlay, float] = field(default_factory=dict)
    demands: Mapping[Overlay, Demand] = field(default_factory=dict)
    statics: Mapping[Overlay, object] = field(default_factory=dict)
    partial_costs: Mapping[Overlay, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Grant:
    """The free fabric goes to this request; where its overlay is not loaded, it is configured."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Prefetch:
    """The free fabric is configured with an overlay that was refused to its clients."""

    overlay: Overlay


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing is done before this moment, unless something arrives."""

    until: float


Decision = Grant | Prefetch | Wait


def decide(fabric: Fabric, policy: Policy, now: float) -> Decision:
    """What a free fabric does next. Those in `hopeless` are taken to be out of the line."""
    own = [w for w in fabric.waiting if w.overlay is None]
    if own:
        return Grant(own[0].ticket)
    mine = [w for w in fabric.waiting if w.overlay == fabric.loaded]
    others = [w for w in fabric.waiting if w.overlay != fabric.loaded]
    wished = _wished(fabric, policy, now)
    if mine and now < fabric.since + policy.hold:
        return Grant(mine[0].ticket)
    due = {w.overlay for w in others if now >= w.arrived + policy.patience}
    due |= {o for o, demand in wished.items() if now >= demand.since + policy.patience}
    if due:
        # Least recently loaded first: each other overlay comes once at most before any of them.
        overlay = min(due, key=lambda o: (_left(fabric, o), o))
        return _turn_to(overlay, others)
    pressed = [w for w in others if now >= _last_call(fabric, policy, w)]
    if pressed:
        return Grant(min(pressed, key=lambda w: (w.deadline, w.ticket)).ticket)
    if mine:
        return Grant(mine[0].ticket)
    idle = fabric.loaded is None or now >= fabric.used + policy.linger
    if idle and others:
        return Grant(others[0].ticket)
    if idle and wished and now >= fabric.since + policy.hold:
        return _turn_to(min(wished, key=lambda o: (_left(fabric, o), o)), others)
    return Wait(_next_moment(fabric, policy, others, wished, now))


def hopeless(fabric: Fabric, policy: Policy, now: float) -> tuple[Waiting, ...]:
    """Who cannot be served by the deadline any more, given what has to be configured."""
    in_use = any(w.overlay == fabric.loaded for w in fabric.waiting)
    free = max(now, fabric.since + policy.hold) if in_use else now
    gone = []
    for w in fabric.waiting:
        if w.overlay is None or w.overlay == fabric.loaded:
            late = now >= w.deadline
        else:
            late = now >= w.deadline or free + _cost(fabric, w.overlay) > w.deadline
        if late:
            gone.append(w)
    return tuple(gone)


def next_loss(fabric: Fabric) -> float:
    """When the next request in line becomes hopeless, unless something changes."""
    return min(
        (
            w.deadline - (0.0 if w.overlay == fabric.loaded else _cost(fabric, w.overlay))
            for w in fabric.waiting
        ),
        default=math.inf,
    )


def arrived(fabric: Fabric, request: Waiting) -> Fabric:
    """The fabric with one more in line."""
    return replace(fabric, waiting=(*fabric.waiting, request))


def without(fabric: Fabric, tickets: Iterable[int]) -> Fabric:
    """The fabric without these in line."""
    gone = set(tickets)
    return replace(fabric, waiting=tuple(w for w in fabric.waiting if w.ticket not in gone))


def refused(fabric: Fabric, policy: Policy, overlay: Overlay, now: float) -> Fabric:
    """The fabric after a request was refused because of what configuring `overlay` takes."""
    old = fabric.demands.get(overlay)
    if old is None or now > old.latest + policy.patience:
        demand = Demand(now, now, 1)
    else:
        demand = Demand(old.since, now, old.refusals + 1)
    return replace(fabric, demands={**fabric.demands, overlay: demand})


def current(fabric: Fabric, policy: Policy, now: float) -> Fabric:
    """The fabric without demands that nobody has repeated for a while."""
    fresh = {o: d for o, d in fabric.demands.items() if now <= d.latest + policy.patience}
    return fabric if len(fresh) == len(fabric.demands) else replace(fabric, demands=fresh)


def answered(fabric: Fabric, overlay: Overlay) -> Fabric:
    """The fabric once a demand is being met: should that fail, it has to be made anew."""
    return replace(fabric, demands={o: d for o, d in fabric.demands.items() if o != overlay})


def worked(fabric: Fabric, loaded: Overlay | None, now: float) -> Fabric:
    """The fabric after somebody had it, who left `loaded` in it."""
    if loaded == fabric.loaded:
        return replace(fabric, used=now)
    left = dict(fabric.left)
    if fabric.loaded is not None:
        left[fabric.loaded] = now
    demands = {o: demand for o, demand in fabric.demands.items() if o != loaded}
    return replace(fabric, loaded=loaded, since=now, used=now, left=left, demands=demands)


def described(fabric: Fabric, overlay: Overlay, static: object) -> Fabric:
    """The fabric knowing of which design the overlay is a part."""
    return replace(fabric, statics={**fabric.statics, overlay: static})


def configured(
    fabric: Fabric, overlay: Overlay, seconds: float, *, partial: bool = False
) -> Fabric:
    """The fabric knowing how long configuring took: half of what was known, half of this."""
    costs = fabric.partial_costs if partial else fabric.costs
    costs = {**costs, overlay: (costs.get(overlay, seconds) + seconds) / 2}
    return replace(fabric, partial_costs=costs) if partial else replace(fabric, costs=costs)


def forgotten(fabric: Fabric, overlay: Overlay) -> Fabric:
    """The fabric without an overlay that nobody has loaded any more."""

    def others(known: Mapping[Overlay, _T]) -> dict[Overlay, _T]:
        return {other: value for other, value in known.items() if other != overlay}

    return replace(
        fabric,
        costs=others(fabric.costs),
        left=others(fabric.left),
        demands=others(fabric.demands),
        statics=others(fabric.statics),
        partial_costs=others(fabric.partial_costs),
    )


def _turn_to(overlay: Overlay | None, others: list[Waiting]) -> Decision:
    first = next((w for w in others if w.overlay == overlay), None)
    if first is not None:
        return Grant(first.ticket)
    assert overlay is not None
    return Prefetch(overlay)


def _cost(fabric: Fabric, overlay: Overlay | None) -> float:
    if overlay is None:
        return 0.0
    loaded = None if fabric.loaded is None else fabric.statics.get(fabric.loaded)
    if loaded is not None and loaded == fabric.statics.get(overlay):
        return fabric.partial_costs.get(overlay, 0.0)
    return fabric.costs.get(overlay, 0.0)


def _left(fabric: Fabric, overlay: Overlay | None) -> float:
    return -math.inf if overlay is None else fabric.left.get(overlay, -math.inf)


def _last_call(fabric: Fabric, policy: Policy, request: Waiting) -> float:
    """When configuring has to start at the latest, with a little time for the request itself."""
    return request.deadline - _cost(fabric, request.overlay) - 2 * policy.linger


def _wished(fabric: Fabric, policy: Policy, now: float) -> dict[Overlay, Demand]:
    return {
        overlay: demand
        for overlay, demand in fabric.demands.items()
        if overlay != fabric.loaded
        and demand.refusals >= policy.prefetch_after
        and now <= demand.latest + policy.patience
    }


def _next_moment(
    fabric: Fabric,
    policy: Policy,
    others: list[Waiting],
    wished: Mapping[Overlay, Demand],
    now: float,
) -> float:
    moments = [w.arrived + policy.patience for w in others]
    moments += [_last_call(fabric, policy, w) for w in others]
    if others or wished:
        moments += [fabric.used + policy.linger, fabric.since + policy.hold]
    return min((moment for moment in moments if moment > now), default=math.inf)
