"""How each module of the goal is doing, as edgeAgent's runtimeStatus with a sentence for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from .plan import (
    Create,
    Failure,
    InstanceView,
    Kind,
    Load,
    Probe,
    Pull,
    Resolve,
    Step,
    WantedModule,
    module_of,
)
from .plan_containers import RUNNING_STATES
from .plan_types import attempts
from .reported import RuntimeStatus
from .restarts import NEW, RestartRules, RestartState, decide
from .runtime.container import ContainerView
from .seams import LoadedModel, Progress
from .snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Start:
    """When a module began to serve, and how often it had to begin again by itself."""

    instance: str
    boot_id: str
    at: datetime
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Condition:
    """`status` is edgeAgent's runtimeStatus: unknown, backoff, running, unhealthy, stopped, failed,
    dead.

    `details` is what edgeAgent has no field for: model, version, backends, pull progress. Times are
    aware, None where there is none.
    """

    module: str
    status: RuntimeStatus
    description: str
    digest: str | None
    details: Mapping[str, Any]
    kind: Kind = ""
    started: datetime | None = None
    exited: datetime | None = None
    exit_code: int = 0
    restarts: int = 0
    restarted: datetime | None = None


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
    condition = Condition(
        module.name,
        status,
        description,
        module.digest,
        _details(snapshot, module, loaded),
        module.kind,
    )
    if not module.contained:
        if start is None:
            return condition
        return replace(
            condition,
            started=start.at,
            restarts=start.restarts,
            restarted=start.at if start.restarts else None,
        )
    state = snapshot.restarts.get(module.name, NEW)
    condition = replace(condition, restarts=state.count, restarted=state.restarted_at)
    view = container_of(snapshot, module)
    if view is None:
        return condition
    return replace(
        condition,
        started=view.started_at,
        exited=view.finished_at,
        exit_code=view.exit_code if view.state in ("exited", "dead") else 0,
    )


def _details(
    snapshot: Snapshot, module: WantedModule, loaded: LoadedModel | None
) -> dict[str, Any]:
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
    if loaded is not None and loaded.mirror is not None:
        mirror = loaded.mirror
        details["mirror"] = {
            "compared": mirror.compared,
            "differing": mirror.differing,
            "failed": mirror.failed,
            "dropped": mirror.dropped,
            "largestDifference": mirror.largest_difference,
        }
    if loaded is not None and loaded.memory is not None:
        memory = loaded.memory
        details["memory"] = {
            "resident": memory.resident,
            "bytes": memory.bytes,
            "loads": memory.loads,
            "evictions": memory.evictions,
        }
    if module.name in snapshot.canaries:
        details["canary"] = snapshot.canaries[module.name].document()
    if module.options.unsupported and module.kind != "container":
        details["unsupported"] = list(module.options.unsupported)
    progress = dict(snapshot.progress).get(f"pull:{module.name}")
    if progress is not None:
        details["pull"] = {
            "phase": progress.phase,
            "bytes": progress.bytes_done,
            "bytesTotal": progress.bytes_total,
            "layers": progress.layers_done,
            "layersTotal": progress.layers_total,
        }
    view = container_of(snapshot, module)
    if view is not None:
        details["container"] = {
            "name": view.name,
            "id": view.id[:12],
            "state": view.state,
            **({"health": view.health} if view.health != "none" else {}),
            **({"drift": list(view.drift)} if view.drift else {}),
        }
    failure = _failure(snapshot, module.name)
    if failure is not None and failure.code:
        details["error"] = failure.code
    return details


def container_of(snapshot: Snapshot, module: WantedModule) -> ContainerView | None:
    """The module's container, though it may still be that of an earlier deployment."""
    observed = snapshot.observed
    if observed is None or module.kind == "model":
        return None
    if module.container is not None:
        return observed.containers.get(module.container.name)
    found = (view for view in observed.containers.values() if view.module == module.name)
    return next(found, None)


def _judge(
    snapshot: Snapshot, module: WantedModule, loaded: LoadedModel | None
) -> tuple[RuntimeStatus, str]:
    if not module.running:
        view = container_of(snapshot, module)
        if view is not None and view.state in RUNNING_STATES:
            return "running", "is being stopped, as the deployment asks"
        return "stopped", "stopped as the deployment asks"
    failure = _failure(snapshot, module.name)
    if failure is not None:
        if not failure.retryable:
            return "failed", failure.message
        return "backoff", f"{failure.message} ({attempts(failure.count)}, trying again)"
    steps = [step for step in snapshot.running if module_of(step) == module.name]
    for step in steps:
        text = _under_way(step, module, snapshot)
        if text:
            return "unknown", text
    waits = dict(snapshot.plan.waits) if snapshot.plan is not None else {}
    if module.contained:
        status, description = _container(snapshot, module)
        if status != "running" or module.kind == "container":
            if status == "unknown" and module.name in waits:
                description = waits[module.name]
            return status, description
    if module.name in waits:
        return "unknown", waits[module.name]
    if not module.kind:
        return "unknown", "waiting"
    if snapshot.scoring is None:
        return "unknown", "the scoring process does not answer yet"
    if loaded is None or loaded.view.state != "ready":
        return "unknown", "waiting"
    if not any(backend.healthy for backend in loaded.backends):
        return "unhealthy", f"no backend of {loaded.model} answers"
    backends = ", ".join(
        backend.name if backend.healthy else f"{backend.name} (away)" for backend in loaded.backends
    )
    serving = f"serving {loaded.model} version {loaded.version} on {backends}"
    canary = snapshot.canaries.get(module.name)
    return "running", serving if canary is None else f"{serving}; {canary.sentence()}"


def _under_way(step: Step, module: WantedModule, snapshot: Snapshot) -> str:
    if isinstance(step, Resolve):
        return f"asking for {module.image}"
    if isinstance(step, Pull):
        return _pulling(module, dict(snapshot.progress).get(f"pull:{module.name}"))
    if isinstance(step, Load):
        return "loading the model"
    if isinstance(step, Probe):
        return "probing the model"
    if isinstance(step, Create):
        return "creating the container"
    return ""


def _container(snapshot: Snapshot, module: WantedModule) -> tuple[RuntimeStatus, str]:
    """edgeAgent's status of a container, in edgeAgent's sense where it has one."""
    view = container_of(snapshot, module)
    if view is None:
        return "unknown", "its container is not made yet"
    if view.state == "dead":
        return "dead", "its container is dead and will be removed"
    if module.container is not None and view.spec != module.container.fingerprint():
        # Not "running": whoever waits for this deployment would take the old one for it.
        return "unknown", f"{view.state} as it was before, to be replaced"
    state = snapshot.restarts.get(module.name, NEW)
    rules = snapshot.rules.restarts
    verdict = decide(module.policy, state, view, rules, snapshot.now)
    if view.state == "running":
        if state.trouble_since is None and view.health != "unhealthy":
            what = "running" if view.health in ("none", "healthy") else "running, not healthy yet"
            return "running", what
        why = "its health check fails" if view.health == "unhealthy" else "it does not answer"
        if view.health_log:
            why += f": {view.health_log.strip()}"
        if verdict.action == "failed":
            return "failed", f"{why}; given up after {state.count} restarts"
        return "unhealthy", why + _next_restart(verdict.action, state, rules)
    if view.state != "exited":
        return "unknown", view.state
    why = f"ended with exit code {view.exit_code}"
    why += ", out of memory" if view.oom_killed else ""
    why += f": {view.error}" if view.error else ""
    if verdict.action == "failed":
        return "failed", f"{why}; given up after {state.count} restarts"
    if verdict.action == "ended":
        clean = view.exit_code == 0 and not view.oom_killed
        policy = f"restart policy {module.policy}"
        return ("stopped" if clean else "failed"), f"{why}; not started again ({policy})"
    return "backoff", why + _next_restart(verdict.action, state, rules)


def _next_restart(action: str, state: RestartState, rules: RestartRules) -> str:
    # No moment: a text that changes with every look would be reported with every look.
    if action not in ("wait", "restart"):
        return ""
    wait = f"{rules.wait(state.count):g} s after its end"
    return f"; restart {state.count + 1} of {rules.limit} {wait}"


def _pulling(module: WantedModule, progress: Progress | None) -> str:
    if progress is None or not progress.bytes_total:
        return f"pulling {module.image}"
    percent = 100 * progress.bytes_done // progress.bytes_total
    size = progress.bytes_total / 1e6
    return f"pulling {module.image}: {percent} % of {size:.1f} MB"


def _failure(snapshot: Snapshot, module: str) -> Failure | None:
    return next((f for f in snapshot.failures if module_of(f.step) == module), None)


def _loaded(snapshot: Snapshot, module: WantedModule) -> LoadedModel | None:
    if snapshot.scoring is None:
        return None
    return next((m for m in snapshot.scoring.models if m.view.name == module.instance), None)


def _view(snapshot: Snapshot, module: WantedModule) -> InstanceView | None:
    loaded = _loaded(snapshot, module)
    return None if loaded is None else loaded.view
