"""The service side over HTTP, as azure-iot-hub and `az iot` call it (api-version 2021-04-12)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from .devices import ClientId
from .errors import HubError, invalid
from .hub import Hub, parse_json

_BODY_LIMIT = 1024 * 1024
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_application(hub: Hub) -> web.Application:
    """An aiohttp application; every route needs the SAS of a shared access policy."""
    routes = _Routes(hub)
    application = web.Application(
        middlewares=[_errors_and_access(hub)], client_max_size=_BODY_LIMIT
    )
    add = application.router
    for base in ("/devices/{device}", "/devices/{device}/modules/{module}"):
        add.add_put(base, routes.put_identity)
        add.add_get(base, routes.get_identity)
        add.add_delete(base, routes.delete_identity)
    add.add_get("/devices", routes.list_devices)
    add.add_get("/devices/{device}/modules", routes.list_modules)
    add.add_post("/devices/{device}/applyConfigurationContent", routes.apply_configuration)
    for base in ("/twins/{device}", "/twins/{device}/modules/{module}"):
        add.add_get(base, routes.get_twin)
        add.add_patch(base, routes.patch_twin)
        add.add_put(base, routes.put_twin)
        add.add_post(base + "/methods", routes.invoke_method)
    add.add_get("/telemetry", routes.query_telemetry)
    return application


class _Routes:
    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def put_identity(self, request: web.Request) -> web.Response:
        if_match = request.headers.get("If-Match")
        identity = self._hub.put_identity(_client(request), await _object(request), if_match)
        return web.json_response(self._hub.identity_view(identity))

    async def get_identity(self, request: web.Request) -> web.Response:
        identity = self._hub.state.registry.get(_client(request))
        return web.json_response(self._hub.identity_view(identity))

    async def delete_identity(self, request: web.Request) -> web.Response:
        self._hub.delete_identity(_client(request), request.headers.get("If-Match"))
        return web.Response(status=204)

    async def list_devices(self, request: web.Request) -> web.Response:
        devices = [i for i in self._hub.state.registry if not i.client.module]
        return web.json_response([self._hub.identity_view(i) for i in devices])

    async def list_modules(self, request: web.Request) -> web.Response:
        modules = self._hub.state.registry.modules(request.match_info["device"])
        return web.json_response([self._hub.identity_view(i) for i in modules])

    async def apply_configuration(self, request: web.Request) -> web.Response:
        self._hub.apply_configuration(request.match_info["device"], await _object(request))
        return web.Response(status=204)

    async def get_twin(self, request: web.Request) -> web.Response:
        return self._twin(_client(request))

    async def patch_twin(self, request: web.Request) -> web.Response:
        return await self._update_twin(request, whole=False)

    async def put_twin(self, request: web.Request) -> web.Response:
        return await self._update_twin(request, whole=True)

    async def _update_twin(self, request: web.Request, *, whole: bool) -> web.Response:
        client = _client(request)
        if_match = request.headers.get("If-Match")
        self._hub.update_twin(client, await _object(request), whole=whole, if_match=if_match)
        return self._twin(client)

    def _twin(self, client: ClientId) -> web.Response:
        etag = f'"{self._hub.twin(client).etag}"'
        return web.json_response(self._hub.twin_view(client), headers={"ETag": etag})

    async def invoke_method(self, request: web.Request) -> web.Response:
        call = await _object(request)
        name = call.get("methodName")
        if not isinstance(name, str) or not name:
            raise invalid("methodName is missing")
        status, payload = await self._hub.invoke_method(
            _client(request),
            name,
            call.get("payload"),
            response_timeout=_seconds(call, "responseTimeoutInSeconds", 5, 300, 30),
            connect_timeout=_seconds(call, "connectTimeoutInSeconds", 0, 300, 0),
        )
        return web.json_response({"status": status, "payload": payload})

    async def query_telemetry(self, request: web.Request) -> web.Response:
        """Our own call: `?device=&module=&after=<sequenceNumber>&limit=`, oldest first."""
        query = request.query
        try:
            after, limit = int(query.get("after", 0)), int(query.get("limit", 1000))
        except ValueError as error:
            raise invalid("after and limit are numbers") from error
        found = self._hub.telemetry.query(
            query.get("device"), query.get("module"), after, max(limit, 0)
        )
        return web.json_response([message.as_json() for message in found])


def _errors_and_access(hub: Hub) -> Any:
    @web.middleware
    async def middleware(request: web.Request, handler: _Handler) -> web.StreamResponse:
        try:
            hub.authorize_service(request.headers.get("Authorization"), request.host)
            return await handler(request)
        except HubError as error:
            return web.json_response(
                error.as_json(),
                status=error.status,
                headers={"iothub-errorcode": error.code},
            )

    return middleware


def _client(request: web.Request) -> ClientId:
    device, module = request.match_info["device"], request.match_info.get("module")
    return ClientId.parse(device if module is None else f"{device}/{module}")


async def _object(request: web.Request) -> dict[str, Any]:
    body = parse_json(await request.read())
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    return body


def _seconds(call: dict[str, Any], name: str, least: float, most: float, default: float) -> float:
    value = call.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise invalid(f"{name} is a number of seconds from {least:g} to {most:g}")
    return float(value)
