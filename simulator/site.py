"""A simulated site in one process: IoT Hub behind a CONNECT proxy, MQTT broker, OCI registry.

Every port is chosen by the system, so that any number of sites can run side by side. The site also
writes an `agent.toml` with which `gatelet run` becomes a device of it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .connect_proxy import ConnectProxy
from .iothub.server import IotHub
from .mqtt.broker import Broker
from .pki import Pki
from .registry import Registry

HUB_NAME = "sim-hub.gatelet.test"
EDGE_AGENT = "$edgeAgent"
BOARD_DEVICE = "gatelet.simulator.board"


@dataclass(frozen=True, slots=True)
class SiteSettings:
    """`folder` keeps certificates, images and twins; `board` is a simulated board, or "none"."""

    folder: Path
    device: str = "edge-1"
    board: str = "pynq-z2"
    grpc_address: str = "127.0.0.1:8001"


class Site:
    """Start and stop everything together."""

    def __init__(self, settings: SiteSettings) -> None:
        folder = settings.folder
        folder.mkdir(parents=True, exist_ok=True)
        self._settings = settings
        self._pki = Pki(folder / "pki")
        self._password = _password(folder / "broker-password")
        self.hub = IotHub(HUB_NAME, self._pki, state_dir=folder / "hub")
        self.broker = Broker(users={settings.device: self._password})
        self.registry = Registry(folder / "registry")
        self.proxy = ConnectProxy()

    async def start(self) -> None:
        await self.hub.start()
        await self.broker.start()
        await self.registry.start()
        self.proxy.add(f"{HUB_NAME}:8883", ("127.0.0.1", self.hub.mqtt_port))
        await self.proxy.start()
        (self._settings.folder / "agent.toml").write_text(self._agent_config())

    async def stop(self) -> None:
        await self.proxy.stop()
        await self.registry.stop()
        await self.broker.stop()
        await self.hub.stop()

    def describe(self) -> dict[str, Any]:
        """Addresses and credentials of the running site; what `gatelet sim up --json` prints."""
        device = self._settings.device
        return {
            "folder": str(self._settings.folder),
            "device": device,
            "agentConfig": str(self._settings.folder / "agent.toml"),
            "hub": {
                "hostName": HUB_NAME,
                "caFile": str(self._pki.ca_file),
                "proxy": f"127.0.0.1:{self.proxy.port}",
                "deviceConnectionString": self.hub.connection_string(device),
                "edgeAgentConnectionString": self.hub.connection_string(device, EDGE_AGENT),
                "serviceConnectionString": self.hub.service_connection_string,
                "serviceUrl": self.hub.rest_url,
            },
            "broker": {
                "host": "127.0.0.1",
                "port": self.broker.port,
                "username": device,
                "password": self._password,
                "prefix": f"gatelet/v1/{device}",
            },
            "registry": {"address": self.registry.address},
            "board": {"name": self._settings.board, "device": BOARD_DEVICE},
        }

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
port = {self.broker.port}
username = "{self._settings.device}"
password = "{self._password}"

[[registry]]
address = "{self.registry.address}"
insecure = true

[scoring]
grpc-address = "{self._settings.grpc_address}"

[fabric]
device = "{BOARD_DEVICE}"

[deployment]
probation-seconds = 1.0
retry-base-seconds = 0.2
"""


def _password(file: Path) -> str:
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(secrets.token_urlsafe(18))
    return file.read_text()
