"""What an IoT Edge device offers on Unix sockets to its modules and to its edgeAgent.

The workload API is `GET /trust-bundle` and `POST /modules/{name}/genid/{generation}/sign`, which
`IoTHubModuleClient.create_from_edge_environment` calls, `encrypt`, `decrypt` and
`certificate/server` next to `sign`, and `/modules/{name}/certificate/identity`. The identity calls
exist in both of their forms: the management API's `/identities` (edgelet, from 2018-06-28) and the
identity service's `/identities/modules` with the keys service's `POST /sign` (aziot, from
2020-09-01).

Real devices know a caller by its user and process; here everybody on the socket is trusted, so the
sockets are for their owner only (mode 0600).
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from ..pki import CertificateFiles
from .devices import ClientId, Identity
from .errors import HubError, invalid
from .hub import Hub
from .json_text import parse_json
from .workload_crypto import EdgeAuthority, IssuedCertificate, seal, unseal

_CLOSE_SECONDS = 2.0
_MANAGED_BY = "iotedge"
_SOCKET_PATH_LIMIT = 107
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class EdgeDevice:
    """The APIs of one simulated IoT Edge device on `{folder}/workload.sock`, `{folder}/mgmt.sock`.

    `hub` is the hub the device belongs to, `trust_bundle` the PEM of the authorities its modules
    trust. `issuer` signs certificates for modules; without it they get none. Both sockets answer
    every call.
    """

    def __init__(
        self,
        hub: Hub,
        device: str,
        trust_bundle: str,
        folder: Path,
        issuer: CertificateFiles | None = None,
    ) -> None:
        self._hub = hub
        self._device = device
        self._folder = folder
        authority = None if issuer is None else EdgeAuthority(issuer, hub.clock)
        self._application = _make_application(hub, device, trust_bundle, authority)
        self._runner: web.AppRunner | None = None

    @property
    def workload_uri(self) -> str:
        return f"unix://{self._folder / 'workload.sock'}"

    @property
    def management_uri(self) -> str:
        return f"unix://{self._folder / 'mgmt.sock'}"

    def environment(self, module: str) -> dict[str, str]:
        """What edgeAgent gives a module's container; the identity is made where it is missing."""
        hub = self._hub
        for client in (ClientId(self._device), ClientId(self._device, module)):
            if client not in hub.state.registry:
                hub.put_identity(client, {"managedBy": _MANAGED_BY} if client.module else {})
        identity = hub.state.registry.get(ClientId(self._device, module))
        return {
            "IOTEDGE_IOTHUBHOSTNAME": hub.host_name,
            "IOTEDGE_GATEWAYHOSTNAME": hub.host_name,
            "IOTEDGE_DEVICEID": self._device,
            "IOTEDGE_MODULEID": module,
            "IOTEDGE_MODULEGENERATIONID": identity.generation,
            "IOTEDGE_WORKLOADURI": self.workload_uri,
            "IOTEDGE_APIVERSION": "2020-07-07",
            "IOTEDGE_AUTHSCHEME": "sasToken",
        }

    async def start(self) -> None:
        """Raises OSError, also for a folder whose sockets would have too long a path."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._runner = web.AppRunner(
            self._application, access_log=None, shutdown_timeout=_CLOSE_SECONDS
        )
        try:
            await self._runner.setup()
            for name in ("workload.sock", "mgmt.sock"):
                path = self._folder / name
                if len(os.fsencode(path)) > _SOCKET_PATH_LIMIT:
                    raise OSError(f"{path}: too long for a Unix socket; choose a shorter folder")
                path.unlink(missing_ok=True)
                await web.UnixSite(self._runner, path).start()
                path.chmod(0o600)
        except BaseException:
            # What has started is stopped, also when starting is cancelled. It is raised again.
            await self.stop()
            raise

    async def stop(self) -> None:
        if self._runner is None:
            return
        runner, self._runner = self._runner, None
        await runner.cleanup()
        for name in ("workload.sock", "mgmt.sock"):
            (self._folder / name).unlink(missing_ok=True)


def _make_application(
    hub: Hub, device: str, trust_bundle: str, authority: EdgeAuthority | None
) -> web.Application:
    routes = _Routes(hub, device, trust_bundle, authority)
    application = web.Application(middlewares=[_errors])
    add = application.router
    add.add_get("/trust-bundle", routes.trust_bundle)
    add.add_get("/manifest-trust-bundle", routes.manifest_trust_bundle)
    module = "/modules/{module}/genid/{generation}"
    add.add_post(module + "/sign", routes.sign)
    add.add_post(module + "/encrypt", routes.encrypt)
    add.add_post(module + "/decrypt", routes.decrypt)
    add.add_post(module + "/certificate/server", routes.server_certificate)
    add.add_post("/modules/{module}/certificate/identity", routes.identity_certificate)
    for form, base in (("edgelet", "/identities"), ("aziot", "/identities/modules")):
        calls = _Identities(routes, aziot=form == "aziot")
        one = base + ("/{module}" if form == "aziot" else r"/{module:(?!modules$|identity$)[^/]+}")
        for slash in ("", "/"):
            add.add_get(base + slash, calls.list)
            add.add_post(base + slash, calls.create)
        add.add_put(one, calls.update)
        add.add_delete(one, calls.delete)
        if form == "aziot":
            add.add_get(one, calls.get)
    add.add_get("/identities/identity", routes.own_identity)
    add.add_post("/identities/device", routes.own_identity)
    add.add_get("/key/{name}", routes.key_handle)
    add.add_post("/sign", routes.sign_with_handle)
    return application


class _Routes:
    def __init__(
        self, hub: Hub, device: str, trust_bundle: str, authority: EdgeAuthority | None
    ) -> None:
        self.hub = hub
        self.device = device
        self._trust_bundle = trust_bundle
        self._authority = authority

    def identity(self, module: str) -> Identity:
        return self.hub.state.registry.get(ClientId.parse(f"{self.device}/{module}"))

    async def trust_bundle(self, request: web.Request) -> web.Response:
        return web.json_response({"certificate": self._trust_bundle})

    async def manifest_trust_bundle(self, request: web.Request) -> web.Response:
        """Of signed manifests; there is none, which IoT Edge says with an empty text."""
        return web.json_response({"certificate": ""})

    def _caller(self, request: web.Request) -> Identity:
        """Raises HubError 400 or 404."""
        identity = self.identity(request.match_info["module"])
        if request.match_info["generation"] != identity.generation:
            raise HubError(404, "NotFound", f"{identity.client} is of another generation")
        return identity

    async def sign(self, request: web.Request) -> web.Response:
        identity = self._caller(request)
        call = await _object(request)
        if call.get("algo") != "HMACSHA256":
            raise invalid(f"algo must be HMACSHA256, not {call.get('algo')!r}")
        keys = dict(zip(("primary", "secondary"), identity.keys, strict=True))
        key = keys.get(str(call.get("keyId")))
        if key is None:
            raise invalid(f"keyId is primary or secondary, not {call.get('keyId')!r}")
        return web.json_response({"digest": _digest(key, call.get("data"))})

    async def encrypt(self, request: web.Request) -> web.Response:
        identity, call = self._caller(request), await _object(request)
        sealed = seal(
            self._secret(),
            f"{identity.client.module}{identity.generation}",
            _bytes(call, "initializationVector"),
            _bytes(call, "plaintext"),
        )
        return web.json_response({"ciphertext": base64.b64encode(sealed).decode()})

    async def decrypt(self, request: web.Request) -> web.Response:
        identity, call = self._caller(request), await _object(request)
        vector, sealed = _bytes(call, "initializationVector"), _bytes(call, "ciphertext")
        owner = f"{identity.client.module}{identity.generation}"
        try:
            plain = unseal(self._secret(), owner, vector, sealed)
        except ValueError as error:
            raise invalid(str(error)) from error
        return web.json_response({"plaintext": base64.b64encode(plain).decode()})

    async def server_certificate(self, request: web.Request) -> web.Response:
        identity, call = self._caller(request), await _object(request)
        name = call.get("commonName")
        if not isinstance(name, str) or not name:
            raise invalid("commonName is missing")
        issue = self._issuing().server
        return await _issued(issue, name, identity.client.module)

    async def identity_certificate(self, request: web.Request) -> web.Response:
        module = self.identity(request.match_info["module"]).client.module
        issue = self._issuing().identity
        return await _issued(issue, self.hub.host_name, self.device, module)

    def _issuing(self) -> EdgeAuthority:
        if self._authority is None:
            raise HubError(501, "NotImplemented", "this device has no authority for certificates")
        return self._authority

    def _secret(self) -> bytes:
        """As lasting as the device, and known to nobody else."""
        return base64.b64decode(self.hub.state.registry.get(ClientId(self.device)).primary_key)

    async def own_identity(self, request: web.Request) -> web.Response:
        identity = self.hub.state.registry.get(ClientId(self.device))
        return web.json_response(self.aziot_view(identity))

    async def key_handle(self, request: web.Request) -> web.Response:
        """The handle of `device-id`'s or of a module's primary key."""
        name = request.match_info["name"]
        client = ClientId(self.device, "" if name == "device-id" else name)
        return web.json_response({"keyHandle": str(self.hub.state.registry.get(client).client)})

    async def sign_with_handle(self, request: web.Request) -> web.Response:
        call = await _object(request)
        parameters = call.get("parameters")
        message = parameters.get("message") if isinstance(parameters, dict) else None
        if call.get("algorithm") != "HMAC-SHA256":
            raise invalid(f"algorithm must be HMAC-SHA256, not {call.get('algorithm')!r}")
        client = ClientId.parse(str(call.get("keyHandle")))
        if client.device != self.device:
            raise HubError(404, "NotFound", f"there is no key {call.get('keyHandle')!r} here")
        key = self.hub.state.registry.get(client).primary_key
        return web.json_response({"signature": _digest(key, message)})

    def aziot_view(self, identity: Identity) -> dict[str, Any]:
        client = identity.client
        module = {"moduleId": client.module, "genId": identity.generation} if client.module else {}
        return {
            "type": "aziot",
            "spec": {
                "hubName": self.hub.host_name,
                "gatewayHost": self.hub.host_name,
                "deviceId": client.device,
                **module,
                "auth": {"type": "sas", "keyHandle": str(client)},
            },
        }


class _Identities:
    """Create, list, get, update and delete module identities, in one of the two forms."""

    def __init__(self, routes: _Routes, *, aziot: bool) -> None:
        self._routes = routes
        self._aziot = aziot

    async def list(self, request: web.Request) -> web.Response:
        modules = self._routes.hub.state.registry.modules(self._routes.device)
        return web.json_response({"identities": [self._view(module) for module in modules]})

    async def get(self, request: web.Request) -> web.Response:
        return web.json_response(self._view(self._routes.identity(request.match_info["module"])))

    async def create(self, request: web.Request) -> web.Response:
        call = await _object(request)
        module = call.get("moduleId")
        if not isinstance(module, str) or not module:
            raise invalid("moduleId is missing")
        hub = self._routes.hub
        client = ClientId.parse(f"{self._routes.device}/{module}")
        description = {"managedBy": call.get("managedBy") or _MANAGED_BY}
        if_match = "*" if client in hub.state.registry else None
        return web.json_response(self._view(hub.put_identity(client, description, if_match)))

    async def update(self, request: web.Request) -> web.Response:
        identity = self._routes.identity(request.match_info["module"])
        call = await _object(request) if request.can_read_body else {}
        description = {"managedBy": call.get("managedBy") or identity.managed_by}
        identity = self._routes.hub.put_identity(identity.client, description, "*")
        return web.json_response(self._view(identity))

    async def delete(self, request: web.Request) -> web.Response:
        identity = self._routes.identity(request.match_info["module"])
        self._routes.hub.delete_identity(identity.client)
        return web.Response(status=204)

    def _view(self, identity: Identity) -> dict[str, Any]:
        if self._aziot:
            return self._routes.aziot_view(identity)
        return {
            "moduleId": identity.client.module,
            "managedBy": identity.managed_by,
            "generationId": identity.generation,
            "authType": "sas",
        }


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except HubError as error:
        return web.json_response({"message": error.message}, status=error.status)


async def _object(request: web.Request) -> dict[str, Any]:
    body = parse_json(await request.read())
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    return body


async def _issued(issue: Callable[..., IssuedCertificate], *arguments: str) -> web.Response:
    try:
        made = await asyncio.to_thread(issue, *arguments)
    except ValueError as error:
        raise invalid(f"no certificate for {arguments[0]!r}: {error}") from error
    return web.json_response(made.as_json(), status=201)


def _bytes(call: dict[str, Any], name: str) -> bytes:
    try:
        return base64.b64decode(call[name], validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise invalid(f"{name} must be base64 text") from error


def _digest(key: str, data: Any) -> str:
    try:
        message = base64.b64decode(data, validate=True)
    except (TypeError, ValueError) as error:
        raise invalid("what is to be signed must be base64 text") from error
    return base64.b64encode(hmac.digest(base64.b64decode(key), message, "sha256")).decode()
