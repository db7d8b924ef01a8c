"""The `gatelet` command. Exit codes: 0 it worked, 1 it failed, 2 wrong use."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from .cli.command import CommandError
from .version import VERSION

_COMMANDS = {
    "run": "run",
    "apply": "apply",
    "diff": "diff",
    "rollback": "modules",
    "restart": "modules",
    "logs": "modules",
    "method": "modules",
    "list": "status",
    "status": "status",
    "top": "top",
    "check": "check",
    "support-bundle": "check",
    "score": "score",
    "profile": "profile",
    "image": "image",
    "fpga": "fpga",
    "keys": "keys",
    "manifest": "trust",
}
"""The module of `cli` that has a command. Only that one is loaded for it: the agent keeps in memory
for good what `gatelet run` imports."""

_SIMULATOR_COMMANDS = {
    "sim": ("gatelet.simulator.cli", "a simulated site: IoT Hub, MQTT broker, registry, board"),
    "demo": ("gatelet.simulator.demo.cli", "the whole agent at work on a simulated site"),
}
"""Loaded by name when asked for: the agent itself never imports the simulator."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parser = _parser(words)
        parsed, rest = parser.parse_known_args(words)
        if len(rest) == 1 and getattr(parsed, "payload", None) == "" and rest[0][:1] != "-":
            # argparse takes no optional argument after an option that follows a required one.
            parsed.payload, rest = rest[0], []
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        code = parsed.run(parsed)
    except CommandError as error:
        print(f"gatelet: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away; the interpreter must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return int(code)


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gatelet",
        description="Device agent for edge devices with an FPGA.",
        epilog="`gatelet demo` shows everything at work; `gatelet COMMAND --help` explains one.",
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    asked = _COMMANDS.get(words[0]) if words else None
    for module in dict.fromkeys(_COMMANDS.values()) if asked is None else (asked,):
        importlib.import_module(f".cli.{module}", __package__).register(commands)
    for name, (module, summary) in _SIMULATOR_COMMANDS.items():
        if name in words[:1]:
            _load(name, module).register(commands)
        else:
            commands.add_parser(name, help=summary)
    return parser


def _load(name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("gatelet"):
            raise
        raise CommandError(
            f"`gatelet {name}` needs the package {error.name}, which is not installed; "
            "run `pip install 'gatelet[demo]'`"
        ) from error


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"gatelet {VERSION}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
