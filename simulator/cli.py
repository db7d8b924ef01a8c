"""`gatelet sim`: simulated counterparts of everything a device talks to."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from ..agent.cli.command import CommandError, add_json_option, print_json
from ..agent.file_lock import locked
from .board.boards import BOARDS
from .iothub.state import StateUnreadable
from .mqtt.store import StoreUnreadable
from .pki import PkiUnreadable
from .site import BOARD_DEVICE, Site
from .site_config import (
    BROKER,
    EVERYTHING,
    HUB,
    REGISTRY,
    SiteConfigError,
    SiteSettings,
    check,
    load_settings,
)

_PARTS = {
    "up": (EVERYTHING, "a whole site: hub, broker, registry, and an agent.toml for them"),
    "hub": (frozenset({HUB}), "an IoT Hub, its CONNECT proxy and its web page"),
    "broker": (frozenset({BROKER}), "an MQTT broker (3.1.1 and 5.0)"),
    "registry": (frozenset({REGISTRY}), "an OCI registry"),
}


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "sim",
        help="a simulated site: IoT Hub, MQTT broker, registry, board",
        description="Simulated counterparts for the real device SDKs: no cloud, no board.",
    )
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    for name, (_, what) in _PARTS.items():
        _add_server(kinds, name, what)
    board = kinds.add_parser(
        "board",
        help="the boards that can be simulated, and how an agent gets one",
        description="A simulated board lives in the agent's own fabric process, so there is "
        "nothing to start: this prints what its agent.toml says.",
    )
    board.add_argument("name", nargs="?", help="one of them (default: all)")
    add_json_option(board)
    board.set_defaults(run=_board)


def _add_server(kinds: Any, name: str, what: str) -> None:
    up = kinds.add_parser(
        name,
        help=f"start {what.partition(':')[0]} and keep it running",
        description=f"Starts {what}, on free ports of this machine, and runs until it is "
        "interrupted. With --json one line tells addresses and credentials as soon as all is "
        "ready.",
    )
    up.add_argument("--config", type=Path, metavar="FILE", help="TOML file that describes the site")
    up.add_argument("--dir", type=Path, help="keep the state here (default: a new folder)")
    up.add_argument("--device", help="device id (default: edge-1)")
    if name == "up":
        up.add_argument("--board", help='simulated board, or "none" (default: pynq-z2)')
        up.add_argument(
            "--grpc-address",
            help="where the agent of this site serves scoring requests (default: 127.0.0.1:8001)",
        )
    if name in ("up", "hub"):
        up.add_argument(
            "--edge-module",
            action="append",
            metavar="NAME",
            help="give this module of the device what IoT Edge gives a module: environment and "
            "workload socket (may be repeated)",
        )
    if name == "broker":
        _add_broker_options(up)
    add_json_option(up)
    up.set_defaults(run=_up, part=name)


def _add_broker_options(broker: argparse.ArgumentParser) -> None:
    """Flags of `[broker]`; access lists and further users are in the file only."""
    broker.add_argument("--port", type=int, help="listen here (default: a free port)")
    broker.add_argument("--tls", action="store_true", help="TLS, from a CA of the site's own")
    broker.add_argument(
        "--client-certificate",
        action="append",
        metavar="USER",
        help="issue a client certificate for this user (may be repeated)",
    )
    broker.add_argument(
        "--require-certificate", action="store_true", help="let nobody in by password"
    )
    broker.add_argument(
        "--websockets", action="store_true", help="serve websockets too, on a second port"
    )
    broker.add_argument(
        "--persist", action="store_true", help="keep sessions and messages in --dir"
    )


def _up(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="gatelet-site-") as folder:
        try:
            settings = _settings(arguments, Path(folder))
        except SiteConfigError as error:
            raise CommandError(str(error), 2) from error
        return asyncio.run(_serve(arguments, settings))


def _settings(arguments: argparse.Namespace, folder: Path) -> SiteSettings:
    """What the file says, and over it what the command line says. Raises SiteConfigError."""
    base = SiteSettings(folder)
    if arguments.config is not None:
        base = load_settings(arguments.config, folder)
    said = {
        "folder": arguments.dir,
        "device": arguments.device,
        "board": getattr(arguments, "board", None),
        "grpc_address": getattr(arguments, "grpc_address", None),
    }
    changes = {name: value for name, value in said.items() if value is not None}
    if arguments.part != "up":
        changes["parts"] = _PARTS[arguments.part][0]
    if modules := getattr(arguments, "edge_module", None):
        changes["edge_modules"] = tuple(dict.fromkeys((*base.edge_modules, *modules)))
    if arguments.part == "broker":
        changes |= _broker_changes(arguments, base)
    settings = msgspec.structs.replace(base, **changes)
    check(settings)
    if settings.broker.persist and BROKER in settings.parts and settings.folder == folder:
        raise SiteConfigError("the broker can persist only in a folder that stays: add --dir DIR")
    return msgspec.structs.replace(settings, folder=settings.folder.absolute())


def _broker_changes(arguments: argparse.Namespace, base: SiteSettings) -> dict[str, Any]:
    broker = base.broker
    certificates = (*broker.client_certificates, *(arguments.client_certificate or ()))
    changes: dict[str, Any] = {
        "broker": msgspec.structs.replace(
            broker,
            tls=broker.tls or arguments.tls,
            client_certificates=tuple(dict.fromkeys(certificates)),
            require_certificate=broker.require_certificate or arguments.require_certificate,
            persist=broker.persist or arguments.persist,
            websockets=broker.websockets or arguments.websockets,
        )
    }
    if arguments.port is not None:
        changes["ports"] = msgspec.structs.replace(base.ports, broker=arguments.port)
    return changes


async def _serve(arguments: argparse.Namespace, settings: SiteSettings) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with ExitStack() as held:
        try:
            held.enter_context(_alone(settings))
            site = Site(settings)
            await site.start()
        except (OSError, PkiUnreadable, StateUnreadable, StoreUnreadable) as error:
            raise CommandError(f"cannot start the site in {settings.folder}: {error}") from error
        try:
            if arguments.json:
                print_json(site.describe())
            else:
                _tell(site.describe())
            await stop.wait()
        finally:
            await site.stop()
    return 0


@contextmanager
def _alone(settings: SiteSettings) -> Iterator[None]:
    """Two of one kind would write over each other's files. Raises OSError, CommandError."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        for part in sorted(settings.parts):
            taken = CommandError(
                f"another {part} runs in {settings.folder}: end that one, or name another folder "
                "with --dir"
            )
            locks.enter_context(locked(settings.folder / f".{part}.lock", taken))
        yield


def _tell(about: dict[str, Any]) -> None:
    if "hub" in about:
        hub = about["hub"]
        print(f"IoT Hub    {hub['hostName']} through proxy {hub['proxy']}")
        print(f"           service API {hub['serviceUrl']}, CA in {hub['caFile']}")
        print(f"           web page {hub['pageUrl']}")
    if "broker" in about:
        broker = about["broker"]
        tls = f", TLS, CA in {broker['caFile']}" if broker["tls"] else ""
        print(f"broker     {broker['host']}:{broker['port']}, user {broker['username']}{tls}")
        if broker["websocketUrl"]:
            print(f"           websockets {broker['websocketUrl']}")
        for user, files in broker["clientCertificates"].items():
            print(f"           certificate of {user}: {files['certFile']}, {files['keyFile']}")
    if "edge" in about:
        print(f"IoT Edge   {', '.join(about['edge']['modules'])} at {about['edge']['workloadUri']}")
    if "registry" in about:
        print(f"registry   {about['registry']['address']}")
    if "board" in about:
        print(f"board      {about['board']['name']}")
    print(f"control    {about['control']['url']}")
    if "agentConfig" in about:
        print(f"\nNow, in another terminal: gatelet run --config {about['agentConfig']}")
    else:
        print("\nConnection strings and passwords: the same with --json.")
    print("Ctrl-C ends it.", flush=True)
    sys.stdout.flush()


def _board(arguments: argparse.Namespace) -> int:
    if arguments.name is not None and arguments.name not in BOARDS:
        known = ", ".join(sorted(BOARDS))
        raise CommandError(f"there is no simulated board {arguments.name!r}; there are {known}", 2)
    boards = [b for name, b in sorted(BOARDS.items()) if arguments.name in (None, name)]
    if arguments.json:
        about = [{"name": b.name, "part": b.part, "device": BOARD_DEVICE} for b in boards]
        print_json(about if arguments.name is None else about[0])
        return 0
    for board in boards:
        print(f"{board.name:<10} {board.part:<20} {board.arch}")
    if arguments.name is not None:
        print("\nIn agent.toml:\n")
        print(f'[device]\nboard = "{arguments.name}"\n\n[fabric]\ndevice = "{BOARD_DEVICE}"')
    return 0
