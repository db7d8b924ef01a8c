"""How each module of the goal is doing, as edgeAgent's runtimeStatus with a sentence for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .plan import Failure, InstanceView, Load, Probe, Pull, Step, WantedModule
from .reconcile import Snapshot
from .reported import RuntimeStatus
from .steps import LoadedModel, Progress


@dataclass(frozen=True, slots=True)
class Start:
    """When a module began to serve, and how often it had to begin again by itself."""

    instance: str
    boot_id: str
    at: datetime
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Condition:
    """`status` is edgeAgent's runtimeStatus: unknown, backoff, running, unhealthy, stopped, failed.

    `details` is what edgeAgent has no field for: model, version, backends, pull progress.
    """

    module: str
    status: RuntimeStatus
    description: str
    digest: str | None
    start: Start | None
    details: Mapping[str, Any]


def note_starts(before: Mapping[str, Start], snapshot: Snapshot, now: datetime) -> dict[str, Start]:
    """The start of every module that is ready now, from those known before."""
    if snapshot.wanted is None or snapshot.scoring is None:
        return dict(before)
    boot_id = snapshot.scoring.boot_id
    starts = {m.name: before[m.name] for m in snapshot.wanted.modules if m.name in before}
    for module in snapshot.wanted.modules:
        view = _view(snapshot, module)
        if view is None or view.state != "ready" or module.instance is None:
            continue
        known = starts.get(module.name)
        if known is None or known.instance != module.instance:
            starts[module.name] = Start(module.instance, boot_id, now)
        elif known.boot_id != boot_id:
            starts[module.name] = Start(module.instance, boot_id, now, known.restarts + 1)
    return starts


def conditions(snapshot: Snapshot, starts: Mapping[str, Start]) -> tuple[Condition, ...]:
    """One condition for each module of the goal, in the manifest's order."""
    if snapshot.wanted is None:
        return ()
    return tuple(
        _condition(snapshot, module, starts.get(module.name)) for module in snapshot.wanted.modules
    )


def _condition(snapshot: Snapshot, module: WantedModule, start: Start | None) -> Condition:
    loaded = _loaded(snapshot, module)
    status, description = _judge(snapshot, module, loaded)
    details: dict[str, Any] = {}
    if loaded is not None:
        details = {
            "model": loaded.model,
            "modelVersion": loaded.version,
            "backends": {
                backend.name: {
                    "healthy": backend.healthy,
                    "requests": backend.requests,
                    "failures": backend.failures,
                    **({"detail": backend.detail} if backend.detail else {}),
                }
                for backend in loaded.backends
            },
            **({"notes": list(loaded.notes)} if loaded.notes else {}),
        }
    if module.options.unsupported:
        details["unsupported"] = list(module.options.unsupported)
    progress = dict(snapshot.progress).get(f"module:{module.name}")
    if progress is not None:
        details["pull"] = {
            "phase": progress.phase,
            "bytes": progress.bytes_done,
            "bytesTotal": progress.bytes_total,
        }
    return Condition(module.name, status, description, module.digest, start, details)


def _judge(
    snapshot: Snapshot, module: WantedModule, loaded: LoadedModel | None
) -> tuple[RuntimeStatus, str]:
    if not module.running:
        return "stopped", "stopped as the deployment asks"
    failure = _failure(snapshot, module.name)
    if failure is not None:
        if not failure.retryable:
            return "failed", failure.message
        return "backoff", f"{failure.message} (attempt {failure.count}, trying again)"
    step = next((s for s in snapshot.running if _is_of(s, module.name)), None)
    if isinstance(step, Pull):
        return "unknown", _pulling(module, dict(snapshot.progress).get(f"module:{module.name}"))
    if isinstance(step, Load):
        return "unknown", "loading the model"
    if isinstance(step, Probe):
        return "unknown", "probing the model"
    if snapshot.scoring is None:
        return "unknown", "the scoring process does not answer yet"
    if loaded is None or loaded.view.state != "ready":
        return "unknown", "waiting"
    if not any(backend.healthy for backend in loaded.backends):
        return "unhealthy", f"no backend of {loaded.model} answers"
    backends = ", ".join(
        backend.name if backend.healthy else f"{backend.name} (away)" for backend in loaded.backends
    )
    return "running", f"serving {loaded.model} version {loaded.version} on {backends}"


def _pulling(module: WantedModule, progress: Progress | None) -> str:
    if progress is None or not progress.bytes_total:
        return f"pulling {module.image}"
    percent = 100 * progress.bytes_done // progress.bytes_total
    size = progress.bytes_total / 1e6
    return f"pulling {module.image}: {percent} % of {size:.1f} MB"


def _failure(snapshot: Snapshot, module: str) -> Failure | None:
    return next((f for f in snapshot.failures if _is_of(f.step, module)), None)


def _is_of(step: Step, module: str) -> bool:
    return isinstance(step, (Pull, Load, Probe)) and step.module == module


def _loaded(snapshot: Snapshot, module: WantedModule) -> LoadedModel | None:
    if snapshot.scoring is None:
        return None
    return next((m for m in snapshot.scoring.models if m.view.name == module.instance), None)


def _view(snapshot: Snapshot, module: WantedModule) -> InstanceView | None:
    loaded = _loaded(snapshot, module)
    return None if loaded is None else loaded.view
