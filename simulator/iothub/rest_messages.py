"""Messages to devices and their uploads, from the service side.

Azure sends cloud-to-device messages over AMQP only; these calls are ours, except the purge
(`DELETE /devices/{id}/commands`).
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from aiohttp import web

from .c2d import DEFAULT_SECONDS, LONGEST_SECONDS
from .devices import ClientId
from .errors import invalid
from .hub import Hub
from .json_text import parse_json
from .rest_requests import number_of


def add_routes(application: web.Application, hub: Hub) -> None:
    routes = _Messages(hub)
    add = application.router
    for base in ("/devices/{device}", "/devices/{device}/modules/{module}"):
        add.add_post(base + "/messages/devicebound", routes.send)
        add.add_get(base + "/messages/devicebound", routes.list)
        add.add_delete(base + "/commands", routes.purge)
    add.add_post("/devices/{device}/modules/{module}/inputs/{input}", routes.send)
    add.add_get("/messages/feedback", routes.feedback)
    add.add_get("/uploads/notifications", routes.uploads)


class _Messages:
    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def send(self, request: web.Request) -> web.Response:
        """Body: `body` (any JSON; a string is sent as it is) or `bodyBase64`, `properties`,
        `systemProperties`, `ack`, `seconds`. Answers 201 with `messageId`.
        """
        call = parse_json(await request.read())
        if not isinstance(call, dict):
            raise invalid("the body must be a JSON object")
        seconds = call.get("seconds", DEFAULT_SECONDS)
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise invalid(f"seconds is a number up to {LONGEST_SECONDS:g}")
        message = self._hub.c2d.send(
            _client(request),
            _body(call),
            properties=_texts(call, "properties"),
            system=_texts(call, "systemProperties"),
            ack=str(call.get("ack", "none")),
            seconds=float(seconds),
            input=request.match_info.get("input", ""),
        )
        identifier = message.system.get("messageId", message.id)
        return web.json_response({"messageId": identifier}, status=201)

    async def list(self, request: web.Request) -> web.Response:
        """What is not settled."""
        client = _client(request)
        self._hub.state.registry.get(client)
        return web.json_response([one.as_json() for one in self._hub.c2d.queued(client)])

    async def purge(self, request: web.Request) -> web.Response:
        client = _client(request)
        self._hub.state.registry.get(client)
        return web.json_response(
            {
                "deviceId": client.device,
                "moduleId": client.module or None,
                "totalMessagesPurged": self._hub.c2d.purge(client),
            }
        )

    async def feedback(self, request: web.Request) -> web.Response:
        """`?after=<sequenceNumber>`, oldest first."""
        return web.json_response(self._hub.c2d.feedback(_after(request)))

    async def uploads(self, request: web.Request) -> web.Response:
        """`?after=<sequenceNumber>`, oldest first."""
        after = _after(request)
        found = self._hub.uploads.notifications
        return web.json_response([n for n in found if n["sequenceNumber"] > after])


def _client(request: web.Request) -> ClientId:
    device, module = request.match_info["device"], request.match_info.get("module")
    return ClientId.parse(device if module is None else f"{device}/{module}")


def _after(request: web.Request) -> int:
    return number_of(request.query.get("after", "0"), "after")


def _body(call: dict[str, Any]) -> bytes:
    if "bodyBase64" in call:
        try:
            return base64.b64decode(call["bodyBase64"], validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise invalid("bodyBase64 is not base64") from error
    body = call.get("body", "")
    return (body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)).encode()


def _texts(call: dict[str, Any], name: str) -> dict[str, str]:
    value = call.get(name) or {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise invalid(f"{name} is an object of strings")
    return value
