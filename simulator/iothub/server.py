"""An IoT Hub on this machine: MQTT for devices, REST for the service side, both over TLS."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import ssl
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from aiohttp import web

from ...agent.clock import Clock, SystemClock
from ..pki import Pki
from . import state as states
from .client_certificates import ask_for_certificate
from .device_https import make_device_application
from .devices import ClientId, Identity
from .faults import Faults
from .hub import Hub
from .mqtt import DeviceServer
from .rest import make_application
from .rest_page import PageAccess
from .rest_requests import end_connections
from .telemetry import TelemetryStore

_log = logging.getLogger(__name__)
_SAVE_DELAY = 0.05
_CLOSE_SECONDS = 2.0
_UPLOADS_LIFETIME = timedelta(days=365)
_LOOPBACK = "127.0.0.1"


class IotHub:
    """One hub under any `host_name`, on ports of the loopback interface chosen by the system.

    Devices reach it by that name through a ConnectProxy route "{host_name}:8883", with `pki`'s CA
    as their `server_verification_cert`. With `state_dir` identities, twins, keys and sessions
    survive a restart (telemetry does not); without, nothing is written.
    """

    def __init__(
        self,
        host_name: str,
        pki: Pki,
        clock: Clock | None = None,
        state_dir: Path | None = None,
        service_port: int = 0,
        mqtt_port: int = 0,
        https_port: int = 0,
    ) -> None:
        """`service_port` is the port of the service side, the others are those of devices; 0 lets
        the system choose.

        Raises state.StateUnreadable when `state_dir` holds something else.
        """
        self._pki = pki
        self._service_port = service_port
        self._wanted_mqtt_port, self._wanted_https_port = mqtt_port, https_port
        self._file = None if state_dir is None else state_dir / "hub.json"
        state = states.HubState() if self._file is None else states.load(self._file)
        self.core = Hub(host_name, state, clock or SystemClock(), self._state_changed)
        # Devices with certificates of the site's own authority are welcome like those of any other.
        self.core.authorities["site"] = pki.ca_file.read_text()
        self._devices = DeviceServer(self.core)
        self._devices.admits = lambda: not self.paused
        self._save_timer: asyncio.TimerHandle | None = None
        self._reserved: socket.socket | None = None
        self._mqtt: asyncio.Server | None = None
        self._rest: web.AppRunner | None = None
        self._rest_port = 0
        self._https: web.AppRunner | None = None
        self._device_context: ssl.SSLContext | None = None
        self.page_token = secrets.token_urlsafe(24)

    # Where it is, and what it takes to get in.

    @property
    def host_name(self) -> str:
        return self.core.host_name

    @property
    def mqtt_port(self) -> int:
        """Stays the same from `start` to `stop`, also while paused."""
        if self._reserved is None:
            raise RuntimeError("the hub is not started")
        return int(self._reserved.getsockname()[1])

    @property
    def rest_port(self) -> int:
        if not self._rest_port:
            raise RuntimeError("the hub is not started")
        return self._rest_port

    @property
    def https_port(self) -> int:
        """What devices reach as "{host_name}:443" and "{storage_host}:443": MQTT over websockets,
        file upload and the storage it goes to.
        """
        if self._https is None or not self._https.addresses:
            raise RuntimeError("the hub is not started")
        return int(self._https.addresses[0][1])

    @property
    def storage_host(self) -> str:
        return self.core.uploads.storage_host

    @property
    def uploads_url(self) -> str:
        """Of the storage, with a signature for all of it: the `sasUrl` of UploadModuleLogs."""
        return self.core.uploads.container_url(_UPLOADS_LIFETIME)

    @property
    def routes(self) -> dict[str, tuple[str, int]]:
        """All that a ConnectProxy needs for devices."""
        return {
            f"{self.host_name}:8883": (_LOOPBACK, self.mqtt_port),
            f"{self.host_name}:443": (_LOOPBACK, self.https_port),
            f"{self.storage_host}:443": (_LOOPBACK, self.https_port),
        }

    @property
    def rest_url(self) -> str:
        return f"https://localhost:{self.rest_port}"

    @property
    def page_url(self) -> str:
        """The hub's page for people; the fragment lets them in and never leaves the browser."""
        return f"{self.rest_url}/#token={self.page_token}"

    @property
    def paused(self) -> bool:
        return self._mqtt is None

    def page_access(self, prefix: str = "") -> PageAccess:
        """For applications that serve the page, mounted under `prefix`."""
        return PageAccess(
            self.page_token,
            lambda: self.paused,
            self.pause,
            self.resume,
            self.drop_connections,
            prefix,
        )

    def identity(self, device: str, module: str | None = None) -> Identity:
        """The identity, created with fresh keys (its device too) where it is missing."""
        for client in (ClientId(device), ClientId(device, module or "")):
            if client not in self.core.state.registry:
                self.core.put_identity(client, {})
        return self.core.state.registry.get(ClientId(device, module or ""))

    def connection_string(self, device: str, module: str | None = None) -> str:
        """For azure-iot-device; the identity is created where it is missing."""
        identity = self.identity(device, module)
        parts = [f"HostName={self.host_name}", f"DeviceId={device}"]
        if module:
            parts.append(f"ModuleId={module}")
        return ";".join([*parts, f"SharedAccessKey={identity.primary_key}"])

    @property
    def service_connection_string(self) -> str:
        """For azure-iot-hub and `az iot`, with the REST port in its HostName."""
        policy, key = next(iter(self.core.state.policies.items()))
        host = f"localhost:{self.rest_port}"
        return f"HostName={host};SharedAccessKeyName={policy};SharedAccessKey={key}"

    @property
    def telemetry(self) -> TelemetryStore:
        return self.core.telemetry

    @property
    def faults(self) -> Faults:
        return self.core.faults

    # Its life.

    async def start(self) -> None:
        """Raises OSError; nothing stays open then."""
        try:
            if self._wanted_mqtt_port:
                _check_free(self._wanted_mqtt_port)
            # A second, silent socket on the port keeps it ours while the hub is paused.
            self._reserved = socket.socket()
            self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._reserved.bind((_LOOPBACK, self._wanted_mqtt_port))
            await self.resume()
            await self._start_rest()
            await self._start_https()
        except BaseException:
            # What has started is stopped, also when starting is cancelled. It is raised again.
            await self.stop()
            raise

    async def _start_rest(self) -> None:
        self._rest = web.AppRunner(
            make_application(self.core, self.page_access()),
            access_log=None,
            shutdown_timeout=_CLOSE_SECONDS,
        )
        await self._rest.setup()
        site = web.TCPSite(self._rest, _LOOPBACK, self._service_port, ssl_context=self._tls())
        await site.start()
        self._rest_port = int(self._rest.addresses[0][1])

    async def _start_https(self) -> None:
        application = make_device_application(
            self.core,
            lambda: None if self.paused else self._devices.connection(),
            lambda: self._devices.certificates,
        )
        self._https = web.AppRunner(application, access_log=None, shutdown_timeout=_CLOSE_SECONDS)
        await self._https.setup()
        port, context = self._wanted_https_port, self._device_tls()
        await web.TCPSite(self._https, _LOOPBACK, port, ssl_context=context).start()

    async def stop(self) -> None:
        await self.pause()
        if self._rest is not None:
            await end_connections(self._rest)
        if self._https is not None:
            await end_connections(self._https)
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        self._rest, self._rest_port, self._https = None, 0, None
        if self._save_timer is not None:
            self._save_timer.cancel()
            self._save()

    # Faults of the whole hub; `faults` has the countable ones.

    async def pause(self) -> None:
        """Drops every device and refuses connections until `resume`; REST goes on."""
        if self._mqtt is None:
            return
        server, self._mqtt = self._mqtt, None
        server.close()
        self.drop_connections()
        # From Python 3.12 this also waits for connections that are still shaking hands.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(server.wait_closed(), _CLOSE_SECONDS)

    async def resume(self) -> None:
        """Raises OSError."""
        if self._mqtt is not None:
            return
        self._mqtt = await asyncio.get_running_loop().create_server(
            self._devices.connection,
            _LOOPBACK,
            self.mqtt_port,
            ssl=self._device_tls(),
            reuse_port=True,
        )

    def drop_connections(self) -> None:
        """Cuts every device's connection; the hub goes on."""
        self.core.drop_connections()
        self._devices.drop_connections("connections are dropped on request")

    def _device_tls(self) -> ssl.SSLContext:
        if self._device_context is None:
            self._device_context = self._tls([self.storage_host])
            self._devices.certificates = ask_for_certificate(self._device_context)
        return self._device_context

    def _tls(self, more: Sequence[str] = ()) -> ssl.SSLContext:
        return self._pki.server_context([self.host_name, "localhost", _LOOPBACK, *more])

    def _state_changed(self) -> None:
        if self._file is None or self._save_timer is not None:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._save()  # set up before the event loop runs
        else:
            self._save_timer = loop.call_later(_SAVE_DELAY, self._save)

    def _save(self) -> None:
        self._save_timer = None
        if self._file is None:
            return
        try:
            states.save(self._file, self.core.state)
        except OSError as error:
            _log.error("the hub's state is not saved: %s", error)


def _check_free(port: int) -> None:
    """Raises OSError: two hubs that both allow the port to be shared would share their devices."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_LOOPBACK, port))
        except OSError as error:
            why = f"port {port} cannot be had for devices: {error.strerror}"
            raise OSError(error.errno, why) from error
