"""docs/commands.md names every command, and every line it shows is accepted by the parser."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
from gatelet.agent import main

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "commands.md").read_text()
LINES = re.findall(r"^\$ gatelet (.+)$", TEXT, re.MULTILINE)
OPERATOR = {
    "apply", "diff", "rollback", "list", "status", "logs", "restart", "method", "check",
    "support-bundle", "top",
}  # fmt: skip


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = main._parser([])
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("line", LINES)
def test_every_example_is_accepted(line: str) -> None:
    words = shlex.split(line)
    assert main._parser(words).parse_args(words).run


def test_there_is_an_example_of_each_command_for_running_devices() -> None:
    assert {line.split()[0] for line in LINES} >= OPERATOR


def test_every_command_for_running_devices_is_listed_and_takes_json_and_config() -> None:
    table = set(re.findall(r"`([a-z-]+)[^`]*`", "".join(re.findall(r"^\| (`.*?) \|", TEXT, re.M))))
    assert table >= OPERATOR
    parsers = commands()
    for name in OPERATOR:
        options = {o for action in parsers[name]._actions for o in action.option_strings}
        assert {"--json", "--config"} <= options, name


def test_each_command_is_found_in_the_module_that_registers_it() -> None:
    for name in main._COMMANDS:
        parser = main._parser([name])
        (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        assert action.choices[name].get_default("run") or action.choices[name]._subparsers, name
    registered = commands().keys() - main._SIMULATOR_COMMANDS.keys()
    assert registered == main._COMMANDS.keys()
