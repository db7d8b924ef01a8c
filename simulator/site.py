"""A simulated site in one process: IoT Hub behind a CONNECT proxy, MQTT broker, OCI registry.

Every port is chosen by the system unless said otherwise, so that any number of sites can run side
by side. The site also writes an `agent.toml` with which `gatelet run` becomes a device of it.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, TypeVar

from .connect_proxy import ConnectProxy
from .control import ControlServer
from .iothub.devices import ClientId
from .iothub.dps_server import Provisioning
from .iothub.server import IotHub
from .mqtt.broker import Broker
from .pki import Pki
from .registry import Registry
from .site_config import BROKER, EVERYTHING, HUB, REGISTRY, SiteSettings

__all__ = ["BOARD_DEVICE", "DPS_NAME", "EDGE_AGENT", "ID_SCOPE", "Site", "SiteSettings"]

_Part = TypeVar("_Part")
EDGE_AGENT = "$edgeAgent"
DPS_NAME = "sim-dps.gatelet.test"
ID_SCOPE = "0neSIMULATED"
BOARD_DEVICE = "gatelet.simulator.board"


class Site:
    """Start and stop everything together. What `settings.parts` leaves out is None."""

    def __init__(self, settings: SiteSettings) -> None:
        folder, parts, ports = settings.folder, settings.parts, settings.ports
        folder.mkdir(parents=True, exist_ok=True)
        self._settings = settings
        self._pki = Pki(folder / "pki")
        self._password = _password(folder / "broker-password")
        users = {settings.device: self._password, **settings.users}
        self._hub: IotHub | None = None
        self._provisioning: Provisioning | None = None
        self._broker: Broker | None = None
        self._registry: Registry | None = None
        if HUB in parts:
            name, state = settings.host_name, folder / "hub"
            self._hub = IotHub(name, self._pki, state_dir=state, service_port=ports.service)
            self._provisioning = Provisioning(
                DPS_NAME, ID_SCOPE, self._pki, [self._hub], state_dir=folder / "dps"
            )
        if BROKER in parts:
            self._broker = Broker(users=users, port=ports.broker)
        if REGISTRY in parts:
            self._registry = Registry(folder / "registry", port=ports.registry)
        self.proxy = ConnectProxy(port=ports.proxy)
        token = self._hub.page_token if self._hub is not None else secrets.token_urlsafe(24)
        self.control = ControlServer(self, token, ports.control)

    @property
    def parts(self) -> frozenset[str]:
        return self._settings.parts

    @property
    def hub(self) -> IotHub:
        return _there(self._hub, HUB)

    @property
    def provisioning(self) -> Provisioning:
        """The provisioning service in front of the hub; it comes with the hub."""
        return _there(self._provisioning, HUB)

    @property
    def broker(self) -> Broker:
        return _there(self._broker, BROKER)

    @property
    def registry(self) -> Registry:
        return _there(self._registry, REGISTRY)

    @property
    def ca_file(self) -> Path:
        return self._pki.ca_file

    async def start(self) -> None:
        """Raises OSError; nothing stays open then."""
        try:
            if self._hub is not None:
                await self._hub.start()
                self._furnish(self._hub)
                for name, target in self._hub.routes.items():
                    self.proxy.add(name, target)
            if self._provisioning is not None:
                await self._provisioning.start()
                for name, target in self._provisioning.routes.items():
                    self.proxy.add(name, target)
                await self.proxy.start()
            if self._broker is not None:
                await self._broker.start()
            if self._registry is not None:
                await self._registry.start()
            await self.control.start()
        except BaseException:
            await self.stop()
            raise
        if self.parts == EVERYTHING:
            (self._settings.folder / "agent.toml").write_text(self._agent_config())

    async def stop(self) -> None:
        await self.control.stop()
        await self.proxy.stop()
        for part in (self._registry, self._broker, self._provisioning, self._hub):
            if part is not None:
                await part.stop()

    def _furnish(self, hub: IotHub) -> None:
        """What a device was given before, and its keys, stay."""
        if ClientId(self._settings.device) not in hub.core.state.registry:
            edge = {"capabilities": {"iotEdge": True}}
            hub.core.put_identity(ClientId(self._settings.device), edge)
        for device in self._settings.devices:
            client = ClientId(device.id)
            if client in hub.core.state.registry:
                continue
            hub.core.put_identity(client, {"capabilities": {"iotEdge": device.edge}})
            desired = {"desired": device.desired}
            hub.core.update_twin(client, {"tags": device.tags, "properties": desired})
        for name, value in self._settings.faults.items():
            hub.faults.set(name.replace("-", "_"), value)

    def describe(self) -> dict[str, Any]:
        """Addresses and credentials of the running site; what `gatelet sim up --json` prints."""
        device = self._settings.device
        about: dict[str, Any] = {
            "folder": str(self._settings.folder),
            "device": device,
            "control": {"url": self.control.url, "token": self.control.token},
        }
        if self.parts == EVERYTHING:
            about["agentConfig"] = str(self._settings.folder / "agent.toml")
            about["board"] = {"name": self._settings.board, "device": BOARD_DEVICE}
        if self._hub is not None:
            about["hub"] = {
                "hostName": self._hub.host_name,
                "caFile": str(self._pki.ca_file),
                "proxy": f"127.0.0.1:{self.proxy.port}",
                "deviceConnectionString": self._hub.connection_string(device),
                "edgeAgentConnectionString": self._hub.connection_string(device, EDGE_AGENT),
                "serviceConnectionString": self._hub.service_connection_string,
                "serviceUrl": self._hub.rest_url,
                "pageUrl": f"{self.control.url}/hub/#token={self.control.token}",
                "deviceConnectionStrings": {
                    one.id: self._hub.connection_string(one.id) for one in self._settings.devices
                },
            }
        if self._provisioning is not None:
            about["dps"] = {
                "hostName": self._provisioning.host_name,
                "idScope": self._provisioning.id_scope,
                "serviceConnectionString": self._provisioning.service_connection_string,
                "serviceUrl": self._provisioning.url,
            }
        if self._broker is not None:
            about["broker"] = {
                "host": "127.0.0.1",
                "port": self._broker.port,
                "username": device,
                "password": self._password,
                "prefix": f"gatelet/v1/{device}",
            }
        if self._registry is not None:
            about["registry"] = {"address": self._registry.address}
        return about

    def _agent_config(self) -> str:
        site, folder = self.describe(), self._settings.folder
        return f"""# A device of the simulated site in {folder}, made anew at each start of it.
[device]
id = "{self._settings.device}"
state-dir = "{folder / "state"}"
run-dir = "{folder / "run"}"
board = "{self._settings.board}"

[iothub]
connection-string = "{site["hub"]["edgeAgentConnectionString"]}"
ca-file = "{site["hub"]["caFile"]}"
proxy = "{site["hub"]["proxy"]}"

[mqtt]
host = "127.0.0.1"
port = {site["broker"]["port"]}
username = "{self._settings.device}"
password = "{self._password}"

[[registry]]
address = "{site["registry"]["address"]}"
insecure = true

[scoring]
grpc-address = "{self._settings.grpc_address}"

[fabric]
device = "{BOARD_DEVICE}"

[deployment]
probation-seconds = 1.0
retry-base-seconds = 0.2
"""


def _there(part: _Part | None, name: str) -> _Part:
    if part is None:
        raise RuntimeError(f"this site was made without its {name}")
    return part


def _password(file: Path) -> str:
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(secrets.token_urlsafe(18))
    return file.read_text()
