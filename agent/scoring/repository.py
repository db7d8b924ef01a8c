"""Triton's model repository, configuration and statistics extensions, read off the routing table.

What is served is the deployment's to say: loading and unloading only move its models into memory
and out of it, where there is a memory budget, and succeed otherwise where they ask for what is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from ...accelerators.errors import BackendError
from .dataplane import DataPlane
from .errors import Code, ScoringError
from .instances import Instance
from .residency import BudgetedSession

_LOAD_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One version of a model in the index. `reason` says why it is not ready.

    One that is not there yet has no version.
    """

    name: str
    version: str
    ready: bool
    reason: str = ""

    @property
    def state(self) -> str:
        """Triton's word for it."""
        if self.ready:
            return "READY"
        return "UNAVAILABLE" if self.version else "LOADING"


def served(plane: DataPlane, name: str = "", version: str = "") -> Iterator[tuple[str, Instance]]:
    """Endpoint and instance of a model's versions, or of every model.

    Raises ScoringError NOT_FOUND when `name` or `version` is given and not deployed.
    """
    if name:
        plane.model_metadata(name, version)
    for route in plane.table.routes.values():
        if name in ("", route.endpoint):
            for target in route.targets:
                if version in ("", target.version):
                    yield route.endpoint, target.instance


def index(plane: DataPlane, only_ready: bool = False) -> list[Entry]:
    entries = []
    for endpoint, instance in served(plane):
        ready = instance.healthy and plane.model_ready(endpoint, instance.version)
        reason = "" if ready else "no backend can answer now"
        if ready or not only_ready:
            entries.append(Entry(endpoint, instance.version, ready, reason))
    if not only_ready:
        absent = sorted(plane.table.absent)
        entries += [Entry(endpoint, "", False, "being loaded") for endpoint in absent]
    return entries


def load(plane: DataPlane, name: str, parameters: bool) -> None:
    """Raises ScoringError unless the model is served as it is. `parameters`: some were given."""
    if parameters:
        raise ScoringError(
            Code.UNAVAILABLE,
            f"model {name!r} cannot be loaded with another configuration or files: models come "
            "with the deployment; deploy a module with the model you want",
        )
    if name not in plane.table.routes:
        plane.require_served(name)
        raise ScoringError(
            Code.UNAVAILABLE,
            f"model {name!r} cannot be loaded: the deployment does not name it; add a module for "
            "it to the deployment manifest",
        )
    if not plane.model_ready(name):
        raise ScoringError(
            Code.UNAVAILABLE, f"model {name!r} is deployed, but no backend can answer now"
        )
    deadline = time.monotonic() + _LOAD_SECONDS
    for session in _budgeted(plane, name):
        try:
            session.warm(deadline)
        except BackendError as error:
            raise ScoringError(
                Code.UNAVAILABLE, f"model {name!r} cannot be loaded now: {error}"
            ) from error


def unload(plane: DataPlane, name: str) -> None:
    """Take the model out of memory until the next request for it, where memory is budgeted.

    Raises ScoringError when it is answering a request, or is served without a budget.
    """
    sessions = _budgeted(plane, name)
    if sessions:
        # All of them: those that are busy must not keep the others in memory.
        if [session for session in sessions if not session.cool()]:
            raise ScoringError(
                Code.UNAVAILABLE, f"model {name!r} is answering a request; try again", 0.1
            )
        return
    if name in plane.table.endpoints:
        raise ScoringError(
            Code.UNAVAILABLE,
            f"model {name!r} cannot be unloaded: the deployment names it; remove its module from "
            "the deployment manifest",
        )


def _budgeted(plane: DataPlane, name: str) -> list[BudgetedSession]:
    route = plane.table.routes.get(name)
    if route is None:
        return []
    instances = dict.fromkeys(target.instance for target in route.targets)
    sessions = (member.session for instance in instances for member in instance.members)
    return [session for session in sessions if isinstance(session, BudgetedSession)]
