"""What all commands share: their error, the options that find the agent, how JSON is printed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from ..config import AgentConfig, ConfigError, load_config

DEFAULT_CONFIG = Path("/etc/gatelet/agent.toml")


class CommandError(Exception):
    """A command cannot go on; the message is for people. `code` is the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def wrong_use(message: str) -> NoReturn:
    """End with exit code 2."""
    raise CommandError(message, 2)


def add_config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(os.environ.get("GATELET_CONFIG", DEFAULT_CONFIG)),
        help="the agent's configuration (default: $GATELET_CONFIG or %(default)s)",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def configuration(arguments: argparse.Namespace) -> AgentConfig:
    """The configuration that `--config` names. Raises CommandError."""
    try:
        return load_config(arguments.config)
    except ConfigError as error:
        raise CommandError(str(error)) from error


COLOURS = {"red": 31, "green": 32, "yellow": 33, "dim": 2, "bold": 1}


def palette() -> Callable[[str, str], str]:
    """`paint(text, colour)`: with colours on a terminal only, and not where NO_COLOR is set
    (no-color.org) or TERM is dumb."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if plain or not sys.stdout.isatty():
        return lambda text, colour: text
    return lambda text, colour: f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"


def print_json(value: Any) -> None:
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()
