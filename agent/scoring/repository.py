"""Triton's model repository, configuration and statistics extensions, read off the routing table.

What is served is the deployment's to say, so loading and unloading succeed only where they ask for
what already is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .dataplane import DataPlane
from .errors import Code, ScoringError
from .instances import Instance


@dataclass(frozen=True, slots=True)
class Entry:
    """One version of a model in the index. `reason` says why it is not ready."""

    name: str
    version: str
    ready: bool
    reason: str = ""


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
        raise ScoringError(
            Code.UNAVAILABLE,
            f"model {name!r} cannot be loaded: the deployment does not name it; add a module for "
            "it to the deployment manifest",
        )
    if not plane.model_ready(name):
        raise ScoringError(
            Code.UNAVAILABLE, f"model {name!r} is deployed, but no backend can answer now"
        )


def unload(plane: DataPlane, name: str) -> None:
    """Raises ScoringError unless the model is not served anyway."""
    if name in plane.table.routes:
        raise ScoringError(
            Code.UNAVAILABLE,
            f"model {name!r} cannot be unloaded: the deployment names it; remove its module from "
            "the deployment manifest",
        )
