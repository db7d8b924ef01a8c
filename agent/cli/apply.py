"""`gatelet apply`: hand a deployment manifest to the agent on this device."""

from __future__ import annotations

import argparse
from typing import Any

from .command import (
    CommandError,
    add_config_option,
    add_json_option,
    configuration,
    print_json,
)
from .diff import show_preview
from .documents import document
from .waiting import report, wait

FETCHING = 202
LOCAL = "local"


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "apply",
        help="deploy a manifest on this device",
        description="Hands over an IoT Edge deployment manifest (JSON). Without --wait it returns "
        "once the agent has accepted it.",
    )
    parser.add_argument("file", help="the manifest, or - for standard input")
    parser.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="PRIORITY:FILE",
        help="a layered deployment to lay over the manifest (again for more; the highest wins)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what it would change, and change nothing"
    )
    parser.add_argument(
        "--wait", action="store_true", help="wait until the deployment is good or has failed"
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="give up waiting after S seconds"
    )
    add_config_option(parser)
    add_json_option(parser)
    parser.set_defaults(run=_apply)


def _apply(arguments: argparse.Namespace) -> int:
    from .agent_client import AgentClient

    config = configuration(arguments)
    body = document(arguments.file, arguments.layer)
    if arguments.dry_run:
        return show_preview(arguments, body)
    with AgentClient(config.agent_socket) as agent:
        code, description, generation = agent.apply(body)
        if code == FETCHING and arguments.wait:
            code, description, generation = _fetched(agent, arguments)
        if code not in (200, FETCHING):
            if arguments.json:
                print_json({"code": code, "description": description})
                return 1
            raise CommandError(f"the manifest was refused ({code}): {description}")
        if not arguments.wait:
            if arguments.json:
                print_json({"code": code, "generation": generation})
            elif code == FETCHING:
                print(f"{description}; `gatelet status` shows how it goes")
            else:
                print(f"deployment {generation} accepted; `gatelet status` shows how it goes")
            return 0
        result = wait(agent, generation, arguments)
    return report(result, arguments)


def _fetched(agent: Any, arguments: argparse.Namespace) -> tuple[int, str, int]:
    """Until a manifest by reference is here: code, description, generation."""
    reason = ""
    for status in agent.watch(arguments.timeout):
        fetch = status["fetch"]
        if fetch is not None and fetch["source"] == LOCAL:
            reason = fetch["error"]
            continue
        for refused in status["refused"]:
            if refused["source"] == LOCAL:
                return refused["code"], refused["description"], 0
        return 200, "", (status["deployment"] or {}).get("generation", 0)
    raise CommandError(
        f"the manifest is not here after {arguments.timeout:g} s{reason and ': '}{reason}; the "
        "agent goes on trying: see `gatelet status`"
    )
