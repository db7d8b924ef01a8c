"""A simulated site in one process: IoT Hub behind a CONNECT proxy, MQTT broker, OCI registry.

Every port is chosen by the system unless said otherwise, so that any number of sites can run side
by side. The site also writes an `agent.toml` with which `gatelet run` becomes a device of it.
"""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

from .connect_proxy import ConnectProxy
from .control import ControlServer
from .iothub.devices import ClientId
from .iothub.dps_server import Provisioning
from .iothub.server import IotHub
from .iothub.workload import EdgeDevice
from .mqtt.broker import Broker
from .pki import CertificateFiles, Pki
from .registry import Registry
from .site_agent import agent_config
from .site_broker import SiteBroker
from .site_config import BROKER, EVERYTHING, HUB, REGISTRY, SiteSettings

__all__ = ["BOARD_DEVICE", "DPS_NAME", "EDGE_AGENT", "ID_SCOPE", "Site", "SiteSettings"]

_Part = TypeVar("_Part")
EDGE_AGENT = "$edgeAgent"
DPS_NAME = "sim-dps.gatelet.test"
ID_SCOPE = "0neSIMULATED"
BOARD_DEVICE = "gatelet.simulator.board"


class Site:
    """Start and stop everything together. What `settings.parts` leaves out is not there."""

    def __init__(self, settings: SiteSettings) -> None:
        """Raises OSError, and StateUnreadable or PkiUnreadable for a folder that holds something
        else.
        """
        folder, parts, ports = settings.folder, settings.parts, settings.ports
        folder.mkdir(parents=True, exist_ok=True)
        self._settings = settings
        self._pki = Pki(folder / "pki")
        self._hub: IotHub | None = None
        self._provisioning: Provisioning | None = None
        self._edge: EdgeDevice | None = None
        self._edge_environments: dict[str, dict[str, str]] = {}
        self._broker: SiteBroker | None = None
        self._registry: Registry | None = None
        if HUB in parts:
            name, state = settings.host_name, folder / "hub"
            self._hub = IotHub(
                name,
                self._pki,
                state_dir=state,
                service_port=ports.service,
                mqtt_port=ports.hub_mqtt,
                https_port=ports.hub_https,
            )
            self._provisioning = Provisioning(
                DPS_NAME, ID_SCOPE, self._pki, [self._hub], state_dir=folder / "dps"
            )
            if settings.edge_modules:
                trusted = self._pki.ca_file.read_text()
                issuer = self._pki.intermediate(f"edge CA {settings.device}")
                self._edge = EdgeDevice(
                    self._hub.core, settings.device, trusted, folder / "edge", issuer
                )
        if BROKER in parts:
            password = _password(folder / "broker-password")
            self._broker = SiteBroker(settings, self._pki, password)
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
        return _there(self._broker, BROKER).server

    @property
    def broker_certificates(self) -> dict[str, CertificateFiles]:
        """Client certificates by user of the broker."""
        return dict(_there(self._broker, BROKER).certificates)

    @property
    def edge(self) -> EdgeDevice:
        """The device's own APIs for its modules; there with `edge-modules`."""
        return _there(self._edge, "edge-modules")

    @property
    def registry(self) -> Registry:
        return _there(self._registry, REGISTRY)

    @property
    def ca_file(self) -> Path:
        return self._pki.ca_file

    async def start(self) -> None:
        """Raises OSError or StoreUnreadable; nothing stays open then."""
        try:
            if self._hub is not None:
                await self._hub.start()
                self._furnish(self._hub)
                for name, target in self._hub.routes.items():
                    self.proxy.add(name, target)
            if self._edge is not None:
                await self._edge.start()
                for module in self._settings.edge_modules:
                    self._edge_environments[module] = self._edge.environment(module)
            if self._provisioning is not None:
                await self._provisioning.start()
                for name, target in self._provisioning.routes.items():
                    self.proxy.add(name, target)
                await self.proxy.start()
            if self._broker is not None:
                await self._broker.server.start()
            if self._registry is not None:
                await self._registry.start()
            await self.control.start()
            if self.parts == EVERYTHING:
                text = agent_config(self._settings, self.describe(), BOARD_DEVICE)
                _write_private(self._settings.folder / "agent.toml", text)
        except BaseException:
            # What has started is stopped, also when starting is cancelled. It is raised again.
            await self.stop()
            raise

    async def stop(self) -> None:
        """Everything, also when a part of it cannot be stopped; then what that raised."""
        broker = None if self._broker is None else self._broker.server
        parts = (self._hub, self._edge, self._provisioning, broker, self._registry)
        async with AsyncExitStack() as stack:
            for part in (*parts, self.proxy, self.control):
                if part is not None:
                    stack.push_async_callback(part.stop)

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
                "mqttPort": self._hub.mqtt_port,
                "httpsPort": self._hub.https_port,
                "deviceConnectionString": self._hub.connection_string(device),
                "edgeAgentConnectionString": self._hub.connection_string(device, EDGE_AGENT),
                "serviceConnectionString": self._hub.service_connection_string,
                "serviceUrl": self._hub.rest_url,
                "uploadsUrl": self._hub.uploads_url,
                "pageUrl": f"{self.control.url}/hub/#token={self.control.token}",
                "deviceConnectionStrings": {
                    one.id: self._hub.connection_string(one.id) for one in self._settings.devices
                },
            }
        if self._edge is not None:
            about["edge"] = {
                "workloadUri": self._edge.workload_uri,
                "managementUri": self._edge.management_uri,
                "modules": self._edge_environments,
            }
        if self._provisioning is not None:
            about["dps"] = {
                "hostName": self._provisioning.host_name,
                "idScope": self._provisioning.id_scope,
                "serviceConnectionString": self._provisioning.service_connection_string,
                "serviceUrl": self._provisioning.url,
            }
        if self._broker is not None:
            about["broker"] = self._broker.describe()
        if self._registry is not None:
            about["registry"] = {"address": self._registry.address}
        return about


def _there(part: _Part | None, name: str) -> _Part:
    if part is None:
        raise RuntimeError(f"this site was made without its {name}")
    return part


def _password(file: Path) -> str:
    if not file.exists():
        _write_private(file, secrets.token_urlsafe(18))
    return file.read_text()


def _write_private(file: Path, text: str) -> None:
    """Whoever reads a file with keys in it is that device."""
    file.touch(mode=0o600)
    file.chmod(0o600)
    file.write_text(text)
