"""The agent's status document for `gatelet status`, and what it says of its deployment upstream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from .conditions import Condition
from .module_spec import ModuleSpec
from .outbox import Limits, OutboxStatus
from .plan import Failure, describe
from .publish import LinkState
from .reported import ModuleState
from .snapshot import Snapshot
from .store_types import Deployment, Seen

OK, FAILED = 200, 500


def status_document(
    device: str,
    snapshot: Snapshot,
    conditions: tuple[Condition, ...],
    latest: Deployment | None,
    last_good: Deployment | None,
    seen: tuple[Seen, ...],
    links: tuple[LinkState, ...],
    processes: Mapping[str, Any],
    telemetry: Mapping[str, Any] | None = None,
    fetch: Mapping[str, Any] | None = None,
    unsupported: Sequence[str] = (),
) -> dict[str, Any]:
    """What `gatelet status --json` prints. Keys are stable; times are ISO 8601 in UTC."""
    specs = {} if snapshot.manifest is None else {m.name: m for m in snapshot.manifest.modules}
    return {
        "device": device,
        "deployment": deployment_document(snapshot, latest, last_good),
        "modules": [
            {
                "name": condition.module,
                "status": condition.status,
                "description": condition.description,
                "image": specs[condition.module].image,
                "digest": condition.digest,
                "kind": condition.kind,
                "started": _time(condition.started),
                "exited": _time(condition.exited),
                "exitCode": condition.exit_code,
                "restarts": condition.restarts,
                **condition.details,
            }
            for condition in conditions
        ],
        "endpoints": {
            route.endpoint: [
                {"instance": t.instance, "percent": t.percent, "default": t.default}
                for t in route.targets
            ]
            for route in (snapshot.observed.routes if snapshot.observed else ())
        },
        "links": [
            {
                "source": link.source,
                "connected": link.connected,
                "reason": link.reason,
                "warnings": list(link.warnings),
            }
            for link in links
        ],
        "refused": [
            {"source": s.source, "version": s.version, "code": s.code, "description": s.description}
            for s in seen
            if s.code != OK
        ],
        "scoring": dict(snapshot.scoring.addresses if snapshot.scoring else ()),
        "fabric": snapshot.scoring.fabric if snapshot.scoring else None,
        "processes": dict(processes),
        "telemetry": telemetry,
        "fetch": fetch,
        "unsupported": list(unsupported),
    }


def fabric_state(told: Mapping[str, Any] | None) -> dict[str, str]:
    """What of the fabric is state rather than a count; empty without one, or before it is known."""
    if told is None:
        return {}
    if not told.get("up"):
        return {"fabric": "away"}
    return {"fabric": "serving" if told.get("trouble") is None else "sick"}


def telemetry_document(
    to: str, sent: int, outbox: OutboxStatus, limits: Limits | None = None
) -> dict[str, Any]:
    """The outbox: what waits, what was sent since the start, what was dropped in its whole life.

    `limits` are those that hold now. Past the size the oldest of the lowest priority go first.
    """
    return {
        "to": to,
        "messages": outbox.messages,
        "bytes": outbox.bytes,
        "oldestSeconds": round(outbox.oldest_seconds, 1),
        "sent": sent,
        "dropped": dict(outbox.dropped),
        "error": outbox.error,
        "limits": None
        if limits is None
        else {"bytes": limits.max_bytes, "seconds": limits.ttl_seconds},
    }


def deployment_document(
    snapshot: Snapshot,
    latest: Deployment | None,
    last_good: Deployment | None,
    seen: Seen | None = None,
) -> dict[str, Any] | None:
    """The newest deployment and how it stands; None before the first one.

    `seen`: what its reader sent last. Where that was refused the outcome is "rejected", though the
    rest is about the deployment that goes on.
    """
    rejected = seen is not None and seen.code != OK
    if latest is None:
        return {"outcome": "rejected"} if rejected else None
    return {
        "generation": latest.generation,
        "source": latest.source,
        "version": latest.version,
        "phase": latest.phase,
        "description": latest.description,
        "received": latest.received,
        "outcome": "rejected" if rejected else outcome(snapshot, latest, last_good),
        "rolledBack": latest.phase == "failed" and last_good is not None,
        "lastGood": None
        if last_good is None
        else {"generation": last_good.generation, "version": last_good.version},
    }


def outcome(snapshot: Snapshot, latest: Deployment, last_good: Deployment | None) -> str:
    """What became of the newest deployment: "applying", "probation", "good", or of a failed one
    "rollingBack", "rolledBack", "unableToRollBack"."""
    if latest.phase != "failed":
        return latest.phase
    goal, plan = snapshot.goal, snapshot.plan
    if last_good is None or stuck(snapshot):
        return "unableToRollBack"
    if goal is None or plan is None or not goal.rolled_back:
        return "rollingBack"
    return "rolledBack" if plan.settled else "rollingBack"


def stuck(snapshot: Snapshot) -> str:
    """Why a device that rolls back will never arrive; empty while it may."""
    goal, plan = snapshot.goal, snapshot.plan
    if goal is None or plan is None or not goal.rolled_back:
        return ""
    fatal = (failure for failure in plan.blocked if not failure.retryable)
    return "; ".join(f"{describe(failure.step)}: {failure.message}" for failure in fatal)


def desired_status(
    source: str,
    seen: Seen | None,
    latest: Deployment | None,
    last_good: Deployment | None,
    failures: tuple[Failure, ...] = (),
    stuck: str = "",
    *,
    back: bool = True,
) -> tuple[int, int, str]:
    """(version, code, description) of the last document of `source`, in edgeAgent's codes.

    A step that fails is 500 for as long as it does, as edgeAgent reports it. What edgeAgent has no
    words for: a deployment that was given up is 500 and says what runs instead, or why nothing
    does (`stuck`), and whether the device is `back` at the last good one yet; a document that a
    newer one from elsewhere replaced is 200 and says so.
    """
    if seen is None:
        return 0, OK, ""
    if seen.code != OK or latest is None:
        return seen.version, seen.code, seen.description
    if latest.source != source:
        return seen.version, OK, f"replaced by deployment {latest.generation} from {latest.source}"
    if latest.phase != "failed":
        trouble = "; ".join(f"{describe(f.step)}: {f.message}, trying again" for f in failures)
        return seen.version, FAILED if trouble else OK, trouble
    if last_good is None:
        tail = "there is no earlier good deployment to return to"
    elif stuck:
        tail = f"unable to roll back to deployment {last_good.generation}: {stuck}"
    else:
        doing = "rolled back" if back else "rolling back"
        tail = f"{doing} to deployment {last_good.generation} ({last_good.source})"
    return seen.version, FAILED, f"{latest.description}; {tail}"


def _time(at: datetime | None) -> str | None:
    # So fine that who waits for a restart can tell it from the one before.
    return None if at is None else at.isoformat(timespec="milliseconds")


def module_state(condition: Condition, spec: ModuleSpec) -> ModuleState:
    details = dict(condition.details)
    # Counters would make every report differ from the one before: they are metrics, not state.
    for counters in ("mirror", "memory"):
        details.pop(counters, None)
    if "backends" in details:
        details["backends"] = {
            name: {key: value for key, value in backend.items() if key in ("healthy", "detail")}
            for name, backend in details["backends"].items()
        }
    return ModuleState(
        spec,
        condition.status,
        condition.description,
        image_hash=condition.digest,
        started=condition.started,
        exited=condition.exited,
        restarted=condition.restarted,
        restart_count=condition.restarts,
        exit_code=condition.exit_code,
        details=details,
    )


def system_module(spec: ModuleSpec | None, began: datetime) -> ModuleState | None:
    """edgeAgent and edgeHub are this process, whatever image the manifest names for them."""
    if spec is None:
        return None
    return ModuleState(spec, "running", "provided by gatelet", started=began)
