"""`gatelet check` and `gatelet support-bundle`: is all in place, and telling others about it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..clock import SystemClock
from .command import (
    CommandError,
    add_config_option,
    add_json_option,
    configuration,
    palette,
    print_json,
    wrong_use,
)

if TYPE_CHECKING:
    from ..config import AgentConfig
    from ..diagnosis.findings import Finding
    from ..runtime.container import LogLine

_LABELS = {"ok": "OK", "warning": "Warning", "error": "Error", "skipped": "-"}
_COLOURS = {"ok": "green", "warning": "yellow", "error": "red", "skipped": "dim"}
BUNDLE_LINES = 10_000
STATUS_SECONDS = 5.0


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check",
        help="check configuration, clock, network, engine, disk and board",
        description="One line for each check: OK, Warning or Error with what to do. Exit code 1 "
        "with errors. Works without a running agent.",
    )
    check.add_argument(
        "--timeout", type=float, default=10.0, metavar="S", help="give a check S seconds"
    )
    check.set_defaults(run=_check)
    bundle = commands.add_parser(
        "support-bundle",
        help="collect everything that explains this device, without secrets",
        description="Writes a zip with the configuration, status, journal, logs, the result of "
        "`gatelet check`, versions and deployments. Keys, passwords and tokens are left out.",
    )
    bundle.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it")
    bundle.add_argument("--since", default="", metavar="T", help='logs since a time, or "2 days"')
    bundle.add_argument("--until", default="", metavar="T", help="logs until a time")
    bundle.set_defaults(run=_bundle)
    for parser in (check, bundle):
        add_config_option(parser)
        add_json_option(parser)


def _check(arguments: argparse.Namespace) -> int:
    from ..diagnosis.findings import summary

    if not 0 < arguments.timeout <= 600:
        wrong_use("--timeout takes seconds up to 600")
    config = configuration(arguments)
    paint = palette()
    findings = []
    for finding in _findings(config, arguments.config, _status(config), arguments.timeout):
        findings.append(finding)
        if not arguments.json:
            label = paint(_LABELS[finding.level].ljust(8), _COLOURS[finding.level])
            print(f"{label} {finding.name}: {finding.message}", flush=True)
            if finding.fix:
                print(f"{'':8} -> {finding.fix}", flush=True)
    about = summary(findings)
    if arguments.json:
        print_json(about)
    else:
        print(f"{about['ok']} OK, {about['warnings']} warnings, {about['errors']} errors")
    return 1 if about["errors"] else 0


def _findings(
    config: AgentConfig, file: Path, status: dict[str, Any] | None, seconds: float
) -> Iterator[Finding]:
    from ..diagnosis.findings import run_checks
    from ..diagnosis.machine import machine_checks
    from ..diagnosis.network import network_checks

    checks = [
        *machine_checks(config, file, status),
        *network_checks(config, status, SystemClock()),
    ]
    return run_checks(checks, seconds)


def _status(config: AgentConfig) -> dict[str, Any] | None:
    from .agent_client import AgentClient

    if not os.path.exists(config.agent_socket):
        return None
    try:
        with AgentClient(config.agent_socket) as agent:
            return agent.status(STATUS_SECONDS)
    except CommandError:
        return None


def _bundle(arguments: argparse.Namespace) -> int:
    from ..diagnosis.bundle import BundleParts, make_bundle
    from ..methods.moments import parse_moment
    from ..runtime.container import LogFilter

    config, clock = configuration(arguments), SystemClock()
    now = clock.now()
    try:
        since, until = (
            parse_moment(text, now) if text else None for text in (arguments.since, arguments.until)
        )
    except ValueError as error:
        wrong_use(str(error))
    path: Path = arguments.output or Path(f"support-bundle-{now:%Y-%m-%d--%H-%M-%S}.zip")
    if not os.access(path.absolute().parent, os.W_OK):
        raise CommandError(f"cannot write {path}; name another place with --output")
    status = _status(config)
    findings = list(_findings(config, arguments.config, status, 10.0))
    logs = {} if status is None else _module_logs(config, status, arguments)
    try:
        body = make_bundle(
            config, BundleParts(status, findings, logs), LogFilter(None, since, until), clock
        )
        # What is inside is for whoever asked for it.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(body)
    except OSError as error:
        raise CommandError(
            f"cannot write {path}: {error.strerror or error}; name another place with --output"
        ) from error
    if arguments.json:
        print_json({"file": str(path), "bytes": len(body)})
    else:
        print(f"{path} ({len(body) / 1024:.0f} KiB)")
        if status is None:
            print("the agent does not answer: its status is not inside", file=sys.stderr)
    return 0


def _module_logs(
    config: AgentConfig, status: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, list[LogLine]]:
    from ..runtime.container import LogLine
    from .agent_client import AgentClient

    logs: dict[str, list[LogLine]] = {}
    with AgentClient(config.agent_socket) as agent:
        for name in [module["name"] for module in status["modules"]]:
            lines = agent.logs(name, BUNDLE_LINES, arguments.since, arguments.until, follow=False)
            try:
                logs[name] = [LogLine(None, stream, text) for _, stream, text in lines]
            except CommandError as error:
                logs[name] = [LogLine(None, "stderr", str(error))]
    return logs
