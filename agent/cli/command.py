"""What all commands share: their error, the options that find the agent, how JSON is printed."""

from __future__ import annotations

import argparse
import os
import sys
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


def print_json(value: Any) -> None:
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()
