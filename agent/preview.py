"""What a manifest would change on this device, without doing it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from .module_spec import ModuleSpec
from .plan import Plan, describe

Change = Literal["added", "removed", "changed", "unchanged"]


@dataclass(frozen=True, slots=True)
class FieldChange:
    """`path` such as "settings.image" or "env.A.value"; None where there is nothing."""

    path: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class ModuleChange:
    module: str
    change: Change
    fields: tuple[FieldChange, ...] = ()


@dataclass(frozen=True, slots=True)
class Preview:
    """`code` and `description` as a `Verdict` has them; `steps` are what the agent would begin
    with, `blocked` what it could not do and why, `generation` what it is compared with (0: none).
    """

    code: int
    description: str = ""
    generation: int = 0
    modules: tuple[ModuleChange, ...] = ()
    steps: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """For `gatelet diff --json`."""
        document: dict[str, Any] = msgspec.to_builtins(self)
        return document


def compare(before: Iterable[ModuleSpec], after: Iterable[ModuleSpec]) -> tuple[ModuleChange, ...]:
    """Every module of either side, by name."""
    old = {spec.name: spec for spec in before}
    new = {spec.name: spec for spec in after}
    changes = []
    for name in sorted({*old, *new}):
        fields = _differences(_flat(old.get(name)), _flat(new.get(name)))
        kind: Change = "changed" if fields else "unchanged"
        if name not in old:
            kind = "added"
        elif name not in new:
            kind = "removed"
        changes.append(ModuleChange(name, kind, fields))
    return tuple(changes)


def steps_of(plan: Plan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(steps, blocked) for people."""
    return (
        tuple(describe(step) for step in plan.steps),
        tuple(f"{describe(f.step)}: {f.message}" for f in plan.blocked)
        + tuple(f"{module} {reason}" for module, reason in plan.waits),
    )


def _flat(spec: ModuleSpec | None) -> dict[str, Any]:
    """The fields of a manifest entry by their path in it."""
    if spec is None:
        return {}
    flat: dict[str, Any] = {
        "settings.image": spec.image,
        "status": spec.status,
        "restartPolicy": spec.restart_policy,
        "imagePullPolicy": spec.image_pull_policy,
        "startupOrder": spec.startup_order,
        "version": spec.version,
        "type": spec.type,
    }
    flat.update({f"env.{name}.value": value for name, value in spec.env})
    _flatten("settings.createOptions", json.loads(spec.create_options), flat)
    return flat


def _flatten(path: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            _flatten(f"{path}.{key}", item, into)
    elif value != {}:
        into[path] = value


def _differences(old: dict[str, Any], new: dict[str, Any]) -> tuple[FieldChange, ...]:
    return tuple(
        FieldChange(path, old.get(path), new.get(path))
        for path in sorted({*old, *new})
        if old.get(path) != new.get(path)
    )
