"""The processes of a device and how each is started from one configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..accelerators.fpga.board import Board, board_named, detect_board
from .config import AgentConfig
from .supervise import Program


def board_of(config: AgentConfig) -> Board | None:
    """The board that the configuration names or the machine is; None without an FPGA."""
    name = config.device.board
    if name == "none":
        return None
    return detect_board() if name == "auto" else board_named(name)


def programs(config: AgentConfig, config_file: Path, *, verbose: bool) -> tuple[Program, ...]:
    """What to supervise, in the order of starting."""
    options = ("--config", str(config_file), "--die-with-parent", *(("-v",) if verbose else ()))
    me = (sys.executable, "-m", "gatelet.agent.main", "run", *options)
    board = board_of(config)
    roles = [
        Program("scoring", (*me, "--role", "scoring")),
        Program("agent", (*me, "--role", "agent")),
    ]
    if board is not None:
        roles.insert(0, Program("fabric", fabric_command(config, board)))
    return tuple(roles)


def fabric_command(config: AgentConfig, board: Board) -> tuple[str, ...]:
    """The fabric process runs in the board's own Python, where only the accelerators are needed."""
    python = config.fabric.python or Path(sys.executable)
    device = ("--device", config.fabric.device) if config.fabric.device else ()
    return (
        str(python),
        *("-m", "gatelet.accelerators.fpga.fabric"),
        *("--socket", str(config.fabric_socket)),
        *("--lock", str(config.fabric_lock)),
        *("--board", board.name),
        *device,
        *("--log-file", str(config.logs_dir / "fabric.log")),
        *("--log-bytes", str(config.log.max_bytes), "--log-files", str(config.log.files)),
        "--die-with-parent",
    )


def run_fabric_role(config: AgentConfig) -> int:
    """Become the fabric process."""
    from ..accelerators.fpga.fabric import main

    board = board_of(config)
    if board is None:
        print(
            'gatelet: no FPGA board found; set board under [device] (such as "pynq-z2") '
            "if this machine has one",
            file=sys.stderr,
        )
        return 1
    command = fabric_command(config, board)
    # The log is set up already, and a second handler would write every line twice.
    return main(command[command.index("--socket") : command.index("--log-file")])


def run_scoring_role(config: AgentConfig) -> int:
    """Run the scoring process until it is told to end."""
    from .scoring.process import run_scoring
    from .scoring.settings import ScoringSettings

    board = board_of(config)
    return run_scoring(
        ScoringSettings(
            grpc_address=config.scoring.grpc_address,
            grpc_transport=config.scoring.grpc_transport,
            http_address=config.scoring.http_address,
            metrics_address=config.scoring.metrics_address,
            memory_budget_mb=config.scoring.memory_budget_mb,
            **_access_options(config),
            control_socket=str(config.scoring_socket),
            fabric_socket=None if board is None else str(config.fabric_socket),
            board=None if board is None else board.name,
            part=None if board is None else board.part,
        )
    )


def _access_options(config: AgentConfig) -> dict[str, Any]:
    from .scoring.rate import RateLimit
    from .scoring.tls import TlsSettings
    from .scoring.tokens import TokenSettings

    scoring = config.scoring
    tls, tokens = scoring.tls, scoring.tokens
    return {
        "keys_dir": str(config.scoring_keys_dir),
        "allow_insecure": scoring.allow_insecure,
        "cors_origins": scoring.cors_origins,
        "access_log_sample": scoring.access_log_sample,
        "otlp_url": scoring.otlp_url,
        "trace_sample": scoring.trace_sample,
        "rate": RateLimit(scoring.rate_per_second, scoring.rate_burst)
        if scoring.rate_per_second
        else None,
        "tls": None
        if tls is None
        else TlsSettings(
            tls.cert_file, tls.key_file, tls.client_ca_file, tls.require_client_certificate
        ),
        "tokens": None
        if tokens is None
        else TokenSettings(tokens.jwks_file, tokens.issuer, tokens.audience, tokens.leeway_seconds),
    }
