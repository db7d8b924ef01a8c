"""State and faults of a running site over HTTP, for tests in any language and for curl.

Loopback only and without TLS, so that a client needs no certificate; every call carries
`Authorization: Bearer TOKEN`. Below `/hub` is the hub's whole service API with the same token, and
its web page.
"""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .iothub import rest_page
from .iothub.errors import HubError, invalid
from .iothub.rest import make_application
from .iothub.rest_requests import end_connections, object_body, same_text
from .site_config import BROKER, HUB, REGISTRY

if TYPE_CHECKING:
    from .site import Site

_LOOPBACK = "127.0.0.1"
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ControlServer:
    """The control API of one site."""

    def __init__(self, site: Site, token: str, port: int = 0) -> None:
        self._site = site
        self.token = token
        self._port = port
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://{_LOOPBACK}:{self._port}"

    async def start(self) -> None:
        """Raises OSError."""
        self._runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        await web.TCPSite(self._runner, _LOOPBACK, self._port).start()
        self._port = int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await end_connections(runner)

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[self._errors_and_access])
        add = application.router
        add.add_get("/site", self._describe)
        if HUB in self._site.parts:
            access = self._site.hub.page_access("/hub")
            application.add_subapp("/hub", make_application(self._site.hub.core, access))
            add.add_get("/faults", self._get_faults)
            add.add_patch("/faults", self._patch_faults)
            add.add_delete("/faults", self._clear_faults)
        add.add_post("/connections/{part}/{action}", self._connections)
        if BROKER in self._site.parts:
            add.add_get("/broker/retained", self._retained)
            add.add_post("/broker/publish", self._publish)
        if REGISTRY in self._site.parts:
            add.add_post("/registry/{fault}", self._registry_fault)
        return application

    @web.middleware
    async def _errors_and_access(
        self, request: web.Request, handler: _Handler
    ) -> web.StreamResponse:
        try:
            # The hub's application looks for itself: its page is for everybody.
            if not request.path.startswith("/hub/"):
                kind, _, token = request.headers.get("Authorization", "").partition(" ")
                if kind != "Bearer" or not same_text(token, self.token):
                    raise HubError(401, "Unauthorized", "send Authorization: Bearer TOKEN")
            return await handler(request)
        except HubError as error:
            return web.json_response(error.as_json(), status=error.status)

    async def _describe(self, request: web.Request) -> web.Response:
        return web.json_response(self._site.describe())

    # Faults of the hub.

    async def _get_faults(self, request: web.Request) -> web.Response:
        return self._faults()

    async def _patch_faults(self, request: web.Request) -> web.Response:
        rest_page.set_faults(self._site.hub.faults, await object_body(request))
        return self._faults()

    async def _clear_faults(self, request: web.Request) -> web.Response:
        self._site.hub.faults.clear()
        return self._faults()

    def _faults(self) -> web.Response:
        return web.json_response(self._site.hub.faults.as_json())

    # Servers that go away.

    async def _connections(self, request: web.Request) -> web.Response:
        part, action = request.match_info["part"], request.match_info["action"]
        if part not in self._site.parts:
            raise HubError(404, "NotFound", f"this site has no {part!r}")
        if action not in ("drop", "pause", "resume"):
            raise invalid(f"connections can drop, pause and resume, not {action!r}")
        if part == REGISTRY:
            if action == "drop":
                raise invalid("a registry drops by POST /registry/drop")
            getattr(self._site.registry, action)()
        else:
            server = self._site.hub if part == HUB else self._site.broker
            if action == "drop":
                server.drop_connections()
            else:
                await getattr(server, action)()
        return web.Response(status=204)

    # The broker.

    async def _retained(self, request: web.Request) -> web.Response:
        retained = self._site.broker.retained
        return web.json_response(
            {topic: base64.b64encode(payload).decode() for topic, payload in retained.items()}
        )

    async def _publish(self, request: web.Request) -> web.Response:
        """`{"topic", "payload": text or "payloadBase64", "qos", "retain"}`."""
        body = await object_body(request)
        topic, qos = body.get("topic"), body.get("qos", 0)
        if not isinstance(topic, str) or not topic or qos not in (0, 1, 2):
            raise invalid("topic is a text and qos is 0, 1 or 2")
        text, encoded = body.get("payload", ""), body.get("payloadBase64")
        if not isinstance(text, str):
            raise invalid("payload is a text; other bytes go into payloadBase64")
        try:
            payload = base64.b64decode(encoded, validate=True) if encoded else text.encode()
        except (ValueError, TypeError) as error:
            raise invalid(f"payloadBase64: {error}") from error
        try:
            self._site.broker.publish(topic, payload, qos, bool(body.get("retain")))
        except ValueError as error:
            raise invalid(str(error)) from error
        return web.Response(status=204)

    # The registry.

    async def _registry_fault(self, request: web.Request) -> web.Response:
        """corrupt `{"digest"}`, truncate `{"digest", "at"}`, fail `{"count", "status"}`,
        drop `{"after"}`, heal `{"digest"?}`.
        """
        registry, fault = self._site.registry, request.match_info["fault"]
        body: dict[str, Any] = await object_body(request) if request.can_read_body else {}
        try:
            if fault == "corrupt":
                registry.corrupt(str(body["digest"]))
            elif fault == "truncate":
                registry.truncate(str(body["digest"]), int(body["at"]))
            elif fault == "fail":
                registry.fail_next(int(body["count"]), int(body.get("status", 503)))
            elif fault == "drop":
                registry.drop_after(None if body.get("after") is None else int(body["after"]))
            elif fault == "heal":
                registry.heal(body.get("digest"))
            else:
                raise invalid("a registry can corrupt, truncate, fail, drop and heal")
        except KeyError as error:
            raise invalid(f"{fault}: {error} is missing") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise invalid(f"{fault}: {error}") from error
        return web.Response(status=204)
