"""What a simulated site consists of, and the TOML file that says so."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

from .board.boards import BOARDS
from .iothub.devices import ClientId
from .iothub.errors import HubError
from .iothub.faults import Faults

HUB, BROKER, REGISTRY = "hub", "broker", "registry"
EVERYTHING = frozenset((HUB, BROKER, REGISTRY))
NO_BOARD = "none"
_PORTS = range(65536)


class SiteConfigError(Exception):
    """The file cannot be used; the message names it, the key and what to do."""


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Base of all sections: a typo must not be ignored."""


class Ports(_Section, frozen=True):
    """Ports of the loopback interface; 0 lets the system choose, so that sites run side by side."""

    service: int = 0
    proxy: int = 0
    broker: int = 0
    registry: int = 0
    control: int = 0


class Device(_Section, frozen=True):
    """A device that is there from the start; `tags` and `desired` are what its twin begins with."""

    id: str
    edge: bool = False
    tags: dict[str, Any] = {}
    desired: dict[str, Any] = {}


class SiteSettings(_Section, frozen=True):
    """`folder` keeps certificates, images and twins; `board` is a simulated board, or "none".

    `device` is the edge device for which the site writes an agent.toml; `users` are passwords of
    further users of the broker; `faults` are the hub's at its start.
    """

    folder: Path
    device: str = "edge-1"
    board: str = "pynq-z2"
    grpc_address: str = "127.0.0.1:8001"
    host_name: str = "sim-hub.gatelet.test"
    parts: frozenset[str] = EVERYTHING
    ports: Ports = Ports()
    devices: tuple[Device, ...] = ()
    users: dict[str, str] = {}
    faults: dict[str, float] = {}


def load_settings(file: Path, folder: Path) -> SiteSettings:
    """`folder` is used where the file names none. Raises SiteConfigError."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SiteConfigError(f"cannot read {file}: {error}") from error
    return parse_settings(text, str(file), folder)


def parse_settings(text: str, origin: str, folder: Path) -> SiteSettings:
    """Raises SiteConfigError naming `origin`."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        raw = {"folder": str(folder), **tomllib.loads(text)}
    except tomllib.TOMLDecodeError as error:
        raise SiteConfigError(f"{origin} is not valid TOML: {error}") from error
    try:
        settings = msgspec.convert(raw, SiteSettings, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise SiteConfigError(f"{origin}: {error}") from error
    try:
        check(settings)
    except SiteConfigError as error:
        raise SiteConfigError(f"{origin}: {error}") from error
    return settings


def check(settings: SiteSettings) -> None:
    """Raises SiteConfigError."""
    if settings.board not in (*BOARDS, NO_BOARD):
        known = ", ".join(sorted(BOARDS))
        raise SiteConfigError(
            f'there is no simulated board {settings.board!r}; use {known} or "none"'
        )
    if not settings.parts or settings.parts - EVERYTHING:
        raise SiteConfigError(f"parts are some of {', '.join(sorted(EVERYTHING))}")
    for name, port in msgspec.structs.asdict(settings.ports).items():
        if port not in _PORTS:
            raise SiteConfigError(f"ports.{name} is a port number, not {port}")
    try:
        for device in (settings.device, *(one.id for one in settings.devices)):
            ClientId.parse(device)
        faults = Faults()
        for name, value in settings.faults.items():
            faults.set(name.replace("-", "_"), value)
    except (HubError, ValueError) as error:
        raise SiteConfigError(str(error)) from error


def _decode(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError  # msgspec's way of saying: not a type of ours
