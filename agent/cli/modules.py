"""`gatelet rollback`, `restart`, `logs` and `method`: what an operator does to a running device."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from .command import (
    CommandError,
    add_config_option,
    add_json_option,
    configuration,
    print_json,
    wrong_use,
)

METHOD_SECONDS = 60.0


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    rollback = commands.add_parser(
        "rollback",
        help="return to an earlier good deployment",
        description="Deploys an earlier good deployment again, with the images it had.",
    )
    rollback.add_argument(
        "generation",
        nargs="?",
        type=int,
        default=0,
        help="which one (default: the good one before the present one)",
    )
    rollback.add_argument("--wait", action="store_true", help="wait until it is good or has failed")
    rollback.set_defaults(run=_rollback)
    restart = commands.add_parser(
        "restart",
        help="restart a module",
        description="Ends a module once and starts it again. A model is loaded anew beside the one "
        "that serves, so no request fails.",
    )
    restart.add_argument("module")
    restart.add_argument("--wait", action="store_true", help="wait until it runs anew")
    restart.set_defaults(run=_restart)
    logs = commands.add_parser(
        "logs",
        help="print the log of a module or of a process",
        description="MODULE is a module of the deployment, edgeAgent (the agent), edgeHub (its "
        "links and outbox), scoring or fabric.",
    )
    logs.add_argument("module", metavar="MODULE")
    logs.add_argument("-f", "--follow", action="store_true", help="go on with new lines")
    logs.add_argument("--tail", type=int, metavar="N", help="the last N lines only")
    logs.add_argument(
        "--since", default="", metavar="T", help='a time, seconds since 1970, or "2h" (ago)'
    )
    logs.add_argument("--until", default="", metavar="T", help="the same, for the end")
    logs.add_argument("-t", "--timestamps", action="store_true", help="begin lines with their time")
    logs.set_defaults(run=_logs)
    method = commands.add_parser(
        "method",
        help="call a direct method, as the hub does",
        description="ping, RestartModule, GetModuleLogs, UploadModuleLogs, UploadSupportBundle, "
        "GetTaskStatus: edgeAgent's names, payloads and answers.",
        epilog="""Example: gatelet method GetModuleLogs '{"items": [{"id": "all"}]}'""",
    )
    method.add_argument("name")
    method.add_argument("payload", nargs="?", default="", help="JSON, or - for standard input")
    method.set_defaults(run=_method)
    for parser in (rollback, restart):
        parser.add_argument(
            "--timeout",
            type=float,
            default=300.0,
            metavar="S",
            help="give up waiting after S seconds",
        )
    for parser in (rollback, restart, logs, method):
        add_config_option(parser)
        add_json_option(parser)


def _rollback(arguments: argparse.Namespace) -> int:
    from .agent_client import AgentClient
    from .waiting import report, wait

    if arguments.generation < 0:
        wrong_use("a generation is a number from 1, as `gatelet status` shows it")
    with AgentClient(configuration(arguments).agent_socket) as agent:
        code, description, generation = agent.rollback(arguments.generation)
        if code != 200:
            if arguments.json:
                print_json({"code": code, "description": description})
                return 1
            raise CommandError(f"no rollback: {description}")
        if arguments.wait:
            return report(wait(agent, generation, arguments), arguments)
    if arguments.json:
        print_json({"code": code, "generation": generation})
    else:
        print(f"returning, as deployment {generation}; `gatelet status` shows how it goes")
    return 0


def _restart(arguments: argparse.Namespace) -> int:
    from .agent_client import AgentClient
    from .waiting import wait_restarted

    name = arguments.module
    payload = {"schemaVersion": "1.0", "id": name}
    with AgentClient(configuration(arguments).agent_socket) as agent:
        # Read first: only what differs from it came of the restart.
        modules = agent.status()["modules"] if arguments.wait else []
        status, answer = agent.invoke("RestartModule", json.dumps(payload).encode(), METHOD_SECONDS)
        if status != 200:
            message = "" if answer is None else answer.get("message", "")
            if not arguments.json:
                raise CommandError(message)
            print_json({"status": status, **({"message": message} if message else {})})
            return 1
        if not arguments.wait:
            if arguments.json:
                print_json({"status": status})
            else:
                print(f"{name} is being restarted")
            return 0
        unknown = {"name": name, "started": None, "description": ""}
        before = next((module for module in modules if module["name"] == name), unknown)
        well, doing = wait_restarted(agent, before, arguments)
    if arguments.json:
        print_json({"status": status, "restarted": well, "description": doing})
    elif well:
        print(f"{name} was restarted: {doing}")
    else:
        raise CommandError(f"{name} was not restarted: {doing}")
    return 0 if well else 1


def _logs(arguments: argparse.Namespace) -> int:
    if arguments.tail is not None and arguments.tail < 0:
        wrong_use("--tail takes a number from 0")
    for at, stream, text in _lines(arguments):
        if arguments.json:
            print_json({"time": at or None, "stream": stream, "text": text})
        else:
            sys.stdout.write(f"{at} {text}\n" if arguments.timestamps and at else f"{text}\n")
            if arguments.follow:
                sys.stdout.flush()
    return 0


def _lines(arguments: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    from .agent_client import AgentAway, AgentClient

    config = configuration(arguments)
    since, until = arguments.since, arguments.until
    with AgentClient(config.agent_socket) as agent:
        try:
            yield from agent.logs(
                arguments.module, arguments.tail, since, until, follow=arguments.follow
            )
            return
        except AgentAway:
            # Why it does not answer is what its log tells.
            if arguments.follow or not os.path.isdir(config.logs_dir):
                raise
    from ..clock import SystemClock
    from ..log_lines import LineFilter
    from ..methods.module_logs import NoSuchLog, read_process_log
    from ..methods.moments import parse_moment
    from ..runtime.container import LogFilter

    now = SystemClock().now()
    try:
        span = [parse_moment(text, now) if text else None for text in (since, until)]
        where = LogFilter(arguments.tail, *span)
        lines = read_process_log(config.logs_dir, arguments.module, LineFilter(where))
    except (ValueError, NoSuchLog, OSError) as error:
        raise CommandError(f"the agent does not answer, and: {error}") from error
    print("gatelet: the agent does not answer; this is from its own log files", file=sys.stderr)
    for line in lines:
        yield "" if line.at is None else line.at.isoformat(), line.stream, line.text


def _method(arguments: argparse.Namespace) -> int:
    text = sys.stdin.read() if arguments.payload == "-" else arguments.payload
    try:
        payload = json.dumps(json.loads(text)).encode() if text.strip() else b""
    except (ValueError, RecursionError) as error:
        wrong_use(f'the payload is not JSON: {error}; write it as {{"id": "all"}}, in quotes')
    status, answer = _invoke(arguments, arguments.name, payload)
    if arguments.json:
        print_json({"status": status, "payload": answer})
    elif status == 200:
        print(json.dumps(answer, indent=2, ensure_ascii=False) if answer is not None else "ok")
    else:
        message = answer.get("message") if isinstance(answer, dict) else answer
        raise CommandError(f"{arguments.name} failed ({status}): {message}")
    return 0 if status == 200 else 1


def _invoke(arguments: argparse.Namespace, method: str, payload: bytes) -> tuple[int, Any]:
    from .agent_client import AgentClient

    with AgentClient(configuration(arguments).agent_socket) as agent:
        return agent.invoke(method, payload, METHOD_SECONDS)
