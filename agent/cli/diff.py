"""`gatelet diff`: what a manifest would change on this device."""

from __future__ import annotations

import argparse
from typing import Any

from .command import (
    CommandError,
    add_config_option,
    add_json_option,
    configuration,
    palette,
    print_json,
)
from .documents import document

_SIGNS = {"added": "+", "removed": "-", "changed": "~", "unchanged": " "}
_COLOURS = {"added": "green", "removed": "red", "changed": "yellow", "unchanged": "dim"}
SHOWN = 60
"""Characters of a value."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "diff",
        help="show what a manifest would change",
        description="Compares a manifest with what runs and lists the steps that the agent would "
        "begin with. Nothing is changed. Without FILE: what the newest deployment still has to do.",
    )
    parser.add_argument("file", nargs="?", help="the manifest, or - for standard input")
    add_config_option(parser)
    add_json_option(parser)
    parser.set_defaults(run=_diff)


def _diff(arguments: argparse.Namespace) -> int:
    body = b"" if arguments.file is None else document(arguments.file, [])
    return show_preview(arguments, body)


def show_preview(arguments: argparse.Namespace, body: bytes) -> int:
    """Ask the agent and print; the exit code. Raises CommandError."""
    from .agent_client import AgentClient

    with AgentClient(configuration(arguments).agent_socket) as agent:
        code, description, found = agent.preview(body)
    if arguments.json:
        print_json(found)
    elif code != 200:
        raise CommandError(f"the manifest would be refused ({code}): {description}")
    else:
        print(preview_text(found, palette()))
    return 0 if code == 200 else 1


def preview_text(found: dict[str, Any], paint: Any) -> str:
    """`paint(text, colour)` colours a text or leaves it."""
    if not found["modules"] and not found["steps"]:
        return found["description"] or "nothing is deployed, and nothing would be"
    against = found["generation"]
    lines = [f"compared with deployment {against}" if against else "nothing is deployed yet"]
    for module in found["modules"]:
        change = module["change"]
        lines.append(paint(f"{_SIGNS[change]} {module['module']} {change}", _COLOURS[change]))
        if change != "removed":
            lines += [f"    {_field(field, change)}" for field in module["fields"]]
    if found["steps"]:
        lines.append("steps:")
        lines += [f"  {number}. {step}" for number, step in enumerate(found["steps"], 1)]
    else:
        lines.append("no steps: the device is as it should be")
    lines += [paint(f"blocked: {reason}", "red") for reason in found["blocked"]]
    return "\n".join(lines)


def _field(field: dict[str, Any], change: str) -> str:
    if change == "added":
        return f"{field['path']}: {_short(field['after'])}"
    return f"{field['path']}: {_short(field['before'])} -> {_short(field['after'])}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value) or '""'
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
