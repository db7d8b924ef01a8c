"""When a container is restarted: edgeAgent's policies and numbers, as pure functions.

    state = note(state, view, ...)      what an observation means
    verdict = decide(policy, state, view, rules)

edgeAgent waits min(10 * 2^n, 300) s before restart n + 1, gives up after 20 and counts from zero
after 10 minutes of running. Unlike edgeAgent, an unhealthy container (Docker's health check, or the
readiness of what serves the Open Inference Protocol) is restarted by on-unhealthy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from .module_spec import RestartPolicy
from .runtime.container import ContainerView


@dataclass(frozen=True, slots=True)
class RestartRules:
    """Seconds, except `limit`, the number of restarts."""

    base: float = 10.0
    cap: float = 300.0
    limit: int = 20
    reset_after: float = 600.0

    def wait(self, count: int) -> float:
        """How long after its end a container that was restarted `count` times is restarted."""
        return min(self.base * 2.0 ** min(count, 32), self.cap)


@dataclass(frozen=True, slots=True)
class RestartState:
    """What is remembered of a module's restarts. All but the last two fields survive the agent.

    `container` is the fingerprint that the counts belong to; `count` are automatic restarts and
    `exits` ends by itself since it last ran long enough; `exit` names the last end that was
    noticed. `stopped`: it was stopped on purpose, so its next start is no restart. `asked` and
    `answered` count restarts on request. `trouble_since` and `well_since` are monotonic.
    """

    container: str = ""
    count: int = 0
    exits: int = 0
    exit: str = ""
    stopped: bool = False
    asked: int = 0
    answered: int = 0
    restarted_at: datetime | None = None
    trouble_since: float | None = None
    well_since: float | None = None

    def lasting(self) -> RestartState:
        """Without what ends with the agent."""
        return replace(self, trouble_since=None, well_since=None)


NEW = RestartState()
_STOPPED = (0, 137, 143)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`action`: "none", "start" (at once, not counted), "wait" until `at`, "restart" (counted),
    "ended" (as its policy permits), "failed" (given up).
    """

    action: Literal["none", "start", "wait", "restart", "ended", "failed"]
    at: float = 0.0


def exit_name(view: ContainerView) -> str:
    """Tells the ends of containers apart."""
    return f"{view.id} {view.finished_at.isoformat() if view.finished_at else ''}"


def was_stopped(view: ContainerView) -> bool:
    """Whether it ended as containers do that are stopped: by itself, by SIGTERM or by SIGKILL."""
    return view.state == "exited" and view.exit_code in _STOPPED and not view.oom_killed


def note(
    before: RestartState,
    view: ContainerView,
    rules: RestartRules,
    now: float,
    wall: datetime,
    *,
    unready: bool = False,
    revived: bool = False,
) -> RestartState:
    """The state after `view` was seen at `now` (monotonic) and `wall` (aware UTC).

    `unready`: what runs in it does not answer. `revived`: the engine or the host was away, so an
    end that was not known yet is not the container's own.
    """
    state = before
    if view.spec != state.container:
        state = RestartState(view.spec, asked=state.asked, answered=state.asked)
    if view.state == "running":
        if view.health == "unhealthy" or unready:
            since = now if state.trouble_since is None else state.trouble_since
            return replace(state, trouble_since=since, well_since=None)
        since = now if state.well_since is None else state.well_since
        state = replace(state, trouble_since=None, well_since=since)
        if now - since >= rules.reset_after:
            state = replace(state, count=0, exits=0)
        return state
    if view.state not in ("exited", "dead"):
        return replace(state, trouble_since=None, well_since=None)
    if state.exit == exit_name(view) or state.stopped:
        # After a restart of the agent the wait begins anew: it is bounded.
        since = now if state.trouble_since is None else state.trouble_since
        return replace(state, exit=exit_name(view), trouble_since=since, well_since=None)
    if revived:
        return replace(state, exit=exit_name(view), stopped=True, well_since=None)
    since = now
    if state.well_since is None and view.finished_at is not None:
        # Nobody was watching when it ended.
        passed = (wall - view.finished_at).total_seconds()
        since = now - min(max(passed, 0.0), rules.wait(state.count))
    return replace(
        state, exit=exit_name(view), exits=state.exits + 1, trouble_since=since, well_since=None
    )


def decide(
    policy: RestartPolicy, state: RestartState, view: ContainerView, rules: RestartRules, now: float
) -> Verdict:
    """What `policy` asks for a container that shall run and is seen as `view`."""
    if view.state == "running":
        if state.trouble_since is None or policy not in ("on-unhealthy", "always"):
            return Verdict("none")
    elif view.state == "exited":
        if state.stopped:
            return Verdict("start")
        clean = view.exit_code == 0 and not view.oom_killed
        if policy == "never" or (clean and policy != "always"):
            return Verdict("ended")
    else:
        return Verdict("none")
    if state.count >= rules.limit:
        return Verdict("failed")
    at = (now if state.trouble_since is None else state.trouble_since) + rules.wait(state.count)
    return Verdict("restart", at) if at <= now else Verdict("wait", at)


def asked_for(state: RestartState) -> bool:
    """Whether a restart was asked for and is not done."""
    return state.asked > state.answered


def before_start(state: RestartState, *, automatic: bool, wall: datetime) -> RestartState:
    """To be stored before a container is started."""
    if not automatic:
        return state
    return replace(state, count=state.count + 1, restarted_at=wall)


def after_start(state: RestartState) -> RestartState:
    return replace(state, stopped=False, answered=state.asked, trouble_since=None)


def before_stop(state: RestartState, *, automatic: bool, wall: datetime) -> RestartState:
    """To be stored before a container is stopped, so that its end is not taken for its own."""
    if automatic:
        state = replace(state, count=state.count + 1, restarted_at=wall)
    return replace(state, stopped=True)


def ask(state: RestartState) -> RestartState:
    """A person asks for a restart: it also gives a module that was given up another chance."""
    return replace(state, asked=state.asked + 1, count=0, exits=0)
