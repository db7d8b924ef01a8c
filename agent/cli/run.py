"""`gatelet run`: the agent's processes, all of them under a supervisor or one of them alone."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from types import TracebackType

from ..config import AgentConfig, ConfigError
from .command import CommandError, add_config_option, configuration


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "run",
        help="run the agent on this device",
        description="Starts the agent, scoring and fabric processes and restarts those that die. "
        "With --role one of them runs alone, as under systemd.",
    )
    add_config_option(parser)
    parser.add_argument(
        "--role", choices=("all", "agent", "scoring", "fabric"), default="all", help="which process"
    )
    parser.add_argument("--die-with-parent", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-v", "--verbose", action="store_true", help="log every step")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    config = configuration(arguments)
    _log_to_stderr(arguments, config)
    if arguments.die_with_parent:
        from ...accelerators.parent import die_with_parent

        die_with_parent()
    try:
        for folder in (config.device.run_dir, config.device.state_dir):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(
            f"cannot make {error.filename}: {error.strerror}; run as a user who may write there, "
            "or set state-dir and run-dir under [device]"
        ) from error
    if arguments.role == "all":
        from ..supervise import AlreadyRunning, alone

        try:
            with alone(config.device.run_dir):
                _log_to_files("supervisor", config)
                return _supervise(arguments, config)
        except AlreadyRunning as error:
            raise CommandError(str(error)) from error
    _log_to_files(arguments.role, config)
    if arguments.role == "agent":
        from ..process import run_agent

        try:
            return asyncio.run(run_agent(config))
        except ConfigError as error:
            raise CommandError(str(error)) from error
    if arguments.role == "scoring":
        # Before a library starts threads: one that does not block the signals that the main thread
        # waits for could take them, and the process would end without draining.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        from ..roles import run_scoring_role

        return run_scoring_role(config)
    from ..roles import run_fabric_role

    return run_fabric_role(config)


def _log_to_stderr(arguments: argparse.Namespace, config: AgentConfig) -> None:
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else config.log.level.upper(),
        format=f"%(asctime)s {arguments.role:7} %(levelname)-7s %(message)s",
        stream=sys.stderr,
    )
    for noisy in ("azure", "paho", "urllib3", "asyncio", "grpc", "docker"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _log_to_files(role: str, config: AgentConfig) -> None:
    """Keep the log on the device too: `gatelet logs` and direct methods read it from there."""
    from ...accelerators.process_log import BoundedLogFile
    from ..redaction import redact

    log, settings = logging.getLogger(__name__), config.log
    path = config.logs_dir / f"{role}.log"
    try:
        handler = BoundedLogFile(path, settings.max_bytes, settings.files, redact)
    except OSError as error:
        log.warning("no log is kept: cannot write %s: %s", path, error.strerror)
        return
    logging.getLogger().addHandler(handler)
    show = sys.excepthook

    def crashed(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if issubclass(kind, Exception):
            record = log.makeRecord(
                __name__, logging.CRITICAL, "", 0, "crashed", (), (kind, error, trace)
            )
            handler.handle(record)
        show(kind, error, trace)

    sys.excepthook = crashed


def _supervise(arguments: argparse.Namespace, config: AgentConfig) -> int:
    from ..clock import SystemClock
    from ..roles import programs
    from ..supervise import Supervisor

    supervisor = Supervisor(
        programs(config, arguments.config, verbose=arguments.verbose),
        config.processes_file,
        SystemClock(),
    )

    async def serve() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await supervisor.run(stop)

    asyncio.run(serve())
    return 0
