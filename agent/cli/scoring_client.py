"""How commands reach a scoring process: its address, the key to show, certificates of TLS."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .command import CommandError, wrong_use

if TYPE_CHECKING:
    from ..scoring.client import ScoringClient

KEY_VARIABLE = "GATELET_SCORING_KEY"


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        default="127.0.0.1:8001",
        help="host:port or unix:path of the served model (default: %(default)s); a key or token "
        f"comes from ${KEY_VARIABLE}",
    )
    parser.add_argument(
        "--ca-file", type=Path, metavar="PEM", help="use TLS and trust these authorities"
    )
    parser.add_argument(
        "--cert-file", type=Path, metavar="PEM", help="with --key-file: our certificate, over TLS"
    )
    parser.add_argument("--key-file", type=Path, metavar="PEM", help="the certificate's key")


def scoring_client(arguments: argparse.Namespace, seconds: float = 30.0) -> ScoringClient:
    """Raises CommandError for files that cannot be read."""
    from ..scoring.client import ClientTls, ScoringClient

    tls = None
    if (arguments.cert_file is None) != (arguments.key_file is None):
        wrong_use("--cert-file and --key-file go together")
    if arguments.ca_file is not None:
        tls = ClientTls(
            _read(arguments.ca_file),
            None if arguments.cert_file is None else _read(arguments.cert_file),
            None if arguments.key_file is None else _read(arguments.key_file),
        )
    elif arguments.cert_file is not None:
        wrong_use("--cert-file needs --ca-file: whom to trust")
    bearer = os.environ.get(KEY_VARIABLE, "").strip()
    return ScoringClient(arguments.url, seconds, bearer=bearer, tls=tls)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror or error}") from error
