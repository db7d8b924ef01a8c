"""`gatelet status` and `gatelet list`: what the agent is doing, for people and for scripts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ..clock import SystemClock
from .command import add_config_option, add_json_option, configuration, palette, print_json
from .spans import module_text
from .waiting import instead

COLOURS = {
    "running": "green",
    "unhealthy": "yellow",
    "backoff": "yellow",
    "failed": "red",
    "dead": "red",
}


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for name, run, summary in (
        ("status", _status, "show the deployment, its modules and the links"),
        ("list", _list, "list the modules"),
    ):
        parser = commands.add_parser(name, help=summary)
        add_config_option(parser)
        add_json_option(parser)
        parser.set_defaults(run=run)


def _fetch(arguments: argparse.Namespace) -> dict[str, Any]:
    from .agent_client import AgentClient

    with AgentClient(configuration(arguments).agent_socket) as agent:
        return agent.status()


def _status(arguments: argparse.Namespace) -> int:
    status = _fetch(arguments)
    if arguments.json:
        print_json(status)
        return 0
    deployment = status["deployment"]
    print(f"device      {status['device']}")
    if deployment is None:
        print("deployment  none yet")
    else:
        about = f"{deployment['generation']} from {deployment['source']}, {deployment['phase']}"
        print(f"deployment  {about}")
        if deployment["description"]:
            print(f"            {deployment['description']}")
        if deployment["rolledBack"]:
            print(f"            {instead(deployment)}")
    if (fetch := status["fetch"]) is not None:
        print(f"fetching    {fetch['url']} for {fetch['source']}")
        if fetch["error"]:
            print(f"            {fetch['error']} (attempt {fetch['attempts']}, trying again)")
    for link in status["links"]:
        state = "connected" if link["connected"] else f"not connected: {link['reason']}"
        print(f"{link['source']:11} {state}")
        for warning in link["warnings"]:
            print(f"{'':11} warning: {warning}")
    telemetry = status["telemetry"]
    if telemetry is not None:
        print(f"telemetry   {_telemetry(telemetry)}")
    for name, process in status["processes"].items():
        print(f"{name:11} pid {process['pid']}, {process.get('restarts', 0)} restarts")
    if status["scoring"]:
        addresses = (f"{name} {address}" for name, address in status["scoring"].items())
        print(f"{'serving':11} {', '.join(addresses)}")
    if (fabric := status.get("fabric")) is not None:
        print(f"{'fpga':11} {fabric_text(fabric)}")
    for refusal in status["refused"]:
        print(f"refused     from {refusal['source']} ({refusal['code']}): {refusal['description']}")
    print()
    _table(status["modules"])
    return 0


def fabric_text(fabric: Mapping[str, Any]) -> str:
    """One line about the fabric process, as it tells of itself."""
    if not fabric.get("up"):
        return "the fabric process does not answer"
    configured = fabric["reconfigurations"] + fabric.get("partialReconfigurations", 0)
    parts = [
        f"{fabric.get('loaded') or 'nothing'} on {fabric.get('board') or 'an unknown board'}",
        f"{configured} configurations",
        f"{fabric['requests']} requests",
    ]
    if temperatures := fabric.get("temperatures"):
        parts.append(f"{max(temperatures.values()):.0f} °C")
    if (trouble := fabric.get("trouble")) is not None:
        parts.append(f"sick: {trouble}")
    return ", ".join(parts)


def _telemetry(telemetry: dict[str, Any]) -> str:
    parts = [f"{telemetry['sent']} sent over {telemetry['to']}"]
    if telemetry["messages"]:
        waiting = f"{telemetry['messages']} waiting ({telemetry['bytes']} bytes"
        parts.append(f"{waiting}, oldest {telemetry['oldestSeconds']:.0f} s)")
    parts += [f"{count} dropped ({why})" for why, count in sorted(telemetry["dropped"].items())]
    if telemetry["error"]:
        parts.append(telemetry["error"])
    return ", ".join(parts)


def _list(arguments: argparse.Namespace) -> int:
    modules = _fetch(arguments)["modules"]
    if arguments.json:
        print_json(modules)
    else:
        now = SystemClock().now()
        _table([{**module, "description": module_text(module, now)} for module in modules])
    return 0


def _table(modules: list[dict[str, Any]]) -> None:
    """As `iotedge list` prints it."""
    paint = palette()
    rows = [("NAME", "STATUS", "DESCRIPTION", "CONFIG")]
    rows += [(m["name"], m["status"], m["description"], m["image"]) for m in modules]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        name, status, text = (cell.ljust(n) for cell, n in zip(row[:3], widths, strict=True))
        colour = COLOURS.get(row[1])
        shown = status if colour is None else paint(status, colour)
        print("  ".join((name, shown, text, row[3])))
