"""A device provisioning service on this machine: MQTT for devices, REST for the service side."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import secrets
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from aiohttp import web

from ...agent.clock import Clock, SystemClock
from ..mqtt.websocket import serve_websocket
from ..pki import Pki
from .client_certificates import ask_for_certificate
from .dps import DpsFaults, ProvisioningService, Registration
from .dps_enrollments import Enrollment, parse_enrollment
from .dps_mqtt import DpsDeviceServer
from .dps_rest import OPEN, make_application
from .errors import HubError
from .rest_requests import end_connections
from .server import IotHub
from .state import StateUnreadable, write_json

_log = logging.getLogger(__name__)
_LOOPBACK = "127.0.0.1"
_CLOSE_SECONDS = 2.0
_WEBSOCKET = "/$iothub/websocket"
_FORMAT = 1


class Provisioning:
    """A service under any `host_name`, on ports of the loopback interface chosen by the system.

    Devices reach it by that name through ConnectProxy routes: "{host_name}:8883" to `mqtt_port` and
    "{host_name}:443" (MQTT over websockets, and the service side) to `https_port`. With `state_dir`
    enrolments and registrations survive a restart. `retry_after` is what devices are told to wait
    between their requests, in whole seconds.
    """

    def __init__(
        self,
        host_name: str,
        id_scope: str,
        pki: Pki,
        hubs: Sequence[IotHub],
        clock: Clock | None = None,
        state_dir: Path | None = None,
        retry_after: int = 1,
    ) -> None:
        """Raises state.StateUnreadable when `state_dir` holds something else."""
        self._pki = pki
        self._file = None if state_dir is None else state_dir / "dps.json"
        self.core = ProvisioningService(
            id_scope, host_name, {hub.host_name: hub.core for hub in hubs}, clock or SystemClock()
        )
        self._policies = {"provisioningserviceowner": _new_key()}
        self._load()
        self.core.changed = self._changed
        self._devices = DpsDeviceServer(self.core, retry_after)
        self._mqtt: asyncio.Server | None = None
        self._rest: web.AppRunner | None = None

    @property
    def host_name(self) -> str:
        return self.core.host_name

    @property
    def id_scope(self) -> str:
        return self.core.id_scope

    @property
    def faults(self) -> DpsFaults:
        return self.core.faults

    @property
    def retry_after(self) -> int:
        return self._devices.retry_after

    @retry_after.setter
    def retry_after(self, seconds: int) -> None:
        self._devices.retry_after = seconds

    @property
    def mqtt_port(self) -> int:
        if self._mqtt is None:
            raise RuntimeError("the provisioning service is not started")
        return int(self._mqtt.sockets[0].getsockname()[1])

    @property
    def https_port(self) -> int:
        if self._rest is None or not self._rest.addresses:
            raise RuntimeError("the provisioning service is not started")
        return int(self._rest.addresses[0][1])

    @property
    def url(self) -> str:
        return f"https://localhost:{self.https_port}"

    @property
    def routes(self) -> dict[str, tuple[str, int]]:
        """All that a ConnectProxy needs for devices."""
        return {
            f"{self.host_name}:8883": (_LOOPBACK, self.mqtt_port),
            f"{self.host_name}:443": (_LOOPBACK, self.https_port),
        }

    @property
    def service_connection_string(self) -> str:
        """For `az iot dps` and the service SDKs, with the port in its HostName."""
        policy, key = next(iter(self._policies.items()))
        host = f"localhost:{self.https_port}"
        return f"HostName={host};SharedAccessKeyName={policy};SharedAccessKey={key}"

    def enroll(self, registration: str, body: Mapping[str, Any]) -> Enrollment:
        """Creates or replaces an individual enrolment from the REST body. Raises HubError 400."""
        return self._store(registration, False, body)

    def enroll_group(self, name: str, body: Mapping[str, Any]) -> Enrollment:
        """Creates or replaces an enrolment group from the REST body. Raises HubError 400."""
        return self._store(name, True, body)

    async def start(self) -> None:
        """Raises OSError; nothing stays open then."""
        try:
            context = self._tls()
            self._mqtt = await asyncio.get_running_loop().create_server(
                self._devices.connection, _LOOPBACK, 0, ssl=context
            )
            application = make_application(self.core, self._policies, self._changed)
            application[OPEN] = frozenset({_WEBSOCKET})
            application.router.add_get(_WEBSOCKET, self._websocket)
            self._rest = web.AppRunner(
                application, access_log=None, shutdown_timeout=_CLOSE_SECONDS
            )
            await self._rest.setup()
            await web.TCPSite(self._rest, _LOOPBACK, 0, ssl_context=context).start()
        except BaseException:
            # What has started is stopped, also when starting is cancelled. It is raised again.
            await self.stop()
            raise

    async def stop(self) -> None:
        server, self._mqtt = self._mqtt, None
        runner, self._rest = self._rest, None
        if server is not None:
            server.close()
        self._devices.drop_connections()
        if runner is not None:
            await end_connections(runner)
        if server is not None:
            await asyncio.wait(
                {asyncio.ensure_future(server.wait_closed())}, timeout=_CLOSE_SECONDS
            )

    async def _websocket(self, request: web.Request) -> web.StreamResponse:
        return await serve_websocket(request, self._devices.connection())

    def _tls(self) -> ssl.SSLContext:
        context = self._pki.server_context([self.host_name, "localhost", _LOOPBACK])
        self._devices.certificates = ask_for_certificate(context)
        return context

    # What outlives it.

    def _store(self, name: str, group: bool, body: Mapping[str, Any]) -> Enrollment:
        enrollment = parse_enrollment(name, group, body, self.core.now())
        (self.core.groups if group else self.core.enrollments)[name] = enrollment
        self._changed()
        return enrollment

    def _changed(self) -> None:
        if self._file is None:
            return
        core = self.core
        state = {
            "format": _FORMAT,
            "policies": self._policies,
            "enrollments": [one.document for one in core.enrollments.values()],
            "groups": [one.document for one in core.groups.values()],
            "registrations": [asdict(one) for one in core.registrations.values()],
        }
        try:
            write_json(self._file, state)
        except OSError as error:
            _log.error("the state of the provisioning service is not saved: %s", error)

    def _load(self) -> None:
        if self._file is None or not self._file.exists():
            return
        try:
            state = json.loads(self._file.read_bytes())
            if state["format"] != _FORMAT:
                raise ValueError(f"format {state['format']} instead of {_FORMAT}")
            self._policies = dict(state["policies"])
            for group, field in ((False, "registrationId"), (True, "enrollmentGroupId")):
                stored = self.core.groups if group else self.core.enrollments
                for document in state["groups" if group else "enrollments"]:
                    parsed = parse_enrollment(document[field], group, document, self.core.now())
                    stored[parsed.id] = replace(parsed, document=document)
            for item in state["registrations"]:
                item["error"] = tuple(item["error"])
                self.core.registrations[item["id"]] = Registration(**item)
        except (HubError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateUnreadable(
                f"{self._file} is not the state of a simulated provisioning service ({error}): "
                "move it away to start anew"
            ) from error


def _new_key() -> str:
    return base64.b64encode(secrets.token_bytes(32)).decode()
