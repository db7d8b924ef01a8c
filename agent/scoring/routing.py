"""Which instance of an endpoint answers a request: pure functions over one immutable table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

I = TypeVar("I")  # noqa: E741 - an instance, whatever the caller takes for one


@dataclass(frozen=True, slots=True)
class Target(Generic[I]):
    """An instance and its share of the endpoint's requests in percent."""

    instance: I
    version: str
    percent: int


@dataclass(frozen=True, slots=True)
class Route(Generic[I]):
    """An endpoint; the default target, which takes the remainder, comes first.

    `bounds[i]` is the end, as a fraction of 1, of what the i-th of the others takes.
    """

    endpoint: str
    targets: tuple[Target[I], ...]
    bounds: tuple[float, ...]

    @property
    def default(self) -> Target[I]:
        return self.targets[0]


@dataclass(frozen=True, slots=True)
class RoutingTable(Generic[I]):
    """Every endpoint by its name. Replaced as a whole, never changed."""

    routes: Mapping[str, Route[I]] = field(default_factory=dict)


def make_route(endpoint: str, default: Target[I], others: Sequence[Target[I]] = ()) -> Route[I]:
    """A route whose default target takes what `others` leave of 100 percent.

    Raises ValueError when they claim more than 100 percent.
    """
    total = sum(target.percent for target in others)
    if total > 100:
        raise ValueError(
            f"endpoint {endpoint!r}: the targets claim {total} percent, at most 100 are there"
        )
    bounds = []
    claimed = 0
    for target in others:
        claimed += target.percent
        bounds.append(claimed / 100)
    remainder = Target(default.instance, default.version, 100 - total)
    return Route(endpoint, (remainder, *others), tuple(bounds))


def choose(route: Route[I], version: str, draw: float) -> Target[I] | None:
    """The target for a request: of `version` if given (None: not deployed), else by share.

    `draw` is uniform in [0, 1).
    """
    if version:
        return next((target for target in route.targets if target.version == version), None)
    for target, bound in zip(route.targets[1:], route.bounds, strict=True):
        if draw < bound:
            return target
    return route.targets[0]
