"""The service side over HTTP, as azure-iot-hub and `az iot` call it (api-version 2021-04-12)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from . import rest_fleet, rest_messages, rest_page
from .devices import ClientId
from .errors import HubError, invalid
from .hub import Hub
from .rest_page import PageAccess
from .rest_requests import client_of, number_of, object_body, same_text, seconds_of

_BODY_LIMIT = 1024 * 1024
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_application(hub: Hub, page: PageAccess | None = None) -> web.Application:
    """An aiohttp application; every route needs the SAS of a shared access policy.

    With `page` it also serves the hub's web page, whose token is as good as a policy.
    """
    routes = _Routes(hub)
    application = web.Application(
        middlewares=[_errors_and_access(hub, page)], client_max_size=_BODY_LIMIT
    )
    add = application.router
    for base in ("/devices/{device}", "/devices/{device}/modules/{module}"):
        add.add_put(base, routes.put_identity)
        add.add_get(base, routes.get_identity)
        add.add_delete(base, routes.delete_identity)
    add.add_get("/devices/{device}/modules", routes.list_modules)
    add.add_post("/devices/{device}/applyConfigurationContent", routes.apply_configuration)
    for base in ("/twins/{device}", "/twins/{device}/modules/{module}"):
        add.add_get(base, routes.get_twin)
        add.add_patch(base, routes.patch_twin)
        add.add_put(base, routes.put_twin)
        add.add_post(base + "/methods", routes.invoke_method)
    add.add_get("/telemetry", routes.query_telemetry)
    rest_fleet.add_routes(application, hub)
    rest_messages.add_routes(application, hub)
    if page is not None:
        rest_page.add_routes(application, hub, page)
    return application


class _Routes:
    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def put_identity(self, request: web.Request) -> web.Response:
        if_match = request.headers.get("If-Match")
        identity = self._hub.put_identity(client_of(request), await object_body(request), if_match)
        return web.json_response(self._hub.identity_view(identity))

    async def get_identity(self, request: web.Request) -> web.Response:
        identity = self._hub.state.registry.get(client_of(request))
        return web.json_response(self._hub.identity_view(identity))

    async def delete_identity(self, request: web.Request) -> web.Response:
        self._hub.delete_identity(client_of(request), request.headers.get("If-Match"))
        return web.Response(status=204)

    async def list_modules(self, request: web.Request) -> web.Response:
        modules = self._hub.state.registry.modules(request.match_info["device"])
        return web.json_response([self._hub.identity_view(i) for i in modules])

    async def apply_configuration(self, request: web.Request) -> web.Response:
        self._hub.apply_configuration(request.match_info["device"], await object_body(request))
        return web.Response(status=204)

    async def get_twin(self, request: web.Request) -> web.Response:
        return self._twin(client_of(request))

    async def patch_twin(self, request: web.Request) -> web.Response:
        return await self._update_twin(request, whole=False)

    async def put_twin(self, request: web.Request) -> web.Response:
        return await self._update_twin(request, whole=True)

    async def _update_twin(self, request: web.Request, *, whole: bool) -> web.Response:
        client = client_of(request)
        if_match = request.headers.get("If-Match")
        self._hub.update_twin(client, await object_body(request), whole=whole, if_match=if_match)
        return self._twin(client)

    def _twin(self, client: ClientId) -> web.Response:
        etag = f'"{self._hub.twin(client).etag}"'
        return web.json_response(self._hub.twin_view(client), headers={"ETag": etag})

    async def invoke_method(self, request: web.Request) -> web.Response:
        call = await object_body(request)
        name = call.get("methodName")
        if not isinstance(name, str) or not name:
            raise invalid("methodName is missing")
        status, payload = await self._hub.invoke_method(
            client_of(request),
            name,
            call.get("payload"),
            response_timeout=seconds_of(call, "responseTimeoutInSeconds", 5, 300, 30),
            connect_timeout=seconds_of(call, "connectTimeoutInSeconds", 0, 300, 0),
        )
        return web.json_response({"status": status, "payload": payload})

    async def query_telemetry(self, request: web.Request) -> web.Response:
        """Our own call: `?device=&module=&after=<sequenceNumber>&limit=`, oldest first."""
        query = request.query
        after = number_of(query.get("after", "0"), "after")
        limit = number_of(query.get("limit", "1000"), "limit")
        found = self._hub.telemetry.query(query.get("device"), query.get("module"), after, limit)
        return web.json_response([message.as_json() for message in found])


def _errors_and_access(hub: Hub, page: PageAccess | None) -> Any:
    @web.middleware
    async def middleware(request: web.Request, handler: _Handler) -> web.StreamResponse:
        try:
            authorization = request.headers.get("Authorization", "")
            if not (page is not None and _of_the_page(request, authorization, page)):
                hub.authorize_service(authorization, request.host)
            return await handler(request)
        except HubError as error:
            return web.json_response(
                error.as_json(),
                status=error.status,
                headers={"iothub-errorcode": error.code},
            )

    return middleware


def _of_the_page(request: web.Request, authorization: str, page: PageAccess) -> bool:
    """The page's own files are for everybody; what they then ask for needs the page's token."""
    resource = request.match_info.route.resource
    if resource is not None and resource.canonical.removeprefix(page.prefix) in rest_page.FILES:
        return request.method in ("GET", "HEAD")
    kind, _, token = authorization.partition(" ")
    return kind == "Bearer" and same_text(token, page.token)
