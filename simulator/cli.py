"""`gatelet sim`: simulated counterparts of everything a device talks to."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from pathlib import Path

from ..accelerators.fpga.board import board_named
from ..agent.cli.command import CommandError, add_json_option, print_json
from .site import Site, SiteSettings


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "sim",
        help="a simulated site: IoT Hub, MQTT broker, registry, board",
        description="Simulated counterparts for the real device SDKs: no cloud, no board.",
    )
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    up = kinds.add_parser(
        "up",
        help="start a whole site and keep it running",
        description="Starts hub, broker and registry on free ports, writes an agent.toml for "
        "`gatelet run --config`, and runs until it is interrupted.",
    )
    up.add_argument("--dir", type=Path, help="keep the site's state here (default: a new folder)")
    up.add_argument("--device", default="edge-1", help="device id (default: %(default)s)")
    up.add_argument(
        "--board", default="pynq-z2", help='simulated board, or "none" (default: %(default)s)'
    )
    up.add_argument(
        "--grpc-address",
        default="127.0.0.1:8001",
        help="where the agent of this site serves scoring requests (default: %(default)s)",
    )
    add_json_option(up)
    up.set_defaults(run=_up)


def _up(arguments: argparse.Namespace) -> int:
    if arguments.board != "none" and board_named(arguments.board).part is None:
        raise CommandError(f"unknown board {arguments.board!r}; pynq-z2 is one that is simulated")
    if arguments.dir is not None:
        return asyncio.run(_serve(arguments, arguments.dir.absolute()))
    with tempfile.TemporaryDirectory(prefix="gatelet-site-") as folder:
        return asyncio.run(_serve(arguments, Path(folder)))


async def _serve(arguments: argparse.Namespace, folder: Path) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    site = Site(SiteSettings(folder, arguments.device, arguments.board, arguments.grpc_address))
    try:
        await site.start()
    except OSError as error:
        raise CommandError(f"cannot start the site in {folder}: {error}") from error
    try:
        if arguments.json:
            print_json(site.describe())
        else:
            _tell(site)
        await stop.wait()
    finally:
        await site.stop()
    return 0


def _tell(site: Site) -> None:
    about = site.describe()
    print(f"IoT Hub    {about['hub']['hostName']} through proxy {about['hub']['proxy']}")
    print(f"           service API {about['hub']['serviceUrl']}")
    print(f"broker     {about['broker']['host']}:{about['broker']['port']}")
    print(f"registry   {about['registry']['address']}")
    print(f"board      {about['board']['name']}")
    print(f"\nNow, in another terminal: gatelet run --config {about['agentConfig']}")
    print("Ctrl-C ends the site.", flush=True)
    sys.stdout.flush()
