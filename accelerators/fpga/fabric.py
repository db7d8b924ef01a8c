"""The fabric process: the only one that touches the FPGA.

    python -m gatelet.accelerators.fpga.fabric --socket PATH --lock PATH [--board NAME]
        [--device MODULE] [--die-with-parent]

It runs in the board's own Python environment, mostly as root, and needs only pynq and numpy.
`--device` names a module whose `install(board)` puts another pynq device in before the fabric is
opened (`gatelet.simulator.board`).
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..errors import BackendError, LoadError
from ..notify import Notifier
from ..parent import die_with_parent
from ..process_log import BoundedLogFile
from .board import Board, board_named, detect_board
from .driver import FabricDriver
from .server import FabricServer

_LOG = logging.getLogger(__name__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gatelet-fabric", description="Own the FPGA and serve it to the scoring process."
    )
    parser.add_argument("--socket", type=Path, required=True, help="Unix socket to serve on")
    parser.add_argument("--lock", type=Path, required=True, help="lock file of this fabric")
    parser.add_argument("--board", help="board name, such as pynq-z2 (default: ask the system)")
    parser.add_argument("--device", help="module whose install(board) provides the pynq device")
    parser.add_argument("--hang-after", type=float, default=0.5, metavar="SECONDS",
                        help="how long one transfer may take (default: 0.5)")  # fmt: skip
    parser.add_argument("--log-file", type=Path, help="keep the log in this file too")
    parser.add_argument("--log-bytes", type=int, default=1024 * 1024, help="size of one log file")
    parser.add_argument("--log-files", type=int, default=4, help="how many log files are kept")
    parser.add_argument("--die-with-parent", action="store_true", help="end when the parent ends")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the fabric process. Returns 0 after SIGTERM, 1 when the fabric cannot be served."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s fabric: %(message)s")
    if options.log_file is not None:
        _keep_log(options.log_file, options.log_bytes, options.log_files)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if options.die_with_parent:
        die_with_parent()
    board = board_named(options.board) if options.board else detect_board()
    driver = FabricDriver(options.lock, board.part if board else None,
                          hang_after=options.hang_after)  # fmt: skip
    try:
        if options.device:
            _install(options.device, board)
        driver.open()
        server = FabricServer(driver, options.socket, board)
        server.start()
    except (BackendError, OSError) as error:
        driver.close()
        _LOG.error("%s", error)
        return 1
    about = (
        f"fabric ready: board={board.name if board else 'unknown'} "
        f"part={(board.part if board else None) or 'unknown'} socket={options.socket}"
    )
    print(about, flush=True)
    _LOG.info("%s", about)
    notifier = Notifier.from_environment()
    notifier.ready()
    while not stop.wait(min(1.0, notifier.interval or 1.0)):
        notifier.alive()
        if server.stuck:
            _LOG.error("pynq does not return; ending so that the supervisor starts a new process")
            logging.shutdown()
            os._exit(1)
    notifier.stopping()
    server.stop()
    return 0


def _keep_log(path: Path, max_bytes: int, files: int) -> None:
    try:
        logging.getLogger().addHandler(BoundedLogFile(path, max_bytes, files))
    except OSError as error:
        _LOG.warning("no log is kept: cannot write %s: %s", path, error.strerror)


def _install(module: str, board: Board | None) -> None:
    if board is None:
        raise LoadError("--device needs --board, such as --board pynq-z2")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module).install(board.name)
    except ImportError as error:
        raise LoadError(
            f"device module {module} cannot be imported ({error}); a simulated board needs "
            "gatelet[fpga]"
        ) from error
    except ValueError as error:
        raise LoadError(f"device module {module}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
