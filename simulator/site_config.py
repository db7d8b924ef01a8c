"""What a simulated site consists of, and the TOML file that says so."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import msgspec

from .board.boards import BOARDS
from .iothub.devices import ClientId
from .iothub.errors import HubError
from .iothub.faults import Faults
from .mqtt.access import Grant

HUB, BROKER, REGISTRY = "hub", "broker", "registry"
EVERYTHING = frozenset((HUB, BROKER, REGISTRY))
NO_BOARD = "none"
TOPICS = "gatelet/v1"
"""Topics of a device begin with this and its id, as an agent's do by default."""
_PORTS = range(65536)
_HOST_NAME = re.compile(r"(?=.{1,63}\Z)[A-Za-z0-9]([A-Za-z0-9.\-]*[A-Za-z0-9])?\Z", re.ASCII)
_COMMON_NAME_LIMIT = 64


class SiteConfigError(Exception):
    """The file cannot be used; the message names it, the key and what to do."""


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """Base of all sections: a typo must not be ignored."""


class Ports(_Section, frozen=True):
    """Ports of the loopback interface; 0 lets the system choose, so that sites run side by side."""

    service: int = 0
    hub_mqtt: int = 0
    hub_https: int = 0
    proxy: int = 0
    broker: int = 0
    broker_websockets: int = 0
    registry: int = 0
    control: int = 0


class Device(_Section, frozen=True):
    """A device that is there from the start; `tags` and `desired` are what its twin begins with."""

    id: str
    edge: bool = False
    tags: dict[str, Any] = {}
    desired: dict[str, Any] = {}


class GrantRule(_Section, frozen=True):
    """One `[[broker.grants]]`: see gatelet.simulator.mqtt.access.Grant."""

    topic: str
    publish: bool = True
    subscribe: bool = True
    user: str | None = None


class BrokerSettings(_Section, frozen=True):
    """The MQTT broker.

    `client_certificates` are users who get a certificate of the site's authority, instead of a
    password or next to it; with `require_certificate` nobody gets in by password, and every user
    gets one. Both, like `tls`, mean TLS on both ports. `persist` keeps sessions and messages in
    the site's folder. `grants`: None lets everybody do everything; else what is not granted is
    denied, but the site's own device always has its own topics.
    """

    tls: bool = False
    client_certificates: tuple[str, ...] = ()
    require_certificate: bool = False
    persist: bool = False
    websockets: bool = False
    grants: tuple[GrantRule, ...] | None = None

    @property
    def encrypted(self) -> bool:
        return self.tls or self.require_certificate or bool(self.client_certificates)


class SiteSettings(_Section, frozen=True):
    """`folder` keeps certificates, images and twins; `board` is a simulated board, or "none".

    `device` is the edge device for which the site writes an agent.toml; `edge_modules` are modules
    of it that get what IoT Edge gives a module; `users` are passwords of further users of the
    broker; `faults` are the hub's at its start.
    """

    folder: Path
    device: str = "edge-1"
    board: str = "pynq-z2"
    grpc_address: str = "127.0.0.1:8001"
    host_name: str = "sim-hub.gatelet.test"
    parts: frozenset[str] = EVERYTHING
    ports: Ports = Ports()
    devices: tuple[Device, ...] = ()
    edge_modules: tuple[str, ...] = ()
    broker: BrokerSettings = BrokerSettings()
    users: dict[str, str] = {}
    faults: dict[str, float] = {}

    @property
    def certificate_users(self) -> tuple[str, ...]:
        """Users of the broker who get a client certificate."""
        everybody = (self.device, *self.users) if self.broker.require_certificate else ()
        return tuple(dict.fromkeys((*self.broker.client_certificates, *everybody)))


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
    if not _HOST_NAME.match(settings.host_name):
        raise SiteConfigError(
            f"host-name is a DNS name of up to 63 characters, not {settings.host_name!r}"
        )
    for name, port in msgspec.structs.asdict(settings.ports).items():
        if port not in _PORTS:
            key = name.replace("_", "-")
            raise SiteConfigError(f"ports.{key} is a port number, not {port}")
    try:
        for device in (settings.device, *(one.id for one in settings.devices)):
            ClientId.parse(device)
        for module in settings.edge_modules:
            ClientId.parse(f"{settings.device}/{module}")
        faults = Faults()
        for name, value in settings.faults.items():
            faults.set(name.replace("-", "_"), value)
    except (HubError, ValueError) as error:
        raise SiteConfigError(str(error)) from error
    _check_broker(settings)


def _check_broker(settings: SiteSettings) -> None:
    for user in settings.certificate_users:
        if not 0 < len(user) <= _COMMON_NAME_LIMIT:
            raise SiteConfigError(
                f"broker.client-certificates: {user!r} cannot be the common name of a certificate, "
                f"which has 1 to {_COMMON_NAME_LIMIT} characters"
            )
    users = {settings.device, *settings.users, *settings.broker.client_certificates}
    for rule in settings.broker.grants or ():
        if rule.user is not None and rule.user not in users:
            raise SiteConfigError(
                f"broker.grants: there is no user {rule.user!r}; give it a password in [users] or "
                "list it in broker.client-certificates"
            )
    try:
        grants(settings)
    except ValueError as error:
        raise SiteConfigError(f"broker.grants: {error}") from error


def grants(settings: SiteSettings) -> tuple[Grant, ...] | None:
    """What the broker grants, None for everything. Raises ValueError."""
    if settings.broker.grants is None:
        return None
    own = Grant(f"{TOPICS}/%u/#", user=settings.device)
    rules = settings.broker.grants
    return (own, *(Grant(r.topic, r.publish, r.subscribe, r.user) for r in rules))


def _decode(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError  # msgspec's way of saying: not a type of ours
