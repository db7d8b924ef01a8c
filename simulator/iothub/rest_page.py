"""The hub's web page for people, and the calls behind it: overview and faults."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Awaitable, Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from aiohttp import web

from .devices import ClientId, Identity
from .errors import invalid
from .faults import Faults
from .hub import Hub
from .rest_requests import object_body

_FOLDER = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/page/hub.css": ("hub.css", "text/css"),
    "/page/hub.js": ("hub.js", "text/javascript"),
    "/page/twins.js": ("twins.js", "text/javascript"),
}
# The page needs nothing from elsewhere, so nothing from elsewhere may get at its token.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


@dataclasses.dataclass(frozen=True, slots=True)
class PageAccess:
    """The page's token, and the switches of the hub that are not faults of single events.

    `prefix` is the path under which the application is mounted.
    """

    token: str
    paused: Callable[[], bool]
    pause: Callable[[], Awaitable[None]]
    resume: Callable[[], Awaitable[None]]
    drop_connections: Callable[[], None]
    prefix: str = ""


def add_routes(application: web.Application, hub: Hub, access: PageAccess) -> None:
    for path in FILES:
        application.router.add_get(path, _file)
    routes = _Page(hub, access)
    add = application.router
    add.add_get("/sim/overview", routes.overview)
    add.add_get("/sim/faults", routes.get_faults)
    add.add_patch("/sim/faults", routes.patch_faults)
    add.add_post("/sim/connections/{action}", routes.connections)


def set_faults(faults: Faults, change: dict[str, Any]) -> None:
    """All or nothing. Raises HubError 400."""
    trial = dataclasses.replace(faults)
    try:
        for name, value in change.items():
            trial.set(name, value)
    except ValueError as error:
        raise invalid(str(error)) from error
    for name in change:
        setattr(faults, name, getattr(trial, name))


@lru_cache(maxsize=1)
def fault_descriptions() -> dict[str, str]:
    """What each fault does, from the documentation of its field."""
    try:
        source = inspect.getsource(Faults)
    except OSError:  # installed without sources
        return {}
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for one, after in pairwise(body.body):
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            text = ast.literal_eval(after.value) if isinstance(after, ast.Expr) else ""
            found[one.target.id] = " ".join(str(text).split())
    return found


async def _file(request: web.Request) -> web.Response:
    resource = request.match_info.route.resource
    assert resource is not None
    path = next(path for path in reversed(FILES) if resource.canonical.endswith(path))
    name, kind = FILES[path]
    text = (_FOLDER / name).read_text(encoding="utf-8")
    return web.Response(text=text, content_type=kind, headers=_HEADERS)


class _Page:
    def __init__(self, hub: Hub, access: PageAccess) -> None:
        self._hub = hub
        self._access = access

    async def overview(self, request: web.Request) -> web.Response:
        """Everything at a glance, for a page that asks again every second."""
        registry = self._hub.state.registry
        devices = [identity for identity in registry if not identity.client.module]
        rollout = self._hub.rollout
        return web.json_response(
            {
                "hostName": self._hub.host_name,
                "paused": self._access.paused(),
                "devices": [self._device(identity) for identity in devices],
                "configurations": [rollout.view(one) for one in rollout],
                "faults": self._hub.faults.as_json(),
                "faultDescriptions": fault_descriptions(),
            }
        )

    def _device(self, identity: Identity) -> dict[str, Any]:
        client = identity.client
        agent = self._hub.state.twins.get(ClientId(client.device, "$edgeAgent"))
        reported = agent.reported.value if agent else {}
        running = reported.get("modules")
        if not isinstance(running, dict):
            running = {}
        system = reported.get("systemModules")
        if isinstance(system, dict):
            running = {**running, **{f"${name}": one for name, one in system.items()}}
        return {
            "deviceId": client.device,
            "connected": self._hub.connected(client),
            "enabled": identity.enabled,
            "edge": identity.edge,
            "tags": self._hub.twin(client).tags,
            "deployment": reported.get("lastDesiredStatus"),
            "modules": [
                {
                    "moduleId": one.client.module,
                    "connected": self._hub.connected(one.client),
                    "runtimeStatus": _runtime_status(running.get(one.client.module)),
                }
                for one in self._hub.state.registry.modules(client.device)
            ],
        }

    async def get_faults(self, request: web.Request) -> web.Response:
        return web.json_response(self._hub.faults.as_json())

    async def patch_faults(self, request: web.Request) -> web.Response:
        set_faults(self._hub.faults, await object_body(request))
        return web.json_response(self._hub.faults.as_json())

    async def connections(self, request: web.Request) -> web.Response:
        action = request.match_info["action"]
        if action == "drop":
            self._access.drop_connections()
        elif action == "pause":
            await self._access.pause()
        elif action == "resume":
            await self._access.resume()
        else:
            raise invalid(f"connections can drop, pause and resume, not {action!r}")
        return web.json_response({"paused": self._access.paused()})


def _runtime_status(module: Any) -> Any:
    return module.get("runtimeStatus") if isinstance(module, dict) else None
