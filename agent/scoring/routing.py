"""Which instance of an endpoint answers a request: pure functions over one immutable table."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

I = TypeVar("I")  # noqa: E741 - an instance, whatever the caller takes for one

SESSION_HEADER = "x-gatelet-session"
DEPLOYMENT_HEADER = "azureml-model-deployment"
"""Names the target that is to answer, as Azure ML's online endpoints have it."""


@dataclass(frozen=True, slots=True)
class Target(Generic[I]):
    """An instance and its share of the endpoint's requests in percent.

    `name`: of the module that it belongs to. `mirror`: percent of the endpoint's requests that it
    gets a copy of; its answer may differ by `tolerance` (relative and absolute).
    """

    instance: I
    version: str
    percent: int
    name: str = ""
    mirror: int = 0
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class Route(Generic[I]):
    """An endpoint; the default target, which takes the remainder, comes first.

    `bounds[i]` is the end, as a fraction of 1, of what the i-th of the others takes. `sticky`: the
    header (lower case) whose equal values go to one target. `mirrors`: who gets copies.
    """

    endpoint: str
    targets: tuple[Target[I], ...]
    bounds: tuple[float, ...]
    sticky: str = SESSION_HEADER
    mirrors: tuple[Target[I], ...] = ()

    @property
    def default(self) -> Target[I]:
        return self.targets[0]


@dataclass(frozen=True, slots=True)
class RoutingTable(Generic[I]):
    """Every endpoint by its name. Replaced as a whole, never changed.

    `coming`: endpoints that the deployment wants, routed or not, and what clients must show there.
    """

    routes: Mapping[str, Route[I]] = field(default_factory=dict)
    coming: Mapping[str, str] = field(default_factory=dict)

    @property
    def endpoints(self) -> frozenset[str]:
        """What is routed or wanted."""
        return frozenset((*self.routes, *self.coming))

    @property
    def absent(self) -> frozenset[str]:
        """What is wanted and not routed yet."""
        return frozenset(self.coming.keys() - self.routes.keys())


def make_route(
    endpoint: str, default: Target[I], others: Sequence[Target[I]] = (), sticky: str = ""
) -> Route[I]:
    """A route whose default target takes what `others` leave of 100 percent.

    Raises ValueError when they claim more than 100 percent, or when the default is a mirror.
    """
    total = sum(target.percent for target in others)
    if total > 100:
        raise ValueError(
            f"endpoint {endpoint!r}: the targets claim {total} percent, at most 100 are there"
        )
    if default.mirror:
        raise ValueError(
            f"endpoint {endpoint!r}: the default target answers requests, it cannot mirror them"
        )
    bounds = []
    claimed = 0
    for target in others:
        claimed += target.percent
        bounds.append(claimed / 100)
    targets = (replace(default, percent=100 - total), *others)
    mirrors = tuple(target for target in others if target.mirror)
    return Route(endpoint, targets, tuple(bounds), sticky.lower() or SESSION_HEADER, mirrors)


def position(value: str, salt: str) -> float:
    """Where `value` stands in [0, 1): evenly spread, and the same on every device and day.

    `salt` keeps those who are first at one endpoint from being first at all of them.
    """
    digest = hashlib.blake2b(value.encode("utf-8", "replace"), digest_size=8, key=_key(salt))
    # 53 bits: what a float holds exactly, so that the result stays below 1.
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2**53


def _key(salt: str) -> bytes:
    return hashlib.blake2b(salt.encode("utf-8", "replace"), digest_size=16).digest()


def place(route: Route[I], headers: Mapping[str, str], draw: Callable[[], float]) -> float:
    """Where a request stands in [0, 1) among those of the endpoint: by its session, else by lot.

    While there is one target besides the default, raising its share moves nobody off it.
    """
    if not route.bounds:
        return 0.0
    session = headers.get(route.sticky)
    return position(session, route.endpoint) if session else draw()


def choose(route: Route[I], version: str, at: float, name: str = "") -> Target[I] | None:
    """The target for a request that stands `at` (in [0, 1)): of `version` and `name` where these
    are given (None: not deployed), else by share."""
    if version or name:
        return next(
            (
                target
                for target in route.targets
                if version in ("", target.version) and name in ("", target.name)
            ),
            None,
        )
    for target, bound in zip(route.targets[1:], route.bounds, strict=True):
        if at < bound:
            return target
    return route.targets[0]


def copies(
    route: Route[I], answered: Target[I], draw: Callable[[], float]
) -> tuple[Target[I], ...]:
    """The mirrors that get a copy of a request which `answered` has answered."""
    return tuple(
        target
        for target in route.mirrors
        if target is not answered and draw() * 100 < target.mirror
    )
