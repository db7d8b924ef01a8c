"""Waiting for a deployment or a restart: bars for what is pulled on a terminal, a line per change
elsewhere."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from .command import CommandError, print_json

if TYPE_CHECKING:
    from .agent_client import AgentClient

DONE_PHASES = ("good", "failed", "superseded")
_INSTEAD = {
    "rollingBack": "returning to deployment {}",
    "unableToRollBack": "unable to return to deployment {}: see `gatelet list`",
}
_PERCENT = re.compile(r":? ?\d+ % of .*")


class _Display(Protocol):
    def show(self, status: dict[str, Any]) -> None: ...


def wait(agent: AgentClient, generation: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The outcome of deployment `generation`: generation, phase, outcome, description, lastGood.

    One that failed is waited for until the device is back at the last good one. Raises
    CommandError after `arguments.timeout` seconds.
    """
    failed: dict[str, Any] | None = None
    with _display(f"deployment {generation}", quiet=arguments.json) as display:
        for status in agent.watch(arguments.timeout):
            result = outcome(status, generation)
            if result is not None and result["outcome"] != "rollingBack":
                return result
            failed = result
            display.show(status)
    if failed is not None:
        return failed
    raise CommandError(
        f"deployment {generation} is not good after {arguments.timeout:g} s; the agent goes on "
        "with it: see `gatelet status`"
    )


def outcome(status: dict[str, Any], generation: int) -> dict[str, Any] | None:
    """None while the deployment is on its way."""
    deployment = status["deployment"] or {}
    newest = deployment.get("generation", 0)
    if newest > generation:
        phase, description = "superseded", f"deployment {newest} took its place"
    elif newest == generation and deployment["phase"] in DONE_PHASES:
        phase, description = deployment["phase"], deployment["description"]
    else:
        return None
    last_good = (deployment.get("lastGood") or {}).get("generation")
    return {
        "generation": generation,
        "phase": phase,
        "outcome": deployment.get("outcome", phase) if newest == generation else phase,
        "description": description,
        "lastGood": last_good,
    }


def report(result: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Print what came of it; the exit code."""
    generation, phase = result["generation"], result["phase"]
    if arguments.json:
        print_json(result)
    elif phase == "good":
        print(f"deployment {generation} is good")
    else:
        tail = f"; {instead(result)}" if result.get("lastGood") else ""
        reason = f": {result['description']}" if result["description"] else ""
        print(f"gatelet: deployment {generation} {phase}{reason}{tail}", file=sys.stderr)
    return 0 if phase == "good" else 1


def instead(deployment: Mapping[str, Any]) -> str:
    """What runs in place of a deployment that failed, by its `outcome` and `lastGood`."""
    kept = deployment["lastGood"]
    number = kept["generation"] if isinstance(kept, Mapping) else kept
    words = _INSTEAD.get(deployment.get("outcome", ""), "deployment {} is running instead")
    return words.format(number)


def wait_restarted(
    agent: AgentClient, before: Mapping[str, Any], arguments: argparse.Namespace
) -> tuple[bool, str]:
    """Whether the module that was as `before` in the status runs anew, and what it does.

    Raises CommandError after `arguments.timeout` seconds, and when the module is removed.
    """
    name, doing = before["name"], before["description"]
    with _display(f"restart of {name}", quiet=arguments.json) as display:
        for status in agent.watch(arguments.timeout):
            found = [module for module in status["modules"] if module["name"] == name]
            if not found:
                raise CommandError(f"{name} is no module of the running deployment any more")
            doing = found[0]["description"]
            well = restarted(before, found[0])
            if well is not None:
                return well, doing
            display.show({**status, "modules": found})
    raise CommandError(
        f"{name} does not run anew after {arguments.timeout:g} s; the agent goes on with it: "
        f"{doing}"
    )


def restarted(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool | None:
    """None while the restart of a module is on its way, False when it came to nothing."""
    anew = now["started"] not in (None, before["started"])
    status = now["status"]
    if status in ("failed", "dead"):
        # It may have been so before, and not be looked at yet.
        return False if anew or now["description"] != before["description"] else None
    if not anew:
        return None
    if status == "running":
        return None if now.get("container", {}).get("health") == "starting" else True
    return True if status == "stopped" else None


@contextmanager
def _display(title: str, *, quiet: bool) -> Iterator[_Display]:
    if quiet:
        yield _Silence()
        return
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        DownloadColumn(binary_units=True),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _Bars(progress, title)


class _Silence:
    def show(self, status: dict[str, Any]) -> None:
        pass


class _Lines:
    """One line per module whenever it does something else; percentages are no news."""

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}

    def show(self, status: dict[str, Any]) -> None:
        for module in status["modules"]:
            doing = _PERCENT.sub("", module["description"])
            if self._shown.get(module["name"]) != doing:
                self._shown[module["name"]] = doing
                print(f"{module['name']}: {doing}", file=sys.stderr, flush=True)


class _Bars:
    """A bar for each module: filled while it is pulled, a spinner otherwise."""

    def __init__(self, progress: Any, title: str) -> None:
        self._progress = progress
        self._title = progress.add_task(title, total=None)
        self._tasks: dict[str, Any] = {}

    def show(self, status: dict[str, Any]) -> None:
        for module in status["modules"]:
            name, pull = module["name"], module.get("pull")
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=None)
            total = (pull or {}).get("bytesTotal") or None
            doing = _PERCENT.sub("", module["description"])
            self._progress.update(
                self._tasks[name],
                description=f"{name}: {doing}"[:100],
                total=total,
                completed=(pull or {}).get("bytes", 0) if total else 0,
            )
